package supervisor

import (
	"errors"
	"net/netip"
	"slices"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation"
	"hibergate/supervisor/activity"
	"hibergate/supervisor/process"
)

// connect connects to the socket of a service.
func (st *stage) connect(name string) (fd int) {
	st.t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		addr := st.s.byName[name].ports[0].sock.Address()
		err = unix.Connect(fd, &unix.SockaddrInet4{Port: int(addr.Port), Addr: addr.IP.As4()})
	}
	if err != nil {
		st.t.Fatal(err)
	}
	st.t.Cleanup(func() { closeFD(fd) })
	return fd
}

// A service is frozen on request, and the next traffic thaws it.
func TestFreeze(t *testing.T) {
	perform(t, []*Service{idleService("web")}, func(st *stage) {
		t := st.t
		ctx := t.Context()
		if _, err := st.s.Freeze(ctx, "web"); !errors.Is(err, ErrNotRunning) {
			t.Errorf("freeze what sleeps: got %v, want ErrNotRunning", err)
		}
		st.traffic("web")
		st.pass(time.Second)
		if status, err := st.s.Freeze(ctx, "web"); err != nil || status.State != "frozen" || !st.tree("web").stopped {
			t.Fatalf("freeze: got %+v, %v", status, err)
		}
		st.pass(time.Hour)
		st.want("web", Frozen)
		st.traffic("web")
		st.want("web", Running)
		if st.tree("web").stopped {
			t.Error("still stopped after traffic")
		}
		if _, err := st.s.Freeze(ctx, "web"); err != nil {
			t.Fatal(err)
		}
		if status, err := st.s.Thaw(ctx, "web"); err != nil || status.State != "running" || st.tree("web").stopped {
			t.Fatalf("thaw: got %+v, %v", status, err)
		}
		if _, err := st.s.Freeze(ctx, "web"); err != nil {
			t.Fatal(err)
		}
		if status, err := st.s.Sleep(ctx, "web"); err != nil || status.State != "listening" {
			t.Fatalf("sleep what is frozen: got %+v, %v", status, err)
		}
	})
}

// A daemon whose first process has ended runs on until the last one has.
func TestDaemon(t *testing.T) {
	perform(t, []*Service{idleService("web"), {Name: "git", Accept: true}}, func(st *stage) {
		t := st.t
		for i, name := range []string{"web", "git"} {
			st.traffic(name)
			st.pass(time.Second)
			st.set(func() { st.tree(name).left = true; st.sum.Open = 1 })
			st.procs[i].exit(process.ExitStatus{})
			st.pass(time.Minute)
			st.want(name, Running)
			st.tree(name).leave()
			st.want(name, Listening)
		}
		if got := st.procs[0].signals; got != nil {
			t.Errorf("got %v, want no signals", got)
		}
		// Sleep reaches those that are left.
		st.traffic("web")
		st.pass(time.Second)
		st.set(func() { st.tree("web").left = true })
		st.last().exit(process.ExitStatus{})
		st.pass(time.Second)
		go func() { // the fake does not die of SIGTERM
			time.Sleep(time.Second)
			st.tree("web").leave()
		}()
		status, err := st.s.Sleep(t.Context(), "web")
		if err != nil || status.State != "listening" || !slices.Contains(st.tree("web").signals, syscall.SIGTERM) {
			t.Errorf("got %+v, %v, signals %v", status, err, st.tree("web").signals)
		}
	})
}

// A freeze or a kill that is late does not meet the next process: until it is over, the end of the last one is not told.
func TestLateFreezeAndKill(t *testing.T) {
	svc := idleService("web")
	svc.Stop = Stop{Signal: syscall.SIGTERM, FinalSignal: syscall.SIGKILL, Timeout: 10 * time.Second}
	perform(t, []*Service{svc}, func(st *stage) {
		t := st.t
		for _, stubborn := range []bool{false, true} {
			st.traffic("web")
			st.pass(time.Second)
			slow := make(chan struct{})
			p, tree := st.last(), st.tree("web")
			if stubborn { // it is killed in the end
				st.set(func() { p.stubborn = true })
				st.pass(12 * time.Second)
				st.want("web", Stopping)
			}
			st.set(func() { tree.slow = slow })
			st.pass(12 * time.Second)
			st.want("web", map[bool]State{false: Confirming, true: Killing}[stubborn])
			p.exit(process.ExitStatus{})
			st.pass(time.Second)
			if _, armed := st.take(st.s.byName["web"].ports[0].sock.FD()); armed {
				t.Fatal("armed while a freeze or a kill is under way")
			}
			st.set(func() { tree.slow = nil })
			close(slow)
			st.pass(time.Second)
			st.want("web", Listening)
			if tree.stopped {
				t.Error("left frozen")
			}
		}
		st.traffic("web")
		st.pass(time.Second)
		st.want("web", Running)
	})
}

