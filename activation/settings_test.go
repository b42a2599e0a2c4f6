package activation

import (
	"encoding/binary"
	"errors"
	"io"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
)

// dropAll is a filter that lets nothing in.
func dropAll(fd int) error {
	program := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: 0}}
	return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &program[0]})
}

func lockFilter(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_LOCK_FILTER, 1) }

// setKey sets a TCP_MD5SIG key for everybody of one IP version.
func setKey(fd int, family uint16, mapped bool) error {
	key := unix.TCPMD5Sig{Addr: unix.SockaddrStorage{Family: family}, Flags: unix.TCP_MD5SIG_FLAG_PREFIX, Keylen: 3, Key: [80]byte{'k', 'e', 'y'}}
	if mapped {
		key.Addr.Data[16], key.Addr.Data[17] = 0xff, 0xff
	}
	return unix.SetsockoptTCPMD5Sig(fd, unix.IPPROTO_TCP, unix.TCP_MD5SIG_EXT, &key)
}

// What a process has set, no client suffers from when it has ended.
func TestRestoreSettings(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	set := func(level, option, value int) func(int) error {
		return func(fd int) error { return unix.SetsockoptInt(fd, level, option, value) }
	}
	const v4, v6 = "tcp://127.0.0.1:0", "tcp://:0"
	const said = "a process had set "
	tests := map[string]struct {
		addresses []string
		do        func(fd int) error
		want      string
	}{
		"IP_MINTTL":         {[]string{v4, v6}, set(unix.IPPROTO_IP, unix.IP_MINTTL, 255), said + "IP_MINTTL"},
		"IPV6_MINHOPCOUNT":  {[]string{v6}, set(unix.IPPROTO_IPV6, unix.IPV6_MINHOPCOUNT, 255), said + "IPV6_MINHOPCOUNT"},
		"IP_TTL":            {[]string{v4, v6}, set(unix.IPPROTO_IP, unix.IP_TTL, 1), said + "IP_TTL"},
		"IPV6_UNICAST_HOPS": {[]string{v6}, set(unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS, 1), said + "IPV6_UNICAST_HOPS"},
		"SO_DONTROUTE":      {[]string{v4, v6}, set(unix.SOL_SOCKET, unix.SO_DONTROUTE, 1), said + "SO_DONTROUTE"},
		"SO_REUSEPORT":      {[]string{v4, v6}, set(unix.SOL_SOCKET, unix.SO_REUSEPORT, 1), ""},
		"SO_RCVLOWAT":       {[]string{v4, v6}, set(unix.SOL_SOCKET, unix.SO_RCVLOWAT, 1<<20), ""},
		"TCP_USER_TIMEOUT":  {[]string{v4, v6}, set(unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, 1), ""},
		"TCP_MD5SIG":        {[]string{v4}, func(fd int) error { return setKey(fd, unix.AF_INET, false) }, said + "TCP_MD5SIG"},
		"TCP_MD5SIG, IPv6":  {[]string{v6}, func(fd int) error { return setKey(fd, unix.AF_INET6, false) }, said + "TCP_MD5SIG"},
		"TCP_MD5SIG, both": {[]string{v6}, func(fd int) error {
			return errors.Join(setKey(fd, unix.AF_INET6, false), setKey(fd, unix.AF_INET6, true))
		}, said + "TCP_MD5SIG"},
		"filter":  {[]string{v4, v6}, dropAll, said + "SO_ATTACH_FILTER"},
		"lock":    {[]string{v4, v6}, lockFilter, ""},
		"several": {[]string{v4, v6}, func(fd int) error { return errors.Join(dropAll(fd), set(unix.IPPROTO_IP, unix.IP_MINTTL, 255)(fd)) }, said + "IP_MINTTL, SO_ATTACH_FILTER"},
		"time limits": {[]string{v4, v6}, func(fd int) error {
			limit := unix.Timeval{Usec: 1}
			return errors.Join(
				unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit),
				unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &limit),
				unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}))
		}, ""},
	}
	for name, test := range tests {
		for _, address := range test.addresses {
			t.Run(name+" "+address, func(t *testing.T) {
				t.Parallel()
				s := mustOpen(t, address, Options{})
				before := readSettings(t, s)
				err := test.do(s.FD())
				if errors.Is(err, unix.ENOPROTOOPT) {
					t.Skip("the kernel has no TCP_MD5SIG")
				}
				if err != nil {
					t.Fatal(err)
				}
				if got, err := s.Restore(); got != test.want || err != nil {
					t.Errorf("got %q, %v, want %q", got, err, test.want)
				}
				if got, err := s.Restore(); got != "" || err != nil {
					t.Errorf("got %q, %v the second time", got, err)
				}
				if got := readSettings(t, s); !slices.Equal(got, before) {
					t.Errorf("got %v, want %v", got, before)
				}
				ips := []string{"127.0.0.1"}
				if address == v6 {
					ips = append(ips, "::1")
				}
				clients := dialEach(t, s, ips, 1)
				if got := serveAll(t, s); got != len(clients) {
					t.Errorf("got %d connections, want %d", got, len(clients))
				}
				expectAnswers(t, clients)
			})
		}
	}
}

