package activation

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
)

func TestOpen(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	tests := map[string]struct {
		address string
		family  Family
		domain  int
		kind    int
		listens int
		v6only  int // -1: not asked
	}{
		"dual stack by default":   {"tcp://:0", FamilyDefault, unix.AF_INET6, unix.SOCK_STREAM, 1, 0},
		"dual stack":              {"tcp://:0", FamilyDual, unix.AF_INET6, unix.SOCK_STREAM, 1, 0},
		"IPv6 only":               {"tcp://:0", FamilyIPv6, unix.AF_INET6, unix.SOCK_STREAM, 1, 1},
		"IPv6 only by wildcard":   {"udp://[::]:0", FamilyIPv6, unix.AF_INET6, unix.SOCK_DGRAM, 0, 1},
		"IPv4 only":               {"tcp://:0", FamilyIPv4, unix.AF_INET, unix.SOCK_STREAM, 1, -1},
		"IPv4 wildcard":           {"udp://0.0.0.0:0", FamilyDefault, unix.AF_INET, unix.SOCK_DGRAM, 0, -1},
		"IPv4 address":            {"tcp://127.0.0.1:0", FamilyDual, unix.AF_INET, unix.SOCK_STREAM, 1, -1},
		"IPv6 address":            {"tcp://[::1]:0", FamilyDefault, unix.AF_INET6, unix.SOCK_STREAM, 1, -1},
		"Unix stream":             {"unix:@hg-open", 0, unix.AF_UNIX, unix.SOCK_STREAM, 1, -1},
		"Unix datagrams":          {"unixgram:@hg-open", 0, unix.AF_UNIX, unix.SOCK_DGRAM, 0, -1},
		"Unix sequential packets": {"unixpacket:@hg-open", 0, unix.AF_UNIX, unix.SOCK_SEQPACKET, 1, -1},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := mustOpen(t, test.address, Options{Family: test.family})
			reuse := 1
			if s.Address().Network == UDP {
				reuse = 0
			}
			for what, got := range map[string][2]int{
				"domain":    {getInt(t, s.FD(), unix.SOL_SOCKET, unix.SO_DOMAIN), test.domain},
				"type":      {getInt(t, s.FD(), unix.SOL_SOCKET, unix.SO_TYPE), test.kind},
				"listening": {getInt(t, s.FD(), unix.SOL_SOCKET, unix.SO_ACCEPTCONN), test.listens},
				"reuseaddr": {getInt(t, s.FD(), unix.SOL_SOCKET, unix.SO_REUSEADDR), reuse},
			} {
				if got[0] != got[1] {
					t.Errorf("%s: got %d, want %d", what, got[0], got[1])
				}
			}
			if test.v6only >= 0 {
				if got := getInt(t, s.FD(), unix.IPPROTO_IPV6, unix.IPV6_V6ONLY); got != test.v6only {
					t.Errorf("IPV6_V6ONLY: got %d, want %d", got, test.v6only)
				}
			}
			if a := s.Address(); a.Network.IP() && (a.Port == 0 || a.IP != s.Spec().Address.IP) {
				t.Errorf("got address %v for %v", a, s.Spec().Address)
			}
			if len(s.Warnings()) > 0 {
				t.Error(s.Warnings())
			}
			checkFlags(t, s)
		})
	}
}

// checkFlags checks what holds for every descriptor that we own.
func checkFlags(t *testing.T, s *Socket) {
	t.Helper()
	flags, _ := unix.FcntlInt(uintptr(s.FD()), unix.F_GETFL, 0)
	cloexec, _ := unix.FcntlInt(uintptr(s.FD()), unix.F_GETFD, 0)
	if flags&unix.O_NONBLOCK == 0 || cloexec&unix.FD_CLOEXEC == 0 {
		t.Errorf("got flags %#x and %#x, want O_NONBLOCK and FD_CLOEXEC", flags, cloexec)
	}
	link, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", s.FD()))
	if err != nil {
		t.Fatal(err)
	}
	if strings.HasPrefix(link, "socket:") && link != fmt.Sprintf("socket:[%d]", s.Inode()) {
		t.Errorf("got inode %d of %s", s.Inode(), link)
	}
}

func TestOpenZone(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	// A multicast address of the link may be bound on any interface that is up.
	s := mustOpen(t, "udp://[ff02::1%lo]:0", Options{})
	sa, err := unix.Getsockname(s.FD())
	if err != nil {
		t.Fatal(err)
	}
	if got, ok := sa.(*unix.SockaddrInet6); !ok || got.ZoneId != 1 {
		t.Errorf("got %+v, want zone 1", sa)
	}
	if got := addrPortZone(s.FD(), sa); got.Addr() != netip.MustParseAddr("ff02::1%lo") {
		t.Errorf("got %v read back", got)
	}
	if got := zoneName(s.FD(), 4711); got != "4711" {
		t.Errorf("got %s for an interface that is not there", got)
	}
}

