package supervisor

import (
	"container/heap"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation"
	"hibergate/supervisor/activity"
	"hibergate/supervisor/gate"
)

// The errors that callers may want to tell apart.
var (
	ErrUnknownService = errors.New("unknown service")
	ErrShuttingDown   = errors.New("hibergated is shutting down")
	ErrPerConnection  = errors.New("accept = true: each connection starts a process of its own, there is nothing to wake or to freeze")
	ErrGate           = errors.New(`handoff = "gate": its processes are not ours to freeze`)
	ErrNotRunning     = errors.New("it does not run")
	ErrNothingToLearn = errors.New(`only with handoff = "adopt" does a program bind its sockets itself`)
)

// Options of a Supervisor.
type Options struct {
	Logger    *slog.Logger          // never nil
	Inherited *activation.Inherited // sockets handed to us, used instead of opening new ones; nil: none
	Name      string                // of this supervisor on the machine: of its nftables table and its cgroup
	Global    Global
	State     string      // the directory for what is learned of services; empty: nothing is kept
	Changed   chan Counts // gets the newest counts, replacing older ones; capacity 1; nil: nobody wants them
}

// Counts say how many services there are, have a process, and are in backoff.
type Counts struct{ Awake, Failing, Total int }

// Supervisor runs services. One goroutine, Run, owns all of them; everybody
// else asks it by message and gets copies.
type Supervisor struct {
	log      *slog.Logger
	watcher  Watcher
	looker   Looker
	launcher Launcher
	global   Global
	state    string // immutable
	changed  chan Counts

	// What other goroutines want Run to do: results of work that it started, and requests.
	mu    sync.Mutex // held to put in or take out only
	inbox []message
	gone  bool // Run takes no more

	// Owned by Run.
	units     []*unit
	nextKey   uint32 // for the looker
	byName    map[string]*unit
	procs     map[uint64]*instance // by token
	lastToken uint64
	timers    timers
	chores    []chore                  // the earliest first
	inFlight  int                      // goroutines that will send a result
	toLook    []*unit                  // want a look
	looking   bool                     // one look is under way; it serves many services
	ends      map[uint64]*treeEnd      // by token
	paused    []*unit                  // may go on when a process has ended
	starting  int                      // processes that may come of launches under way
	waitsFor  *activation.AddressWatch // nil: every address is there
	tables    *tables                  // what the kernel is told for gates; immutable
	probes    chan struct{}            // immutable; full while maxProbes are under way
	unparked  func() error             // gives parking up; nil: nothing to give up
	noParking string                   // why connections are not parked; empty: they are
	counts    Counts
	stopping  bool
	givesUp   time.Time // when Run waits for starts no longer; zero: KillNow was not called
}

// message is run by the loop.
type message func(now time.Time)

// New opens the sockets of the services and starts to account for their
// traffic. A service whose address is not there yet, or taken, waits for it; any other
// socket that cannot be opened is an error, which names each one that failed. Run
// must be called to give them up.
func New(services []*Service, opts Options) (*Supervisor, error) {
	opened, err := openAll(services, opts)
	if err != nil {
		return nil, err
	}
	watcher, err := activation.NewWatcher()
	if err != nil {
		return nil, errors.Join(err, closeAll(opened))
	}
	launcher, err := newExecLauncher(opts.Name)
	if err != nil {
		return nil, errors.Join(err, watcher.Close(), closeAll(opened))
	}
	for _, l := range launcher.spawner.Leftovers() {
		opts.Logger.Warn("processes of an earlier hibergated are still there, and stay as they are", slog.String("service", l.Name), slog.Any("pids", l.PIDs))
	}
	s := newSupervisor(services, opened, launcher, opts)
	s.watcher = watcher
	var watched []activity.Socket
	for _, u := range s.units {
		for i := range u.ports {
			if u.ports[i].sock.FD() >= 0 {
				watched = append(watched, u.watched(u.ports[i]))
			}
		}
	}
	s.looker = activity.New(activity.Options{Logger: opts.Logger, Table: opts.Name}, watched)
	for _, u := range s.units {
		if u.spec.Handoff == Gate {
			u.door = s.newDoor(u)
		}
	}
	s.allowParking()
	return s, nil
}

