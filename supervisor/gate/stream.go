package gate

import (
	"errors"
	"log/slog"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation"
)

// streams accepts what comes to the stream sockets of one gate and moves bytes to and from destinations.
//
// Each connection belongs to a loop, which is one goroutine with an epoll set of its own; the first loop, the porter,
// accepts, keeps those that wait, and connects to the destinations, in the order in which they came, and gives pairs
// away to the other loops. A loop begins when it has something to do, and ends when the gate is held and the loop has
// nothing left, so a sleeping gate has neither goroutine nor descriptor.
//
// All methods may be called from any goroutine.
type streams struct {
	spec    *Spec
	hooks   streamHooks
	sources []*source
	began   time.Time // what the loops count nanoseconds from
	running sync.WaitGroup

	kept atomic.Int32 // sides for which something is kept

	// The loops take the lock for what opens and closes, never for moving bytes.
	mu      sync.Mutex
	mode    mode
	loops   []*loop // by number; nil: not running
	targets []*target
	totals  []destinationTotal // by Spec.Destinations
	next    int                // target whose turn it is
	spare   bool               // a target may have a connection that nobody has used yet
	epoch   uint32             // counts admissions
	served  bool               // a connection was established in this admission
	loss    error              // to be told to hooks.lost
	stray   bool               // a client was refused while the gate is held: to be told to hooks.waits
	serial  uint64             // of the last connection
	active  int                // pairs that have, or are getting, a connection to a destination
	waiting int                // clients without one that have not left
	left    int                // clients without one that have closed their side and sent nothing
	watched bool               // the porter watches the listening sockets
	paused  int64              // nothing is accepted or opened until then: descriptors or memory ran out; 0: no
	denied  uint64             // connections closed: their sources may not use the socket
	excess  uint64             // the same: there were MaxConnections
	expired uint64             // clients that waited for PendingTimeout
	plain   bool               // it was said that a client's address could not be kept
	short   bool               // it was said that descriptors or memory ran out
}

// streamHooks is what streams tells others.
type streamHooks struct {
	// lost says that every destination refused: once per admission, from a relay goroutine, with no lock held. served
	// says that a connection had been established since admit. It must not block, nor call flows or close, which wait
	// for that goroutine.
	lost func(err error, served bool)
	// waits says that a client was refused while the gate was held, and waits from now on; may be nil. It is called as lost
	// is.
	waits  func()
	ignore func(netip.Addr) bool // sources whose connections do not count as activity; may be nil
	log    *slog.Logger
}

// mode says what becomes of new clients.
type mode uint8

const (
	held       mode = iota // they stay in the queue of the kernel
	collecting             // they are accepted and wait
	admitting              // they are connected to a destination
	closed                 // for good
)

// errStreamsClosed is what admit returns after close.
var errStreamsClosed = errors.New("gate is closed")

// newStreams makes a relay that is held: it has no goroutine and no descriptor. The sockets stay the caller's.
func newStreams(spec *Spec, sockets []*activation.Socket, hooks streamHooks) *streams {
	s := &streams{
		spec: spec, hooks: hooks, began: time.Now(), loops: make([]*loop, max(1, runtime.GOMAXPROCS(0)/2)),
		totals: make([]destinationTotal, len(spec.Destinations)),
	}
	for i, sock := range sockets {
		s.sources = append(s.sources, &source{socket: sock, number: i, unix: sock.Address().Network.Unix(), access: sock.Spec().Options.Access})
	}
	return s
}

// clock returns nanoseconds since the relay was made.
func (s *streams) clock() int64 { return int64(time.Since(s.began)) }

// admit lets clients through to the targets: first those that wait, in the order in which they were accepted, then what
// waits in the queues of the kernel, until hold or until hooks.lost was called. The descriptors in targets are the
// relay's, whatever it returns. The error says what the relay could not begin with; the gate is held then.
func (s *streams) admit(targets []Target) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mode == closed {
		closeSpares(targets)
		return errStreamsClosed
	}
	if err := s.aim(targets); err != nil {
		s.mode = held
		return err
	}
	s.epoch++
	s.served, s.loss, s.paused, s.short = false, nil, 0, false
	s.mode = admitting
	return s.rouse()
}

