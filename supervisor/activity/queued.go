package activity

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"

	"golang.org/x/sys/unix"

	"hibergate/activation"
	"hibergate/supervisor/activity/sockdiag"
)

// Queued returns the identities of what waits on the sockets with these keys and
// nobody has taken, in no order: of each connection, of the first datagram, of the content
// of a FIFO. Two calls tell what was taken between them. It takes nothing itself.
func (t *Tracker) Queued(ctx context.Context, keys []uint32) (ids []uint64, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, key := range keys {
		w := t.sockets[key]
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		var more []uint64
		switch w.Address.Network {
		case activation.TCP:
			more, err = t.queuedTCP(w)
		case activation.Unix, activation.Unixpacket:
			more, err = t.queuedUnix(w)
		case activation.UDP, activation.Unixgram:
			more, err = w.queuedDatagram()
		case activation.FIFO:
			more, err = w.queuedBytes()
		}
		if err != nil {
			return nil, fmt.Errorf("read queue of %s: %w", w.Address, err)
		}
		ids = append(ids, more...)
	}
	return ids, nil
}

func (t *Tracker) queuedTCP(w *watched) (ids []uint64, err error) {
	q := sockdiag.Query{
		Family: w.domain, Protocol: w.protocol, Ports: []uint16{w.port},
		States: []sockdiag.State{sockdiag.Established, sockdiag.CloseWait},
	}
	err = t.sockdiag.Inet(q, func() { ids = nil }, func(row *sockdiag.Inet) {
		if owns, _ := w.owns(row.Local); owns && row.Inode == 0 {
			ids = append(ids, row.Cookie)
		}
	})
	return ids, err
}

func (t *Tracker) queuedUnix(w *watched) (ids []uint64, err error) {
	if err := w.identify(); err != nil {
		return nil, err
	}
	err = t.sockdiag.Unix(func() { ids = nil }, func(row *sockdiag.Unix) {
		if row.Inode != w.inode {
			return
		}
		for b := row.Pending; len(b) >= 4; b = b[4:] {
			ids = append(ids, uint64(binary.NativeEndian.Uint32(b)))
		}
	})
	return ids, err
}

// queuedDatagram looks at the head of the queue without taking it. A client that
// sends the same again and again looks as if nothing was taken.
func (w *watched) queuedDatagram() ([]uint64, error) {
	var b [512]byte
	n, from, err := unix.Recvfrom(w.FD, b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT|unix.MSG_TRUNC)
	if errors.Is(err, unix.EAGAIN) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	h := fnv.New64a()
	fmt.Fprintf(h, "%d %+v ", n, from)
	h.Write(b[:min(n, len(b))])
	return []uint64{h.Sum64()}, nil
}

func (w *watched) queuedBytes() ([]uint64, error) {
	n, err := unix.IoctlGetInt(w.FD, unix.TIOCINQ) // FIONREAD
	if n == 0 || err != nil {
		return nil, err
	}
	return []uint64{uint64(n)}, nil
}