// watched is what the activity tracker needs of a socket.
func (u *unit) watched(p *port) activity.Socket {
	return activity.Socket{
		Key: p.key, Address: p.sock.Address(), FD: p.sock.FD(),
		Accounting: u.spec.Accounting, Ignore: u.spec.Wake.Ignore, Denied: p.sock.Spec().Options.Access.Denied(),
		HandedOver: u.spec.Gate != nil && u.spec.Gate.Forward == gate.Kernel,
	}
}

// newSupervisor builds the part that does not touch the kernel.
func newSupervisor(services []*Service, opened []listeners, launcher Launcher, opts Options) *Supervisor {
	s := &Supervisor{
		log:      opts.Logger,
		launcher: launcher,
		global:   opts.Global,
		state:    opts.State,
		changed:  opts.Changed,
		units:    make([]*unit, len(services)),
		byName:   make(map[string]*unit, len(services)),
		procs:    make(map[uint64]*instance),
		ends:     make(map[uint64]*treeEnd),
		probes:   make(chan struct{}, maxProbes),
		tables:   &tables{name: opts.Name + "-gates", log: opts.Logger},
	}
	now := time.Now()
	for i, svc := range services {
		u := &unit{spec: svc, index: i, place: -1, ports: make(ports, len(opened[i].sockets))}
		for j, sock := range opened[i].sockets {
			u.ports[j] = &port{sock: sock, slot: j, key: s.nextKey, failed: opened[i].errs[j], learned: j >= len(svc.Sockets)}
			s.nextKey++
		}
		switch {
		case svc.Handoff == Gate:
			u.policy = newGated(svc, now)
		case svc.Accept:
			u.policy = newPerConnection(svc, now)
			u.sources = newSources(&svc.Limits)
		default:
			u.policy = newSolo(svc, now)
		}
		s.units[i], s.byName[svc.Name] = u, u
	}
	s.counts.Total = len(services)
	return s
}

// Run serves until ctx ends. Then it stops every process as its service wants
// it, removes what was created and returns.
func (s *Supervisor) Run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() {
		s.post(func(time.Time) {
			s.stopping = true
			s.all(shutdownRequested{})
		})
	})
	defer stop()

	var failed error
	for _, u := range s.units {
		failed = errors.Join(failed, s.begin(u)) //nolint:contextcheck // what is under way when ctx ends is told to end by its policy
	}
	if failed == nil {
		failed = s.loop() //nolint:contextcheck // what is under way when ctx ends is brought to its end
	}
	s.close()
	failed = errors.Join(failed, s.endSessions())
	for _, u := range s.units {
		failed = errors.Join(failed, s.give(u))
	}
	if s.unparked != nil {
		failed = errors.Join(failed, s.unparked())
	}
	failed = errors.Join(failed, s.tables.close())
	if s.waitsFor != nil {
		failed = errors.Join(failed, s.watcher.Remove(s.waitsFor.FD()), s.waitsFor.Close())
	}
	return errors.Join(failed, s.looker.Close(), s.launcher.Close(), s.watcher.Close())
}

// begin has the sockets of a unit watched, or waits for those that are not open.
func (s *Supervisor) begin(u *unit) error {
	now := time.Now()
	for i := range u.ports {
		p := u.ports[i]
		if p.sock.FD() < 0 {
			s.step(now, u, openFailed{p.failed})
			s.waitForAddresses(u)
			if len(u.spec.Learn) > 0 {
				s.step(now, u, addresses{known: u.known()})
			}
			return nil
		}
		if err := s.watcher.Add(p.sock.FD(), socketToken(u.index, p.slot, 0)); err != nil {
			return fmt.Errorf("service %q: watch %s: %w", u.spec.Name, p.sock.Address(), err)
		}
	}
	if len(u.spec.Learn) > 0 {
		s.step(now, u, addresses{known: u.known()})
	}
	if u.policy.life().state == Listening {
		s.arm(u)
	}
	if u.door != nil {
		s.findUp(u)
	}
	return nil
}