// Where it cannot be found out whether anybody is left, somebody is.
func TestDescendantsUnknown(t *testing.T) {
	perform(t, []*Service{idleService("web")}, func(st *stage) {
		st.set(func() { st.sum.Open = 1 })
		st.traffic("web")
		st.pass(time.Second)
		st.set(func() { st.tree("web").unknown = errors.New("too many open files") })
		st.last().exit(process.ExitStatus{})
		st.pass(time.Minute)
		st.want("web", Running)
		st.set(func() { st.tree("web").unknown = nil })
		st.pass(5 * time.Second)
		st.want("web", Listening)
	})
}

// With kill_mode = "process" nobody waits for those that are left.
func TestLeftAlone(t *testing.T) {
	svc := idleService("web")
	svc.Stop = DefaultStop()
	svc.Stop.KillMode = KillProcess
	perform(t, []*Service{svc}, func(st *stage) {
		t := st.t
		st.traffic("web")
		st.pass(time.Second)
		st.set(func() { st.tree("web").left = true })
		if status, err := st.s.Sleep(t.Context(), "web"); err != nil || status.State != "listening" {
			t.Fatalf("got %+v, %v", status, err)
		}
		if _, err := st.s.Sleep(t.Context(), "web"); err != nil {
			t.Fatal(err)
		}
		st.tree("web").leave()
		st.traffic("web") // it is still armed
		st.pass(time.Second)
		st.want("web", Running)
		st.set(func() { st.tree("web").left = false })
	})
}

func TestStopCommand(t *testing.T) {
	svc := idleService("web")
	svc.Stop = DefaultStop()
	svc.Stop.Command = []string{"/bin/stop", "now"}
	perform(t, []*Service{svc}, func(st *stage) {
		st.traffic("web")
		st.pass(15 * time.Second)
		st.want("web", Listening)
		if len(st.ran) != 1 || !slices.Equal(st.ran[0], svc.Stop.Command) {
			st.t.Errorf("ran %v, want the stop command once", st.ran)
		}
	})
}

// A process that takes nothing of what woke it is ended after start.timeout, and has failed.
func TestTakesNothing(t *testing.T) {
	svc := &Service{Name: "web", Start: Start{Timeout: 10 * time.Second}}
	perform(t, []*Service{svc}, func(st *stage) {
		st.connect("web")
		st.set(func() { st.queued = []uint64{7} })
		st.traffic("web")
		st.pass(9 * time.Second)
		st.want("web", Running)
		st.pass(2 * time.Second)
		st.want("web", Backoff)
		st.traffic0("web")
	})
}

// traffic0 checks that a service is not armed.
func (st *stage) traffic0(name string) {
	st.t.Helper()
	if _, armed := st.take(st.s.byName[name].ports[0].sock.FD()); armed {
		st.t.Errorf("%s is armed", name)
	}
}

// Clients of a service that was given up learn of it, if they are to.
func TestReject(t *testing.T) {
	svc := &Service{Name: "web", Restart: DefaultRestart()}
	svc.Restart.Burst, svc.Restart.OnFailure = 1, Reject
	perform(t, []*Service{svc}, func(st *stage) {
		t := st.t
		fd := st.connect("web")
		st.set(func() { st.fail = errors.New("no such file") })
		st.traffic("web")
		st.pass(time.Second)
		st.want("web", Failed)
		st.traffic("web")
		if n, err := unix.Read(fd, make([]byte, 1)); n != 0 || err != nil {
			t.Errorf("got %d, %v, want the end", n, err)
		}
		status, err := st.s.Reset(t.Context(), "web")
		if err != nil || status.State != "listening" || status.Refused.Failed != 1 {
			t.Errorf("got %+v, %v, want it listening, and one refused", status, err)
		}
		st.set(func() { st.fail = nil })
		st.traffic("web")
		st.pass(time.Second)
		st.want("web", Running)
	})
}

