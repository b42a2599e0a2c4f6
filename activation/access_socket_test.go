package activation

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
)

// mustOpenAccess opens a socket with an access list.
func mustOpenAccess(tb testing.TB, address string, a *Access) *Socket {
	tb.Helper()
	s := mustOpen(tb, address, Options{})
	if err := s.attachAccess(a, s.FD()); err != nil {
		tb.Fatal(err)
	}
	return s
}

// client makes a non-blocking socket at a source address of its own.
func client(tb testing.TB, kind int, source netip.Addr) int {
	tb.Helper()
	domain := unix.AF_INET6
	if source.Is4() {
		domain = unix.AF_INET
	}
	fd, err := unix.Socket(domain, kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { unix.Close(fd) })
	if err := unix.Bind(fd, at(source, 0)); err != nil {
		tb.Fatalf("bind to %s: %v", source, err)
	}
	return fd
}

func at(addr netip.Addr, port uint16) unix.Sockaddr {
	if addr.Is4() {
		return &unix.SockaddrInet4{Addr: addr.As4(), Port: int(port)}
	}
	return &unix.SockaddrInet6{Addr: addr.As16(), Port: int(port)}
}

// localhost is where a client at the source finds a wildcard socket.
func localhost(source netip.Addr) netip.Addr {
	if source.Is4() {
		return netip.MustParseAddr("127.0.0.1")
	}
	return netip.IPv6Loopback()
}

// drops returns how many packets the kernel has dropped at the socket.
func drops(tb testing.TB, fd int) uint32 {
	tb.Helper()
	var info [9]uint32 // SK_MEMINFO_DROPS is the last
	size := uint32(unsafe.Sizeof(info))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_MEMINFO,
		uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		tb.Fatal(errno)
	}
	return info[8]
}

// dropped waits until the kernel has dropped n packets at the socket. A client may send
// its packet again, so it may be more.
func dropped(t *testing.T, s *Socket, n uint32) {
	t.Helper()
	nettest.Eventually(t, func() error {
		if got := drops(t, s.FD()); got < n {
			return fmt.Errorf("%d packets dropped, want %d", got, n)
		}
		return nil
	})
}

// localAddress gives the loopback interface an IPv6 address.
func localAddress(tb testing.TB, addr string) netip.Addr {
	tb.Helper()
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		tb.Fatal(err)
	}
	defer unix.Close(fd)
	ip := netip.MustParseAddr(addr)
	req := struct { // in6_ifreq of linux/ipv6.h
		addr  [16]byte
		bits  uint32
		index int32
	}{ip.As16(), 128, 1}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCSIFADDR, uintptr(unsafe.Pointer(&req)))
	if errno != 0 && errno != unix.EEXIST {
		tb.Fatal(errno)
	}
	nettest.Eventually(tb, func() error { return unix.Bind(fd, at(ip, 0)) }) // it is tentative at first
	return ip
}

// accessTests are a list, and sources that it denies and permits.
var accessTests = map[string]struct {
	address         string
	list            string
	denied, allowed string
}{
	"IPv4":                     {"127.0.0.1:0", "127.0.0.0/8 -127.9.0.0/16 127.9.9.0/24 -127.9.9.9", "127.9.9.9 127.9.1.1", "127.0.0.5 127.9.9.8"},
	"IPv4 deny":                {"127.0.0.1:0", "-127.9.0.0/16", "127.9.0.1", "127.8.0.1"},
	"IPv6":                     {"[::]:0", "fd00:ac::1", "fd00:ac::2 ::1", "fd00:ac::1"},
	"IPv6 deny":                {"[::]:0", "-fd00:ac::/64 fd00:ac::1 ::/0", "fd00:ac::2", "fd00:ac::1 ::1"},
	"dual stack":               {":0", "127.0.0.7 ::1", "127.0.0.8 fd00:ac::1", "127.0.0.7 ::1"},
	"dual stack, IPv4 denied":  {":0", "-0.0.0.0/0", "127.0.0.1", "::1"},
	"dual stack, IPv6 denied":  {":0", "-::/0", "::1", "127.0.0.1"},
	"dual stack, only mapped":  {":0", "::ffff:127.0.0.7", "127.0.0.8 ::1", "127.0.0.7"},
	"everybody, spelled out":   {":0", "0.0.0.0/0 ::/0", "", "127.0.0.1 ::1"},
	"nobody, who is somewhere": {":0", "192.0.2.0/24", "127.0.0.1 ::1", ""},
}

