package activation

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
)

// imitations are the kinds of sockets that a program may have, and one of ours for each.
func imitations(t *testing.T) map[string]struct {
	address      string
	o            Options
	domain, kind int
} {
	t.Helper()
	const stream, dgram = unix.SOCK_STREAM, unix.SOCK_DGRAM
	return map[string]struct {
		address      string
		o            Options
		domain, kind int
	}{
		"TCP, IPv4":          {"tcp://127.0.0.1:0", Options{}, unix.AF_INET, stream},
		"TCP, both versions": {"tcp://:0", Options{Family: FamilyDual}, unix.AF_INET6, stream},
		"TCP, mapped":        {"tcp://127.0.0.1:0", Options{}, unix.AF_INET6, stream},
		"UDP, IPv4":          {"udp://127.0.0.1:0", Options{}, unix.AF_INET, dgram},
		"UDP, both versions": {"udp://:0", Options{Family: FamilyDual}, unix.AF_INET6, dgram},
		"UDP, packet info":   {"udp://:0", Options{Family: FamilyDual, PacketInfo: true}, unix.AF_INET6, dgram},
		"Unix":               {"unix:@hg-" + t.Name(), Options{}, unix.AF_UNIX, stream},
		"Unix, datagrams":    {"unixgram:@hg-" + t.Name(), Options{}, unix.AF_UNIX, dgram},
		"TCP, with options": {"tcp://:0", Options{
			Family: FamilyDual, KeepAlive: true, KeepAliveTime: 71 * time.Second, NoDelay: true, DeferAccept: 3 * time.Second,
			TTL: 33, TOS: new(int), Priority: new(int), Congestion: "reno",
		}, unix.AF_INET6, stream},
	}
}

// readOptions reads all that Imitate may change.
func readOptions(t *testing.T, fd int) map[string]int {
	t.Helper()
	out := map[string]int{}
	for _, o := range imitated() {
		if v, err := unix.GetsockoptInt(fd, o.level, o.name); err == nil {
			out[fmt.Sprintf("option %d of level %d", o.name, o.level)] = v
		}
	}
	const clamp, most = "option 10 of level 6", 65535 << 14 // TCP_WINDOW_CLAMP, which cannot become 0 again
	if out[clamp] == most {
		out[clamp] = 0
	}
	for name, o := range map[string]int{"SO_RCVBUF": unix.SO_RCVBUF, "SO_SNDBUF": unix.SO_SNDBUF} {
		out[name] = getInt(t, fd, unix.SOL_SOCKET, o)
	}
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	if err != nil {
		t.Fatal(err)
	}
	out["O_NONBLOCK"] = flags & unix.O_NONBLOCK
	return out
}

func congestion(t *testing.T, fd int) string {
	t.Helper()
	name, err := unix.GetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION)
	if err != nil {
		t.Fatal(err)
	}
	return name
}

// programSocket is one that a program has just made.
func programSocket(t *testing.T, domain, kind, protocol int) int {
	t.Helper()
	fd, err := unix.Socket(domain, kind|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// differs fails the test where two sets of options are not the same, but for those that are excepted.
func differs(t *testing.T, what string, got, want map[string]int, except ...string) {
	t.Helper()
	for _, name := range slices.Sorted(maps.Keys(got)) {
		if want, ok := want[name]; ok && got[name] != want && !slices.Contains(except, name) {
			t.Errorf("%s: %s: got %d, want %d", what, name, got[name], want)
		}
	}
}

// A program that has set nothing changes nothing, but O_NONBLOCK.
func TestImitateNothing(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	for name, tt := range imitations(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := mustOpen(t, tt.address, tt.o)
			before, reno := readOptions(t, s.FD()), ""
			if s.addr.Network == TCP {
				reno = congestion(t, s.FD())
			}
			for range 3 {
				if err := s.Imitate(programSocket(t, tt.domain, tt.kind, 0)); err != nil {
					t.Fatal(err)
				}
			}
			except := []string{"O_NONBLOCK"}
			if tt.o.PacketInfo { // which was for the datagrams that have come, and are marked already
				except = append(except, pktinfo...)
			}
			after := readOptions(t, s.FD())
			differs(t, "nothing was set", after, before, except...)
			if after["O_NONBLOCK"] != 0 {
				t.Error("it does not block, and the program's did")
			}
			if tt.o.PacketInfo && (after[pktinfo[0]] != 0 || after[pktinfo[1]] != 0) {
				t.Error("the program gets what it did not ask for")
			}
			if s.addr.Network == TCP && congestion(t, s.FD()) != reno {
				t.Errorf("got congestion control %s, want %s", congestion(t, s.FD()), reno)
			}
		})
	}
}

