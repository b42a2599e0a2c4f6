package activation

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
)

// allowParking leaves it allowed: tests that park run at the same time.
var allowParking = sync.OnceValue(func() error {
	_, err := AllowParking()
	return err
})

// parkable is the feature that sockets can be parked.
func parkable() error {
	if err := nettest.Namespaces(); err != nil {
		return err
	}
	return allowParking()
}

// inOwnNetwork runs f on a thread with a network namespace that nobody else is in.
func inOwnNetwork(t *testing.T, f func()) {
	t.Helper()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		runtime.LockOSThread() // and never back: the thread ends with the goroutine
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Error(err)
			return
		}
		f()
	}()
	<-ended
	if t.Failed() {
		t.FailNow()
	}
}

// dialEach connects n clients to s by each of the IPs, and has each say its number.
func dialEach(t *testing.T, s *Socket, ips []string, n int) []net.Conn {
	t.Helper()
	var out []net.Conn
	for _, ip := range ips {
		for range n {
			c, err := net.DialTimeout("tcp", net.JoinHostPort(ip, fmt.Sprint(s.Address().Port)), 10*time.Second)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close() })
			if _, err := fmt.Fprintf(c, "%08d", len(out)); err != nil {
				t.Fatal(err)
			}
			out = append(out, c)
		}
	}
	return out
}

// serveAll answers whoever is in the queue of s, and says how many there were.
func serveAll(t *testing.T, s *Socket) int {
	t.Helper()
	for n := 0; ; n++ {
		fd, _, err := s.Accept()
		if KindOfAcceptError(err) == AcceptEmpty {
			return n
		}
		if err != nil {
			t.Fatal(err)
		}
		var b [8]byte
		if k, err := unix.Read(fd, b[:]); k != 8 || err != nil {
			t.Errorf("read: got %d bytes, %v", k, err)
		}
		if _, err := unix.Write(fd, b[:]); err != nil {
			t.Error(err)
		}
		if err := unix.Close(fd); err != nil {
			t.Error(err)
		}
	}
}

// expectAnswers reads back what every client said.
func expectAnswers(t *testing.T, clients []net.Conn) {
	t.Helper()
	for i, c := range clients {
		if err := c.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(c)
		if err != nil {
			t.Errorf("client %d of %d: %v", i, len(clients), err)
		}
		if len(b) != 8 {
			t.Errorf("client %d of %d: got %q", i, len(clients), b)
		}
	}
}

func mustPark(t *testing.T, s *Socket) {
	t.Helper()
	if err := s.Park(); err != nil || !s.Parked() {
		t.Fatalf("got %v, parked %v", err, s.Parked())
	}
}

func mustUnpark(t *testing.T, s *Socket) {
	t.Helper()
	if err := s.Unpark(); err != nil || s.Parked() {
		t.Fatalf("got %v, parked %v", err, s.Parked())
	}
}

func TestPark(t *testing.T) {
	t.Parallel()
	nettest.Need(t, parkable)
	const v4, v6 = "127.0.0.1", "::1"
	tests := map[string]struct {
		address string
		o       Options
		ips     []string
	}{
		"IPv4":            {"tcp://127.0.0.1:0", Options{}, []string{v4}},
		"IPv4 wildcard":   {"tcp://0.0.0.0:0", Options{}, []string{v4, "127.0.0.2"}},
		"IPv6":            {"tcp://[::1]:0", Options{}, []string{v6}},
		"both versions":   {"tcp://:0", Options{Family: FamilyDual}, []string{v4, v6}},
		"IPv6 only":       {"tcp://:0", Options{Family: FamilyIPv6}, []string{v6}},
		"on a device":     {"tcp://:0", Options{Device: "lo"}, []string{v4, v6}},
		"free bind":       {"tcp://127.9.9.9:0", Options{FreeBind: true, Transparent: true}, []string{"127.9.9.9"}},
		"deferred accept": {"tcp://:0", Options{DeferAccept: 3 * time.Second}, []string{v4, v6}},
		"a short backlog": {"tcp://127.0.0.1:0", Options{Backlog: 8}, []string{v4}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := mustOpen(t, test.address, test.o)
			n := len(test.ips)
			for range 5 {
				before := dialEach(t, s, test.ips, 2)
				mustPark(t, s)
				during := dialEach(t, s, test.ips, 5)
				if err := s.Park(); err != nil { // again
					t.Fatal(err)
				}
				if got := serveAll(t, s); got != 2*n {
					t.Fatalf("got %d connections while parked, want the %d from before", got, 2*n)
				}
				expectAnswers(t, before)
				if pending, err := s.Pending(); pending || err != nil {
					t.Fatalf("got %v, %v while parked", pending, err)
				}
				mustUnpark(t, s)
				after := dialEach(t, s, test.ips, 1)
				if err := s.Unpark(); err != nil { // again
					t.Fatal(err)
				}
				if got := serveAll(t, s); got != 6*n {
					t.Fatalf("got %d connections, want %d", got, 6*n)
				}
				expectAnswers(t, append(during, after...))
			}
		})
	}
}