func addresses(list string) (out []netip.Addr) {
	for text := range strings.FieldsSeq(list) {
		out = append(out, netip.MustParseAddr(text))
	}
	return out
}

// A denied client gets no answer, is in no queue, and wakes nobody.
func TestAccessTCP(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	localAddress(t, "fd00:ac::1")
	localAddress(t, "fd00:ac::2")
	for name, test := range accessTests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := mustOpenAccess(t, "tcp://"+test.address, access(t, test.list))
			watch := watching(t, s)
			var denied []int
			for i, source := range addresses(test.denied) {
				fd := client(t, unix.SOCK_STREAM, source)
				if err := unix.Connect(fd, at(localhost(source), s.Address().Port)); !errors.Is(err, unix.EINPROGRESS) {
					t.Fatalf("%s: %v", source, err)
				}
				dropped(t, s, uint32(i+1))
				denied = append(denied, fd)
			}
			if n := watch(); n != 0 {
				t.Errorf("%d reports", n)
			}
			for _, source := range addresses(test.allowed) {
				exchange(t, s, source)
			}
			if ok, err := s.Pending(); ok || err != nil {
				t.Errorf("got %v, %v, want nobody else", ok, err)
			}
			for _, fd := range denied {
				if info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO); err != nil || info.State != unix.BPF_TCP_SYN_SENT {
					t.Errorf("got %+v, %v, want a client that waits", info, err)
				}
			}
		})
	}
}

// watching puts the socket into an epoll set, and returns what counts reports without waiting.
func watching(t *testing.T, s *Socket) func() int {
	t.Helper()
	ep, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(ep) })
	if err := unix.EpollCtl(ep, unix.EPOLL_CTL_ADD, s.FD(), &unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLONESHOT}); err != nil {
		t.Fatal(err)
	}
	return func() int {
		n, err := unix.EpollWait(ep, make([]unix.EpollEvent, 1), 0)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
}

// exchange connects from the source, and passes data both ways.
func exchange(t *testing.T, s *Socket, source netip.Addr) {
	t.Helper()
	fd := client(t, unix.SOCK_STREAM, source)
	exchangeOn(t, s, fd, source)
}

func exchangeOn(t *testing.T, s *Socket, fd int, source netip.Addr) {
	t.Helper()
	unix.SetNonblock(fd, false)
	unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &unix.Timeval{Sec: 10}) // of connect(2) too
	if err := unix.Connect(fd, at(localhost(source), s.Address().Port)); err != nil {
		t.Fatalf("%s: %v", source, err)
	}
	if _, err := unix.Write(fd, []byte("hello")); err != nil {
		t.Fatal(err)
	}
	conn, peer, err := s.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(conn)
	if peer.Remote.Addr() != source {
		t.Fatalf("got %s, want %s", peer.Remote, source)
	}
	buf := make([]byte, 16)
	if n, err := unix.Read(conn, buf); string(buf[:max(n, 0)]) != "hello" {
		t.Errorf("got %q, %v", buf[:max(n, 0)], err)
	}
	if _, err := unix.Write(conn, []byte("bye")); err != nil {
		t.Error(err)
	}
	if n, err := unix.Read(fd, buf); string(buf[:max(n, 0)]) != "bye" {
		t.Errorf("got %q, %v", buf[:max(n, 0)], err)
	}
}

