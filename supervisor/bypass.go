package supervisor

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/bits"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"hibergate/activation"
	"hibergate/supervisor/activity"
	"hibergate/supervisor/gate"
	"hibergate/supervisor/gate/forward"
	"hibergate/supervisor/gate/lookup"
)

// A bypass is a way in which the kernel leads the clients of one gate to its destination, past us. Its methods run outside the loop, one at
// a time, but for account and flows.
type bypass interface {
	// begin leads new clients to a destination.
	begin(to netip.AddrPort) error
	// end has new clients come to our sockets. When it returns, account knows of all who did not.
	end() error
	// account adds to the sums of the sockets who was led past them. last: the destination is to be stopped if nobody is there.
	account(ctx context.Context, sums []activity.Summary, last bool)
	// sever ends what is left of the connections with a destination that was stopped.
	sever(ctx context.Context) error
	// flows lists the connections of a socket, and says why they are not all.
	flows(ctx context.Context, socket int) ([]activity.Flow, string)
	// String says which way it is.
	String() string
}

// tables are what the kernel is told for all gates together. They are made when the first gate needs them: with the one of nftables
// all connections of the machine are tracked from then on.
type tables struct {
	name string // of the nftables table
	log  *slog.Logger

	mu         sync.Mutex // guards what follows
	closed     bool
	lookup     *lookup.Table
	lookupErr  error // why there is none; nil: it was not tried
	forward    *forward.Table
	forwardErr error
}

// sockets returns the table by which connections are handed to sockets of this machine.
func (t *tables) sockets() (*lookup.Table, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.lookup == nil && t.lookupErr == nil && !t.closed {
		t.lookup, t.lookupErr = lookup.Open()
	}
	return t.lookup, t.lookupErr
}

// addresses returns the table by which addresses are translated, and connections counted.
func (t *tables) addresses() (*forward.Table, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.forward == nil && t.forwardErr == nil && !t.closed {
		if t.forward, t.forwardErr = forward.Open(t.name); t.forwardErr != nil {
			t.log.Warn("connections are neither forwarded by nftables, nor seen past the gates", slog.Any("err", t.forwardErr))
		}
	}
	return t.forward, t.forwardErr
}

func (t *tables) close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed = true
	var errs []error
	if t.lookup != nil {
		errs = append(errs, t.lookup.Close())
	}
	if t.forward != nil {
		errs = append(errs, t.forward.Close())
	}
	return errors.Join(errs...)
}

// handover gives new connections to the listening socket of a destination on this machine.
type handover struct {
	tables *tables
	looker Looker
	all    []*activation.Socket
	keys   []uint32
}

func (h *handover) String() string { return "kernel (sk_lookup)" }

func (h *handover) begin(to netip.AddrPort) error {
	if !lookup.Local(to) {
		return fmt.Errorf("%v is no address of this machine", to.Addr())
	}
	table, err := h.tables.sockets()
	if err != nil {
		return err
	}
	for i, sock := range h.all {
		o := sock.Spec().Options
		if err := table.Add(h.keys[i], sock.Address(), o.Family, o.Device, to); err != nil {
			return errors.Join(err, h.end())
		}
	}
	return nil
}

func (h *handover) end() error {
	table, err := h.tables.sockets()
	if err != nil {
		return nil //nolint:nilerr // then nothing was begun
	}
	var failed error
	for _, key := range h.keys {
		failed = errors.Join(failed, table.Remove(key))
	}
	return failed
}

// account is that of sock_diag: what was handed over has the port of our sockets, as what was accepted there.
func (h *handover) account(ctx context.Context, sums []activity.Summary, _ bool) {
	table, err := h.tables.sockets()
	for i, seen := range h.looker.Look(ctx, time.Now(), h.keys) {
		sum := &sums[i]
		switch {
		case !sum.Known:
		case !seen.Known:
			*sum = seen
		case err != nil:
			*sum = activity.Summary{Why: err.Error()}
		default:
			sum.Exact = false
			sum.Open, sum.Queued = max(sum.Open, seen.Open), max(sum.Queued, seen.Queued)
			sum.Peers ^= seen.Peers ^ spread(table.Begun(h.keys[i]))
			if seen.LastPayload.After(sum.LastPayload) {
				sum.LastPayload = seen.LastPayload
			}
		}
	}
}

func (h *handover) sever(context.Context) error { return nil } // they ended with the destination

func (h *handover) flows(ctx context.Context, socket int) ([]activity.Flow, string) {
	return h.looker.Flows(ctx, h.keys[socket], nil)
}

// translation has nftables translate the destination address of new connections.
type translation struct {
	tables  *tables
	all     []*activation.Socket
	keys    []uint32
	traffic bool                           // idle.when = "no-traffic"
	begun   []atomic.Uint64                // connections by the rules that there were before, by socket
	to      atomic.Pointer[netip.AddrPort] // the last destination; nil: none yet
}

