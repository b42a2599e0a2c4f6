package activation

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
)

// run has a goroutine wait in a Watcher until the test ends.
func run(tb testing.TB) (*Watcher, <-chan []Ready) {
	tb.Helper()
	w, err := NewWatcher()
	if err != nil {
		tb.Fatal(err)
	}
	ready, stop, ended := make(chan []Ready), make(chan struct{}), make(chan error)
	go func() {
		for {
			batch, err := w.Wait(time.Time{})
			if err != nil {
				ended <- err
				return
			}
			select {
			case <-stop:
				close(ended)
				return
			default:
			}
			if len(batch) > 0 {
				ready <- slices.Clone(batch)
			}
		}
	}()
	tb.Cleanup(func() {
		close(stop)
		if err := w.Wake(); err != nil {
			tb.Error(err)
		}
		if err := <-ended; err != nil {
			tb.Errorf("Wait: %v", err)
		}
		if err := w.Close(); err != nil {
			tb.Error(err)
		}
	})
	return w, ready
}

// event makes an eventfd: the simplest thing that becomes ready when we say so.
func event(tb testing.TB) int {
	tb.Helper()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { unix.Close(fd) })
	return fd
}

func signal(tb testing.TB, fd int) {
	tb.Helper()
	if _, err := unix.Write(fd, []byte{1, 0, 0, 0, 0, 0, 0, 0}); err != nil {
		tb.Fatal(err)
	}
}

// expect receives one batch of exactly these reports.
func expect(tb testing.TB, ready <-chan []Ready, want ...Ready) {
	tb.Helper()
	select {
	case got := <-ready:
		if fmt.Sprint(got) != fmt.Sprint(want) {
			tb.Fatalf("got %v, want %v", got, want)
		}
	case <-time.After(10 * time.Second):
		tb.Fatalf("got nothing, want %v", want)
	}
}

// expectNothing proves that no report is due: another descriptor that becomes ready
// later is all that is reported. What is ready is in the set before epoll_ctl or write return.
func expectNothing(tb testing.TB, w *Watcher, ready <-chan []Ready) {
	tb.Helper()
	fd := event(tb)
	if err := w.Arm(fd, 1<<63); err != nil {
		tb.Fatal(err)
	}
	signal(tb, fd)
	expect(tb, ready, Ready{Token: 1 << 63})
	if err := w.Remove(fd); err != nil {
		tb.Fatal(err)
	}
}

func TestWatcherReportsOncePerArm(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	w, ready := run(t)
	s := mustOpen(t, "tcp://:0", Options{})
	const token = 0xfedc_ba98_7654_3210
	if err := w.Add(s.FD(), token); err != nil {
		t.Fatal(err)
	}
	mustDial(t, s)
	expectNothing(t, w, ready) // not armed yet
	if err := w.Arm(s.FD(), token); err != nil {
		t.Fatal(err)
	}
	expect(t, ready, Ready{Token: token})
	mustDial(t, s)
	expectNothing(t, w, ready)
	if err := w.Arm(s.FD(), token+1); err != nil { // connections still queue: at once
		t.Fatal(err)
	}
	expect(t, ready, Ready{Token: token + 1})
	for range 2 {
		fd, _, err := s.Accept()
		if err != nil {
			t.Fatal(err)
		}
		unix.Close(fd)
	}
	if err := w.Arm(s.FD(), 7); err != nil {
		t.Fatal(err)
	}
	expectNothing(t, w, ready)
	mustDial(t, s)
	expect(t, ready, Ready{Token: 7})
	if err := w.Remove(s.FD()); err != nil {
		t.Fatal(err)
	}
}

func TestWatcherDisarm(t *testing.T) {
	t.Parallel()
	w, ready := run(t)
	fd := event(t)
	for range 2 { // disarmed, and disarmed again
		if err := w.Arm(fd, 1); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := w.Disarm(fd, 1); err != nil {
				t.Fatal(err)
			}
		}
	}
	signal(t, fd)
	expectNothing(t, w, ready)
	if err := w.Arm(fd, 2); err != nil {
		t.Fatal(err)
	}
	expect(t, ready, Ready{Token: 2})
	if err := errors.Join(w.Remove(fd), w.Remove(fd)); err != nil {
		t.Fatal(err)
	}
}

