package forward

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"

	"golang.org/x/sys/unix"

	"hibergate/activation"
	"hibergate/supervisor/activity"
	"hibergate/supervisor/activity/conntrack"
)

// maxList bounds Account.List: it is for people to read.
const maxList = 1000

// Account is what connection tracking knows about connections.
type Account struct {
	Open  int    // connections that may still carry data, see Table.Flows
	Begun uint64 // that have taken the rule since Table.Add; 0 where there is none
	// Peers is a hash over the identities of the open connections: it changes when they do.
	Peers uint64
	// Moved is how many packets the open connections have carried, either way: it changes whenever one of them carries one. Where it is
	// not Counted it does not.
	Moved uint64
	// In and Out are what has gone through all connections that are still known, open or not: they can become less. Counted
	// says that they are real (nf_conntrack_acct was on when each of the connections began).
	In, Out activity.Counters
	Counted bool
	List    []activity.Flow // the open ones, at most 1,000
}

// Flows returns the account of the connections to a listening address that were sent to a destination, whether the rule is still there or not.
//
// All are open but those that both ends have closed and confirmed (TIME_WAIT) or one has reset (CLOSE). A connection of which one end has said that it
// will send no more (FIN_WAIT, CLOSE_WAIT) still carries what the other one sends, and in LAST_ACK the last of it
// may have to be sent again.
func (t *Table) Flows(ctx context.Context, listen activation.Address, to netip.AddrPort) (Account, error) {
	w := wanted{listen: listen, to: unmapped(to)}
	a, _, err := t.flows.read(ctx, w, nil)
	if err != nil {
		return Account{}, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, r := range t.rules {
		if r.to != w.to || r.port != listen.Port || r.ip != bare(listen.IP) {
			continue
		}
		n, err := t.begun(&r)
		if err != nil {
			return Account{}, err
		}
		a.Begun += n
	}
	return a, nil
}

// Destination returns the account of all connections with a destination that this machine knows of, by whatever way.
func (t *Table) Destination(ctx context.Context, to netip.AddrPort) (Account, error) {
	a, _, err := t.flows.read(ctx, wanted{all: true, to: unmapped(to)}, nil)
	return a, err
}

// Drain is for the end of a destination, after [Table.Remove]: where it says that nothing is open, nothing is left that leads
// there, and the destination may stop. Else it is to be called again later, when Flows says so. Whether a client may take up the port of
// a connection that has ended without being sent where that was, is what it sees to: it deletes the
// ended ones from the table of the kernel. A client that does it in these 20 ms or so gets through with its next attempt, a second later.
func (t *Table) Drain(ctx context.Context, listen activation.Address, to netip.AddrPort) (Account, error) {
	w := wanted{listen: listen, to: unmapped(to)}
	a, err := t.drain(ctx, w)
	if err != nil {
		return Account{}, fmt.Errorf("end forwarding of %v to %v: %w", listen, to, err)
	}
	return a, nil
}

func (t *Table) drain(ctx context.Context, w wanted) (a Account, err error) {
	t.mu.Lock()
	for _, r := range t.rules {
		if r.to == w.to && r.port == w.listen.Port && r.ip == bare(w.listen.IP) {
			err = errors.New("there is still a rule")
		}
	}
	t.mu.Unlock()
	if err != nil {
		return a, err
	}
	// Most of the time something is open, which costs nobody anything.
	if a, _, err = t.flows.read(ctx, w, nil); err != nil || a.Open > 0 {
		return a, err
	}
	if err = t.holdUp(w.listen.Port); err != nil {
		return a, err
	}
	defer func() { err = errors.Join(err, t.letGo(w.listen.Port)) }()
	activation.WaitForPackets()
	for {
		var ended []conntrack.Flow
		a, ended, err = t.flows.read(ctx, w, func(f *conntrack.Flow) bool { return !isOpen(f) })
		if err == nil {
			err = t.flows.delete(ctx, ended)
		}
		if err != nil || len(ended) < atOnce {
			return a, err
		}
	}
}

// atOnce bounds how many flows are deleted after one reading.
const atOnce = 10000

// holdUp drops the first packets of connections to a port that the kernel takes for those of old ones.
func (t *Table) holdUp(port uint16) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.drains == 0 {
		if err := lost(t.addDrain()); err != nil {
			return err
		}
	}
	t.drains++
	if t.draining[port] == 0 {
		if err := lost(t.nft.Transact(t.element(unix.NFT_MSG_NEWSETELEM, drainingSet, portAlone(port), nil))); err != nil {
			t.drains--
			return err
		}
	}
	t.draining[port]++
	return nil
}