// collect accepts clients and has them wait, where the gate has a PendingTimeout; the others stay in the queue of the
// kernel.
func (s *streams) collect() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mode == closed {
		return errStreamsClosed
	}
	if s.spec.PendingTimeout <= 0 {
		return nil
	}
	s.closeDoor()
	s.mode, s.paused = collecting, 0
	return s.rouse()
}

// rouse prepares the listening sockets and has the porter look what there is to do. It is called with the lock held.
func (s *streams) rouse() error {
	for _, src := range s.sources {
		src.failed = false
		src.prepare()
	}
	l, err := s.loop(0)
	if err != nil {
		s.closeDoor()
		return err
	}
	l.ring()
	return nil
}

// hold lets nobody else in. After it returns nothing is accepted any more, and every connection that was is in sums.
// Those that have a destination go on; those that wait for one go on waiting.
func (s *streams) hold() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mode == closed {
		return
	}
	s.closeDoor()
	s.ringAll()
}

// closeDoor makes the gate held. It is called with the lock held.
func (s *streams) closeDoor() {
	s.mode = held
	if l := s.loops[0]; l != nil && s.watched {
		s.unwatch(l)
	}
	s.closeSpares()
}

// ringAll has every loop look what there is to do. It is called with the lock held.
func (s *streams) ringAll() {
	for _, l := range s.loops {
		if l != nil {
			l.ring()
		}
	}
}

// close cuts every connection at both ends, frees every descriptor, and waits until the loops have ended.
func (s *streams) close() {
	s.mu.Lock()
	if s.mode != closed {
		s.closeDoor()
		s.mode = closed
	}
	s.ringAll()
	s.mu.Unlock()
	s.running.Wait()
}

// loop returns a loop that runs. It is called with the lock held.
func (s *streams) loop(number int) (*loop, error) {
	if l := s.loops[number]; l != nil {
		return l, nil
	}
	l, err := newLoop(s, number)
	if err != nil {
		return nil, err
	}
	s.loops[number] = l
	s.running.Go(l.run)
	return l, nil
}

// place returns the loop that is to have a new pair: the one with the fewest, the porter where another cannot begin. It
// is called with the lock held, by the porter.
func (s *streams) place(porter *loop) *loop {
	best, least := 0, porter.load
	for i := 1; i < len(s.loops); i++ {
		load := 0
		if s.loops[i] != nil {
			load = s.loops[i].load
		}
		if load < least {
			best, least = i, load
		}
	}
	l, err := s.loop(best)
	if err != nil {
		return porter
	}
	return l
}

// lose makes the gate held because no destination takes a client. It is called with the lock held.
func (s *streams) lose(err error) {
	s.closeDoor()
	s.loss = err
}

// tellLoss calls hooks.lost, or hooks.waits, where that is due.
func (s *streams) tellLoss() {
	s.mu.Lock()
	loss, served, stray := s.loss, s.served, s.stray
	s.loss, s.stray = nil, false
	s.mu.Unlock()
	switch {
	case loss != nil:
		s.hooks.lost(loss, served)
	case stray && s.hooks.waits != nil:
		s.hooks.waits()
	}
}

// pause stops accepting and connecting for a time, because there are no descriptors or no memory, or the queue of a
// destination is full. It is called with the lock held.
func (s *streams) pause(e unix.Errno, length time.Duration) {
	s.paused = s.clock() + int64(length)
	if !s.short && e != unix.EAGAIN {
		s.short = true
		s.hooks.log.Warn("clients wait: resources ran out", slog.Any("err", e))
	}
}

// isShortage says whether an error goes away when others free what they have.
func isShortage(e unix.Errno) bool {
	switch e { //nolint:exhaustive // all others are of another kind
	case unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM, unix.ENOSPC, unix.EADDRNOTAVAIL:
		return true
	}
	return false
}

// resourcePause is how long nothing is tried after descriptors or memory ran out, unless a connection ends before.
const resourcePause = 100 * time.Millisecond

// queuePause is the same for a Unix socket whose queue is full; its process tells nobody when there is room.
const queuePause = 10 * time.Millisecond