// What moves may be more than the backlog.
func TestUnparkFull(t *testing.T) {
	t.Parallel()
	nettest.Need(t, parkable)
	s := mustOpen(t, "tcp://127.0.0.1:0", Options{Backlog: 3})
	clients := dialEach(t, s, []string{"127.0.0.1"}, 4)
	mustPark(t, s)
	clients = append(clients, dialEach(t, s, []string{"127.0.0.1"}, 4)...)
	mustUnpark(t, s)
	if got := serveAll(t, s); got != len(clients) {
		t.Errorf("got %d connections, want %d", got, len(clients))
	}
	expectAnswers(t, clients)
}

// A program that asks to share the address must not get it, not even after it was shared for a while.
func TestParkStranger(t *testing.T) {
	t.Parallel()
	nettest.Need(t, parkable)
	for _, address := range []string{"tcp://127.0.0.1:0", "tcp://:0", "tcp://[::1]:0"} {
		s := mustOpen(t, address, Options{})
		spec := Spec{Address: s.Address(), Options: Options{ReusePort: true}}
		for range 3 {
			if o, err := Open(spec); !errors.Is(err, unix.EADDRINUSE) {
				o.Close()
				t.Fatalf("%s: got %v, want EADDRINUSE", address, err)
			}
			if getInt(t, s.FD(), unix.SOL_SOCKET, unix.SO_REUSEPORT) != 0 {
				t.Errorf("%s: its port is shared", address)
			}
			mustPark(t, s)
			mustUnpark(t, s)
		}
	}
}

// What accepted sockets inherit is the same for those that came while the socket was parked, also
// where another program has set it.
func TestParkOptions(t *testing.T) {
	t.Parallel()
	nettest.Need(t, parkable)
	mark, priority, tos := 7, 3, 0x10
	s := mustOpen(t, "tcp://:0", Options{
		KeepAlive: true, KeepAliveTime: 71 * time.Second, KeepAliveInterval: 5 * time.Second, KeepAliveProbes: 4, NoDelay: true,
		ReceiveBuffer: 32768, SendBuffer: 65536, Mark: &mark, Priority: &priority, TOS: &tos, TTL: 33, Congestion: "reno",
	})
	if err := unix.SetsockoptInt(s.FD(), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, 4711); err != nil {
		t.Fatal(err)
	}
	read := func() (out []int) {
		fd, _, err := s.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		for _, o := range append(likeness(), option{unix.SOL_SOCKET, unix.SO_RCVBUF}, option{unix.SOL_SOCKET, unix.SO_SNDBUF}) {
			out = append(out, getInt(t, fd, o.level, o.name))
		}
		return out
	}
	dialEach(t, s, []string{"::1"}, 1)
	want := read()
	mustPark(t, s)
	dialEach(t, s, []string{"::1"}, 1)
	mustUnpark(t, s)
	if got := read(); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("got  %v\nwant %v\nof   %v", got, want, likeness())
	}
}

func TestNotParkable(t *testing.T) {
	t.Parallel()
	nettest.Need(t, parkable)
	inherited := mustOpen(t, "tcp://127.0.0.1:0", Options{ReusePort: true})
	inherited.spec.Options.ReusePort, inherited.joint = false, true
	for _, s := range []*Socket{
		mustOpen(t, "udp://127.0.0.1:0", Options{}),
		mustOpen(t, "unix:@hg-park", Options{}),
		mustOpen(t, "tcp://127.0.0.1:0", Options{ReusePort: true}),
		inherited,
	} {
		if err := s.Park(); !errors.Is(err, ErrNotParkable) || s.Parked() {
			t.Errorf("%s: got %v, parked %v", s.Address(), err, s.Parked())
		}
	}
}

