package gate

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation"
	"hibergate/supervisor/activity"
)

// datagrams relays what comes to the UDP sockets of one gate: each client has a session, with a socket of its own that is
// connected to a destination. The sockets are borrowed; they have to be open from admit to hold, and on from there until
// the sessions are over or close returns. On a wildcard socket clients are answered from the address that they have asked where
// the socket was opened with activation.Options.PacketInfo. IPv4 and IPv6 may be mixed: a client of one can have a destination of the other.
//
// One goroutine moves everything. It runs from admit until nothing is admitted and no session is left. All methods may be
// called from any goroutine.
type datagrams struct {
	spec    *Spec
	sockets []*activation.Socket
	hooks   datagramHooks
	now     func() time.Time // time.Now, but in tests
	wg      sync.WaitGroup   // the goroutine

	// A lock rather than messages, so that whoever looks or holds never waits for more than one turn of the relay, and so
	// that both can be done while there is no goroutine. It is never held while something waits.
	mu           sync.Mutex
	watcher      *activation.Watcher // nil: the goroutine does not run
	message      *datagramMessage    // for the time that the goroutine runs, like buffer and kept
	buffer       []byte
	kept         keptDatagrams
	reading      bool // admitted
	closed       bool
	served       bool  // a reply came in this admission
	short        bool  // want of descriptors was logged in this admission
	lost         error // what to tell hooks.lost
	refusal      error // the last one of a destination in this admission
	destinations []*datagramDestination
	turn         int
	sessions     map[datagramKey]*datagramSession
	byID         map[uint64]*datagramSession
	lastID       uint64 // the first ones are of the sockets, by their place
	order        datagramList
	accounts     []datagramAccount // one for each socket
	totals       datagramTotals
}

// datagramHooks are told what happens to the datagrams of one gate.
type datagramHooks struct {
	// lost is called when the last of the destinations refuses (ECONNREFUSED, or there is no way to it). The relay has
	// stopped to read its sockets by then, as after hold, so that what comes waits for the next admit. It is
	// called at most once in each admission, from the relay's goroutine, with no lock held, and must not wait; it may call
	// hold. A call may be under way when hold or admit returns. served says that a reply came since admit.
	lost   func(err error, served bool)
	ignore func(netip.Addr) bool // sources that do not count as activity; nil: all count
	log    *slog.Logger          // nil: nothing is logged
}

// datagramAccount is the traffic of one socket since newDatagrams. Bytes are of payload.
type datagramAccount struct {
	last    time.Time // the last datagram either way, of those who are not ignored
	in, out activity.Counters
}

// How much is moved from one socket before the others, and those who want the lock, get their turn.
const (
	socketTurn  = 64
	sessionTurn = 16
)

// newDatagrams returns the relay of UDP sockets that is held. It has no goroutine and no descriptor.
func newDatagrams(spec *Spec, sockets []*activation.Socket, hooks datagramHooks) *datagrams {
	if hooks.log == nil {
		hooks.log = slog.New(slog.DiscardHandler)
	}
	return &datagrams{
		spec: spec, sockets: sockets, hooks: hooks, now: time.Now, lastID: uint64(len(sockets)),
		sessions: make(map[datagramKey]*datagramSession), byID: make(map[uint64]*datagramSession),
		accounts: make([]datagramAccount, len(sockets)),
	}
}

// admit lets datagrams through to the targets, which are all of UDP, beginning with those that were refused
// before. It may be called again while it holds, with other targets. Sessions whose destination is not among them
// are forgotten, and the next datagram of the client begins a new one. The FD of a target is closed: here nobody needs it. After an error nothing is admitted.
// A gate without UDP sockets admits nothing, whatever the targets.
func (d *datagrams) admit(targets []Target) error {
	destinations, err := datagramDestinations(targets)
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case len(d.sockets) == 0:
		return nil
	case d.closed:
		err = errors.New("admit datagrams: the gate is closed")
	}
	if err != nil {
		d.stopReading()
		d.ring()
		return err
	}
	if err := d.start(); err != nil {
		return fmt.Errorf("admit datagrams: %w", err)
	}
	now := d.now()
	d.destinations, d.turn = destinations, 0
	d.served, d.short, d.lost, d.refusal, d.reading = false, false, nil, nil, true
	d.move(now)
	for i, s := range d.sockets {
		if !d.reading {
			break // what was refused before is refused again
		}
		if err := d.watcher.ArmEdge(s.FD(), uint64(i)); err != nil {
			d.stopReading()
			d.ring()
			return fmt.Errorf("admit datagrams of %s: %w", s.Address(), err)
		}
	}
	d.ring() // there may be a deadline now
	return nil
}

// datagramDestinations takes over the targets.
func datagramDestinations(targets []Target) (list []*datagramDestination, err error) {
	for i := range targets {
		if fd := targets[i].FD; fd >= 0 {
			_ = unix.Close(fd) // close(2) releases it whatever it returns
		}
		dest, e := newDatagramDestination(&targets[i])
		err = errors.Join(err, e)
		list = append(list, dest)
	}
	if len(targets) == 0 {
		err = errors.New("admit datagrams: no destination for them")
	}
	return list, err
}

