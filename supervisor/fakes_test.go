package supervisor

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"hibergate/activation"
	"hibergate/activation/nettest"
	"hibergate/supervisor/activity"
	"hibergate/supervisor/process"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

// stage is a Supervisor whose world is played by the test, in fake time.
type stage struct {
	t     *testing.T
	s     *Supervisor
	ended chan error
	stop  context.CancelFunc

	mu       sync.Mutex     // never held while waiting: what follows belongs to the loop, its goroutines and the test
	armed    map[int]uint64 // fd to token
	ready    chan []activation.Ready
	bell     chan struct{}
	procs    []*fakeProcess // all that were ever started, in order
	fail     error          // what Launch returns
	sum      activity.Summary
	looks    int
	frozen   func()            // called by Freeze
	armFails error             // what the next Arm returns
	hang     chan struct{}     // Launch waits until it is closed; nil: it does not
	clients  []activity.Client // what Waiting returns
	queued   []uint64          // what Queued returns
	ran      [][]string        // commands
}

// perform runs services until the test function returns.
func perform(t *testing.T, services []*Service, test func(*stage)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		st := &stage{
			t: t, ended: make(chan error, 1), armed: map[int]uint64{},
			ready: make(chan []activation.Ready), bell: make(chan struct{}, 1), sum: activity.Summary{Known: true, Exact: true},
		}
		var opened []listeners
		for _, svc := range services {
			svc.Sockets = []activation.Spec{{Name: svc.Name, Address: activation.Address{Network: activation.TCP, IP: netip.MustParseAddr("127.0.0.1")}}}
			if svc.Stop.Timeout == 0 {
				svc.Stop = DefaultStop()
			}
			if svc.Restart.Delay == 0 {
				svc.Restart = DefaultRestart()
			}
			sock, err := activation.Open(svc.Sockets[0])
			if err != nil {
				t.Fatal(err)
			}
			opened = append(opened, listeners{[]*activation.Socket{sock}, []error{nil}})
		}
		st.s = newSupervisor(services, opened, (*fakeLauncher)(st), Options{Logger: slog.New(slog.DiscardHandler)})
		st.s.watcher, st.s.looker = (*fakeWatcher)(st), (*fakeLooker)(st)
		ctx, cancel := context.WithCancel(t.Context())
		st.stop = cancel
		go func() { st.ended <- st.s.Run(ctx) }()
		synctest.Wait()
		test(st)
		cancel()
		synctest.Wait()
		for _, p := range st.procs {
			p.exit(process.ExitStatus{Signal: syscall.SIGTERM})
		}
		if err := <-st.ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

// traffic comes on the socket of a service, if it is armed.
func (st *stage) traffic(name string) {
	st.t.Helper()
	fd := st.s.byName[name].ports[0].sock.FD()
	token, ok := st.take(fd)
	if !ok {
		st.t.Fatalf("%s is not armed", name)
	}
	st.ready <- []activation.Ready{{Token: token}}
	synctest.Wait()
}

// take what a one-shot report of the watcher takes: the registration.
func (st *stage) take(fd int) (token uint64, ok bool) {
	st.mu.Lock()
	defer st.mu.Unlock()
	token, ok = st.armed[fd]
	delete(st.armed, fd)
	return token, ok
}

// set changes what the world does from now on.
func (st *stage) set(f func()) {
	st.mu.Lock()
	defer st.mu.Unlock()
	f()
}

// pass lets time go by.
func (st *stage) pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func (st *stage) want(name string, want State) {
	st.t.Helper()
	got, err := st.s.Status(st.t.Context(), name, false)
	if err != nil || got[0].State != want.String() {
		st.t.Fatalf("%s: got %+v (%v), want state %s", name, got, err, want)
	}
}

// last returns the newest process.
func (st *stage) last() *fakeProcess { return st.procs[len(st.procs)-1] }

type fakeWatcher stage

func (w *fakeWatcher) Add(int, uint64) error { return nil }
func (w *fakeWatcher) Arm(fd int, token uint64) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.armFails; err != nil {
		w.armFails = nil
		return err
	}
	w.armed[fd] = token
	return nil
}
func (w *fakeWatcher) ArmEdge(fd int, token uint64) error { return w.Arm(fd, token) }
func (w *fakeWatcher) Disarm(fd int, _ uint64) error      { (*stage)(w).take(fd); return nil }
func (w *fakeWatcher) Remove(fd int) error                { (*stage)(w).take(fd); return nil }
func (w *fakeWatcher) Close() error                       { return nil }
func (w *fakeWatcher) Wake() error {
	select {
	case w.bell <- struct{}{}:
	default:
	}
	return nil
}

func (w *fakeWatcher) Wait(deadline time.Time) ([]activation.Ready, error) {
	var timer <-chan time.Time
	if !deadline.IsZero() {
		timer = time.After(time.Until(deadline))
	}
	select {
	case batch := <-w.ready:
		return batch, nil
	case <-w.bell:
	case <-timer:
	}
	return nil, nil
}

type fakeLauncher stage

func (l *fakeLauncher) Close() error       { return nil }
func (l *fakeLauncher) Abort()             {}
func (l *fakeLauncher) Tracking() string   { return "fake" }
func (l *fakeLauncher) Tree(*Service) Tree { return &fakeTree{stage: (*stage)(l)} }
func (l *fakeLauncher) Run(_ context.Context, _ *Service, _ Tree, argv, _ []string) error {
	time.Sleep(time.Millisecond)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ran = append(l.ran, argv)
	return nil
}