// give closes what a unit has.
func (s *Supervisor) give(u *unit) error {
	var errs []error
	for i := range u.ports {
		p := u.ports[i]
		if p.held != nil {
			closeConnection(p.held)
		}
		if p.sock.FD() >= 0 && !u.stuck {
			errs = append(errs, s.watcher.Remove(p.sock.FD()), p.sock.Close())
		}
	}
	s.endNotify(u)
	if u.end != nil {
		errs = append(errs, s.forgetEnd(u.end))
	}
	if u.tree != nil {
		err := u.tree.Close()
		if (u.spec.Stop.KillMode == KillProcess || u.door != nil) && errors.Is(err, unix.EBUSY) {
			err = nil // they were to be left alone
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// loop handles one message after another until everything has stopped.
func (s *Supervisor) loop() error {
	for !s.done() {
		var deadline time.Time
		switch {
		case !s.givesUp.IsZero() && len(s.procs) == 0: // nothing is left but starts
			deadline = s.givesUp
		default:
			deadline = s.next()
		}
		batch, err := s.watcher.Wait(deadline)
		if err != nil {
			return fmt.Errorf("watch sockets: %w", err) // without it nothing ever wakes
		}
		now := time.Now()
		for _, r := range batch {
			s.notice(now, r)
		}
		for _, m := range s.take() {
			m(now)
		}
		s.timeouts(now)
		s.chore(now)
		s.startLook()
	}
	return nil
}

// post gives the loop something to do. It returns false when the loop has ended.
func (s *Supervisor) post(m message) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.gone {
		return false
	}
	s.inbox = append(s.inbox, m)
	if len(s.inbox) == 1 {
		if err := s.watcher.Wake(); err != nil {
			panic("supervisor: " + err.Error()) // writing to an eventfd of our own cannot fail
		}
	}
	return true
}

// take empties the inbox.
func (s *Supervisor) take() []message {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := s.inbox
	s.inbox = nil
	return all
}

// close ends the taking of messages, and runs those that came too late to matter.
func (s *Supervisor) close() {
	s.mu.Lock()
	s.gone = true
	s.mu.Unlock()
	for _, m := range s.take() {
		m(time.Now())
	}
}

// done says whether everything has stopped. After KillNow it does not wait for ever for what
// may not come back, such as the start of a program on a file system that hangs.
func (s *Supervisor) done() bool {
	if !s.stopping {
		return false
	}
	if !s.givesUp.IsZero() {
		return !time.Now().Before(s.givesUp) && len(s.procs) == 0 || len(s.procs)+len(s.ends)+s.inFlight == 0
	}
	return s.inFlight == 0 && !slices.ContainsFunc(s.units, func(u *unit) bool { return u.policy.life().state != Stopped })
}

func (s *Supervisor) all(ev event) {
	now := time.Now()
	for _, u := range s.units {
		s.step(now, u, ev)
	}
}

// queued asks for the identities of what waits. It runs outside the loop.
func (s *Supervisor) queued(service string, all ports) []uint64 {
	ids, err := s.looker.Queued(context.Background(), all.keys())
	if err != nil {
		s.log.Warn("queue not read", slog.String("service", service), slog.Any("err", err))
		return []uint64{unidentified}
	}
	return ids
}

// step tells a policy what happened and does what it wants.
func (s *Supervisor) step(now time.Time, u *unit, ev event) {
	for _, a := range u.policy.step(now, ev) {
		s.do(u, a)
	}
	life := u.policy.life()
	if u.due != life.deadline {
		u.due = life.deadline
		switch {
		case u.place < 0:
			heap.Push(&s.timers, u)
		case u.due.IsZero():
			heap.Remove(&s.timers, u.place)
		default:
			heap.Fix(&s.timers, u.place)
		}
	}
	u.waiters = slices.DeleteFunc(u.waiters, func(w waiter) bool {
		if !u.settled(w) {
			return false
		}
		close(w.done)
		return true
	})
	if now := u.count(); now != u.counted {
		s.counts.Awake += now.Awake - u.counted.Awake
		s.counts.Failing += now.Failing - u.counted.Failing
		u.counted = now
		s.publish()
	}
}

// count is what one unit adds to Counts.
func (u *unit) count() (c Counts) {
	if len(u.procs) > 0 || u.end != nil || u.door != nil && u.up() {
		c.Awake = 1
	}
	if state := u.policy.life().state; state == Backoff || state == Failed {
		c.Failing = 1
	}
	return c
}

// publish puts the newest counts in the place of what nobody has read yet. Only
// Run sends, so there is room after the first select.
func (s *Supervisor) publish() {
	if s.changed == nil {
		return
	}
	select {
	case <-s.changed:
	default:
	}
	s.changed <- s.counts
}
