package supervisor

import (
	"errors"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"hibergate/activation"
	"hibergate/supervisor/process"
)

func idleService(name string) *Service {
	return &Service{Name: name, Idle: Idle{StopAfter: 10 * time.Second}}
}

// A service sleeps for a hundred hours, is woken by traffic, and is put to sleep again.
func TestNap(t *testing.T) {
	perform(t, []*Service{idleService("web")}, func(st *stage) {
		t := st.t
		st.pass(100 * time.Hour)
		if len(st.procs) != 0 || st.looks != 0 {
			t.Fatalf("%d processes and %d looks without traffic", len(st.procs), st.looks)
		}
		st.traffic("web")
		st.pass(time.Second)
		st.want("web", Running)
		st.set(func() { st.sum.Open = 1 })
		st.pass(time.Hour)
		st.want("web", Running)
		st.set(func() { st.sum.Open, st.sum.Last = 0, time.Now() })
		st.pass(21 * time.Second)
		st.want("web", Listening)
		if diff := cmp.Diff([]syscall.Signal{syscall.SIGTERM, syscall.SIGCONT}, st.last().signals); diff != "" {
			t.Errorf("signals (-want +got):\n%s", diff)
		}
		st.traffic("web")
		st.pass(time.Second)
		if len(st.procs) != 2 {
			t.Errorf("got %d processes, want a second one", len(st.procs))
		}
	})
}

// A client that comes while the process is frozen keeps it alive.
func TestClientDuringConfirm(t *testing.T) {
	perform(t, []*Service{idleService("web")}, func(st *stage) {
		t := st.t
		st.traffic("web")
		st.set(func() { st.frozen = func() { st.sum.Open = 1 } })
		st.pass(11 * time.Second)
		st.want("web", Running)
		if p := st.last(); st.tree("web").stopped || len(p.signals) > 0 {
			t.Errorf("got %+v, want a thawed process without a signal", p)
		}
	})
}

// Many services that are due at the same time are looked at in one pass.
func TestLooksAreShared(t *testing.T) {
	services := make([]*Service, 100)
	for i := range services {
		services[i] = idleService(string(rune('a'+i/26)) + string(rune('a'+i%26)))
	}
	perform(t, services, func(st *stage) {
		t := st.t
		st.set(func() { st.sum.Open = 1 })
		for _, svc := range services {
			st.traffic(svc.Name)
		}
		st.set(func() { st.looks = 0 })
		st.pass(10*time.Second + 50*time.Millisecond)
		if st.looks > 2 {
			t.Errorf("got %d looks at 100 services that are due together, want 2 at most", st.looks)
		}
	})
}

func TestRequests(t *testing.T) {
	perform(t, []*Service{idleService("web"), {Name: "git", Accept: true}}, func(st *stage) {
		t := st.t
		ctx := t.Context()
		status, err := st.s.Wake(ctx, "web")
		if err != nil || status.State != "running" || len(status.PIDs) != 1 {
			t.Fatalf("wake: got %+v, %v, want it running", status, err)
		}
		if _, err := st.s.Wake(ctx, "web"); err != nil || len(st.procs) != 1 {
			t.Fatalf("wake again: got %v and %d processes, want the same one", err, len(st.procs))
		}
		status, err = st.s.Sleep(ctx, "web")
		if err != nil || status.State != "listening" || status.PIDs != nil {
			t.Fatalf("sleep: got %+v, %v, want it listening", status, err)
		}
		if _, err := st.s.Sleep(ctx, "web"); err != nil {
			t.Fatalf("sleep again: %v", err)
		}
		if _, err := st.s.Wake(ctx, "git"); !errors.Is(err, ErrPerConnection) {
			t.Errorf("wake accept = true: got %v, want ErrPerConnection", err)
		}
		if _, err := st.s.Wake(ctx, "nobody"); !errors.Is(err, ErrUnknownService) {
			t.Errorf("wake nobody: got %v, want ErrUnknownService", err)
		}
		if _, err := st.s.Status(ctx, "nobody", false); !errors.Is(err, ErrUnknownService) {
			t.Errorf("status nobody: got %v, want ErrUnknownService", err)
		}
		st.set(func() { st.fail = errors.New("no such file") })
		if status, err := st.s.Wake(ctx, "web"); err == nil || status.State != "backoff" {
			t.Errorf("wake what cannot start: got %+v, %v, want an error", status, err)
		}
	})
}