func (l *fakeLauncher) Launch(_ *Service, tree Tree, _ []*activation.Socket, _ string) (Process, error) {
	time.Sleep(time.Millisecond)
	l.mu.Lock()
	hang := l.hang
	l.mu.Unlock()
	if hang != nil {
		<-hang
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fail != nil {
		return nil, l.fail
	}
	return l.start(tree), nil
}

func (l *fakeLauncher) Serve(_ *Service, tree Tree, _ *activation.Socket, _ serveOrder) (batch, error) {
	time.Sleep(time.Millisecond)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fail != nil {
		return batch{accepted: 1, held: &connection{fd: -1}}, l.fail
	}
	return batch{accepted: 1, procs: []servedProcess{{Process: l.start(tree)}}}, nil
}

// start is called with mu held.
func (l *fakeLauncher) start(tree Tree) *fakeProcess {
	t := tree.(*fakeTree)
	p := &fakeProcess{stage: (*stage)(l), pid: 100 + len(l.procs), alive: true}
	l.procs = append(l.procs, p)
	t.procs = append(t.procs, p)
	return p
}

type fakeLooker stage

func (l *fakeLooker) Look(_ context.Context, _ time.Time, keys []uint32) []activity.Summary {
	time.Sleep(time.Millisecond)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.looks++
	return slices.Repeat([]activity.Summary{l.sum}, len(keys))
}
func (l *fakeLooker) Add(activity.Socket) {}
func (l *fakeLooker) Remove(uint32)       {}
func (l *fakeLooker) Queued(context.Context, []uint32) ([]uint64, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.queued, nil
}

func (l *fakeLooker) Waiting(context.Context, uint32) ([]activity.Client, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.clients, nil
}
func (l *fakeLooker) Handshakes(context.Context, uint32) ([]uint64, error) { return nil, nil }
func (l *fakeLooker) Held(context.Context, uint32, []int) (int, error)     { return 0, nil }
func (l *fakeLooker) Read(context.Context, []int) (uint64, error)          { return 0, nil }
func (l *fakeLooker) Flows(context.Context, uint32, []int) ([]activity.Flow, string) {
	return nil, ""
}
func (l *fakeLooker) Close() error { return nil }

// fakeTree is the processes that were started for one service, and others that the test says are left.
type fakeTree struct {
	*stage
	procs   []*fakeProcess
	left    bool // somebody lives beside procs
	stopped bool
	signals []syscall.Signal
	end     int           // the descriptor that Ended returned; 0: none
	slow    chan struct{} // Freeze and Kill wait until it is closed; nil: they do not
	unknown error         // what Empty returns
}

// hold waits for slow.
func (t *fakeTree) hold() {
	t.mu.Lock()
	slow := t.slow
	t.mu.Unlock()
	if slow != nil {
		<-slow
	}
}

func (t *fakeTree) Signal(sig syscall.Signal) error {
	t.mu.Lock()
	t.signals = append(t.signals, sig)
	procs := slices.Clone(t.procs)
	t.mu.Unlock()
	for _, p := range procs {
		_ = p.Signal(sig) // never fails
	}
	return nil
}

func (t *fakeTree) Kill() error {
	t.hold()
	t.set(func() { t.left = false })
	return t.Signal(syscall.SIGKILL)
}

func (t *fakeTree) Freeze(context.Context) error {
	t.hold()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.stopped = true
	if t.frozen != nil {
		t.frozen()
	}
	return nil
}

func (t *fakeTree) Thaw() error {
	t.set(func() { t.stopped = false })
	return nil
}

func (t *fakeTree) PIDs() ([]int, error) { return nil, nil }
func (t *fakeTree) Close() error         { return nil }
func (t *fakeTree) Rest() error          { return nil }
func (t *fakeTree) Empty() (bool, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.unknown != nil {
		return false, t.unknown
	}
	return !t.left && !slices.ContainsFunc(t.procs, func(p *fakeProcess) bool { return p.alive }), nil
}

func (t *fakeTree) Ended() (int, error) {
	fd, err := syscall.Dup(1) // of its own, as it will be closed
	t.set(func() { t.end = fd })
	return fd, err
}

// leave ends what is left of the tree.
func (t *fakeTree) leave() {
	t.t.Helper()
	t.set(func() { t.left = false })
	if token, ok := t.take(t.end); ok {
		t.ready <- []activation.Ready{{Token: token}}
	}
	synctest.Wait()
}

// tree returns the tree of a service.
func (st *stage) tree(name string) *fakeTree { return st.s.byName[name].tree.(*fakeTree) }

// fakeProcess dies of the signals that a program without handlers dies of, unless stubborn.
type fakeProcess struct {
	*stage
	pid      int
	alive    bool
	stubborn bool
	status   process.ExitStatus
	signals  []syscall.Signal
}

func (p *fakeProcess) TakeListener() int { return -1 }
func (p *fakeProcess) PID() int          { return p.pid }
func (p *fakeProcess) PIDFD() int        { return 10000 + p.pid }
func (p *fakeProcess) Signal(sig syscall.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.signals = append(p.signals, sig)
	if sig == syscall.SIGKILL || sig == syscall.SIGTERM && !p.stubborn {
		go p.exit(process.ExitStatus{Signal: sig})
	}
	return nil
}

func (p *fakeProcess) KillGroup() error { return nil }
func (p *fakeProcess) Reap() (process.ExitStatus, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.alive {
		return p.status, errors.New("still alive")
	}
	return p.status, nil
}

// exit ends the process, once.
func (p *fakeProcess) exit(status process.ExitStatus) {
	p.mu.Lock()
	was := p.alive
	if was {
		p.alive, p.status = false, status
	}
	p.mu.Unlock()
	if token, ok := p.take(p.PIDFD()); ok && was {
		p.ready <- []activation.Ready{{Token: token}}
	}
}