func TestAccessUDP(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	localAddress(t, "fd00:ac::1")
	localAddress(t, "fd00:ac::2")
	for name, test := range accessTests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := mustOpenAccess(t, "udp://"+test.address, access(t, test.list))
			watch := watching(t, s)
			send := func(source netip.Addr) {
				fd := client(t, unix.SOCK_DGRAM, source)
				if err := unix.Sendto(fd, []byte(source.String()), 0, at(localhost(source), s.Address().Port)); err != nil {
					t.Fatal(err)
				}
			}
			for i, source := range addresses(test.denied) {
				send(source)
				dropped(t, s, uint32(i+1))
			}
			if n := watch(); n != 0 {
				t.Errorf("%d reports", n)
			}
			for _, source := range addresses(test.allowed) {
				send(source)
				nettest.Eventually(t, func() error {
					buf := make([]byte, 64)
					n, _, err := unix.Recvfrom(s.FD(), buf, 0)
					if got := string(buf[:max(n, 0)]); err == nil && got != source.String() {
						t.Errorf("got %q, want that of %s", got, source)
					}
					return err
				})
			}
			if ok, err := s.Pending(); ok || err != nil {
				t.Errorf("got %v, %v, want nothing else", ok, err)
			}
		})
	}
}

// A process that shares the socket cannot undo the filter, and neither can we.
func TestAccessLocked(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	a := access(t, "127.0.0.1 ::1")
	for _, address := range []string{"tcp://:0", "udp://:0"} {
		s := mustOpenAccess(t, address, a)
		want, err := attachedFilter(s.FD())
		if err != nil || len(want) == 0 {
			t.Fatalf("got %v, %v, want a filter", want, err)
		}
		all := []unix.SockFilter{{Code: verdict, K: pass}}
		for what, err := range map[string]error{
			"detach":           unix.SetsockoptInt(s.FD(), unix.SOL_SOCKET, unix.SO_DETACH_FILTER, 0),
			"unlock":           unix.SetsockoptInt(s.FD(), unix.SOL_SOCKET, unix.SO_LOCK_FILTER, 0),
			"attach":           unix.SetsockoptSockFprog(s.FD(), unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &all[0]}),
			"attach reuseport": unix.SetsockoptSockFprog(s.FD(), unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_CBPF, &unix.SockFprog{Len: 1, Filter: &all[0]}),
		} {
			if !errors.Is(err, unix.EPERM) {
				t.Errorf("%s: %s: got %v, want EPERM", address, what, err)
			}
		}
		if err := s.attachAccess(a, s.FD()); err != nil {
			t.Errorf("%s: the same list again: %v", address, err)
		}
		for _, list := range []string{"127.0.0.2", ""} {
			if err := s.attachAccess(access(t, list), s.FD()); !errors.Is(err, unix.EPERM) {
				t.Errorf("%s: got %v for the list %q, want EPERM", address, err, list)
			}
		}
	}
	// What has no source address has no list.
	for _, address := range []string{"unix:@hg-access", "unixgram:@hg-access", "fifo://" + tempPath(t, "f")} {
		s := mustOpenAccess(t, address, a)
		if _, err := unix.GetsockoptInt(s.FD(), unix.SOL_SOCKET, unix.SO_LOCK_FILTER); err != nil && !errors.Is(err, unix.ENOTSOCK) {
			t.Error(err)
		}
		if s.Address().Network == Unix {
			mustDial(t, s)
		}
	}
}

