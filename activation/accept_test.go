package activation

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
)

func TestAcceptTCP(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	for _, host := range []string{"127.0.0.1", "::1"} {
		s := mustOpen(t, "tcp://:0", Options{}) // dual stack
		ip := netip.MustParseAddr(host)
		domain, sa := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Port: int(s.Address().Port), Addr: [4]byte{127, 0, 0, 1}})
		if ip.Is6() {
			domain, sa = unix.AF_INET6, &unix.SockaddrInet6{Port: int(s.Address().Port), Addr: ip.As16()}
		}
		client, err := unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(client)
		if err := unix.Connect(client, sa); err != nil {
			t.Fatal(err)
		}
		own, err := unix.Getsockname(client)
		if err != nil {
			t.Fatal(err)
		}
		fd, peer, err := s.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		if want := (Peer{Remote: addrPort(own), Local: netip.AddrPortFrom(ip, s.Address().Port)}); peer != want {
			t.Errorf("got %+v, want %+v", peer, want)
		}
		checkConnection(t, fd)
		if _, _, err := s.Accept(); KindOfAcceptError(err) != AcceptEmpty {
			t.Errorf("got %v, want EAGAIN", err)
		}
	}
}

// checkConnection checks that an accepted descriptor blocks and is close-on-exec.
func checkConnection(t *testing.T, fd int) {
	t.Helper()
	flags, _ := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	cloexec, _ := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
	if flags&unix.O_NONBLOCK != 0 || cloexec&unix.FD_CLOEXEC == 0 {
		t.Errorf("got flags %#x and %#x, want FD_CLOEXEC and not O_NONBLOCK", flags, cloexec)
	}
}

// A client that has closed or reset its connection before it is accepted is
// accepted like any other.
func TestAcceptGone(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	s := mustOpen(t, "tcp://127.0.0.1:0", Options{})
	for _, linger := range []int32{-1, 0} {
		client, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		sa, _ := unix.Getsockname(s.FD())
		if err := unix.Connect(client, sa); err != nil {
			t.Fatal(err)
		}
		own, _ := unix.Getsockname(client)
		if linger == 0 { // close by a reset
			if err := unix.SetsockoptLinger(client, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
				t.Fatal(err)
			}
		}
		if err := unix.Close(client); err != nil {
			t.Fatal(err)
		}
		fd, peer, err := s.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		if peer.Remote != addrPort(own) {
			t.Errorf("linger %d: got peer %+v, want %v", linger, peer, addrPort(own))
		}
	}
}

