package activity

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation"
	"hibergate/supervisor/activity/conntrack"
	"hibergate/supervisor/activity/ledger"
	"hibergate/supervisor/activity/sockdiag"
)

// Socket is a socket to be watched. Key is the caller's own name for it.
type Socket struct {
	Key        uint32
	Address    activation.Address // as bound, with the port the kernel chose
	FD         int                // borrowed; open for as long as the socket is watched
	Accounting Accounting
	// Ignore are sources whose connections do not matter (health checkers): they count neither in Open,
	// Queued and Peers of a Summary nor for its Last and LastPayload, but in its In and Out, and Flows, Queued and
	// Waiting of the Tracker show them. TCP only. A client of IPv4 compares as such also on a dual-stack socket.
	Ignore []netip.Prefix
	// Denied are sources that the socket does not let in ([activation.Access.Denied]): what they send is no activity. It
	// is seen by the ledger, which looks before the socket does.
	Denied []activation.Range
	// HandedOver says that the kernel leads connections to the socket past it, to those of other programs (a BPF program of type
	// sk_lookup). These may be of the other IP version than the socket, so both lists are asked. TCP only.
	HandedOver bool
}

// Options of a Tracker.
type Options struct {
	Logger *slog.Logger // never nil
	// Table is the name of the nftables table; it must be the same for each run of
	// one supervisor and differ between supervisors.
	Table string
}

// retryAfter is how long a ledger that could not be made is left alone.
const retryAfter = 10 * time.Second

// Tracker asks the witnesses. It is safe for concurrent use.
type Tracker struct {
	log   *slog.Logger
	table string

	// One look at a time: the sockets to the kernel are shared, and a look is too
	// short for more. Everything below is guarded by mu.
	mu        sync.Mutex
	sockets   map[uint32]*watched
	closed    bool
	ledger    *ledger.Ledger // nil: there is none
	tried     time.Time      // when it was last attempted to make the ledger
	sockdiag  *sockdiag.Conn
	conntrack *conntrack.Conn
	sysctl    activation.Switch
	missing   [witnesses]string // what is not to be had, by witness; empty: all is well
	warned    [witnesses]bool   // that it is missing
}

// witness names what can be missing.
type witness uint8

const (
	nftablesWitness witness = iota
	conntrackWitness
	countersWitness
	ignoredWitness // of the ledger
	sockdiagWitness
	witnesses
)

const (
	closedTracker = "the tracker is closed"
	notWatched    = "the socket is not watched"
)

// New opens what the kernel permits and starts to account for the sockets, in one
// go so that thousands cost one transaction. It always succeeds: what is missing is
// said in the Summary of each socket that wants it, and logged once.
func New(opts Options, sockets []Socket) *Tracker {
	t := &Tracker{
		log:       opts.Logger,
		table:     opts.Table,
		sockets:   make(map[uint32]*watched, len(sockets)),
		sockdiag:  sockdiag.New(),
		conntrack: conntrack.New(),
	}
	for _, s := range sockets {
		t.sockets[s.Key] = watch(s)
	}
	if t.wantsLedger() {
		t.openLedger(time.Now())
		t.probeConntrack()
	}
	t.warn()
	return t
}

// Add starts to watch one more socket, as if New had been given it; the accounts of the others
// go on. A socket with the same key that is watched already is replaced. Where it has the
// same address, its account goes on, too.
func (t *Tracker) Add(s Socket) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return
	}
	old, w := t.sockets[s.Key], watch(s)
	t.sockets[s.Key] = w
	if old != nil && old.account == w.account {
		w.counted, w.countedBefore = old.counted, old.countedBefore
	}
	if old != nil && old.accounted() {
		t.settle(old.account)
	}
	if w.accounted() {
		t.settle(w.account)
		t.probeConntrack()
	}
	t.warn()
}

// Remove ends the watch over a socket. It does nothing where there is none. After it the descriptor may be closed.
func (t *Tracker) Remove(key uint32) {
	t.mu.Lock()
	defer t.mu.Unlock()
	w := t.sockets[key]
	if w == nil || t.closed {
		return
	}
	delete(t.sockets, key)
	if w.accounted() {
		t.settle(w.account)
	}
}

// settle makes the ledger keep an account, or keep it no longer, as the sockets want it now.
func (t *Tracker) settle(key ledger.Key) {
	a, wanted := t.accounts(func(k ledger.Key) bool { return k == key })[key]
	var err error
	switch {
	case t.ledger == nil && wanted:
		t.openLedger(time.Now())
	case t.ledger == nil:
	case wanted:
		err = t.ledger.Put(a)
	default:
		err = t.ledger.Remove(key)
	}
	t.noteRefused()
	if err != nil { // a new ledger has the accounts that are wanted
		t.log.Warn("activity begins anew", slog.Any("err", errors.Join(err, t.loseLedger(time.Now()))))
	}
}