// In a reuseport group the program that chooses is set through a socket without the lock.
func TestAccessReusePort(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	a := access(t, "127.0.0.1")
	first := mustOpen(t, "tcp://127.0.0.1:0", Options{ReusePort: true})
	if err := first.attachAccess(a, first.FD()); err != nil {
		t.Fatal(err)
	}
	second := mustOpen(t, first.Address().String(), Options{ReusePort: true})
	if err := second.filterAccess(a, second.FD()); err != nil {
		t.Fatal(err)
	}
	for choice, s := range []*Socket{first, second} {
		program := []unix.SockFilter{{Code: verdict, K: uint32(choice)}}
		if err := unix.SetsockoptSockFprog(second.FD(), unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_CBPF, &unix.SockFprog{Len: 1, Filter: &program[0]}); err != nil {
			t.Fatal(err)
		}
		fd := client(t, unix.SOCK_STREAM, netip.MustParseAddr("127.0.0.2"))
		before := drops(t, s.FD())
		if err := unix.Connect(fd, at(localhost(first.Address().IP), s.Address().Port)); !errors.Is(err, unix.EINPROGRESS) {
			t.Fatal(err)
		}
		dropped(t, s, before+1)
		exchange(t, s, netip.MustParseAddr("127.0.0.1"))
	}
	if err := second.attachAccess(a, second.FD()); err != nil {
		t.Errorf("lock later: %v", err)
	}
}

// The source is found behind IPv6 extension headers and IPv4 options as well.
func TestAccessExtensionHeaders(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	one, two := localAddress(t, "fd00:ac::1"), localAddress(t, "fd00:ac::2")
	padding := string([]byte{0, 0, 1, 4, 0, 0, 0, 0}) // PadN (RFC 8200)
	noop := string([]byte{1, 1, 1, 1})
	set := func(fd, level, option int, value string) {
		if err := unix.SetsockoptString(fd, level, option, value); err != nil {
			t.Fatal(err)
		}
	}
	for _, test := range []struct {
		allowed, denied netip.Addr
		options         func(fd int)
	}{
		{one, two, func(fd int) {
			set(fd, unix.IPPROTO_IPV6, unix.IPV6_HOPOPTS, padding)
			set(fd, unix.IPPROTO_IPV6, unix.IPV6_DSTOPTS, padding)
		}},
		{netip.MustParseAddr("127.1.0.1"), netip.MustParseAddr("127.1.0.2"), func(fd int) { set(fd, unix.IPPROTO_IP, unix.IP_OPTIONS, noop) }},
	} {
		s := mustOpenAccess(t, "tcp://:0", access(t, test.allowed.String()))
		fd := client(t, unix.SOCK_STREAM, test.denied)
		test.options(fd)
		if err := unix.Connect(fd, at(localhost(test.denied), s.Address().Port)); !errors.Is(err, unix.EINPROGRESS) {
			t.Fatal(err)
		}
		dropped(t, s, 1)
		fd = client(t, unix.SOCK_STREAM, test.allowed)
		test.options(fd)
		exchangeOn(t, s, fd, test.allowed)
	}
}