func TestAcceptUnix(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	for _, scheme := range []string{"unix", "unixpacket"} {
		for _, name := range []string{"", "@hg-client-" + scheme, tempPath(t, "c")} {
			s := mustOpen(t, scheme+"://"+tempPath(t, "s"), Options{})
			kind := getInt(t, s.FD(), unix.SOL_SOCKET, unix.SO_TYPE)
			client, err := unix.Socket(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			if name != "" {
				if err := unix.Bind(client, &unix.SockaddrUnix{Name: name}); err != nil {
					t.Fatal(err)
				}
			}
			if err := unix.Connect(client, &unix.SockaddrUnix{Name: s.Address().Path}); err != nil {
				t.Fatal(err)
			}
			if err := unix.Close(client); err != nil { // the credentials outlive it
				t.Fatal(err)
			}
			fd, peer, err := s.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(fd)
			checkConnection(t, fd)
			want := Peer{Path: name, UID: uint32(os.Getuid()), GID: uint32(os.Getgid()), PID: int32(os.Getpid()), Known: true}
			if peer != want {
				t.Errorf("%s: got %+v, want %+v", scheme, peer, want)
			}
		}
	}
}

func TestKindOfAcceptError(t *testing.T) {
	t.Parallel()
	tests := map[AcceptErrorKind][]error{
		AcceptEmpty:    {unix.EAGAIN},
		AcceptPause:    {unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM},
		AcceptSkip:     {unix.ECONNABORTED, unix.EPROTO, unix.ENETDOWN, unix.EPERM},
		AcceptShutDown: {unix.EINVAL},
		AcceptFailed:   {unix.EBADF, unix.ENOTSOCK, errors.New("other"), nil},
	}
	for want, errs := range tests {
		for _, err := range errs {
			if got := KindOfAcceptError(err); got != want {
				t.Errorf("%v: got %d, want %d", err, got, want)
			}
			if err == nil {
				continue
			}
			if got := KindOfAcceptError(&SocketError{Err: fmt.Errorf("x: %w", err)}); got != want {
				t.Errorf("wrapped %v: got %d, want %d", err, got, want)
			}
		}
	}
}

func TestRevive(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	addresses := []string{
		"tcp://:0", "tcp://127.0.0.1:0", "udp://:0", "unix:@hg-revive",
		"unix://" + tempPath(t, "s"), "unixgram://" + tempPath(t, "s"), "unixpacket://" + tempPath(t, "s"),
	}
	for _, address := range addresses {
		t.Run(address, func(t *testing.T) {
			t.Parallel()
			s := mustOpen(t, address, Options{Backlog: 5, RemoveOnStop: true})
			before := s.Address()
			if needed, err := s.Revive(); needed || err != nil {
				t.Fatalf("got %v, %v of a socket that works", needed, err)
			}
			// UDP says ENOTCONN and shuts down all the same.
			if err := unix.Shutdown(s.FD(), unix.SHUT_RDWR); err != nil && !errors.Is(err, unix.ENOTCONN) {
				t.Fatal(err)
			}
			if _, err := s.Pending(); !errors.Is(err, ErrShutDown) {
				t.Fatalf("got %v, want ErrShutDown", err)
			}
			if s.Address().Network == TCP { // Unix sockets say EAGAIN
				if _, _, err := s.Accept(); KindOfAcceptError(err) != AcceptShutDown {
					t.Errorf("got %v from Accept", err)
				}
			}
			if needed, err := s.Revive(); !needed || err != nil {
				t.Fatalf("got %v, %v, want it to be needed", needed, err)
			}
			if ok, err := s.Pending(); ok || err != nil {
				t.Fatalf("got %v, %v after Revive", ok, err)
			}
			if s.Address() != before {
				t.Errorf("got address %v, want %v", s.Address(), before)
			}
			checkFlags(t, s)
			client := mustDial(t, s)
			if !s.Address().Network.Connections() {
				if _, err := unix.Write(client, []byte("x")); err != nil {
					t.Fatal(err)
				}
			}
			if ok, err := s.Pending(); !ok || err != nil {
				t.Errorf("got %v, %v with a client", ok, err)
			}
			if p := s.Address().Path; len(p) > 0 && p[0] == '/' {
				if err := s.Close(); err != nil {
					t.Fatal(err)
				}
				if _, err := os.Lstat(p); err == nil {
					t.Error("the new file was not removed")
				}
			}
		})
	}
}

// While a process still holds an abstract name nothing can be done; later it can.
func TestReviveAgain(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	for _, address := range []string{"unix:@hg-revive-again", "unixgram:@hg-revive-again"} {
		s := mustOpen(t, address, Options{})
		other, err := unix.FcntlInt(uintptr(s.FD()), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Shutdown(other, unix.SHUT_RDWR); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if needed, err := s.Revive(); !needed || !errors.Is(err, unix.EADDRINUSE) {
				t.Errorf("got %v, %v while the name is taken", needed, err)
			}
		}
		syscall.ForkLock.RLock() // a helper of another test that is being started may hold a copy
		err = unix.Close(other)
		syscall.ForkLock.RUnlock()
		if err != nil {
			t.Fatal(err)
		}
		if needed, err := s.Revive(); !needed || err != nil {
			t.Errorf("got %v, %v when the name is free", needed, err)
		}
		mustDial(t, s)
		checkFlags(t, s)
	}
}

// A UDP socket does not have to wait for the processes that hold the old one.
func TestReviveHeldUDP(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	s := mustOpen(t, "udp://:0", Options{})
	other, err := unix.FcntlInt(uintptr(s.FD()), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(other)
	if err := unix.Shutdown(other, unix.SHUT_RDWR); !errors.Is(err, unix.ENOTCONN) {
		t.Fatal(err)
	}
	if revived, err := s.Revive(); !revived || err != nil {
		t.Fatalf("got %v, %v", revived, err)
	}
	if _, err := unix.Write(mustDial(t, s), []byte("x")); err != nil {
		t.Fatal(err)
	}
	if ok, err := s.Pending(); !ok || err != nil {
		t.Errorf("got %v, %v, want the datagram", ok, err)
	}
	if getInt(t, s.FD(), unix.SOL_SOCKET, unix.SO_REUSEADDR) != 0 {
		t.Error("others may bind the port too")
	}
}

// What does not change may be read while a socket is replaced; go test -race looks on.
func TestReviveConcurrently(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	for _, address := range []string{"tcp://:0", "udp://:0", "unix://" + tempPath(t, "s")} {
		s := mustOpen(t, address, Options{})
		spec, addr, fd := s.Spec(), s.Address(), s.FD()
		started, stop, ended := make(chan struct{}), make(chan struct{}), make(chan struct{})
		go func() {
			defer close(ended)
			for i := 0; ; i++ {
				if s.Address() != addr || s.FD() != fd || s.Spec().Address != spec.Address {
					t.Errorf("got %v and descriptor %d, want %v and %d", s.Address(), s.FD(), addr, fd)
				}
				if i == 0 {
					close(started)
				}
				select {
				case <-stop:
					return
				default:
				}
			}
		}()
		<-started
		for range 20 {
			if err := unix.Shutdown(s.FD(), unix.SHUT_RDWR); err != nil && !errors.Is(err, unix.ENOTCONN) {
				t.Error(err)
			}
			if revived, err := s.Revive(); !revived || err != nil {
				t.Errorf("got %v, %v", revived, err)
			}
			if _, err := s.Restore(); err != nil {
				t.Error(err)
			}
		}
		close(stop)
		<-ended
	}
}

// An error that waits on a datagram socket would be reported again and again.
func TestReviveClearsErrors(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	s := mustOpen(t, "udp://127.0.0.1:0", Options{})
	if err := unix.SetsockoptInt(s.FD(), unix.IPPROTO_IP, unix.IP_RECVERR, 1); err != nil {
		t.Fatal(err)
	}
	nobody := mustOpen(t, "udp://127.0.0.1:0", Options{})
	sa, _ := unix.Getsockname(nobody.FD())
	if err := nobody.Close(); err != nil {
		t.Fatal(err)
	}
	if err := unix.Sendto(s.FD(), []byte("x"), 0, sa); err != nil {
		t.Fatal(err)
	}
	nettest.Eventually(t, func() error {
		events, err := s.poll()
		if err == nil && events&unix.POLLERR == 0 {
			return fmt.Errorf("no error waits: events %#x", events)
		}
		return err
	})
	if needed, err := s.Revive(); needed || err != nil {
		t.Errorf("got %v, %v", needed, err)
	}
	if events, err := s.poll(); events != 0 || err != nil {
		t.Errorf("got events %#x, %v after Revive", events, err)
	}
}
