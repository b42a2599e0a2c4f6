package activation

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
)

// sendFrom sends one datagram to s by the IP version of from.
func sendFrom(t *testing.T, s, from *Socket) error {
	t.Helper()
	sa, err := unix.Getsockname(from.FD())
	if err != nil {
		t.Fatal(err)
	}
	port := int(s.Address().Port)
	switch sa.(type) {
	case *unix.SockaddrInet4:
		sa = &unix.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}}
	case *unix.SockaddrInet6:
		sa = &unix.SockaddrInet6{Port: port, Addr: [16]byte{15: 1}}
	default:
		sa = &unix.SockaddrUnix{Name: s.Address().Path}
	}
	return unix.Sendto(from.FD(), []byte(from.Address().String()), unix.MSG_DONTWAIT, sa)
}

// connectTo connects s as a process that shares it would.
func connectTo(t *testing.T, s, peer *Socket) {
	t.Helper()
	sa, err := unix.Getsockname(peer.FD())
	if err != nil {
		t.Fatal(err)
	}
	if v4, ok := sa.(*unix.SockaddrInet4); ok && getInt(t, s.FD(), unix.SOL_SOCKET, unix.SO_DOMAIN) == unix.AF_INET6 {
		mapped := &unix.SockaddrInet6{Port: v4.Port, Addr: [16]byte{10: 255, 11: 255}}
		copy(mapped.Addr[12:], v4.Addr[:])
		sa = mapped
	}
	if err := unix.Connect(s.FD(), sa); err != nil {
		t.Fatal(err)
	}
}

// receive takes one datagram, "" where there is none.
func receive(t *testing.T, s *Socket) string {
	t.Helper()
	var b [256]byte
	n, _, err := unix.Recvfrom(s.FD(), b[:], unix.MSG_DONTWAIT)
	if errors.Is(err, unix.EAGAIN) {
		return ""
	}
	if err != nil {
		t.Fatal(err)
	}
	return string(b[:n])
}

// earlyAddress makes a second address beside one of a client; those of UDP have any port.
func earlyAddress(client string) string {
	if client[:4] == "unix" {
		return client + "-early"
	}
	return client
}

func localName(t *testing.T, s *Socket) string {
	t.Helper()
	sa, err := unix.Getsockname(s.FD())
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprint(addrPort(sa), unixPath(sa))
}