// readSettings reads all that Restore sets back.
func readSettings(t *testing.T, s *Socket) []int {
	t.Helper()
	var out []int
	for _, o := range riskySettings() {
		if o.of(s.addr.Network, s.v6) {
			out = append(out, getInt(t, s.FD(), o.level, o.option.name))
		}
	}
	linger, err := unix.GetsockoptLinger(s.FD(), unix.SOL_SOCKET, unix.SO_LINGER)
	if err != nil {
		t.Fatal(err)
	}
	out = append(out, int(linger.Onoff))
	for _, option := range []int{unix.SO_RCVTIMEO, unix.SO_SNDTIMEO} {
		limit, err := unix.GetsockoptTimeval(s.FD(), unix.SOL_SOCKET, option)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, int(limit.Nano()))
	}
	return out
}

// What was asked for stays, and comes back.
func TestRestoreSettingsWanted(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	o := Options{TTL: 33, Transparent: true, ReusePort: true, Device: "lo", Access: access(t, "-127.0.0.9")}
	for _, address := range []string{"tcp://:0", "tcp://127.0.0.1:0", "udp://:0", "udp://127.0.0.1:0"} {
		s := mustOpen(t, address, o)
		before := readSettings(t, s)
		if got, err := s.Restore(); got != "" || err != nil {
			t.Errorf("%s: got %q, %v", address, got, err)
		}
		if err := errors.Join(
			unix.SetsockoptInt(s.FD(), unix.IPPROTO_IP, unix.IP_TTL, 1),
			unix.SetsockoptInt(s.FD(), unix.IPPROTO_IP, unix.IP_TRANSPARENT, 0),
			unix.SetsockoptInt(s.FD(), unix.SOL_SOCKET, unix.SO_REUSEPORT, 0),
			unix.SetsockoptInt(s.FD(), unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX, 0),
		); err != nil {
			t.Fatal(err)
		}
		const want = "a process had set IP_TRANSPARENT, IP_TTL, SO_BINDTODEVICE"
		if got, err := s.Restore(); got != want || err != nil {
			t.Errorf("%s: got %q, %v", address, got, err)
		}
		if got := readSettings(t, s); s.Address().Network == TCP && !slices.Equal(got, before) {
			t.Errorf("%s: got %v, want %v", address, got, before)
		}
	}
}

// A parked socket goes on sharing its port.
func TestRestoreParked(t *testing.T) {
	t.Parallel()
	nettest.Need(t, parkable)
	s := mustOpen(t, "tcp://127.0.0.1:0", Options{})
	mustPark(t, s)
	if got, err := s.Restore(); got != "" || err != nil || getInt(t, s.FD(), unix.SOL_SOCKET, unix.SO_REUSEPORT) != 1 {
		t.Errorf("got %q, %v", got, err)
	}
	mustUnpark(t, s)
}

// What cannot be undone is said.
func TestRestoreLockedFilter(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	for _, address := range []string{"tcp://127.0.0.1:0", "udp://127.0.0.1:0", "unixgram:@hg-restore-locked"} {
		s := mustOpen(t, address, Options{})
		if err := errors.Join(dropAll(s.FD()), lockFilter(s.FD()), unix.SetsockoptInt(s.FD(), unix.SOL_SOCKET, unix.SO_DONTROUTE, 1)); err != nil {
			t.Fatal(err)
		}
		_, err := s.Restore()
		if se, ok := errors.AsType[*SocketError](err); !ok || !errors.Is(se, unix.EPERM) || !strings.Contains(err.Error(), "a process has locked it") {
			t.Errorf("%s: got %v, want EPERM", address, err)
		}
		if s.Address().Network == TCP && getInt(t, s.FD(), unix.SOL_SOCKET, unix.SO_DONTROUTE) != 0 {
			t.Error("the rest is not restored")
		}
	}
}

// A device that only privilege takes away again is said.
func TestRestoreDevice(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	for _, privileged := range []bool{true, false} {
		s := mustOpen(t, "tcp://127.0.0.1:0", Options{})
		if err := unix.SetsockoptString(s.FD(), unix.SOL_SOCKET, unix.SO_BINDTODEVICE, "lo"); err != nil {
			t.Fatal(err)
		}
		restored := make(chan struct{})
		go func() {
			defer close(restored)
			if !privileged {
				runtime.LockOSThread() // and never back
				var none [2]unix.CapUserData
				if err := unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &none[0]); err != nil {
					t.Error(err)
					return
				}
			}
			got, err := s.Restore()
			if privileged && (got != "a process had set SO_BINDTODEVICE" || err != nil) {
				t.Errorf("got %q, %v", got, err)
			}
			if !privileged && !errors.Is(err, unix.EPERM) {
				t.Errorf("got %q, %v, want EPERM", got, err)
			}
		}()
		<-restored
	}
}