func TestOpenErrors(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	taken, takenUDP := mustOpen(t, "tcp://127.0.0.1:0", Options{}), mustOpen(t, "udp://:0", Options{})
	mustOpen(t, "unix:@hg-taken", Options{})
	port := taken.Address().Port
	tests := map[string]struct {
		address string
		o       Options
		want    string
		errno   unix.Errno
	}{
		"port in use":         {fmt.Sprintf("tcp://127.0.0.1:%d", port), Options{}, fmt.Sprintf("bind tcp://127.0.0.1:%d: address already in use", port), unix.EADDRINUSE},
		"UDP port in use":     {takenUDP.Address().String(), Options{}, "bind " + takenUDP.Address().String() + ": address already in use", unix.EADDRINUSE},
		"name in use":         {"unix:@hg-taken", Options{}, "bind unix:@hg-taken: address already in use", unix.EADDRINUSE},
		"address not here":    {"tcp://192.0.2.1:80", Options{}, "bind tcp://192.0.2.1:80: cannot assign requested address", unix.EADDRNOTAVAIL},
		"device not here":     {"tcp://:80", Options{Device: "hg0"}, "bind to device hg0: tcp://:80: no such device", unix.ENODEV},
		"zone not here":       {"tcp://[fe80::1%hg0]:80", Options{}, "bind tcp://[fe80::1%hg0]:80: interface hg0: no such device", unix.ENODEV},
		"IPv4 as IPv6":        {"tcp://127.0.0.1:80", Options{Family: FamilyIPv6}, "open tcp://127.0.0.1:80: an IPv4 address cannot be IPv6 only: invalid argument", unix.EINVAL},
		"IPv6 as IPv4":        {"tcp://[::1]:80", Options{Family: FamilyIPv4}, "open tcp://[::1]:80: an IPv6 address cannot be IPv4 only: invalid argument", unix.EINVAL},
		"directory is a file": {"unix:///proc/version/x", Options{}, "bind unix:///proc/version/x: not a directory", unix.ENOTDIR},
	}
	for name, test := range tests {
		s, err := Open(Spec{Address: mustParse(t, test.address), Options: test.o})
		if err == nil {
			s.Close()
			t.Errorf("%s: no error", name)
			continue
		}
		var se *SocketError
		if err.Error() != test.want || !errors.Is(err, test.errno) || !errors.As(err, &se) {
			t.Errorf("%s: got %v, want %s", name, err, test.want)
		}
	}
	if _, err := Open(Spec{}); err == nil {
		t.Error("an invalid address was opened")
	}
}

func TestCloseTwice(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	s := mustOpen(t, "tcp://:0", Options{})
	for range 2 {
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if s.FD() != -1 {
		t.Errorf("got descriptor %d after Close", s.FD())
	}
}

// Without privilege sockets open all the same, with warnings.
func TestOpenUnprivileged(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	seven := 7
	specs := []Spec{
		{Address: mustParse(t, "udp://:1053"), Options: Options{ReceiveBuffer: 1 << 30, SendBuffer: 4096, Mark: &seven, Priority: &seven, Transparent: true}},
		{Address: mustParse(t, "tcp://:80")},
	}
	type result struct {
		s   *Socket
		err error
	}
	results := make(chan []result)
	go func() {
		// Capabilities belong to the thread, which ends with this goroutine as it is never unlocked.
		runtime.LockOSThread()
		hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var none [2]unix.CapUserData
		out := make([]result, len(specs))
		err := unix.Capset(&hdr, &none[0])
		for i, spec := range specs {
			if out[i].err = err; err == nil {
				out[i].s, out[i].err = Open(spec)
			}
		}
		results <- out
	}()
	got := <-results
	if got[0].err != nil {
		t.Fatal(got[0].err)
	}
	defer got[0].s.Close()
	var ops []string
	for _, w := range got[0].s.Warnings() {
		if !errors.Is(w, unix.EPERM) {
			t.Errorf("got %v, want EPERM in it", w)
		}
		if se, ok := errors.AsType[*SocketError](w); ok {
			ops = append(ops, se.Op)
		}
	}
	want := "[set IP_TRANSPARENT of set IPV6_TRANSPARENT of set receive buffer of set SO_MARK of set SO_PRIORITY of]"
	if fmt.Sprint(ops) != want {
		t.Errorf("got %v, want %s", got[0].s.Warnings(), want)
	}
	if n := getInt(t, got[0].s.FD(), unix.SOL_SOCKET, unix.SO_SNDBUF); n != 8192 {
		t.Errorf("got a send buffer of %d bytes, want 8192", n)
	}
	if err := got[1].err; err == nil || err.Error() != "bind tcp://:80: permission denied" {
		t.Errorf("got %v", err)
	}
}
