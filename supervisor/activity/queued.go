package activity

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"time"
	"unsafe"

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
		w, err := t.find(ctx, key)
		if err != nil {
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

// find returns a socket of which something is asked.
func (t *Tracker) find(ctx context.Context, key uint32) (*watched, error) {
	w := t.sockets[key]
	switch {
	case t.closed:
		return nil, errors.New(closedTracker)
	case w == nil:
		return nil, errors.New(notWatched)
	}
	return w, ctx.Err()
}

func (t *Tracker) queuedTCP(w *watched) (ids []uint64, err error) {
	err = t.eachQueued(w, func() { ids = nil }, func(row *sockdiag.Inet) { ids = append(ids, row.Cookie) })
	return ids, err
}

// eachQueued calls each for every connection in the accept queue of a TCP socket; begin and each as
// for sockdiag.Conn.Inet.
func (t *Tracker) eachQueued(w *watched, begin func(), each func(*sockdiag.Inet)) error {
	states := []sockdiag.State{sockdiag.Established, sockdiag.CloseWait, sockdiag.SynReceived}
	return t.eachConnection(w, states, begin, func(row *sockdiag.Inet) {
		// A handshake is not queued yet, unless it is TCP Fast Open: then there is a socket with timers.
		if row.Inode == 0 && (row.State != sockdiag.SynReceived || row.Timed) {
			each(row)
		}
	})
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

// queuedDatagram looks at the head of the queue without taking it. The time at which a datagram came is
// part of its identity, so that a client may send the same again and again. Some have no time: Unix
// datagrams, and those of UDP that came before the first call for this socket. Segments of one send (UDP_SEGMENT)
// share theirs. Where such ones are equal, it looks as if nothing had been taken. (To have times from the start would
// cost: a socket that wants them makes the kernel note them for every packet of the machine, 2 % of the CPU per datagram.)
func (w *watched) queuedDatagram() ([]uint64, error) {
	var b, control [512]byte
	if w.Address.Network == activation.UDP {
		stamp(w.FD) // from now on peeking takes the time along
	}
	asked := time.Now().UnixNano()
	n, controls, _, from, err := unix.Recvmsg(w.FD, b[:], control[:], unix.MSG_PEEK|unix.MSG_DONTWAIT|unix.MSG_TRUNC)
	if errors.Is(err, unix.EAGAIN) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var came int64
	if w.Address.Network == activation.UDP {
		if came = stamp(w.FD); came >= asked {
			came = 0 // it has none
		}
	}
	h := fnv.New64a()
	fmt.Fprintf(h, "%d %+v %d ", n, from, came)
	h.Write(b[:min(n, len(b))])
	h.Write(control[:controls]) // the time, where the program wants it there (SO_TIMESTAMP)
	return []uint64{h.Sum64()}, nil
}

// stamp returns the time, in nanoseconds of the wall clock, at which the datagram came that was read or peeked
// at last (SIOCGSTAMPNS, socket(7)); where it has none, the time of this call. It makes the kernel note the times
// of all that come from about now on, for as long as the socket lives. Programs that read the socket see nothing of it.
func stamp(fd int) int64 {
	var t unix.Timespec
	// It fails before the first datagram, and leaves zero.
	_, _, _ = unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCGSTAMPNS, uintptr(unsafe.Pointer(&t)))
	return t.Nano()
}

func (w *watched) queuedBytes() ([]uint64, error) {
	n, err := unix.IoctlGetInt(w.FD, unix.TIOCINQ) // FIONREAD
	if n == 0 || err != nil {
		return nil, err
	}
	return []uint64{uint64(n)}, nil
}