// start starts the goroutine unless it runs.
func (d *datagrams) start() error {
	if d.watcher != nil {
		return nil
	}
	w, err := activation.NewWatcher()
	if err != nil {
		return err
	}
	d.watcher, d.message, d.buffer = w, new(datagramMessage), make([]byte, maxDatagram)
	d.wg.Go(func() { d.run(w) })
	return nil
}

// move sets the sessions of the previous admission on the destinations of this one.
func (d *datagrams) move(now time.Time) {
	var next *datagramSession
	for s := d.order.first; s != nil; s = next {
		next = s.next
		if s.fd >= 0 {
			d.review(s, now)
		}
		switch {
		case s.fd >= 0:
		case s.again && d.kept.holds(s.kept):
			d.pass(s, d.kept.read(s.kept, d.buffer), now)
		default:
			d.end(s) // its next datagram begins a new one
		}
	}
}

// review keeps the socket of a session where it still leads to a destination. What was refused before is not to
// count against the destination that is there now.
func (d *datagrams) review(s *datagramSession, now time.Time) {
	pending, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_ERROR) // takes it away
	refused := err != nil || isRefusal(unix.Errno(pending))
	if !refused {
		for _, t := range d.destinations {
			if t.address == s.to.address {
				s.to, t.sessions = t, t.sessions+1
				return
			}
		}
	} else {
		d.totals.Refused++
	}
	s.again = s.again || d.resendable(s, now)
	d.disconnect(s)
}

// hold stops to read the sockets, at once: after it returns, what comes waits in their queues for the next
// admit. Sessions still get replies until they expire. It does nothing where nothing is admitted.
func (d *datagrams) hold() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.lost = nil
	d.stopReading()
	d.ring() // to end, where there is no session
}

// close ends everything, and waits for it. It must not be called by a hook.
func (d *datagrams) close() {
	d.mu.Lock()
	d.closed, d.lost = true, nil
	d.stopReading()
	d.forget()
	d.ring()
	d.mu.Unlock()
	d.wg.Wait()
}

// stopReading leaves the sockets alone.
func (d *datagrams) stopReading() {
	if !d.reading {
		return
	}
	d.reading = false
	for _, s := range d.sockets {
		if err := d.watcher.Remove(s.FD()); err != nil {
			d.hooks.log.Warn("socket still watched", slog.String("address", s.Address().String()), slog.Any("err", err))
		}
	}
}

// forget ends all sessions.
func (d *datagrams) forget() {
	for d.order.first != nil {
		d.end(d.order.first)
	}
}

// ring makes the goroutine look at what has changed.
func (d *datagrams) ring() {
	if d.watcher == nil {
		return
	}
	if err := d.watcher.Wake(); err != nil { // an eventfd refuses nothing but a bad argument
		d.hooks.log.Warn("datagrams not told", slog.Any("err", err))
	}
}

// run is the goroutine.
func (d *datagrams) run(w *activation.Watcher) {
	var deadline time.Time // when the next session may expire
	for {
		ready, err := w.Wait(deadline)
		for i := range ready {
			d.turnOf(ready[i].Token)
		}
		var more bool
		if deadline, more = d.settle(deadline, err); !more {
			return
		}
	}
}

// turnOf moves what is there on one socket.
func (d *datagrams) turnOf(token uint64) {
	d.mu.Lock()
	if now := d.now(); token < uint64(len(d.sockets)) {
		d.readSocket(int(token), now)
	} else if s := d.byID[token]; s != nil {
		d.readSession(s, now)
	}
	d.tellLost()
}

// tellLost unlocks, and calls the hook where it has to be.
func (d *datagrams) tellLost() {
	err, served := d.lost, d.served
	d.lost = nil
	d.mu.Unlock()
	if err != nil {
		d.hooks.lost(err, served)
	}
}

// settle ends what is over, and returns when to look again. The deadline only moves when it has passed: most of the time
// sessions are used before they expire, and then there is nothing to be done. False ends the goroutine; err is what it cannot go on with.
func (d *datagrams) settle(deadline time.Time, err error) (time.Time, bool) {
	d.mu.Lock()
	defer d.tellLost()
	if err != nil {
		if d.reading {
			d.lost = err
		}
		d.stopReading()
		d.forget()
	}
	now := d.now()
	if deadline.IsZero() || !deadline.After(now) {
		deadline = d.expire(now)
	}
	if d.reading || d.order.first != nil {
		return deadline, true
	}
	if err := d.watcher.Close(); err != nil {
		d.hooks.log.Warn("epoll set not closed", slog.Any("err", err))
	}
	d.watcher, d.message, d.buffer, d.kept.ring = nil, nil, nil, nil
	return deadline, false
}
