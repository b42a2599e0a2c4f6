package activation

import (
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
)

// optionTests reads every socket option back from the kernel. Those of paths are in path_test.go.
func optionTests() map[string]struct {
	address       string
	o             Options
	level, option int
	want          int
} {
	seven := 7
	tos := 0x48
	return map[string]struct {
		address       string
		o             Options
		level, option int
		want          int
	}{
		"ReusePort":           {"tcp://:0", Options{ReusePort: true}, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1},
		"FreeBind IPv4":       {"tcp://192.0.2.1:0", Options{FreeBind: true}, unix.IPPROTO_IP, unix.IP_FREEBIND, 1},
		"FreeBind IPv6":       {"udp://[2001:db8::1]:0", Options{FreeBind: true}, unix.IPPROTO_IPV6, unix.IPV6_FREEBIND, 1},
		"Transparent IPv4":    {"tcp://127.0.0.1:0", Options{Transparent: true}, unix.IPPROTO_IP, unix.IP_TRANSPARENT, 1},
		"Transparent IPv6":    {"tcp://:0", Options{Transparent: true}, unix.IPPROTO_IPV6, unix.IPV6_TRANSPARENT, 1},
		"Broadcast":           {"udp://:0", Options{Broadcast: true}, unix.SOL_SOCKET, unix.SO_BROADCAST, 1},
		"KeepAlive":           {"tcp://:0", Options{KeepAlive: true}, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		"KeepAliveTime":       {"tcp://:0", Options{KeepAliveTime: 90 * time.Second}, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 90},
		"KeepAliveTime short": {"tcp://:0", Options{KeepAliveTime: time.Millisecond}, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 1},
		"KeepAliveInterval":   {"tcp://:0", Options{KeepAliveInterval: 11 * time.Second}, unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 11},
		"KeepAliveProbes":     {"tcp://:0", Options{KeepAliveProbes: 3}, unix.IPPROTO_TCP, unix.TCP_KEEPCNT, 3},
		"NoDelay":             {"tcp://:0", Options{NoDelay: true}, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
		"DeferAccept":         {"tcp://:0", Options{DeferAccept: time.Second}, unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT, 1},
		"ReceiveBuffer":       {"udp://:0", Options{ReceiveBuffer: 8192}, unix.SOL_SOCKET, unix.SO_RCVBUF, 16384},
		"SendBuffer":          {"unix:@hg-sndbuf", Options{SendBuffer: 8192}, unix.SOL_SOCKET, unix.SO_SNDBUF, 16384},
		"Mark":                {"tcp://:0", Options{Mark: &seven}, unix.SOL_SOCKET, unix.SO_MARK, 7},
		"Priority":            {"tcp://:0", Options{Priority: &seven, TOS: &tos}, unix.SOL_SOCKET, unix.SO_PRIORITY, 7},
		"TOS IPv4":            {"tcp://:0", Options{TOS: &tos}, unix.IPPROTO_IP, unix.IP_TOS, tos},
		"TOS IPv6":            {"udp://[::1]:0", Options{TOS: &tos}, unix.IPPROTO_IPV6, unix.IPV6_TCLASS, tos},
		"TTL IPv4":            {"tcp://:0", Options{TTL: 5}, unix.IPPROTO_IP, unix.IP_TTL, 5},
		"TTL IPv6":            {"tcp://:0", Options{TTL: 5}, unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS, 5},
		"PassCredentials":     {"unixgram:@hg-passcred", Options{PassCredentials: true}, unix.SOL_SOCKET, unix.SO_PASSCRED, 1},
		"PacketInfo IPv4":     {"udp://127.0.0.1:0", Options{PacketInfo: true}, unix.IPPROTO_IP, unix.IP_PKTINFO, 1},
		"PacketInfo IPv6":     {"udp://[::1]:0", Options{PacketInfo: true}, unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1},
		"PipeSize":            {"", Options{PipeSize: 1 << 17}, 0, 0, 1 << 17},
	}
}

func TestOptions(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	for name, test := range optionTests() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if test.address == "" {
				s := mustOpen(t, "fifo://"+tempPath(t, "f"), test.o)
				if got, err := unix.FcntlInt(uintptr(s.FD()), unix.F_GETPIPE_SZ, 0); got != test.want {
					t.Errorf("got %d, %v, want %d", got, err, test.want)
				}
				return
			}
			s := mustOpen(t, test.address, test.o)
			if got := getInt(t, s.FD(), test.level, test.option); got != test.want {
				t.Errorf("got %d, want %d", got, test.want)
			}
			if w := s.Warnings(); len(w) > 0 {
				t.Error(w)
			}
		})
	}
}

