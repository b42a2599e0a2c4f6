package activation

import (
	"errors"
	"fmt"
	"math"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
)

// madeByProgram is a socket that a program has made and bound, and where it has connections may listen.
type madeByProgram struct {
	domain, kind, protocol int
	set                    func(fd int) error
	to                     unix.Sockaddr // nil: to nothing
	listen                 bool
}

// make returns a descriptor that Take may have.
func (m madeByProgram) make(t *testing.T) int {
	t.Helper()
	fd, err := unix.Socket(m.domain, m.kind|unix.SOCK_CLOEXEC, m.protocol)
	if err != nil {
		t.Fatal(err)
	}
	if m.set != nil {
		err = m.set(fd)
	}
	if err == nil && m.to != nil {
		err = unix.Bind(fd, m.to)
	}
	if err == nil && m.listen {
		err = unix.Listen(fd, 7)
	}
	if err != nil {
		unix.Close(fd)
		t.Fatal(err)
	}
	return fd
}

// mustTake takes over what a program has made.
func mustTake(t *testing.T, m madeByProgram, o Options) *Socket {
	t.Helper()
	fd := m.make(t)
	s, err := Take(Spec{Name: "taken", Options: o}, fd)
	if err != nil {
		unix.Close(fd)
		t.Fatal(err)
	}
	if s.FD() != fd {
		t.Errorf("got descriptor %d, want %d", s.FD(), fd)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func setInt(level, option, value int) func(int) error {
	return func(fd int) error { return unix.SetsockoptInt(fd, level, option, value) }
}

var (
	mapped4   = [16]byte{10: 0xff, 11: 0xff, 12: 127, 15: 1}
	mappedAny = [16]byte{10: 0xff, 11: 0xff}
	loopback6 = [16]byte{15: 1}
)

// What Take finds, Open makes again from what Reopen says: a socket of the same kind in the same place.
func TestTakeAndReopen(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	const stream, dgram, four, six, local = unix.SOCK_STREAM, unix.SOCK_DGRAM, unix.AF_INET, unix.AF_INET6, unix.AF_UNIX
	v4 := func(b ...byte) *unix.SockaddrInet4 { return &unix.SockaddrInet4{Addr: [4]byte(b)} }
	v6 := func(b [16]byte) *unix.SockaddrInet6 { return &unix.SockaddrInet6{Addr: b} }
	only := setInt(unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1)
	notOnly := setInt(unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 0)
	device := func(fd int) error { return unix.BindToDevice(fd, "lo") }
	for name, tt := range map[string]struct {
		m    madeByProgram
		o    Options
		want string // with %d for the port
		spec Options
	}{
		"TCP, IPv4":                 {madeByProgram{four, stream, 0, nil, v4(127, 0, 0, 1), true}, Options{}, "tcp://127.0.0.1:%d", Options{}},
		"TCP, does not listen yet":  {madeByProgram{four, stream, 0, nil, v4(127, 0, 0, 1), false}, Options{}, "tcp://127.0.0.1:%d", Options{}},
		"TCP, IPv4 wildcard":        {madeByProgram{four, stream, 0, nil, v4(0, 0, 0, 0), true}, Options{}, "tcp://0.0.0.0:%d", Options{}},
		"TCP, IPv6":                 {madeByProgram{six, stream, 0, nil, v6(loopback6), true}, Options{}, "tcp://[::1]:%d", Options{}},
		"TCP, IPv6, only":           {madeByProgram{six, stream, 0, only, v6(loopback6), true}, Options{}, "tcp://[::1]:%d", Options{}},
		"TCP, both versions":        {madeByProgram{six, stream, 0, notOnly, v6([16]byte{}), true}, Options{}, "tcp://[::]:%d", Options{Family: FamilyDual}},
		"TCP, IPv6 wildcard":        {madeByProgram{six, stream, 0, only, v6([16]byte{}), true}, Options{}, "tcp://[::]:%d", Options{Family: FamilyIPv6}},
		"TCP, mapped":               {madeByProgram{six, stream, 0, nil, v6(mapped4), true}, Options{}, "tcp://127.0.0.1:%d", Options{}},
		"TCP, mapped wildcard":      {madeByProgram{six, stream, 0, nil, v6(mappedAny), true}, Options{}, "tcp://0.0.0.0:%d", Options{}},
		"TCP, on a device":          {madeByProgram{four, stream, 0, device, v4(0, 0, 0, 0), true}, Options{}, "tcp://0.0.0.0:%d", Options{Device: "lo"}},
		"TCP, an address elsewhere": {madeByProgram{four, stream, 0, setInt(unix.IPPROTO_IP, unix.IP_FREEBIND, 1), v4(192, 0, 2, 1), true}, Options{}, "tcp://192.0.2.1:%d", Options{FreeBind: true}},
		"TCP, the same of IPv6": {
			madeByProgram{six, stream, 0, setInt(unix.IPPROTO_IPV6, unix.IPV6_FREEBIND, 1), v6([16]byte{0: 0x20, 1: 1, 2: 0xd, 3: 0xb8, 15: 1}), true},
			Options{},
			"tcp://[2001:db8::1]:%d",
			Options{FreeBind: true},
		},
		"TCP, transparent": {
			madeByProgram{four, stream, 0, setInt(unix.IPPROTO_IP, unix.IP_TRANSPARENT, 1), v4(192, 0, 2, 1), true}, Options{}, "tcp://192.0.2.1:%d", Options{Transparent: true},
		},
		"TCP, options of ours": {
			madeByProgram{four, stream, 0, nil, v4(127, 0, 0, 1), true}, Options{NoDelay: true, TTL: 33}, "tcp://127.0.0.1:%d", Options{NoDelay: true, TTL: 33},
		},
		"UDP, IPv4":          {madeByProgram{four, dgram, 0, nil, v4(127, 0, 0, 1), false}, Options{}, "udp://127.0.0.1:%d", Options{}},
		"UDP, both versions": {madeByProgram{six, dgram, 0, notOnly, v6([16]byte{}), false}, Options{}, "udp://[::]:%d", Options{Family: FamilyDual}},
		"Unix, abstract":     {madeByProgram{local, stream, 0, nil, &unix.SockaddrUnix{Name: "@hg-take"}, true}, Options{}, "unix:@hg-take", Options{}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := mustTake(t, tt.m, tt.o)
			spec, err := s.Reopen()
			if err != nil {
				t.Fatal(err)
			}
			want := tt.want
			if strings.Contains(want, "%d") {
				want = fmt.Sprintf(want, s.Address().Port)
			}
			if s.Address().String() != want || spec.Address != s.Address() || spec.Name != "taken" {
				t.Errorf("got %s, and %s of name %q, want %s", s.Address(), spec.Address, spec.Name, want)
			}
			if got, want := fmt.Sprintf("%+v", spec.Options), fmt.Sprintf("%+v", tt.spec); got != want {
				t.Errorf("got  %s\nwant %s", got, want)
			}
			before, device := shape(t, s.FD()), s.device
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			again, err := Open(spec)
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := again.Close(); err != nil {
					t.Error(err)
				}
			}()
			if got := shape(t, again.FD()); got != before || again.device != device {
				t.Errorf("got  %s, device %q\nwant %s, device %q", got, again.device, before, device)
			}
			if len(again.Warnings()) > 0 {
				t.Errorf("got warnings %v", again.Warnings())
			}
		})
	}
}