var pktinfo = []string{
	fmt.Sprintf("option %d of level %d", unix.IP_PKTINFO, unix.IPPROTO_IP),
	fmt.Sprintf("option %d of level %d", unix.IPV6_RECVPKTINFO, unix.IPPROTO_IPV6),
}

// another finds a value that an option can be set to and that is not what it is. false: it cannot be set here.
func another(fd int, o option) (int, bool) {
	now, err := unix.GetsockoptInt(fd, o.level, o.name)
	if err != nil {
		return 0, false
	}
	for _, v := range []int{now ^ 1, now + 1, 17, 1000, 3, 0} {
		if v == now || v < 0 {
			continue
		}
		if unix.SetsockoptInt(fd, o.level, o.name, v) != nil {
			continue
		}
		if got, err := unix.GetsockoptInt(fd, o.level, o.name); err == nil && got != now {
			return got, true
		}
	}
	return 0, false
}

// Each option is carried over alone, without the others, and is gone with the next program.
func TestImitateEach(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	tested := map[option]bool{}
	for name, tt := range imitations(t) {
		for _, o := range imitated() {
			what := fmt.Sprintf("option %d of level %d", o.name, o.level)
			fd := programSocket(t, tt.domain, tt.kind, 0)
			plain := readOptions(t, fd)
			if _, ok := another(fd, o); ok && !tt.o.PacketInfo {
				tested[o] = true
				imitateOne(t, name+", "+what, tt.address, tt.o, fd, plain)
			}
		}
	}
	for _, o := range imitated() {
		if !tested[o] {
			t.Logf("not to be had here: option %d of level %d", o.name, o.level)
		}
	}
	if len(tested) < 45 {
		t.Errorf("only %d options were tested", len(tested))
	}
}

// imitateOne has a new socket of ours imitate one that a program has changed, and then one that is plain.
func imitateOne(t *testing.T, what, address string, o Options, fd int, plain map[string]int) {
	t.Helper()
	s, err := Open(Spec{Address: mustParse(t, address), Options: o})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	before, theirs := readOptions(t, s.FD()), readOptions(t, fd)
	if err := s.Imitate(fd); err != nil {
		t.Errorf("%s: %v", what, err)
	}
	want := maps.Clone(before)
	for name, v := range theirs { // all that came with the one, too
		if v != plain[name] {
			want[name] = v
		}
	}
	after := readOptions(t, s.FD())
	differs(t, what, after, want, "O_NONBLOCK")
	for range 2 {
		if err := s.Imitate(programSocket(t, getInt(t, fd, unix.SOL_SOCKET, unix.SO_DOMAIN), getInt(t, fd, unix.SOL_SOCKET, unix.SO_TYPE), 0)); err != nil {
			t.Errorf("%s, back: %v", what, err)
		}
	}
	differs(t, what+", back", readOptions(t, s.FD()), before, "O_NONBLOCK")
}

// All of them at once, twice, with nothing between and after.
func TestImitateAll(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	for name, tt := range imitations(t) {
		s := mustOpen(t, tt.address, tt.o)
		before := readOptions(t, s.FD())
		for _, tos := range []int{0x10, 0x08} {
			fd := programSocket(t, tt.domain, tt.kind, 0)
			for _, o := range imitated() {
				if o.name == unix.IP_TOS && o.level == unix.IPPROTO_IP {
					_ = unix.SetsockoptInt(fd, o.level, o.name, tos)
				} else {
					another(fd, o)
				}
			}
			want := readOptions(t, fd)
			if err := s.Imitate(fd); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			differs(t, name, readOptions(t, s.FD()), want, "SO_RCVBUF", "SO_SNDBUF")
			if err := s.Imitate(programSocket(t, tt.domain, tt.kind, 0)); err != nil {
				t.Errorf("%s, back: %v", name, err)
			}
			differs(t, name+", back", readOptions(t, s.FD()), before, append(pktinfo, "O_NONBLOCK")...)
		}
	}
}

