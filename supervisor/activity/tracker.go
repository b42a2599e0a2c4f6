package activity

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
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
	table string

	// One look at a time: the sockets to the kernel are shared, and a look is too
	// short for more. Everything below is guarded by mu.
	mu        sync.Mutex
	sockets   map[uint32]*watched
	keys      []ledger.Key // of all sockets that want the ledger
	closed    bool
	ledger    *ledger.Ledger // nil: there is none
	tried     time.Time      // when it was last attempted to make the ledger
	sockdiag  *sockdiag.Conn
	conntrack *conntrack.Conn
	sysctl    accountingSwitch
	missing   [witnesses]string // what is not to be had, by witness; empty: all is well
}

// witness names what can be missing.
type witness uint8

const (
	nftablesWitness witness = iota
	conntrackWitness
	countersWitness
	sockdiagWitness
	witnesses
)

const closedTracker = "the tracker is closed"

// New opens what the kernel permits and starts to account for the sockets, in one
// go so that thousands cost one transaction. It always succeeds: what is missing is
// said in the Summary of each socket that wants it, and logged once.
func New(opts Options, sockets []Socket) *Tracker {
	t := &Tracker{
		table:     opts.Table,
		sockets:   make(map[uint32]*watched, len(sockets)),
		sockdiag:  sockdiag.New(),
		conntrack: conntrack.New(),
	}
	for _, s := range sockets {
		w := watch(s)
		t.sockets[s.Key] = w
		if w.account != (ledger.Key{}) {
			t.keys = append(t.keys, w.account)
		}
	}
	if len(t.keys) > 0 {
		t.openLedger(time.Now())
		t.probeConntrack()
	}
	for _, what := range t.Missing() {
		opts.Logger.Warn("activity is known only in part", slog.String("missing", what))
	}
	return t
}

// openLedger makes the ledger where there is none, unless it failed a moment ago. The accounts start
// anew, with "a packet just now"; what was counted before is kept.
func (t *Tracker) openLedger(now time.Time) {
	if t.ledger != nil || now.Sub(t.tried).Abs() < retryAfter {
		return
	}
	l, err := ledger.Open(t.table, t.keys, true)
	if err != nil {
		t.tried = now
		t.missing[nftablesWitness] = explain("nftables", err)
		return
	}
	t.ledger, t.missing[nftablesWitness] = l, ""
	for _, w := range t.sockets {
		w.countedBefore = w.counted
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
	if err := t.sysctl.on(); err != nil {
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
	err := errors.Join(t.sysctl.restore(), t.sockdiag.Close(), t.conntrack.Close())
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
			s.Why = "the socket is not watched"
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
