package activation

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
)

// onlySYN lets a listening socket hear the beginnings of handshakes, and never their ends.
func onlySYN(t *testing.T, fd int) {
	t.Helper()
	program := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_B | unix.BPF_ABS, K: 13}, // the flags
		{Code: unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K, K: 2, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: 1 << 16},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0},
	}
	if err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}); err != nil {
		t.Fatal(err)
	}
}

// A handshake belongs to the socket that got its beginning, and moves with the queue of that.
func TestParkHandshake(t *testing.T) {
	t.Parallel()
	nettest.Need(t, parkable)
	for _, ip := range []string{"127.0.0.1", "::1"} {
		for _, talks := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, client talks %v", ip, talks), func(t *testing.T) {
				t.Parallel()
				s := mustOpen(t, "tcp://:0", Options{})
				onlySYN(t, s.FD())
				dial := func() net.Conn {
					c, err := net.Dial("tcp", net.JoinHostPort(ip, fmt.Sprint(s.Address().Port)))
					if err != nil {
						t.Fatal(err)
					}
					t.Cleanup(func() { c.Close() })
					if talks {
						if _, err := c.Write([]byte("12345678")); err != nil {
							t.Fatal(err)
						}
					}
					return c
				}
				first := dial()
				mustPark(t, s)
				if err := unix.SetsockoptInt(s.FD(), unix.SOL_SOCKET, unix.SO_DETACH_FILTER, 0); err != nil {
					t.Fatal(err)
				}
				onlySYN(t, s.parking.fd)
				second := dial()
				waitFor := func() {
					nettest.Eventually(t, func() error {
						if pending, err := s.Pending(); !pending || err != nil {
							return fmt.Errorf("nothing in the queue: %w", err)
						}
						return nil
					})
				}
				if talks {
					waitFor()
					serveAll(t, s)
					expectAnswers(t, []net.Conn{first})
				}
				mustUnpark(t, s)
				if talks {
					waitFor()
					if got := serveAll(t, s); got != 1 {
						t.Errorf("got %d connections, want 1", got)
					}
					expectAnswers(t, []net.Conn{second})
					return
				}
				for range 2 {
					waitFor()
					fd, _, err := s.Accept()
					if err != nil {
						t.Fatal(err)
					}
					if err := unix.Close(fd); err != nil {
						t.Fatal(err)
					}
				}
				for _, c := range []net.Conn{first, second} {
					if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
						t.Errorf("got %v, want EOF", err)
					}
				}
			})
		}
	}
}

// A process that shuts the socket down while it is parked costs nobody the connection.
func TestParkShutDown(t *testing.T) {
	t.Parallel()
	nettest.Need(t, parkable)
	for _, address := range []string{"tcp://127.0.0.1:0", "tcp://:0"} {
		s := mustOpen(t, address, Options{})
		to := []string{"127.0.0.1"}
		for range 3 {
			clients := dialEach(t, s, to, 10)
			mustPark(t, s)
			clients = append(clients, dialEach(t, s, to, 5)...)
			if err := errors.Join(unix.SetsockoptInt(s.FD(), unix.SOL_SOCKET, unix.SO_REUSEPORT, 0), unix.Shutdown(s.FD(), unix.SHUT_RDWR)); err != nil {
				t.Fatal(err)
			}
			clients = append(clients, dialEach(t, s, to, 5)...)
			if err := s.Unpark(); !errors.Is(err, ErrShutDown) || !s.Parked() {
				t.Fatalf("got %v, parked %v", err, s.Parked())
			}
			if revived, err := s.Revive(); !revived || err != nil {
				t.Fatalf("got %v, %v", revived, err)
			}
			clients = append(clients, dialEach(t, s, to, 5)...)
			if pending, err := s.Pending(); pending || err != nil {
				t.Fatalf("got %v, %v: it is still parked", pending, err)
			}
			mustUnpark(t, s)
			clients = append(clients, dialEach(t, s, to, 5)...)
			if got := serveAll(t, s); got != len(clients) {
				t.Fatalf("got %d connections, want %d", got, len(clients))
			}
			expectAnswers(t, clients)

			// Shut down first, and parked then.
			if err := unix.Shutdown(s.FD(), unix.SHUT_RDWR); err != nil {
				t.Fatal(err)
			}
			mustPark(t, s)
			clients = dialEach(t, s, to, 5)
			if revived, err := s.Revive(); !revived || err != nil {
				t.Fatalf("got %v, %v", revived, err)
			}
			clients = append(clients, dialEach(t, s, to, 5)...)
			mustUnpark(t, s)
			if got := serveAll(t, s); got != len(clients) {
				t.Fatalf("got %d connections, want %d", got, len(clients))
			}
			expectAnswers(t, clients)
		}
	}
}

// A process that makes a parked socket listen again by itself gets nobody, whatever its backlog is.
func TestParkListenAgain(t *testing.T) {
	t.Parallel()
	nettest.Need(t, parkable)
	for address, shutBefore := range map[string]bool{"tcp://127.0.0.1:7171": false, "tcp://:7172": false, "tcp://[::1]:7173": true} {
		s := mustOpen(t, address, Options{})
		to := []string{"127.0.0.1"}
		if s.Address().IP.Is6() {
			to = []string{"::1"}
		}
		again := func() {
			if err := errors.Join(unix.Shutdown(s.FD(), unix.SHUT_RDWR), unix.Listen(s.FD(), 0)); err != nil {
				t.Fatal(err)
			}
		}
		if shutBefore {
			again()
		}
		mustPark(t, s)
		clients := dialEach(t, s, to, 3)
		for range 3 {
			again()
			mustPark(t, s)
			clients = append(clients, dialEach(t, s, to, 3)...)
			if pending, err := s.Pending(); pending || err != nil {
				t.Fatalf("%s: got %v, %v while parked", address, pending, err)
			}
		}
		if _, err := s.Restore(); err != nil { // the backlog
			t.Fatal(err)
		}
		if err := s.Readmit(); err != nil {
			t.Fatal(err)
		}
		clients = append(clients, dialEach(t, s, to, 3)...)
		mustUnpark(t, s)
		clients = append(clients, dialEach(t, s, to, 1)...)
		if got := serveAll(t, s); got != len(clients) {
			t.Errorf("%s: got %d connections, want %d", address, got, len(clients))
		}
		expectAnswers(t, clients)
	}
}