func TestWatcherErrors(t *testing.T) {
	t.Parallel()
	w, err := NewWatcher()
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Open("/proc/self/exe", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := w.Add(fd, 1); !errors.Is(err, unix.EPERM) {
		t.Errorf("got %v of a regular file, want EPERM", err)
	}
	if err := w.Arm(-1, 1); !errors.Is(err, unix.EBADF) {
		t.Errorf("got %v of no descriptor, want EBADF", err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
}

// Wait returns for a Wake, also for one that came before, and at its deadline; what is
// ready at the deadline is returned.
func TestWatcherWake(t *testing.T) {
	t.Parallel()
	w, err := NewWatcher()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if err := errors.Join(w.Wake(), w.Wake()); err != nil {
		t.Fatal(err)
	}
	if batch, err := w.Wait(time.Time{}); len(batch) != 0 || err != nil {
		t.Errorf("after Wake: got %v, %v, want an empty batch", batch, err)
	}
	begin := time.Now()
	if batch, err := w.Wait(begin.Add(20 * time.Millisecond)); len(batch) != 0 || err != nil || time.Since(begin) < 20*time.Millisecond {
		t.Errorf("deadline: got %v, %v after %s, want an empty batch after 20ms", batch, err, time.Since(begin))
	}
	fd := event(t)
	if err := w.Arm(fd, 5); err != nil {
		t.Fatal(err)
	}
	signal(t, fd)
	if batch, err := w.Wait(time.Time{}); err != nil || !slices.Equal(batch, []Ready{{Token: 5}}) {
		t.Errorf("after a deadline has passed: got %v, %v, want the report", batch, err)
	}
	if err := w.Remove(fd); err != nil {
		t.Fatal(err)
	}
}

// A deadline that has passed keeps nothing from being reported.
func TestWatcherOverdue(t *testing.T) {
	t.Parallel()
	w, err := NewWatcher()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	fd := event(t)
	signal(t, fd)
	for i := range 3 {
		if err := w.Arm(fd, uint64(i)); err != nil {
			t.Fatal(err)
		}
		past := time.Now().Add(-time.Second)
		if batch, err := w.Wait(past); err != nil || !slices.Equal(batch, []Ready{{Token: uint64(i)}}) {
			t.Errorf("got %v, %v, want the report", batch, err)
		}
		if batch, err := w.Wait(past); err != nil || len(batch) != 0 {
			t.Errorf("got %v, %v, want an empty batch", batch, err)
		}
	}
	if err := w.Remove(fd); err != nil {
		t.Fatal(err)
	}
}

// A socket that is armed by edges reports each arrival, also while the one before still waits.
func TestWatcherArmEdge(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	for _, address := range []string{"tcp://127.0.0.1:0", "unix:@hg-edge", "unixpacket:@hg-edge", "udp://127.0.0.1:0", "unixgram:@hg-edge", "fifo://" + tempPath(t, "f")} {
		t.Run(address, func(t *testing.T) {
			t.Parallel()
			w, ready := run(t)
			s := mustOpen(t, address, Options{})
			arrive := func() {
				if s.Address().Network == FIFO {
					signal(t, s.FD())
					return
				}
				fd := mustDial(t, s)
				if !s.Address().Network.Connections() {
					signal(t, fd)
				}
			}
			if err := w.ArmEdge(s.FD(), 1); err != nil {
				t.Fatal(err)
			}
			expectNothing(t, w, ready)
			for range 3 {
				arrive()
				expect(t, ready, Ready{Token: 1})
				expectNothing(t, w, ready)
			}
			if err := w.ArmEdge(s.FD(), 2); err != nil { // what waits is reported under the new token
				t.Fatal(err)
			}
			expect(t, ready, Ready{Token: 2})
			if err := w.Arm(s.FD(), 3); err != nil { // and once only
				t.Fatal(err)
			}
			expect(t, ready, Ready{Token: 3})
			arrive()
			expectNothing(t, w, ready)
			if err := w.ArmEdge(s.FD(), 4); err != nil {
				t.Fatal(err)
			}
			expect(t, ready, Ready{Token: 4})
			if err := w.Disarm(s.FD(), 4); err != nil {
				t.Fatal(err)
			}
			arrive()
			expectNothing(t, w, ready)
		})
	}
}

// Every one of many sockets is reported once.
func TestWatcherMany(t *testing.T) {
	t.Parallel()
	const n = 2000
	w, ready := run(t)
	fds := make([]int, n)
	for i := range fds {
		fds[i] = event(t)
		if err := errors.Join(w.Add(fds[i], uint64(i)), w.Arm(fds[i], uint64(i))); err != nil {
			t.Fatal(err)
		}
	}
	for range 3 {
		go func() {
			for _, fd := range fds {
				signal(t, fd)
			}
		}()
		seen := make(map[uint64]bool)
		for len(seen) < n {
			batch := <-ready
			for _, r := range batch {
				if seen[r.Token] || r.Hangup {
					t.Fatalf("got %+v twice", r)
				}
				seen[r.Token] = true
			}
		}
		expectNothing(t, w, ready)
		var b [8]byte
		for i, fd := range fds {
			if _, err := unix.Read(fd, b[:]); err != nil {
				t.Fatal(err)
			}
			if err := w.Arm(fd, uint64(i)); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// The time from connect(2) until the receiver has the report.
func BenchmarkWatcher(b *testing.B) {
	for _, n := range []int{1, 5000} {
		b.Run(fmt.Sprintf("sockets=%d", n), func(b *testing.B) {
			nettest.Need(b, nettest.Namespaces)
			w, ready := run(b)
			sockets := make([]*Socket, n)
			for i := range sockets {
				sockets[i] = mustOpen(b, fmt.Sprintf("unix:@hg-bench-%d", i), Options{})
				if err := w.Arm(sockets[i].FD(), uint64(i)); err != nil {
					b.Fatal(err)
				}
			}
			s := sockets[n/2]
			client := func() int {
				fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
				if err != nil {
					b.Fatal(err)
				}
				return fd
			}
			to := &unix.SockaddrUnix{Name: s.Address().Path}
			var in time.Duration
			b.ReportAllocs()
			for b.Loop() {
				fd := client()
				start := time.Now()
				if err := unix.Connect(fd, to); err != nil {
					b.Fatal(err)
				}
				<-ready
				in += time.Since(start)
				conn, _, err := s.Accept()
				if err != nil {
					b.Fatal(err)
				}
				unix.Close(conn)
				unix.Close(fd)
				if err := w.Arm(s.FD(), 0); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(in.Nanoseconds())/float64(b.N), "ns/report")
		})
	}
}

func BenchmarkOpen(b *testing.B) {
	nettest.Need(b, nettest.Namespaces)
	spec := Spec{Address: Address{Network: TCP}}
	b.ReportAllocs()
	for b.Loop() {
		s, err := Open(spec)
		if err != nil {
			b.Fatal(err)
		}
		s.Close()
	}
}