// What is no integer.
func TestImitateRest(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	for _, kind := range []string{"tcp://127.0.0.1:0", "udp://127.0.0.1:0"} {
		s := mustOpen(t, kind, Options{})
		k := getInt(t, s.FD(), unix.SOL_SOCKET, unix.SO_TYPE)
		before := readOptions(t, s.FD())
		fd := programSocket(t, unix.AF_INET, k|unix.SOCK_NONBLOCK, 0)
		limit := unix.Timeval{Sec: 3, Usec: 0}
		err := errors.Join(
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 100000), unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 50000),
			unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1, Linger: 7}),
			unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit), unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &limit),
		)
		if k == unix.SOCK_STREAM {
			err = errors.Join(err, unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, "reno"))
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Imitate(fd); err != nil {
			t.Error(err)
		}
		differs(t, kind, readOptions(t, s.FD()), readOptions(t, fd))
		linger, err := unix.GetsockoptLinger(s.FD(), unix.SOL_SOCKET, unix.SO_LINGER)
		if err != nil || *linger != (unix.Linger{Onoff: 1, Linger: 7}) {
			t.Errorf("%s: linger: got %v, %v", kind, linger, err)
		}
		for _, o := range []int{unix.SO_RCVTIMEO, unix.SO_SNDTIMEO} {
			if got, err := unix.GetsockoptTimeval(s.FD(), unix.SOL_SOCKET, o); err != nil || *got != limit {
				t.Errorf("%s: time limit %d: got %v, %v", kind, o, got, err)
			}
		}
		if k == unix.SOCK_STREAM && congestion(t, s.FD()) != "reno" {
			t.Errorf("%s: got congestion control %s", kind, congestion(t, s.FD()))
		}
		// The process ends, and the next one sets nothing.
		if _, err := s.Restore(); err != nil {
			t.Error(err)
		}
		plain := programSocket(t, unix.AF_INET, k, 0)
		if err := s.Imitate(plain); err != nil {
			t.Error(err)
		}
		differs(t, kind+", back", readOptions(t, s.FD()), before, "O_NONBLOCK")
		if k == unix.SOCK_STREAM && congestion(t, s.FD()) != congestion(t, plain) {
			t.Errorf("%s, back: got congestion control %s, want %s", kind, congestion(t, s.FD()), congestion(t, plain))
		}
		if linger, err := unix.GetsockoptLinger(s.FD(), unix.SOL_SOCKET, unix.SO_LINGER); err != nil || linger.Onoff != 0 {
			t.Errorf("%s, back: linger: got %v, %v", kind, linger, err)
		}
	}
}

// What is configured holds where the program says nothing, and the program's word is the last one.
func TestImitateCongestion(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	s := mustOpen(t, "tcp://127.0.0.1:0", Options{Congestion: "reno", ReceiveBuffer: 65536})
	size := getInt(t, s.FD(), unix.SOL_SOCKET, unix.SO_RCVBUF)
	usual := congestion(t, programSocket(t, unix.AF_INET, unix.SOCK_STREAM, 0))
	if usual == "reno" {
		t.Skip("it is the usual one here")
	}
	for i := range 2 {
		if err := s.Imitate(programSocket(t, unix.AF_INET, unix.SOCK_STREAM, 0)); err != nil {
			t.Fatal(err)
		}
		if got := congestion(t, s.FD()); got != "reno" {
			t.Errorf("program %d, which sets nothing: got %s, want reno", i, got)
		}
		if got := getInt(t, s.FD(), unix.SOL_SOCKET, unix.SO_RCVBUF); got != size {
			t.Errorf("program %d, which sets nothing: got a buffer of %d, want %d", i, got, size)
		}
		fd := programSocket(t, unix.AF_INET, unix.SOCK_STREAM, 0)
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 5000); err != nil {
			t.Fatal(err)
		}
		if err := s.Imitate(fd); err != nil {
			t.Fatal(err)
		}
		if got, want := getInt(t, s.FD(), unix.SOL_SOCKET, unix.SO_RCVBUF), getInt(t, fd, unix.SOL_SOCKET, unix.SO_RCVBUF); got != want {
			t.Errorf("got a buffer of %d, want %d", got, want)
		}
	}
}

// A socket of MPTCP is one of TCP as far as its options go.
func TestImitateMPTCP(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces, mptcp)
	for _, domain := range []int{unix.AF_INET, unix.AF_INET6} {
		address := map[int]string{unix.AF_INET: "tcp://127.0.0.1:0", unix.AF_INET6: "tcp://[::1]:0"}[domain]
		s := mustOpen(t, address, Options{})
		before := readOptions(t, s.FD())
		fd := programSocket(t, domain, unix.SOCK_STREAM, unix.IPPROTO_MPTCP)
		if err := s.Imitate(fd); err != nil {
			t.Error(err)
		}
		differs(t, address, readOptions(t, s.FD()), before, "O_NONBLOCK")
		if err := errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1), unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)); err != nil {
			t.Fatal(err)
		}
		if err := s.Imitate(fd); err != nil {
			t.Error(err)
		}
		if getInt(t, s.FD(), unix.SOL_SOCKET, unix.SO_KEEPALIVE) != 1 || getInt(t, s.FD(), unix.IPPROTO_TCP, unix.TCP_NODELAY) != 1 {
			t.Error("options are lost")
		}
	}
}

// mptcp is the feature that the kernel has MPTCP.
func mptcp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_MPTCP)
	if err == nil {
		unix.Close(fd)
	}
	return err
}