// Every field of Options has a test that reads it back.
func TestOptionsCovered(t *testing.T) {
	t.Parallel()
	covered := []string{ // by tests of their own
		"Backlog", "Family", "Device", "Congestion",
		"Mode", "DirMode", "Owner", "Group", "Symlinks", "RemoveOnStop",
		"Access",
	}
	for name := range optionTests() {
		covered = append(covered, strings.Fields(name)[0])
	}
	for _, field := range reflect.VisibleFields(reflect.TypeFor[Options]()) {
		if !slices.Contains(covered, field.Name) {
			t.Errorf("no test for %s", field.Name)
		}
	}
}

func TestDeviceAndCongestion(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	s := mustOpen(t, "tcp://:0", Options{Device: "lo", Congestion: "reno"})
	if got, err := unix.GetsockoptString(s.FD(), unix.SOL_SOCKET, unix.SO_BINDTODEVICE); got != "lo" {
		t.Errorf("device: got %q, %v", got, err)
	}
	if got, err := unix.GetsockoptString(s.FD(), unix.IPPROTO_TCP, unix.TCP_CONGESTION); strings.TrimRight(got, "\x00") != "reno" {
		t.Errorf("congestion: got %q, %v", got, err)
	}
}

func TestBacklog(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	// tcp_info of a listening socket carries the backlog in this field (tcp_diag).
	for backlog, want := range map[int]uint32{5: 5, 0: 4096} {
		s := mustOpen(t, "tcp://:0", Options{Backlog: backlog})
		info, err := unix.GetsockoptTCPInfo(s.FD(), unix.IPPROTO_TCP, unix.TCP_INFO)
		if err != nil {
			t.Fatal(err)
		}
		if got := info.Sacked; got != want {
			t.Errorf("backlog %d: got %d, want %d", backlog, got, want)
		}
	}
}

// What cannot be had does not keep the socket from working.
func TestOptionWarnings(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	s := mustOpen(t, "tcp://127.0.0.1:0", Options{Congestion: "none-such", TTL: 999})
	w := s.Warnings()
	if len(w) != 2 {
		t.Fatalf("got %v, want two warnings", w)
	}
	want := "set TCP_CONGESTION of " + s.Spec().Address.String()
	if got := w[0].Error(); !strings.HasPrefix(got, "set TCP_CONGESTION of tcp://127.0.0.1:") || !strings.HasSuffix(got, ": none-such: no such file or directory") {
		t.Errorf("got %q, want %q", got, want)
	}
	mustDial(t, s)
	if ok, err := s.Pending(); !ok {
		t.Errorf("got %v, %v, want a connection", ok, err)
	}
}

// Accepted connections have the options of the listening socket.
func TestOptionsInherited(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	tos := 0x48
	s := mustOpen(t, "tcp://:0", Options{KeepAlive: true, KeepAliveProbes: 3, NoDelay: true, TOS: &tos, TTL: 5, ReceiveBuffer: 8192})
	mustDial(t, s)
	fd, _, err := s.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	for _, o := range [][3]int{
		{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		{unix.IPPROTO_TCP, unix.TCP_KEEPCNT, 3},
		{unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
		{unix.IPPROTO_IPV6, unix.IPV6_TCLASS, tos},
		{unix.IPPROTO_IP, unix.IP_TTL, 5},
		{unix.SOL_SOCKET, unix.SO_RCVBUF, 16384},
	} {
		if got := getInt(t, fd, o[0], o[1]); got != o[2] {
			t.Errorf("option %d of level %d: got %d, want %d", o[1], o[0], got, o[2])
		}
	}
}

// Sharing a port is something the user asks for, on both sides.
func TestReusePortShares(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	for _, scheme := range []string{"tcp", "udp"} {
		first := mustOpen(t, scheme+"://:0", Options{ReusePort: true})
		mustOpen(t, first.Address().String(), Options{ReusePort: true})
		if s, err := Open(Spec{Address: first.Address()}); err == nil {
			t.Errorf("%s: a socket without ReusePort shares the port", scheme)
			s.Close()
		}
	}
}