// shape is what makes a socket the same for its clients. One of mapped addresses and one of IPv4 are the same.
func shape(t *testing.T, fd int) string {
	t.Helper()
	sa, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	where := unixPath(sa)
	if ap := addrPort(sa); ap.IsValid() {
		where = ap.String()
		if sa6, ok := sa.(*unix.SockaddrInet6); ok && sa6.Addr == [16]byte{} {
			where += fmt.Sprint(", only IPv6 ", getInt(t, fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY))
		}
	} else if !strings.HasPrefix(where, "@") {
		var st unix.Stat_t
		if err := unix.Stat(where, &st); err != nil {
			t.Fatal(err)
		}
		where += fmt.Sprintf(", %o %d %d", st.Mode, st.Uid, st.Gid)
	}
	return fmt.Sprint(where, ", type ", getInt(t, fd, unix.SOL_SOCKET, unix.SO_TYPE))
}

// A descriptor that cannot be taken stays the caller's.
func TestTakeErrors(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	eventfd := func() int {
		fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		return fd
	}
	lo := func(fd int) error { return unix.BindToDevice(fd, "lo") }
	for name, tt := range map[string]struct {
		fd   int
		o    Options
		want error
	}{
		"no descriptor":         {-1, Options{}, unix.EBADF},
		"no socket":             {eventfd(), Options{}, unix.ENOTSOCK},
		"TCP, bound to nothing": {madeByProgram{unix.AF_INET, unix.SOCK_STREAM, 0, nil, nil, false}.make(t), Options{}, unix.EADDRNOTAVAIL},
		"UDP, bound to nothing": {madeByProgram{unix.AF_INET6, unix.SOCK_DGRAM, 0, nil, nil, false}.make(t), Options{}, unix.EADDRNOTAVAIL},
		"Unix, bound to nothing": {
			madeByProgram{unix.AF_UNIX, unix.SOCK_STREAM, 0, nil, nil, false}.make(t), Options{}, unix.EADDRNOTAVAIL,
		},
		"another kind": {madeByProgram{unix.AF_NETLINK, unix.SOCK_RAW, 0, nil, nil, false}.make(t), Options{}, unix.EADDRNOTAVAIL},
		"no such device": {
			madeByProgram{unix.AF_INET, unix.SOCK_STREAM, 0, lo, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}, true}.make(t), Options{Device: "hg-none"}, unix.ENODEV,
		},
	} {
		s, err := Take(Spec{Options: tt.o}, tt.fd)
		var se *SocketError
		if s != nil || !errors.Is(err, tt.want) || !errors.As(err, &se) {
			t.Errorf("%s: got %v, %v, want %v", name, s, err, tt.want)
		}
		if tt.fd >= 0 {
			if _, err := unix.FcntlInt(uintptr(tt.fd), unix.F_GETFD, 0); err != nil {
				t.Errorf("%s: the descriptor: %v", name, err)
			}
			unix.Close(tt.fd)
		}
	}
}