// A connection that is accepted has what the program has set.
func TestImitateInherited(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	s := mustOpen(t, "tcp://127.0.0.1:0", Options{})
	fd := programSocket(t, unix.AF_INET, unix.SOCK_STREAM, 0)
	if err := errors.Join(unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1), unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, 4711)); err != nil {
		t.Fatal(err)
	}
	if err := s.Imitate(fd); err != nil {
		t.Fatal(err)
	}
	mustDial(t, s)
	conn, _, err := s.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(conn)
	if getInt(t, conn, unix.IPPROTO_TCP, unix.TCP_NODELAY) != 1 || getInt(t, conn, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT) != 4711 {
		t.Error("it has not")
	}
}

// The size of segments that a program asks for is not that of the next one's connections. What can be read of a
// listening socket does not tell.
func TestImitateMaxSegment(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	s := mustOpen(t, "tcp://127.0.0.1:0", Options{})
	segment := func() uint32 {
		mustDial(t, s)
		conn, _, err := s.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(conn)
		info, err := unix.GetsockoptTCPInfo(conn, unix.IPPROTO_TCP, unix.TCP_INFO)
		if err != nil {
			t.Fatal(err)
		}
		return info.Snd_mss
	}
	want := segment()
	for range 2 {
		fd := programSocket(t, unix.AF_INET, unix.SOCK_STREAM, 0)
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_MAXSEG, 1000); err != nil {
			t.Fatal(err)
		}
		if err := s.Imitate(fd); err != nil {
			t.Fatal(err)
		}
		if got := segment(); got > 1000 || got < 900 {
			t.Errorf("got segments of %d bytes, want those of the program", got)
		}
		if err := s.Imitate(programSocket(t, unix.AF_INET, unix.SOCK_STREAM, 0)); err != nil {
			t.Fatal(err)
		}
		if got := segment(); got != want {
			t.Errorf("back: got segments of %d bytes, want %d", got, want)
		}
	}
}

// A descriptor that is none is an error, and changes nothing.
func TestImitateErrors(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	s := mustOpen(t, "tcp://127.0.0.1:0", Options{})
	before := readOptions(t, s.FD())
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pipe[0])
	defer unix.Close(pipe[1])
	for fd, want := range map[int]error{-1: unix.EBADF, pipe[0]: unix.ENOTSOCK} {
		var se *SocketError
		if err := s.Imitate(fd); !errors.Is(err, want) || !errors.As(err, &se) {
			t.Errorf("%d: got %v, want %v", fd, err, want)
		}
	}
	differs(t, "errors", readOptions(t, s.FD()), before)
}

func TestCopy(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	set := []struct{ level, name, value int }{
		{unix.SOL_SOCKET, unix.SO_REUSEADDR, 1},
		{unix.SOL_SOCKET, unix.SO_REUSEPORT, 1},
		{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 17},
		{unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1},
		{unix.SOL_SOCKET, unix.SO_RCVBUF, 100000},
	}
	for _, domain := range []int{unix.AF_INET, unix.AF_INET6} {
		for _, protocol := range []int{unix.IPPROTO_TCP, unix.IPPROTO_MPTCP} {
			if protocol == unix.IPPROTO_MPTCP && mptcp() != nil {
				continue
			}
			what := fmt.Sprintf("domain %d, protocol %d", domain, protocol)
			for _, flags := range []int{0, unix.SOCK_NONBLOCK} {
				from, to := programSocket(t, domain, unix.SOCK_STREAM|flags, protocol), programSocket(t, domain, unix.SOCK_STREAM, 0)
				for range 2 {
					if err := Copy(to, from); err != nil {
						t.Errorf("%s: %v", what, err)
					}
					for _, o := range set {
						want, err := unix.GetsockoptInt(from, o.level, o.name)
						got, e := unix.GetsockoptInt(to, o.level, o.name)
						if err == nil && e == nil && got != want {
							t.Errorf("%s: option %d of level %d: got %d, want %d", what, o.name, o.level, got, want)
						}
					}
					if a, b := readOptions(t, from)["O_NONBLOCK"], readOptions(t, to)["O_NONBLOCK"]; a != b {
						t.Errorf("%s: got O_NONBLOCK %d, want %d", what, b, a)
					}
					for _, o := range set {
						if o.level == unix.IPPROTO_IPV6 && domain == unix.AF_INET {
							continue
						}
						if err := unix.SetsockoptInt(from, o.level, o.name, o.value); err != nil {
							t.Fatal(err)
						}
					}
				}
			}
		}
	}
	if err := Copy(-1, programSocket(t, unix.AF_INET, unix.SOCK_STREAM, 0)); err == nil {
		t.Error("copied to nothing")
	}
}