// What must wait for a limit of all services goes on as soon as a process has ended.
func TestMaxProcesses(t *testing.T) {
	perform(t, []*Service{idleService("web"), idleService("api"), {Name: "git", Accept: true}}, func(st *stage) {
		if err := st.s.ask(func() { st.s.global.MaxProcesses = 1 }); err != nil {
			st.t.Fatal(err)
		}
		st.set(func() { st.sum.Open = 1 })
		st.traffic("web")
		st.pass(time.Second)
		st.traffic("api")
		st.pass(10 * time.Millisecond)
		st.want("api", Backoff)
		st.traffic("git")
		st.pass(10 * time.Millisecond)
		st.want("git", Backoff)
		st.procs[0].exit(process.ExitStatus{})
		st.pass(10 * time.Millisecond)
		st.want("api", Listening)
		st.traffic("api")
		st.pass(10 * time.Millisecond)
		st.want("api", Running)
		st.procs[1].exit(process.ExitStatus{})
		st.pass(10 * time.Millisecond)
		st.want("git", Listening)
		st.traffic("git")
		st.pass(10 * time.Millisecond)
		st.want("git", Running)
	})
}

// Clients that are to be ignored do not wake a service, and those that have left do not fill its queue.
func TestScreen(t *testing.T) {
	svc := idleService("web")
	svc.Wake.Ignore = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}
	perform(t, []*Service{svc}, func(st *stage) {
		t := st.t
		fd := st.connect("web")
		checker := activity.Client{Remote: netip.MustParseAddrPort("127.0.0.1:4711")}
		st.set(func() { st.clients = []activity.Client{checker} })
		st.arrival("web")
		st.want("web", Listening)
		checker.Left = true
		st.set(func() { st.clients = []activity.Client{checker} })
		st.arrival("web")
		st.want("web", Listening)
		if n, err := unix.Read(fd, make([]byte, 1)); n != 0 || err != nil {
			t.Errorf("got %d, %v, want the end", n, err)
		}
		status, err := st.s.Status(t.Context(), "web", false)
		if err != nil || status[0].Refused.Ignored != 1 {
			t.Errorf("got %+v, %v, want one ignored", status, err)
		}
		st.set(func() {
			st.clients = append(st.clients, activity.Client{Remote: netip.MustParseAddrPort("192.0.2.1:4711")})
		})
		st.arrival("web")
		st.pass(time.Second)
		st.want("web", Running)
	})
}

// arrival is traffic on a socket that stays armed.
func (st *stage) arrival(name string) {
	st.t.Helper()
	st.mu.Lock()
	token, ok := st.armed[st.s.byName[name].ports[0].sock.FD()]
	st.mu.Unlock()
	if !ok {
		st.t.Fatalf("%s is not armed", name)
	}
	st.ready <- []activation.Ready{{Token: token}}
	st.pass(2 * time.Millisecond)
}

func TestWakeScreen(t *testing.T) {
	t.Parallel()
	client := func(addr string, bytes int, left bool) activity.Client {
		return activity.Client{Remote: netip.AddrPortFrom(netip.MustParseAddr(addr), 1), Bytes: bytes, Left: left}
	}
	ignore := Wake{Ignore: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("fe80::/10")}}
	bytes := Wake{MinBytes: 10}
	for name, tt := range map[string]struct {
		wake    Wake
		clients []activity.Client
		resets  int // others in the queue
		want    screening
	}{
		"nobody":                  {ignore, nil, 0, screening{}},
		"ignored":                 {ignore, []activity.Client{client("192.0.2.9", 5, false)}, 0, screening{soon: true}},
		"ignored, mapped":         {ignore, []activity.Client{client("::ffff:192.0.2.9", 5, false)}, 0, screening{soon: true}},
		"ignored, with a zone":    {ignore, []activity.Client{client("fe80::1%eth0", 5, false)}, 0, screening{soon: true}},
		"another":                 {ignore, []activity.Client{client("192.0.2.9", 5, false), client("192.0.3.9", 0, false)}, 0, screening{wake: true}},
		"ignored and gone":        {ignore, []activity.Client{client("192.0.2.9", 0, true), client("192.0.2.9", 0, true)}, 0, screening{gone: 2}},
		"one of two gone":         {ignore, []activity.Client{client("192.0.2.9", 0, true), client("192.0.2.9", 5, false)}, 0, screening{soon: true}},
		"resets":                  {ignore, nil, 127, screening{gone: 127}},
		"resets and one who left": {ignore, []activity.Client{client("192.0.2.9", 0, true)}, 3, screening{gone: 4}},
		"wants its answer":        {ignore, []activity.Client{client("192.0.2.9", 5, true)}, 0, screening{soon: true}},
		"enough":                  {bytes, []activity.Client{client("192.0.2.9", 10, false)}, 0, screening{wake: true}},
		"enough, and half closed": {bytes, []activity.Client{client("192.0.2.9", 10, true)}, 0, screening{wake: true}},
		"too little":              {bytes, []activity.Client{client("192.0.2.9", 9, false)}, 0, screening{soon: true}},
		"too little, and gone":    {bytes, []activity.Client{client("192.0.2.9", 9, true)}, 0, screening{gone: 1}},
		"half of the queue":       {ignore, slices.Repeat([]activity.Client{client("192.0.2.9", 5, false)}, 64), 0, screening{wake: true}},
		"with resets":             {ignore, slices.Repeat([]activity.Client{client("192.0.2.9", 5, false)}, 4), 60, screening{wake: true}},
	} {
		if got := tt.wake.screen(tt.clients, len(tt.clients)+tt.resets, 128); got != tt.want {
			t.Errorf("%s: got %+v, want %+v", name, got, tt.want)
		}
	}
}