// What Reopen cannot know is an error: nobody is to open something else in its place.
func TestReopenErrors(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	for _, address := range []string{"tcp://127.0.0.1:0", "udp://127.0.0.1:0", "unix:@hg-reopen-closed"} {
		s := mustOpen(t, address, Options{})
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		var se *SocketError
		if spec, err := s.Reopen(); !errors.Is(err, unix.EBADF) || !errors.As(err, &se) {
			t.Errorf("%s, closed: got %v, %v, want EBADF", address, spec.Address, err)
		}
	}
}

// A socket that Open made says what it was opened from, with its port.
func TestReopenOpened(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	for _, tt := range []struct {
		address string
		o       Options
	}{
		{"tcp://127.0.0.1:0", Options{NoDelay: true, Backlog: 3}},
		{"tcp://:0", Options{Family: FamilyDual, FreeBind: true}},
		{"udp://:0", Options{Family: FamilyIPv6, Device: "lo"}},
		{"unix:@hg-reopen", Options{}},
	} {
		s := mustOpen(t, tt.address, tt.o)
		spec, err := s.Reopen()
		if err != nil {
			t.Fatal(err)
		}
		if got, want := fmt.Sprintf("%+v", spec.Options), fmt.Sprintf("%+v", tt.o); got != want || spec.Address != s.Address() {
			t.Errorf("%s: got  %s %s\nwant %s", tt.address, spec.Address, got, want)
		}
	}
}

// Where a program listens, connections that come wait, however often it comes and goes; its options stay.
func TestTakeServes(t *testing.T) {
	t.Parallel()
	nettest.Need(t, parkable)
	m := madeByProgram{unix.AF_INET, unix.SOCK_STREAM, 0, setInt(unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 17), &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}, false}
	s := mustTake(t, m, Options{KeepAlive: true})
	if err := s.Listen(9); err != nil {
		t.Fatal(err)
	}
	if err := unix.SetNonblock(s.FD(), true); err != nil {
		t.Fatal(err)
	}
	if getInt(t, s.FD(), unix.SOL_SOCKET, unix.SO_KEEPALIVE) != 1 || getInt(t, s.FD(), unix.IPPROTO_TCP, unix.TCP_KEEPIDLE) != 17 {
		t.Error("options are lost")
	}
	for range 3 {
		clients := dialEach(t, s, []string{"127.0.0.1"}, 3)
		mustPark(t, s)
		clients = append(clients, dialEach(t, s, []string{"127.0.0.1"}, 3)...)
		mustUnpark(t, s)
		if got := serveAll(t, s); got != 6 {
			t.Errorf("got %d connections, want 6", got)
		}
		expectAnswers(t, clients)
		if err := unix.Shutdown(s.FD(), unix.SHUT_RDWR); err != nil {
			t.Fatal(err)
		}
		if revived, err := s.Revive(); !revived || err != nil {
			t.Errorf("got %v, %v", revived, err)
		}
		if said, err := s.Restore(); said != "" || err != nil {
			t.Errorf("got %q, %v", said, err)
		}
	}
}

