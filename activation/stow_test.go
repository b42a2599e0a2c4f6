package activation

import (
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
)

// Those who wait at a socket wait where it is parked, with what they have said, until they come back.
func TestStow(t *testing.T) {
	t.Parallel()
	nettest.Need(t, parkable)
	for _, address := range []string{"tcp://127.0.0.1:0", "tcp://127.0.0.1:7181", "tcp://:0", "tcp://[::1]:0"} {
		t.Run(address, func(t *testing.T) {
			t.Parallel()
			s := mustOpen(t, address, Options{})
			to := []string{"127.0.0.1"}
			if s.Address().IP.Is6() {
				to = []string{"::1"}
			}
			for range 5 {
				clients := dialEach(t, s, to, 10)
				mustPark(t, s)
				clients = append(clients, dialEach(t, s, to, 3)...)
				for range 2 { // the second time there is nothing
					if err := s.Stow(); err != nil || !s.Parked() {
						t.Fatalf("got %v, parked %v", err, s.Parked())
					}
					if pending, err := s.Pending(); pending || err != nil {
						t.Fatalf("got %v, %v: something was left", pending, err)
					}
					if getInt(t, s.FD(), unix.SOL_SOCKET, unix.SO_ACCEPTCONN) != 1 {
						t.Fatal("it does not listen")
					}
					clients = append(clients, dialEach(t, s, to, 3)...)
				}
				mustUnpark(t, s)
				clients = append(clients, dialEach(t, s, to, 2)...)
				if got := serveAll(t, s); got != len(clients) {
					t.Fatalf("got %d connections, want %d", got, len(clients))
				}
				expectAnswers(t, clients)
			}
		})
	}
}

// A program that has shut the socket down, or made it listen again, is no obstacle.
func TestStowAfterShutdown(t *testing.T) {
	t.Parallel()
	nettest.Need(t, parkable)
	to := []string{"127.0.0.1"}
	for _, address := range []string{"tcp://127.0.0.1:0", "tcp://127.0.0.1:7182"} {
		s := mustOpen(t, address, Options{})
		clients := dialEach(t, s, to, 3)
		mustPark(t, s)
		if err := errors.Join(unix.Shutdown(s.FD(), unix.SHUT_RDWR), unix.Listen(s.FD(), 1)); err != nil {
			t.Fatal(err)
		}
		if err := s.Stow(); err != nil {
			t.Fatal(err)
		}
		clients = append(clients, dialEach(t, s, to, 3)...)
		if err := unix.Shutdown(s.FD(), unix.SHUT_RDWR); err != nil {
			t.Fatal(err)
		}
		if revived, err := s.Revive(); !revived || err != nil {
			t.Fatal(revived, err)
		}
		if err := s.Stow(); err != nil {
			t.Fatal(err)
		}
		if pending, err := s.Pending(); pending || err != nil {
			t.Errorf("got %v, %v", pending, err)
		}
		mustUnpark(t, s)
		if got := serveAll(t, s); got != len(clients) {
			t.Errorf("got %d connections, want %d", got, len(clients))
		}
		expectAnswers(t, clients)
	}
}

// One that does not listen has nothing to stow; Revive is what it needs.
func TestStowErrors(t *testing.T) {
	t.Parallel()
	nettest.Need(t, parkable)
	s := mustOpen(t, "tcp://127.0.0.1:0", Options{})
	clients := dialEach(t, s, []string{"127.0.0.1"}, 2)
	var se *SocketError
	for _, o := range []*Socket{s, mustOpen(t, "udp://127.0.0.1:0", Options{}), mustOpen(t, "unix:@hg-stow", Options{})} {
		if err := o.Stow(); !errors.Is(err, unix.EINVAL) || !errors.As(err, &se) {
			t.Errorf("%s, which is not parked: got %v, want EINVAL", o.Address(), err)
		}
	}
	mustPark(t, s)
	clients = append(clients, dialEach(t, s, []string{"127.0.0.1"}, 2)...)
	if err := unix.Shutdown(s.FD(), unix.SHUT_RDWR); err != nil {
		t.Fatal(err)
	}
	if err := s.Stow(); err != nil && !errors.Is(err, unix.ENOTCONN) {
		t.Errorf("got %v, want nothing or ENOTCONN", err)
	}
	if _, err := s.Revive(); err != nil {
		t.Fatal(err)
	}
	mustUnpark(t, s)
	if got := serveAll(t, s); got != len(clients) {
		t.Errorf("got %d connections, want %d", got, len(clients))
	}
	expectAnswers(t, clients)
}

// Clients that come all the time, whatever moves, are all served, and nobody is refused.
func TestStowStorm(t *testing.T) {
	t.Parallel()
	nettest.Need(t, parkable)
	s := mustOpen(t, "tcp://127.0.0.1:0", Options{})
	const each, several = 200, 4
	var clients sync.WaitGroup
	var running atomic.Int32
	for range several {
		running.Add(1)
		clients.Go(func() {
			defer running.Add(-1)
			for i := range each {
				if err := ask(s.Address().Port, i); err != nil {
					t.Errorf("request %d: %v", i, err)
					return
				}
			}
		})
	}
	cycles, served := 0, 0
	for running.Load() > 0 {
		mustPark(t, s)
		if err := s.Stow(); err != nil {
			t.Fatal(err)
		}
		if pending, err := s.Pending(); pending || err != nil {
			t.Errorf("got %v, %v: something was left", pending, err)
		}
		mustUnpark(t, s)
		served += serveAll(t, s)
		cycles++
	}
	clients.Wait()
	if served += serveAll(t, s); served != each*several {
		t.Errorf("served %d, want %d", served, each*several)
	}
	t.Logf("%d clients, %d cycles", served, cycles)
}

// A socket that was parked once, and that a process shuts down when it is not, can be parked as before.
func TestParkAfterRevive(t *testing.T) {
	t.Parallel()
	nettest.Need(t, parkable)
	to := []string{"127.0.0.1"}
	for _, address := range []string{"tcp://127.0.0.1:0", "tcp://127.0.0.1:7183", "tcp://:7184"} {
		s := mustOpen(t, address, Options{})
		for i := range 4 {
			var clients []net.Conn
			mustPark(t, s)
			clients = append(clients, dialEach(t, s, to, 3)...)
			mustUnpark(t, s)
			clients = append(clients, dialEach(t, s, to, 3)...)
			if got := serveAll(t, s); got != len(clients) {
				t.Errorf("%s, round %d: got %d connections, want %d", address, i, got, len(clients))
			}
			expectAnswers(t, clients)
			if err := unix.Shutdown(s.FD(), unix.SHUT_RDWR); err != nil {
				t.Fatal(err)
			}
			if revived, err := s.Revive(); !revived || err != nil {
				t.Fatalf("got %v, %v", revived, err)
			}
			if i%2 == 1 {
				if _, err := s.Restore(); err != nil {
					t.Fatal(err)
				}
			}
			if getInt(t, s.FD(), unix.SOL_SOCKET, unix.SO_REUSEPORT) != 0 {
				t.Error("its port is shared")
			}
			if o, err := Open(Spec{Address: s.Address(), Options: Options{ReusePort: true}}); !errors.Is(err, unix.EADDRINUSE) {
				o.Close()
				t.Errorf("a stranger: got %v, want EADDRINUSE", err)
			}
		}
	}
}