func (n *translation) String() string { return "kernel (nftables)" }

func (n *translation) begin(to netip.AddrPort) error {
	for _, sock := range n.all {
		spec := *sock.Spec()
		spec.Address = sock.Address()
		if err := forward.Check(spec, activation.Address{Network: activation.TCP, IP: to.Addr(), Port: to.Port()}); err != nil {
			return err
		}
	}
	if err := forward.CheckMachine(to); err != nil {
		return err
	}
	table, err := n.tables.addresses()
	if err != nil {
		return err
	}
	n.to.Store(&to)
	for i, sock := range n.all {
		o := sock.Spec().Options
		if err := table.Add(n.keys[i], sock.Address(), o.Family, o.Device, to); err != nil {
			return errors.Join(err, n.end())
		}
	}
	return nil
}

func (n *translation) end() error {
	to := n.to.Load()
	if to == nil {
		return nil
	}
	table, err := n.tables.addresses()
	if err != nil {
		return err
	}
	var failed error
	for i, key := range n.keys {
		account, err := table.Flows(context.Background(), n.all[i].Address(), *to)
		n.begun[i].Add(account.Begun)
		failed = errors.Join(failed, err, table.Remove(key))
	}
	return failed
}

func (n *translation) account(ctx context.Context, sums []activity.Summary, last bool) {
	to := n.to.Load()
	if to == nil {
		return
	}
	table, err := n.tables.addresses()
	for i, sock := range n.all {
		sum := &sums[i]
		if !sum.Known {
			continue
		}
		var a forward.Account
		switch {
		case err != nil:
		case last:
			a, err = table.Drain(ctx, sock.Address(), *to)
		default:
			a, err = table.Flows(ctx, sock.Address(), *to)
		}
		if err != nil {
			*sum = activity.Summary{Why: err.Error()}
			continue
		}
		sum.Open += a.Open
		a.Begun += n.begun[i].Load()
		tracked(sum, &a, n.traffic)
		for of, more := range map[*activity.Counters]activity.Counters{&sum.In: a.In, &sum.Out: a.Out} {
			of.Packets += more.Packets
			of.Bytes += more.Bytes
		}
	}
}

func (n *translation) sever(ctx context.Context) error {
	to := n.to.Load()
	if to == nil {
		return nil
	}
	table, err := n.tables.addresses()
	for i := 0; err == nil && i < len(n.all); i++ {
		err = table.Sever(ctx, n.all[i].Address(), *to)
	}
	return err
}

func (n *translation) flows(ctx context.Context, socket int) ([]activity.Flow, string) {
	to := n.to.Load()
	if to == nil {
		return nil, ""
	}
	table, err := n.tables.addresses()
	if err == nil {
		var a forward.Account
		if a, err = table.Flows(ctx, n.all[socket].Address(), *to); err == nil {
			return a.List, ""
		}
	}
	return nil, err.Error()
}

// tracked adds what connection tracking tells, which is only known from one look to the next. Where it is the traffic that counts, a packet
// without payload counts as well: the kernel does not tell them apart.
func tracked(sum *activity.Summary, a *forward.Account, traffic bool) {
	sum.Exact = false
	changes := a.Begun
	if traffic {
		changes += a.Moved
		sum.PayloadUnseen = sum.PayloadUnseen || a.Open > 0 && !a.Counted
	}
	// Turned, as the account of the sockets and that of the destination may be the same, and would cancel out.
	sum.Peers = bits.RotateLeft64(sum.Peers, 1) ^ a.Peers ^ spread(changes)
}

// spread makes a number that changes all bits when it grows, to be part of a hash.
func spread(n uint64) uint64 { return n * 0x9e3779b97f4a7c15 }

// bypasses are the ways in which the kernel may lead past one gate, the best first. None: it is not to.
func (s *Supervisor) bypasses(spec *Service, all ports) []bypass {
	if spec.Gate.Forward != gate.Kernel {
		return nil
	}
	sockets, keys := all.sockets(), all.keys()
	return []bypass{
		&handover{tables: s.tables, looker: s.looker, all: sockets, keys: keys},
		&translation{
			tables: s.tables, all: sockets, keys: keys, traffic: spec.Idle.When == activity.NoTraffic,
			begun: make([]atomic.Uint64, len(all)),
		},
	}
}

// watchDestinations adds to the first sum who is with the destinations, by whatever way.
func (t *tables) watchDestinations(ctx context.Context, all []netip.AddrPort, sums []activity.Summary, traffic bool) {
	table, err := t.addresses()
	sum := &sums[0]
	for _, to := range slices.Compact(all) {
		var a forward.Account
		if err == nil {
			a, err = table.Destination(ctx, to)
		}
		if err != nil {
			*sum = activity.Summary{Why: err.Error()}
			return
		}
		sum.Open = max(sum.Open, a.Open) // the gate's own connections are among them
		tracked(sum, &a, traffic)
	}
}