// An IPv6 packet from "::ffff:127.0.0.1" is not from 127.0.0.1, though the service would be told so.
func TestAccessMappedSource(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	raw, err := unix.Socket(unix.AF_INET6, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(raw)
	send := func(s *Socket, source string) {
		const size = 8 // a UDP header and no data
		from, to := netip.MustParseAddr(source).As16(), netip.IPv6Loopback().As16()
		packet := append([]byte{6 << 4, 0, 0, 0, 0, size, unix.IPPROTO_UDP, 64}, append(from[:], to[:]...)...)
		packet = binary.BigEndian.AppendUint16(packet, 4711)
		packet = binary.BigEndian.AppendUint16(packet, s.Address().Port)
		packet = binary.BigEndian.AppendUint16(packet, size)
		sum := uint32(size + unix.IPPROTO_UDP) // of the pseudo-header (RFC 8200)
		for i := 8; i < len(packet); i += 2 {
			sum += uint32(binary.BigEndian.Uint16(packet[i:]))
		}
		for sum > 0xffff {
			sum = sum>>16 + sum&0xffff
		}
		packet = binary.BigEndian.AppendUint16(packet, ^uint16(sum))
		if err := unix.Sendto(raw, packet, 0, &unix.SockaddrInet6{Addr: to}); err != nil {
			t.Fatal(err)
		}
	}
	for _, list := range []string{"127.0.0.1 ::1", "-192.0.2.1", "::/0 0.0.0.0/0"} {
		s := mustOpenAccess(t, "udp://:0", access(t, list))
		send(s, "::ffff:127.0.0.1")
		dropped(t, s, 1)
		if ok, err := s.Pending(); ok || err != nil {
			t.Errorf("%q: got %v, %v, want nothing", list, ok, err)
		}
		send(s, "::1") // the packet itself is sound
		nettest.Eventually(t, func() error {
			if ok, err := s.Pending(); !ok {
				return fmt.Errorf("nothing: %w", err)
			}
			return nil
		})
	}
}

// With SYN cookies, and with data on the SYN, a denied source gets no further. Not parallel:
// the settings are the namespace's.
func TestAccessCookiesAndFastOpen(t *testing.T) {
	nettest.Need(t, nettest.Namespaces)
	sysctl(t, "net/ipv4/tcp_syncookies", "2")  // for every SYN
	sysctl(t, "net/ipv4/tcp_fastopen", "1543") // both sides, without a cookie, every listener
	s := mustOpenAccess(t, "tcp://:0", access(t, "127.0.0.1 ::1"))
	denied, allowed := netip.MustParseAddr("127.0.0.2"), netip.MustParseAddr("127.0.0.1")
	before := cookies(t)
	fd := client(t, unix.SOCK_STREAM, denied)
	if err := unix.Connect(fd, at(allowed, s.Address().Port)); !errors.Is(err, unix.EINPROGRESS) {
		t.Fatal(err)
	}
	dropped(t, s, 1)
	if n := cookies(t) - before; n != 0 {
		t.Errorf("%d cookies for a denied source", n)
	}
	exchange(t, s, allowed)
	exchange(t, s, netip.IPv6Loopback())
	if n := cookies(t) - before; n != 2 {
		t.Errorf("%d cookies for allowed sources, want 2", n)
	}

	if err := unix.SetsockoptInt(s.FD(), unix.IPPROTO_TCP, unix.TCP_FASTOPEN, 16); err != nil {
		t.Fatal(err)
	}
	sysctl(t, "net/ipv4/tcp_syncookies", "1")
	dial := func(source netip.Addr) {
		fd := client(t, unix.SOCK_STREAM, source)
		err := unix.Sendto(fd, []byte("early"), unix.MSG_FASTOPEN, at(allowed, s.Address().Port))
		if err != nil && !errors.Is(err, unix.EINPROGRESS) {
			t.Fatal(err)
		}
	}
	last := drops(t, s.FD())
	dial(denied)
	dropped(t, s, last+1)
	if ok, err := s.Pending(); ok || err != nil {
		t.Errorf("got %v, %v, want nobody", ok, err)
	}
	dial(allowed)
	nettest.Eventually(t, func() error {
		conn, peer, err := s.Accept()
		if err == nil {
			unix.Close(conn)
			if peer.Remote.Addr() != allowed {
				t.Errorf("got %s", peer.Remote)
			}
		}
		return err
	})
}

// sysctl sets a variable of the network namespace for the rest of the test.
func sysctl(tb testing.TB, name, value string) {
	tb.Helper()
	path := "/proc/sys/" + name
	old, err := os.ReadFile(path)
	if err != nil {
		tb.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(value), 0); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { os.WriteFile(path, old, 0) })
}

// cookies returns how many SYN cookies this network namespace has sent.
func cookies(t *testing.T) int {
	t.Helper()
	b, err := os.ReadFile("/proc/net/netstat")
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(b), "\n") // names, then values
	for i, name := range strings.Fields(lines[0]) {
		if name == "SyncookiesSent" {
			var n int
			fmt.Sscan(strings.Fields(lines[1])[i], &n)
			return n
		}
	}
	t.Fatal("no SyncookiesSent")
	return 0
}