// A process that ignores SIGTERM is killed after stop.timeout, and Sleep waits for that.
func TestSleepStubborn(t *testing.T) {
	perform(t, []*Service{{Name: "web", Stop: Stop{Signal: syscall.SIGTERM, FinalSignal: syscall.SIGKILL, Timeout: 5 * time.Second}}}, func(st *stage) {
		t := st.t
		st.traffic("web")
		st.pass(time.Second)
		st.set(func() { st.last().stubborn = true })
		begin := time.Now()
		if _, err := st.s.Sleep(t.Context(), "web"); err != nil || time.Since(begin).Truncate(time.Second) != 5*time.Second {
			t.Errorf("got %v after %s, want it asleep after 5s", err, time.Since(begin))
		}
	})
}

// After a failed start the clients wait in the queue until the backoff is over.
func TestBackoff(t *testing.T) {
	perform(t, []*Service{idleService("web")}, func(st *stage) {
		st.set(func() { st.fail = errors.New("no such file") })
		st.traffic("web")
		st.pass(500 * time.Millisecond)
		st.want("web", Backoff)
		st.set(func() { st.fail = nil })
		st.pass(time.Second)
		st.traffic("web")
		st.pass(time.Second)
		st.want("web", Running)
	})
}

// A report of a socket that was disarmed while it was on its way means nothing.
func TestLateReport(t *testing.T) {
	perform(t, []*Service{idleService("web")}, func(st *stage) {
		fd := st.s.byName["web"].ports[0].sock.FD()
		late := st.armed[fd]
		st.traffic("web")
		st.pass(time.Second)
		st.last().exit(process.ExitStatus{})
		synctest.Wait()
		st.ready <- []activation.Ready{{Token: late}}
		st.pass(time.Second)
		st.want("web", Listening)
	})
}

// The first signal stops every process, the second one kills at once.
func TestShutdown(t *testing.T) {
	perform(t, []*Service{idleService("web"), {Name: "git", Accept: true}}, func(st *stage) {
		t := st.t
		st.traffic("web")
		st.traffic("git")
		st.pass(time.Second)
		for _, p := range st.procs {
			st.set(func() { p.stubborn = true })
		}
		begin := time.Now()
		st.stop()
		st.pass(time.Second)
		if _, err := st.s.Wake(t.Context(), "web"); !errors.Is(err, ErrShuttingDown) {
			t.Errorf("wake: got %v, want ErrShuttingDown", err)
		}
		st.s.KillNow()
		st.ended <- <-st.ended
		if took := time.Since(begin); took > 2*time.Second {
			t.Errorf("took %s", took)
		}
		for _, p := range st.procs {
			if diff := cmp.Diff([]syscall.Signal{syscall.SIGTERM, syscall.SIGCONT, syscall.SIGKILL}, p.signals); diff != "" {
				t.Errorf("signals (-want +got):\n%s", diff)
			}
		}
		if err := st.s.Ping(t.Context()); !errors.Is(err, ErrShuttingDown) {
			t.Errorf("ping: got %v, want ErrShuttingDown", err)
		}
	})
}

func TestCounts(t *testing.T) {
	perform(t, []*Service{idleService("web"), idleService("api")}, func(st *stage) {
		t := st.t
		changed := make(chan Counts, 1)
		if err := st.s.ask(func() { st.s.changed = changed }); err != nil {
			t.Fatal(err)
		}
		st.traffic("web")
		st.pass(time.Millisecond)
		st.set(func() { st.fail = errors.New("no such file") })
		st.traffic("api")
		st.pass(10 * time.Millisecond)
		if got, want := <-changed, (Counts{Awake: 1, Failing: 1, Total: 2}); got != want {
			t.Errorf("got %+v, want %+v", got, want)
		}
	})
}

// A start that never comes back does not hold up the end, and what it starts after
// all is killed.
func TestShutdownWhileStartHangs(t *testing.T) {
	perform(t, []*Service{idleService("web")}, func(st *stage) {
		t := st.t
		hang := make(chan struct{})
		st.set(func() { st.hang = hang })
		st.traffic("web")
		st.stop()
		st.pass(time.Hour)
		if err := st.s.Ping(t.Context()); err != nil {
			t.Fatalf("ended before KillNow: %v", err)
		}
		st.s.KillNow()
		st.ended <- <-st.ended
		close(hang)
		synctest.Wait()
		if diff := cmp.Diff([]syscall.Signal{syscall.SIGKILL}, st.last().signals); diff != "" {
			t.Errorf("signals (-want +got):\n%s", diff)
		}
	})
}

// A socket that could not be armed (epoll_ctl(2): ENOMEM, ENOSPC) is armed after the backoff.
func TestArmFails(t *testing.T) {
	perform(t, []*Service{idleService("web")}, func(st *stage) {
		st.traffic("web")
		st.pass(time.Second)
		st.set(func() { st.armFails = errors.New("no space left on device") })
		st.last().exit(process.ExitStatus{})
		st.pass(500 * time.Millisecond)
		st.want("web", Backoff)
		st.pass(time.Second)
		st.want("web", Listening)
		st.traffic("web")
	})
}