func TestRestorePeer(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	const v4, other4, v6 = "udp://127.0.0.1:0", "udp://127.0.0.2:0", "udp://[::1]:0"
	dir := "unixgram://" + tempPath(t, "")
	tests := map[string]struct {
		address   string
		o         Options
		peer      string
		others    []string
		keepsPeer bool // while something waits
	}{
		"IPv4":                       {"udp://127.0.0.1:7101", Options{}, v4, []string{v4, other4}, false},
		"IPv4 wildcard":              {"udp://0.0.0.0:7102", Options{}, v4, []string{v4, other4}, false},
		"IPv4, any port":             {"udp://127.0.0.1:0", Options{}, v4, []string{v4, other4}, true},
		"IPv4 wildcard, any port":    {"udp://0.0.0.0:0", Options{}, v4, []string{v4, other4}, true},
		"IPv4 on a device":           {"udp://127.0.0.1:7103", Options{Device: "lo"}, v4, []string{v4, other4}, true},
		"IPv6":                       {"udp://[::1]:7104", Options{}, v6, []string{v6}, true},
		"IPv6, any port":             {"udp://[::1]:0", Options{}, v6, []string{v6}, true},
		"IPv6 wildcard":              {"udp://[::]:7105", Options{Family: FamilyIPv6}, v6, []string{v6}, true},
		"IPv6 on a device":           {"udp://[::]:7106", Options{Family: FamilyIPv6, Device: "lo"}, v6, []string{v6}, true},
		"both versions, IPv4 peer":   {"udp://:7107", Options{}, v4, []string{v4, other4, v6}, true},
		"both versions, IPv6 peer":   {"udp://:7108", Options{}, v6, []string{v4, other4, v6}, true},
		"both versions, shared port": {"udp://:7109", Options{ReusePort: true}, v4, []string{v4, v6}, true},
		"abstract":                   {"unixgram:@hg-restore", Options{}, "unixgram:@hg-restore-peer", []string{"unixgram:@hg-restore-other"}, true},
		"path":                       {dir + "/s", Options{}, dir + "/p", []string{dir + "/o"}, true},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := mustOpen(t, test.address, test.o)
			address, local, fd := s.Address(), localName(t, s), s.FD()
			reuse := getInt(t, fd, unix.SOL_SOCKET, unix.SO_REUSEADDR)
			device, _ := unix.GetsockoptString(fd, unix.SOL_SOCKET, unix.SO_BINDTODEVICE)
			if repaired, err := s.Restore(); repaired != "" || err != nil {
				t.Fatalf("got %q, %v without a peer", repaired, err)
			}
			// A process that is still there holds the old socket on.
			held, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
			if err != nil {
				t.Fatal(err)
			}
			peer := mustOpen(t, test.peer, Options{})
			early := mustOpen(t, earlyAddress(test.others[0]), Options{})
			for _, from := range []*Socket{early, peer} {
				if err := sendFrom(t, s, from); err != nil {
					t.Fatal(err)
				}
			}
			connectTo(t, s, peer)
			if repaired, err := s.Restore(); (repaired != "") == test.keepsPeer || err != nil {
				t.Fatalf("got %q, %v while something waits", repaired, err)
			}
			for _, want := range []string{early.Address().String(), peer.Address().String()} {
				if got := receive(t, s); got != want {
					t.Fatalf("got %q from the queue, want %q", got, want)
				}
			}
			if repaired, err := s.Restore(); (repaired != "") != test.keepsPeer || err != nil {
				t.Fatalf("got %q, %v with an empty queue", repaired, err)
			}
			if repaired, err := s.Restore(); repaired != "" || err != nil {
				t.Fatalf("got %q, %v the second time", repaired, err)
			}
			if got := localName(t, s); got != local || s.Address() != address || s.FD() != fd {
				t.Errorf("got %s, %v, descriptor %d, want %s, %v, %d", got, s.Address(), s.FD(), local, address, fd)
			}
			if got := getInt(t, fd, unix.SOL_SOCKET, unix.SO_REUSEADDR); got != reuse {
				t.Errorf("got SO_REUSEADDR %d, want %d", got, reuse)
			}
			if got, _ := unix.GetsockoptString(fd, unix.SOL_SOCKET, unix.SO_BINDTODEVICE); got != device {
				t.Errorf("got device %q, want %q", got, device)
			}
			checkFlags(t, s)
			if err := unix.Close(held); err != nil { // with a shared port it would get its part
				t.Fatal(err)
			}
			for _, other := range test.others {
				from := mustOpen(t, other, Options{})
				if err := sendFrom(t, s, from); err != nil {
					t.Errorf("from %s: %v", other, err)
				} else if got := receive(t, s); got != from.Address().String() {
					t.Errorf("got %q, want what %s sent", got, from.Address())
				}
			}
		})
	}
}

func TestRestoreBacklog(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	for _, address := range []string{"tcp://127.0.0.1:0", "unix:@hg-restore-backlog", "unix://" + tempPath(t, "s"), "unixpacket:@hg-restore-backlog"} {
		t.Run(address, func(t *testing.T) {
			t.Parallel()
			s := mustOpen(t, address, Options{Backlog: 20})
			mustDial(t, s)
			if err := unix.Listen(s.FD(), 0); err != nil {
				t.Fatal(err)
			}
			if repaired, err := s.Restore(); repaired != "" || err != nil {
				t.Fatalf("got %q, %v", repaired, err)
			}
			for range 9 { // would wait for room in a backlog of 0
				mustDial(t, s)
			}
			for i := range 10 {
				fd, _, err := s.Accept()
				if err != nil {
					t.Fatalf("connection %d: %v", i, err)
				}
				unix.Close(fd)
			}
			for _, how := range []int{unix.SHUT_RD, unix.SHUT_RDWR} {
				if err := unix.Shutdown(s.FD(), how); err != nil {
					t.Fatal(err)
				}
				if _, err := s.Restore(); err != nil {
					t.Fatal(err)
				}
				if _, err := s.Pending(); !errors.Is(err, ErrShutDown) {
					t.Errorf("got %v, want that Restore leaves it to Revive", err)
				}
				if revived, err := s.Revive(); !revived || err != nil {
					t.Errorf("got %v, %v", revived, err)
				}
			}
		})
	}
}