// A socket that a program has shared is shared no more, and one that another process shares cannot be parked.
func TestTakeShared(t *testing.T) {
	t.Parallel()
	nettest.Need(t, parkable)
	share := setInt(unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
	s := mustTake(t, madeByProgram{unix.AF_INET, unix.SOCK_STREAM, 0, share, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}, true}, Options{})
	if getInt(t, s.FD(), unix.SOL_SOCKET, unix.SO_REUSEPORT) != 0 {
		t.Error("its port is shared")
	}
	if o, err := Open(Spec{Address: s.Address(), Options: Options{ReusePort: true}}); !errors.Is(err, unix.EADDRINUSE) {
		o.Close()
		t.Errorf("got %v, want EADDRINUSE", err)
	}
	mustPark(t, s)
	mustUnpark(t, s)

	other := mustOpen(t, "tcp://127.0.0.1:0", Options{ReusePort: true})
	to := &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: int(other.Address().Port)}
	s = mustTake(t, madeByProgram{unix.AF_INET, unix.SOCK_STREAM, 0, share, to, true}, Options{})
	if err := s.Park(); !errors.Is(err, ErrNotParkable) {
		t.Errorf("got %v, want ErrNotParkable", err)
	}
}

// Workers that share a port may all be bound before the first of them listens, and that one must not find that it cannot.
func TestTakeSharedBeforeListen(t *testing.T) {
	t.Parallel()
	nettest.Need(t, parkable)
	share := setInt(unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
	m := madeByProgram{unix.AF_INET, unix.SOCK_STREAM, 0, share, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}, false}
	first := m.make(t)
	sa, err := unix.Getsockname(first)
	if err != nil {
		t.Fatal(err)
	}
	m.to = sa
	second := m.make(t) // bound, and does not listen
	taken, err := Take(Spec{}, first)
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	if err := taken.Listen(5); err != nil {
		t.Errorf("listen: %v", err)
	}
	unix.Close(second)
	if getInt(t, taken.FD(), unix.SOL_SOCKET, unix.SO_REUSEPORT) != 0 {
		t.Error("its port is shared")
	}
	if o, err := Open(Spec{Address: taken.Address(), Options: Options{ReusePort: true}}); !errors.Is(err, unix.EADDRINUSE) {
		o.Close()
		t.Errorf("a stranger: got %v, want EADDRINUSE", err)
	}
}

// A program of another user can be parked all the same, also with connections that it has accepted.
func TestTakeOfOtherUser(t *testing.T) {
	t.Parallel()
	nettest.Need(t, parkable, nettest.RealRoot)
	for _, m := range []madeByProgram{
		{unix.AF_INET, unix.SOCK_STREAM, 0, nil, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}, true},
		{unix.AF_INET6, unix.SOCK_STREAM, 0, nil, &unix.SockaddrInet6{}, true},
	} {
		made := m.make(t)
		if err := unix.Fchown(made, 65534, -1); err != nil { // as in TestParkOtherUser
			t.Fatal(err)
		}
		s, err := Take(Spec{}, made)
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.SetNonblock(s.FD(), true); err != nil {
			t.Fatal(err)
		}
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
			if i == 1 {
				unix.Shutdown(fd, unix.SHUT_WR)
				client.Close()
			}
			if err := unix.Close(fd); err != nil {
				t.Fatal(err)
			}
			mustPark(t, s)
			mustUnpark(t, s)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
}