// A process that waits for the socket hears of what moves there.
func TestUnparkWakes(t *testing.T) {
	t.Parallel()
	nettest.Need(t, parkable)
	s := mustOpen(t, "tcp://127.0.0.1:0", Options{})
	w, ready := run(t)
	if err := w.Arm(s.FD(), 1); err != nil {
		t.Fatal(err)
	}
	mustPark(t, s)
	clients := dialEach(t, s, []string{"127.0.0.1"}, 3)
	expectNothing(t, w, ready)
	mustUnpark(t, s)
	expect(t, ready, Ready{Token: 1})
	serveAll(t, s)
	expectAnswers(t, clients)
	if err := w.Remove(s.FD()); err != nil {
		t.Fatal(err)
	}
}

// Between Readmit and Unpark new connections come to the socket, and the others wait on.
func TestReadmit(t *testing.T) {
	t.Parallel()
	nettest.Need(t, parkable)
	s := mustOpen(t, "tcp://127.0.0.1:0", Options{})
	to := []string{"127.0.0.1"}
	mustPark(t, s)
	parked := dialEach(t, s, to, 3)
	for _, shut := range []bool{false, true} {
		if shut { // which changes the order in the group
			if err := unix.Shutdown(s.FD(), unix.SHUT_RDWR); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.Readmit(); err != nil || !s.Parked() {
			t.Fatalf("got %v, parked %v", err, s.Parked())
		}
		if _, err := s.Revive(); err != nil {
			t.Fatal(err)
		}
		clients := dialEach(t, s, to, 3)
		if got := serveAll(t, s); got != 3 {
			t.Errorf("got %d connections, want 3", got)
		}
		expectAnswers(t, clients)
		mustPark(t, s)
		parked = append(parked, dialEach(t, s, to, 3)...)
		if got := serveAll(t, s); got != 0 {
			t.Errorf("got %d connections while parked", got)
		}
	}
	mustUnpark(t, s)
	if err := s.Readmit(); err != nil {
		t.Error(err)
	}
	if got := serveAll(t, s); got != len(parked) {
		t.Errorf("got %d connections, want %d", got, len(parked))
	}
	expectAnswers(t, parked)
}

func TestParkClose(t *testing.T) {
	t.Parallel()
	nettest.Need(t, parkable)
	s, err := Open(Spec{Address: mustParse(t, "tcp://127.0.0.1:0")})
	if err != nil {
		t.Fatal(err)
	}
	mustPark(t, s)
	if err := s.Close(); err != nil || s.Parked() {
		t.Fatalf("got %v, parked %v", err, s.Parked())
	}
	again, err := Open(Spec{Address: s.Address()})
	if err != nil {
		t.Fatal(err)
	}
	if err := again.Close(); err != nil {
		t.Fatal(err)
	}
}

// Clients that come all the time notice nothing.
func TestParkStorm(t *testing.T) {
	t.Parallel()
	nettest.Need(t, parkable)
	for _, address := range []string{"tcp://127.0.0.1:0", "tcp://:0"} {
		s := mustOpen(t, address, Options{})
		stop, served := make(chan struct{}), make(chan int)
		go func() {
			n := 0
			for {
				select {
				case <-stop:
					served <- n
					return
				default:
				}
				fds := []unix.PollFd{{Fd: int32(s.FD()), Events: unix.POLLIN}}
				_, _ = unix.Poll(fds, 10)
				n += serveAll(t, s)
			}
		}()
		const perClient = 500
		var clients sync.WaitGroup
		var running atomic.Int32
		for range 4 {
			running.Add(1)
			clients.Go(func() {
				defer running.Add(-1)
				for i := range perClient {
					if err := ask(s.Address().Port, i); err != nil {
						t.Errorf("request %d: %v", i, err)
						return
					}
				}
			})
		}
		cycles := 0
		for running.Load() > 0 {
			mustPark(t, s)
			mustUnpark(t, s)
			cycles++
		}
		clients.Wait()
		close(stop)
		if n := <-served; n != 4*perClient {
			t.Errorf("served %d, want %d", n, 4*perClient)
		}
		t.Logf("%s: %d clients, %d cycles", address, 4*perClient, cycles)
	}
}

// ask is one client of the storm.
func ask(port uint16, i int) error {
	c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return err
	}
	want := fmt.Sprintf("%08d", i)
	if _, err := c.Write([]byte(want)); err != nil {
		return err
	}
	b, err := io.ReadAll(c)
	if err != nil || string(b) != want {
		return fmt.Errorf("got %q: %w", b, err)
	}
	return nil
}

func BenchmarkPark(b *testing.B) {
	nettest.Need(b, parkable)
	for _, address := range []string{"tcp://127.0.0.1:0", "tcp://:0"} {
		b.Run(address, func(b *testing.B) {
			s := mustOpen(b, address, Options{})
			var park time.Duration
			b.ReportAllocs()
			for b.Loop() {
				start := time.Now()
				if err := s.Park(); err != nil {
					b.Fatal(err)
				}
				park += time.Since(start)
				if err := s.Unpark(); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(park.Nanoseconds())/float64(b.N), "ns/park")
		})
	}
}