// The backlog that another program chose is not ours to change.
func TestRestoreInherited(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	s := mustOpen(t, "unix:@hg-restore-inherited", Options{})
	if err := unix.Listen(s.FD(), 0); err != nil {
		t.Fatal(err)
	}
	s.inherited = true
	if _, err := s.Restore(); err != nil {
		t.Fatal(err)
	}
	mustDial(t, s)
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: s.Address().Path}); !errors.Is(err, unix.EAGAIN) {
		t.Errorf("got %v, want EAGAIN of a backlog of 0", err)
	}
}

// Flags that all who share the socket share are set back, and it is nothing to speak of.
func TestRestoreFlags(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	for _, address := range []string{"tcp://127.0.0.1:0", "udp://127.0.0.1:0", "unix:@hg-restore-flags", "fifo://" + tempPath(t, "f")} {
		s := mustOpen(t, address, Options{DeferAccept: 3 * time.Second})
		if _, err := unix.FcntlInt(uintptr(s.FD()), unix.F_SETFL, unix.O_ASYNC); err != nil {
			t.Fatal(err)
		}
		deferred := 0
		if s.Address().Network == TCP {
			deferred = getInt(t, s.FD(), unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT)
			if err := unix.SetsockoptInt(s.FD(), unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT, 0); err != nil {
				t.Fatal(err)
			}
		}
		if repaired, err := s.Restore(); repaired != "" || err != nil {
			t.Errorf("%s: got %q, %v", address, repaired, err)
		}
		checkFlags(t, s)
		if flags, _ := unix.FcntlInt(uintptr(s.FD()), unix.F_GETFL, 0); flags&unix.O_ASYNC != 0 {
			t.Errorf("%s: got O_ASYNC", address)
		}
		if deferred != 0 && getInt(t, s.FD(), unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT) != deferred {
			t.Errorf("%s: data is not waited for", address)
		}
	}
}

// A port that the kernel chose is the same after shutdown(2), which gives it back.
func TestReviveSamePort(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	for _, address := range []string{"tcp://127.0.0.1:0", "tcp://:0", "tcp://[::1]:0"} {
		s := mustOpen(t, address, Options{})
		for range 2 {
			local := localName(t, s)
			if err := unix.Shutdown(s.FD(), unix.SHUT_RDWR); err != nil {
				t.Fatal(err)
			}
			if revived, err := s.Revive(); !revived || err != nil {
				t.Fatalf("got %v, %v", revived, err)
			}
			if got := localName(t, s); got != local {
				t.Errorf("got %s, want %s", got, local)
			}
		}
	}
}

func TestRestoreFIFO(t *testing.T) {
	t.Parallel()
	s := mustOpen(t, "fifo://"+tempPath(t, "f"), Options{})
	if repaired, err := s.Restore(); repaired != "" || err != nil {
		t.Errorf("got %q, %v", repaired, err)
	}
}

func TestRestoreError(t *testing.T) {
	t.Parallel()
	for _, network := range []Network{TCP, UDP} {
		s := &Socket{addr: Address{Network: network}, fd: -1}
		_, err := s.Restore()
		if se, ok := errors.AsType[*SocketError](err); !ok || !errors.Is(se, unix.EBADF) {
			t.Errorf("%v: got %v, want EBADF in a SocketError", network, err)
		}
	}
}

func BenchmarkRestore(b *testing.B) {
	nettest.Need(b, nettest.Namespaces)
	for _, address := range []string{"tcp://:0", "udp://:0", "unix:@hg-bench-restore"} {
		b.Run(address, func(b *testing.B) {
			s := mustOpen(b, address, Options{})
			b.ReportAllocs()
			for b.Loop() {
				if _, err := s.Restore(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