// Only sockets of one user can share an address, so those that park one of another user's are that user's, too.
func TestParkOtherUser(t *testing.T) {
	t.Parallel()
	nettest.Need(t, parkable, nettest.RealRoot)
	s := mustOpen(t, "tcp://127.0.0.1:0", Options{})
	if err := unix.Fchown(s.FD(), 65534, -1); err != nil { // which says who has bound it (sockfs_setattr in the kernel)
		t.Fatal(err)
	}
	mustPark(t, s)
	clients := dialEach(t, s, []string{"127.0.0.1"}, 3)
	if pending, err := s.Pending(); pending || err != nil {
		t.Errorf("got %v, %v, want nothing in its own queue", pending, err)
	}
	mustUnpark(t, s)
	if getInt(t, s.FD(), unix.SOL_SOCKET, unix.SO_REUSEPORT) != 0 {
		t.Error("its port is shared")
	}
	if got := serveAll(t, s); got != 3 {
		t.Errorf("got %d connections, want 3", got)
	}
	expectAnswers(t, clients)
}

// Connections that a service has accepted under a user of its own, and those that have just
// ended, are no obstacle.
func TestParkConnections(t *testing.T) {
	t.Parallel()
	nettest.Need(t, parkable, nettest.RealRoot)
	for _, address := range []string{"tcp://127.0.0.1:0", "tcp://:0"} {
		s := mustOpen(t, address, Options{})
		for i := range 3 {
			client := dialEach(t, s, []string{"127.0.0.1"}, 1)[0]
			fd, _, err := s.Accept()
			if err != nil {
				t.Fatal(err)
			}
			if err := unix.Fchown(fd, 65534, -1); err != nil {
				t.Fatal(err)
			}
			mustPark(t, s)
			mustUnpark(t, s)
			if i == 1 { // the server closes first, so that its end is in TIME_WAIT
				unix.Shutdown(fd, unix.SHUT_WR)
				client.Close()
			}
			if err := unix.Close(fd); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// Without the kernel's leave nothing is parked, and what is parked stays so.
func TestParkNotAllowed(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	inOwnNetwork(t, func() {
		s := mustOpen(t, "tcp://127.0.0.1:0", Options{})
		if err := s.Park(); !errors.Is(err, ErrNotParkable) {
			t.Errorf("got %v, want ErrNotParkable", err)
		}
		release, err := AllowParking()
		if err != nil {
			t.Error(err)
			return
		}
		if err := s.Park(); err != nil {
			t.Error(err)
		}
		sw := Switch{Path: migratePath, wasOff: true}
		if err := sw.On(); err != nil { // as somebody else who wants it
			t.Error(err)
		}
		if err := release(); err != nil {
			t.Error(err)
		}
		if on, err := isOn(migratePath); !on || err != nil {
			t.Errorf("got %v, %v, want it on for the other", on, err)
		}
		if err := sw.Restore(); err != nil {
			t.Error(err)
		}
		if on, err := isOn(migratePath); on || err != nil {
			t.Errorf("got %v, %v after the last", on, err)
		}
		if err := s.Unpark(); !errors.Is(err, ErrNotParkable) || !s.Parked() {
			t.Errorf("got %v, parked %v", err, s.Parked())
		}
		if err := errors.Join(sw.On(), s.Unpark(), sw.Restore()); err != nil || s.Parked() {
			t.Errorf("got %v, parked %v", err, s.Parked())
		}
	})
}

// Who may not use the socket may not do so while it is parked, either.
func TestParkAccess(t *testing.T) {
	t.Parallel()
	nettest.Need(t, parkable)
	s := mustOpen(t, "tcp://127.0.0.1:0", Options{Access: &Access{Deny: []netip.Prefix{netip.MustParsePrefix("127.0.0.9/32")}}})
	for range 2 {
		mustPark(t, s)
		denied, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		err = errors.Join(unix.Bind(denied, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 9}}))
		if e := unix.Connect(denied, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: int(s.Address().Port)}); err != nil || !errors.Is(e, unix.EINPROGRESS) {
			t.Fatalf("got %v, %v, want EINPROGRESS", err, e)
		}
		clients := dialEach(t, s, []string{"127.0.0.1"}, 3)
		mustUnpark(t, s)
		if got := serveAll(t, s); got != len(clients) { // on the loopback interface, what is let in is there at once
			t.Errorf("got %d connections, want %d", got, len(clients))
		}
		expectAnswers(t, clients)
		if err := unix.Close(denied); err != nil {
			t.Fatal(err)
		}
	}
}
