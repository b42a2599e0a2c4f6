package activity

import (
	"context"
	"fmt"
	"net/netip"

	"hibergate/activation"
	"hibergate/supervisor/activity/sockdiag"
)

// Client is a TCP client in an accept queue.
type Client struct {
	Remote netip.AddrPort // IPv4 as such, also on a dual-stack socket
	Bytes  int            // it has sent; nobody has read them
	Left   bool           // it has closed its side
	ID     uint64         // as Tracker.Queued tells it
}

// Waiting returns the clients in the accept queue of a TCP socket. The kernel does not tell their order. One that
// has reset its connection is in the queue, but not in this list. For other kinds of
// socket it returns an error.
func (t *Tracker) Waiting(ctx context.Context, key uint32) ([]Client, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	w, err := t.find(ctx, key)
	if err != nil {
		return nil, err
	}
	if w.Address.Network != activation.TCP {
		return nil, fmt.Errorf("list clients that wait on %s: only those of TCP are known", w.Address)
	}
	var clients []Client
	err = t.eachQueued(w, func() { clients = clients[:0] }, func(row *sockdiag.Inet) {
		c := Client{Remote: row.Peer, Bytes: int(row.ReceiveQ), Left: row.State == sockdiag.CloseWait, ID: row.Cookie}
		if c.Left {
			c.Bytes = max(c.Bytes-1, 0) // the FIN counts as a byte
		}
		clients = append(clients, c)
	})
	if err != nil {
		return nil, fmt.Errorf("list clients that wait on %s: %w", w.Address, err)
	}
	return clients, nil
}

// Handshakes returns the identities of the handshakes of TCP clients that are under way at the address of a
// socket. Those of clients who were given a SYN cookie cannot be seen. Other kinds of socket have none.
func (t *Tracker) Handshakes(ctx context.Context, key uint32) (ids []uint64, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	w, err := t.find(ctx, key)
	if err != nil || w.Address.Network != activation.TCP {
		return nil, err
	}
	err = t.eachConnection(w, []sockdiag.State{sockdiag.SynReceived}, func() { ids = nil }, func(row *sockdiag.Inet) {
		if !row.Timed { // else it is TCP Fast Open, and queued
			ids = append(ids, row.Cookie)
		}
	})
	if err != nil {
		return nil, fmt.Errorf("list handshakes of %s: %w", w.Address, err)
	}
	return ids, nil
}