// take has another supervisor inherit the socket, after one that has ended.
func take(t *testing.T, s *Socket) *Socket {
	t.Helper()
	fd, err := unix.FcntlInt(uintptr(s.FD()), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		t.Fatal(err)
	}
	in := inherited{fd: fd}
	if err := in.ask(); err != nil {
		t.Fatal(err)
	}
	h := &Inherited{sockets: []inherited{in}}
	taken, ok, err := h.Take(&Spec{Address: s.Address()})
	if !ok || err != nil {
		t.Fatalf("got %v, %v", ok, err)
	}
	return taken
}

// A supervisor that ends while it has parked what it inherited leaves nothing that keeps the next one from it.
func TestTakeParked(t *testing.T) {
	t.Parallel()
	nettest.Need(t, parkable)
	for address, ip := range map[string]string{"tcp://127.0.0.1:0": "127.0.0.1", "tcp://:0": "127.0.0.1", "tcp://[::1]:0": "::1"} {
		s := mustOpen(t, address, Options{})
		first := take(t, s)
		mustPark(t, first)
		if err := first.Close(); err != nil {
			t.Fatal(err)
		}
		if getInt(t, s.FD(), unix.SOL_SOCKET, unix.SO_REUSEPORT) != 0 {
			t.Errorf("%s: Close leaves its port shared", address)
		}

		killed := take(t, s)
		mustPark(t, killed)
		if err := errors.Join(unix.Close(killed.parking.fd), unix.Close(killed.parking.spare), unix.Close(killed.fd)); err != nil { // as by SIGKILL
			t.Fatal(err)
		}
		next := take(t, s)
		mustPark(t, next)
		clients := dialEach(t, s, []string{ip}, 2)
		mustUnpark(t, next)
		if got := serveAll(t, next); got != len(clients) {
			t.Errorf("got %d connections, want %d", got, len(clients))
		}
		expectAnswers(t, clients)

		// With a stranger in the group it is left alone.
		if err := s.letJoin(); err != nil {
			t.Fatal(err)
		}
		stranger := mustOpen(t, s.Address().String(), Options{ReusePort: true})
		beside := take(t, s)
		if err := beside.Park(); !errors.Is(err, ErrNotParkable) || getInt(t, s.FD(), unix.SOL_SOCKET, unix.SO_REUSEPORT) != 1 {
			t.Errorf("%s: got %v with %s beside it", address, err, stranger.Address())
		}
		if err := errors.Join(beside.Close(), next.Close()); err != nil {
			t.Error(err)
		}
	}
}

func FuzzListenerBeside(f *testing.F) {
	message := func(kind uint16, body []byte) []byte {
		b := binary.NativeEndian.AppendUint32(nil, uint32(unix.SizeofNlMsghdr+len(body)))
		b = binary.NativeEndian.AppendUint16(b, kind)
		return append(append(b, make([]byte, unix.SizeofNlMsghdr-len(b))...), body...)
	}
	row := make([]byte, 72)
	row[68] = 7
	f.Add(message(20, row))
	f.Add(append(message(20, row), message(unix.NLMSG_DONE, nil)...))
	f.Add(message(unix.NLMSG_ERROR, []byte{0xfe, 0xff, 0xff, 0xff}))
	f.Fuzz(func(t *testing.T, b []byte) {
		if found, err := listenerBeside(b, [16]byte{}, 7); found && err != nil {
			t.Errorf("got %v, %v", found, err)
		}
	})
	if found, err := listenerBeside(message(20, row), [16]byte{}, 8); !found || err != nil {
		f.Errorf("got %v, %v, want another", found, err)
	}
	if found, err := listenerBeside(message(20, row), [16]byte{}, 7); found || err != nil {
		f.Errorf("got %v, %v, want itself", found, err)
	}
	if _, err := listenerBeside(message(unix.NLMSG_ERROR, []byte{0xfe, 0xff, 0xff, 0xff}), [16]byte{}, 7); !errors.Is(err, unix.ENOENT) {
		f.Errorf("got %v, want ENOENT", err)
	}
	if _, err := listenerBeside(message(unix.NLMSG_DONE, nil), [16]byte{}, 7); !errors.Is(err, io.EOF) {
		f.Errorf("got %v, want EOF", err)
	}
}