// MPTCP can be taken, serves, and cannot be parked.
func TestTakeMPTCP(t *testing.T) {
	t.Parallel()
	nettest.Need(t, parkable, mptcp)
	s := mustTake(t, madeByProgram{unix.AF_INET, unix.SOCK_STREAM | unix.SOCK_NONBLOCK, unix.IPPROTO_MPTCP, nil, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}, true}, Options{})
	if err := s.Park(); !errors.Is(err, ErrNotParkable) {
		t.Errorf("got %v, want ErrNotParkable", err)
	}
	clients := dialEach(t, s, []string{"127.0.0.1"}, 3)
	if said, err := s.Restore(); said != "" || err != nil {
		t.Errorf("got %q, %v", said, err)
	}
	if got := serveAll(t, s); got != 3 {
		t.Errorf("got %d connections, want 3", got)
	}
	expectAnswers(t, clients)
}

// What came before the socket was taken is there.
func TestTakeQueue(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	made := madeByProgram{unix.AF_INET, unix.SOCK_STREAM, 0, nil, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}, true}.make(t)
	sa, err := unix.Getsockname(made)
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.DialTimeout("tcp", fmt.Sprintf("127.0.0.1:%d", sa.(*unix.SockaddrInet4).Port), 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s, err := Take(Spec{}, made)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if pending, err := s.Pending(); !pending || err != nil {
		t.Errorf("got %v, %v", pending, err)
	}
}

func TestListen(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	most := backlog(t, mustOpen(t, "tcp://127.0.0.1:0", Options{}))
	m := madeByProgram{unix.AF_INET, unix.SOCK_STREAM, 0, nil, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}, false}
	for name, tt := range map[string]struct {
		s    *Socket
		want map[int]int // by what is asked for
	}{
		"of ours":                   {mustOpen(t, "tcp://127.0.0.1:0", Options{}), map[int]int{0: most, 5: most, math.MaxInt32: most, -1: most}},
		"of ours, with a backlog":   {mustOpen(t, "tcp://127.0.0.1:0", Options{Backlog: 10}), map[int]int{0: 10, 5: 10, 20: 20, -1: 10}},
		"of a program":              {mustTake(t, m, Options{}), map[int]int{0: most, 5: most, -1: most}},
		"of a program, with a list": {mustTake(t, m, Options{Backlog: 10}), map[int]int{5: 10, 20: 20}},
	} {
		for asked, want := range tt.want {
			if err := tt.s.Listen(asked); err != nil {
				t.Errorf("%s: listen(%d): %v", name, asked, err)
			}
			if got := backlog(t, tt.s); got != want {
				t.Errorf("%s: listen(%d): got %d, want %d", name, asked, got, want)
			}
		}
	}
	udp := mustOpen(t, "udp://127.0.0.1:0", Options{})
	var se *SocketError
	if err := udp.Listen(1); !errors.Is(err, unix.EOPNOTSUPP) || !errors.As(err, &se) {
		t.Errorf("UDP: got %v, want EOPNOTSUPP", err)
	}
	// It does not touch the queue.
	s := mustOpen(t, "tcp://127.0.0.1:0", Options{})
	clients := dialEach(t, s, []string{"127.0.0.1"}, 3)
	if err := s.Listen(1); err != nil {
		t.Fatal(err)
	}
	if got := serveAll(t, s); got != 3 {
		t.Errorf("got %d connections, want 3", got)
	}
	expectAnswers(t, clients)
}

// backlog is what listen(2) was told (tcpi_sacked of a listener).
func backlog(t *testing.T, s *Socket) int {
	t.Helper()
	info, err := unix.GetsockoptTCPInfo(s.FD(), unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil {
		t.Fatal(err)
	}
	return int(info.Sacked)
}

// The cookie is the socket's, whichever descriptor is asked.
func TestCookie(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	seen := map[uint64]bool{}
	for _, address := range []string{"tcp://127.0.0.1:0", "udp://127.0.0.1:0", "unix:@hg-cookie", "unixgram:@hg-cookie"} {
		s := mustOpen(t, address, Options{})
		dup, err := unix.FcntlInt(uintptr(s.FD()), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		cookie := s.Cookie()
		if cookie == 0 || seen[cookie] || Cookie(dup) != cookie || s.Cookie() != cookie {
			t.Errorf("%s: got %d, and %d of another descriptor", address, cookie, Cookie(dup))
		}
		seen[cookie] = true
		unix.Close(dup)
	}
	if fifo := mustOpen(t, "fifo://"+tempPath(t, "f"), Options{}); fifo.Cookie() != 0 || Cookie(-1) != 0 {
		t.Error("what is no socket has one")
	}
}