// letGo is the inverse of holdUp.
func (t *Table) letGo(port uint16) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	var err error
	if t.draining[port]--; t.draining[port] == 0 {
		delete(t.draining, port)
		err = lost(t.nft.Transact(t.element(unix.NFT_MSG_DELSETELEM, drainingSet, portAlone(port), nil)))
	}
	if t.drains--; t.drains == 0 {
		err = errors.Join(err, lost(t.removeDrain()))
	}
	return err
}

// Sever ends what is left of the connections to a listening address that were sent to a destination, for one that has stopped without
// waiting for them or has died. It is called after [Table.Remove]. Their clients are reset when they send something, and can connect anew.
func (t *Table) Sever(ctx context.Context, listen activation.Address, to netip.AddrPort) error {
	w := wanted{listen: listen, to: unmapped(to)}
	for {
		_, left, err := t.flows.read(ctx, w, func(*conntrack.Flow) bool { return true })
		if err == nil {
			err = t.flows.delete(ctx, left)
		}
		if err != nil {
			return fmt.Errorf("end connections of %v with %v: %w", listen, to, err)
		}
		if len(left) < atOnce {
			return nil
		}
	}
}

func isOpen(f *conntrack.Flow) bool {
	return f.TCPState != conntrack.TimeWait && f.TCPState != conntrack.Closed
}

// wanted says which flows are meant.
type wanted struct {
	all    bool // whatever the client asked for
	listen activation.Address
	to     netip.AddrPort
}

// has says whether a flow that comes from the destination is meant.
func (w *wanted) has(f *conntrack.Flow) bool {
	if w.all {
		return true
	}
	asked := f.Original.Destination
	ip := bare(w.listen.IP)
	return f.Status&conntrack.DestinationNAT != 0 && asked.Port() == w.listen.Port && (ip == netip.Addr{} || ip == asked.Addr())
}

func unmapped(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }

// flows is the table of connection tracking.
type flows struct {
	mu   sync.Mutex // a dump takes 11 ms and more
	conn *conntrack.Conn
}

func (s *flows) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.conn.Close()
}

// read returns the account of what is wanted, and at most atOnce of the flows that keep chooses; none where it is nil.
func (s *flows) read(ctx context.Context, w wanted, keep func(*conntrack.Flow) bool) (a Account, kept []conntrack.Flow, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return a, nil, err
	}
	begin := func() { a, kept = Account{Counted: true}, nil }
	err = s.conn.DumpFrom(unix.IPPROTO_TCP, w.to, begin, func(f *conntrack.Flow) {
		if !w.has(f) {
			return
		}
		a.add(f)
		if keep != nil && len(kept) < atOnce && keep(f) {
			kept = append(kept, *f)
		}
	})
	return a, kept, err
}

// delete deletes flows; some may have gone already.
func (s *flows) delete(ctx context.Context, flows []conntrack.Flow) error {
	for i := range flows {
		if err := ctx.Err(); err != nil {
			return err
		}
		s.mu.Lock()
		_, err := s.conn.Delete(&flows[i])
		s.mu.Unlock()
		if err != nil {
			return err
		}
	}
	return nil
}

// add adds a flow to the account.
func (a *Account) add(f *conntrack.Flow) {
	a.In.Packets += f.OriginalCounters.Packets
	a.In.Bytes += f.OriginalCounters.Bytes
	a.Out.Packets += f.ReplyCounters.Packets
	a.Out.Bytes += f.ReplyCounters.Bytes
	a.Counted = a.Counted && f.Counted
	if !isOpen(f) {
		return
	}
	a.Open++
	a.Peers ^= identity(f)
	a.Moved += f.OriginalCounters.Packets + f.ReplyCounters.Packets
	if len(a.List) < maxList {
		a.List = append(a.List, activity.Flow{
			Protocol: "tcp", Peer: f.Original.Source, Original: f.Original.Destination, Local: f.Reply.Source, State: f.TCPState.String(),
			In: activity.Counters(f.OriginalCounters), Out: activity.Counters(f.ReplyCounters), Counted: f.Counted,
		})
	}
}

// identity spreads what tells a flow from all others over 64 bits, so that the XOR of several says which they are.
func identity(f *conntrack.Flow) uint64 {
	x := uint64(f.ID)<<16 | uint64(f.Original.Source.Port())
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}