func TestSources(t *testing.T) {
	t.Parallel()
	now := time.Unix(1000, 0)
	peer := func(addr string) *activation.Peer {
		return &activation.Peer{Remote: netip.AddrPortFrom(netip.MustParseAddr(addr), 1)}
	}
	s := newSources(&Limits{MaxConnectionsPerSource: 2, SourcePrefix: 64, AcceptRatePerSource: Rate{3, time.Second}})
	var admitted []source
	admit := func(p *activation.Peer, want sourceLimit) {
		t.Helper()
		who, why := s.admit(now, p)
		if why != want {
			t.Errorf("%+v: got %v, want %v", p, why, want)
		}
		if why == withinLimits {
			admitted = append(admitted, who)
		}
	}
	admit(peer("192.0.2.1"), withinLimits)
	admit(peer("::ffff:192.0.2.1"), withinLimits)
	admit(peer("192.0.2.1"), tooMany)
	admit(peer("192.0.2.2"), withinLimits)
	admit(peer("2001:db8::1"), withinLimits)
	admit(peer("2001:db8::2"), withinLimits)
	admit(peer("2001:db8::3"), tooMany)
	admit(peer("2001:db8:0:1::3"), withinLimits)
	admit(&activation.Peer{UID: 7, Known: true}, withinLimits)
	admit(&activation.Peer{UID: 7, Known: true}, withinLimits)
	admit(&activation.Peer{UID: 7, Known: true}, tooMany)
	admit(&activation.Peer{}, withinLimits) // one that has left already
	for _, who := range admitted {
		s.release(who)
	}
	admit(peer("192.0.2.1"), withinLimits)
	s.release(s.of(peer("192.0.2.1")))
	admit(peer("192.0.2.1"), tooFast)
	now = now.Add(time.Second / 3)
	admit(peer("192.0.2.1"), withinLimits)
	s.release(s.of(peer("192.0.2.1")))

	// Strangers cannot make us remember any number of them.
	for i := range 2 * maxSources {
		addr := netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})
		who, _ := s.admit(now, &activation.Peer{Remote: netip.AddrPortFrom(addr, 1)})
		_ = who // those that come too many share one account, and are above its limits
	}
	if len(s.all) > maxSources+1 {
		t.Errorf("remembers %d sources", len(s.all))
	}
	if newSources(&Limits{MaxConnections: 3}) != nil {
		t.Error("sources are counted without a limit for them")
	}
	var nobody *sources
	if _, why := nobody.admit(now, peer("192.0.2.1")); why != withinLimits {
		t.Error("refused without limits")
	}
	nobody.release(source{})
}

func TestBucket(t *testing.T) {
	t.Parallel()
	now := time.Unix(1000, 0)
	r := Rate{3, 7 * time.Second}
	var b bucket
	for i := range 3 {
		if got := b.fill(now, r); got != 3-i {
			t.Fatalf("got %d tokens, want %d", got, 3-i)
		}
		b.take(1)
	}
	if got := b.fill(now, r); got != 0 {
		t.Fatalf("got %d tokens, want none", got)
	}
	for range 100 { // each deadline brings a token, however it is rounded
		now = b.next(now, r)
		if got := b.fill(now, r); got != 1 {
			t.Fatalf("got %d tokens at the deadline, want 1", got)
		}
		b.take(1)
	}
	if got := b.fill(now.Add(time.Hour), r); got != 3 {
		t.Errorf("got %d tokens after an hour, want 3", got)
	}
	if got := (&bucket{}).fill(now, Rate{}); got != -1 {
		t.Errorf("got %d tokens without a rate, want any number", got)
	}
}