// wantsLedger says whether any socket has an account.
func (t *Tracker) wantsLedger() bool {
	for _, w := range t.sockets {
		if w.accounted() {
			return true
		}
	}
	return false
}

// accounts returns those of the accounts that the sockets want.
func (t *Tracker) accounts(those func(ledger.Key) bool) map[ledger.Key]ledger.Account {
	all := make(map[ledger.Key]ledger.Account)
	for _, w := range t.sockets {
		if !w.accounted() || !those(w.account) {
			continue
		}
		a := ledger.Account{Key: w.account, Ignored: w.unheard()}
		if other, shared := all[w.account]; shared && !slices.Equal(other.Ignored, a.Ignored) {
			a.Ignored = nil // what one of them ignores wakes the other
		}
		all[w.account] = a
	}
	return all
}

// warn logs what is missing, once.
func (t *Tracker) warn() {
	for i, what := range t.missing {
		if what != "" && !t.warned[i] {
			t.warned[i] = true
			t.log.Warn("activity is known only in part", slog.String("missing", what))
		}
	}
}

// openLedger makes the ledger where there is none, unless it failed a moment ago. The accounts start
// anew, with "a packet just now"; what was counted before is kept.
func (t *Tracker) openLedger(now time.Time) {
	if t.ledger != nil || now.Sub(t.tried).Abs() < retryAfter {
		return
	}
	all := t.accounts(func(ledger.Key) bool { return true })
	l, err := ledger.Open(t.table, slices.Collect(maps.Values(all)), true)
	if err != nil {
		t.tried = now
		t.missing[nftablesWitness] = explain("nftables", err)
		return
	}
	t.ledger, t.missing[nftablesWitness] = l, ""
	t.noteRefused()
	for _, w := range t.sockets {
		w.countedBefore = w.counted
	}
}

// noteRefused finds out whether the ledger ignores whom it should.
func (t *Tracker) noteRefused() {
	t.missing[ignoredWitness] = ""
	if t.ledger == nil {
		return
	}
	if err := t.ledger.Refused(); err != nil {
		t.missing[ignoredWitness] = fmt.Sprintf("sources without activity: %v", err)
	}
}

// loseLedger gives up a ledger that cannot be read, and makes a new one at once.
func (t *Tracker) loseLedger(now time.Time) error {
	err := t.ledger.Close()
	t.ledger, t.tried = nil, time.Time{}
	t.openLedger(now)
	return err
}

// probeConntrack finds out whether the table of flows may be read, and turns its counters on.
func (t *Tracker) probeConntrack() {
	// There need not be such a flow: the question is whether one may ask.
	nowhere := netip.AddrPortFrom(netip.IPv4Unspecified(), 1)
	var f conntrack.Flow
	if _, err := t.conntrack.Get(unix.IPPROTO_UDP, conntrack.Tuple{Source: nowhere, Destination: nowhere}, &f); err != nil {
		t.missing[conntrackWitness] = explain("conntrack", err)
		return
	}
	t.missing[conntrackWitness], t.missing[countersWitness] = "", ""
	if err := countFlows(&t.sysctl); err != nil {
		t.missing[countersWitness] = fmt.Sprintf("counters of flows: %v", err)
	}
}

// Missing says in words what the kernel does not permit or have; empty where all is there.
func (t *Tracker) Missing() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	var all []string
	for _, m := range t.missing {
		if m != "" {
			all = append(all, m)
		}
	}
	return all
}

// Close removes what was created in the kernel.
func (t *Tracker) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed = true // a late Look opens nothing
	err := errors.Join(t.sysctl.Restore(), t.sockdiag.Close(), t.conntrack.Close())
	if t.ledger != nil {
		err = errors.Join(err, t.ledger.Close())
		t.ledger = nil
	}
	return err
}

// Look asks the witnesses about the sockets with these keys, all in one pass, and
// returns a Summary for each key, in the same order. now is the time of the call by
// the machine's clock; Last and LastPayload are never after it.
func (t *Tracker) Look(ctx context.Context, now time.Time, keys []uint32) []Summary {
	t.mu.Lock()
	defer t.mu.Unlock()
	summaries := make([]Summary, len(keys))
	l := look{Tracker: t, ctx: ctx, now: now}
	for i, key := range keys {
		w, s := t.sockets[key], &summaries[i]
		switch {
		case w == nil:
			s.Why = notWatched
		case t.closed:
			s.Why = closedTracker
		default:
			if s.Why = w.unknowable(); s.Why == "" {
				s.Known = true
				l.due = append(l.due, due{w, s})
			}
		}
	}
	l.run()
	return summaries
}

// explain says why a witness is not to be had, and what would help.
func explain(what string, err error) string {
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
		return what + ": operation not permitted; run as root or with CAP_NET_ADMIN"
	}
	return fmt.Sprintf("%s: %v", what, err)
}
