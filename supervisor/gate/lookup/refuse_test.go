package lookup_test

import (
	"errors"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"hibergate/activation"
	"hibergate/activation/nettest"
	"hibergate/supervisor/gate/lookup"
)

func TestPossible(t *testing.T) {
	t.Parallel()
	const ok = ""
	for _, c := range []struct {
		listen, to string
		options    activation.Options
		want       string // in the error
	}{
		{"tcp://:8080", "tcp://127.0.0.1:80", activation.Options{}, ok},
		{"tcp://:8080", "tcp://127.0.0.1:80", activation.Options{Family: activation.FamilyIPv4}, ok},
		{"tcp://:8080", "tcp://127.0.0.1:80", activation.Options{Family: activation.FamilyIPv6}, "another version of IP"},
		{"tcp://:8080", "tcp://[::1]:80", activation.Options{}, ok},
		{"tcp://:8080", "tcp://[::1]:80", activation.Options{Family: activation.FamilyIPv4}, "another version of IP"},
		{"tcp://[::]:8080", "tcp://127.0.0.1:80", activation.Options{}, ok},
		{"tcp://0.0.0.0:8080", "tcp://[::1]:80", activation.Options{}, "another version of IP"},
		{"tcp://192.0.2.9:8080", "tcp://127.0.0.1:80", activation.Options{}, ok},
		{"tcp://127.0.0.1:8080", "tcp://192.0.2.1:80", activation.Options{}, ok},
		{"tcp://192.0.2.9:8080", "tcp://[::1]:80", activation.Options{}, "another version of IP"},
		{"tcp://[2001:db8::9]:8080", "tcp://127.0.0.1:80", activation.Options{}, "another version of IP"},
		{"tcp://[fe80::1%eth0]:8080", "tcp://[::1]:80", activation.Options{}, ok},
		{"tcp://[::1]:8080", "tcp://[fe80::1%eth0]:80", activation.Options{}, "cannot be handed to fe80::1%eth0"},
		{"tcp://127.0.0.1:8080", "tcp://224.0.0.1:80", activation.Options{}, "cannot be handed to 224.0.0.1"},
		{"tcp://127.0.0.1:8080", "tcp://0.0.0.0:80", activation.Options{}, "cannot be handed to 0.0.0.0"},
		{"tcp://127.0.0.1:8080", "tcp://127.0.0.1:8080", activation.Options{}, "leads to itself"},
		{"udp://:8080", "udp://127.0.0.1:80", activation.Options{}, "only TCP"},
		{"tcp://:8080", "unix:///run/x", activation.Options{}, "only TCP"},
		{"unix:///run/x", "tcp://127.0.0.1:80", activation.Options{}, "only TCP"},
		{"tcp://:8080", "tcp://127.0.0.1:80", activation.Options{ReusePort: true}, "shares its port"},
		{"tcp://:8080", "tcp://127.0.0.1:80", activation.Options{Transparent: true}, "transparent"},
		{"tcp://:8080", "tcp://127.0.0.1:80", activation.Options{Access: &activation.Access{Allow: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}}}, "access list"},
		{"tcp://:8080", "tcp://127.0.0.1:80", activation.Options{Access: &activation.Access{}}, ok},
	} {
		to, err := activation.ParseAddress(c.to)
		if err != nil {
			t.Fatal(err)
		}
		from, err := activation.ParseAddress(c.listen)
		if err != nil {
			t.Fatal(err)
		}
		err = lookup.Possible(activation.Spec{Address: from, Options: c.options}, to)
		if (err == nil) != (c.want == ok) || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s to %s, %+v: got %v, want %q", c.listen, c.to, c.options, err, c.want)
		}
	}
	// A name that is yet to be looked up.
	if err := lookup.Possible(activation.Spec{Address: activation.Address{Network: activation.TCP, Port: 1}}, activation.Address{Network: activation.TCP, Port: 80}); err != nil {
		t.Error(err)
	}
}

// What cannot be handed over is refused with a reason, and the clients stay with the gate.
func TestAddRefuses(t *testing.T) {
	t.Parallel()
	table := mustOpen(t)
	gate, destination := mustGate(t, "tcp", "127.0.0.1:0"), mustStart(t, "tcp", "127.0.0.1:0")
	taken, shared := mustGate(t, "tcp", "127.0.0.1:0"), mustStart(t, "reuseport", "tcp4", "0.0.0.0:0")
	mustStart(t, "reuseport", "tcp4", shared.to.String())
	ours := mustGate(t, "tcp", "127.0.0.1:0")
	six, bound := mustStart(t, "tcp6", "[::]:0"), mustStart(t, "device=lo", "tcp", "127.0.0.1:0")
	listen, to := gate.address(), destination.to
	zero, group, udp, both := listen, listen, listen, listen
	both.IP = netip.Addr{}
	zero.Port, group.Port, udp.Network = 0, shared.to.Port(), activation.UDP
	mustAdd(t, table, 9, taken, to)
	loopback := netip.MustParseAddr("127.0.0.1")
	for name, c := range map[string]struct {
		listen activation.Address
		device string
		to     netip.AddrPort
		want   error
	}{
		"no port":             {listen: zero, to: to},
		"not TCP":             {listen: udp, to: to},
		"no destination":      {listen: listen},
		"no destination port": {listen: listen, to: netip.AddrPortFrom(to.Addr(), 0)},
		"no such device":      {listen: listen, device: "nosuch0", to: to},
		"twice":               {listen: taken.address(), to: to},
		"nobody":              {listen: listen, to: netip.AddrPortFrom(loopback, 1), want: lookup.ErrNoListener},
		"another address":     {listen: listen, to: netip.AddrPortFrom(netip.MustParseAddr("127.0.0.2"), to.Port()), want: lookup.ErrNoListener},
		"our own":             {listen: listen, to: ours.addrPort(), want: lookup.ErrUnfit},
		"IPv6 alone":          {listen: listen, to: netip.AddrPortFrom(loopback, six.to.Port()), want: lookup.ErrNoListener},
		"both, to IPv6 alone": {listen: both, to: netip.AddrPortFrom(loopback, six.to.Port()), want: lookup.ErrNoListener},
		"other version":       {listen: listen, to: netip.AddrPortFrom(netip.IPv6Loopback(), six.to.Port()), want: lookup.ErrUnfit},
		"bound to a device":   {listen: listen, to: bound.to, want: lookup.ErrUnfit},
		"shared port":         {listen: group, to: to, want: lookup.ErrShared},
	} {
		err := table.Add(1, c.listen, activation.FamilyDefault, c.device, c.to)
		if err == nil || c.want != nil && !errors.Is(err, c.want) {
			t.Errorf("%s: got %v, want %v", name, err, c.want)
		}
		if table.Check(1) {
			t.Errorf("%s: handed over", name)
		}
	}
	if !table.Check(9) {
		t.Error("the other gate is not handed over any more")
	}
	expect(t, gate.Addr().String(), "gate")
	// One that was added before goes to the gate again.
	mustAdd(t, table, 1, gate, to)
	if err := table.Add(1, listen, activation.FamilyDefault, "", netip.AddrPortFrom(loopback, 1)); err == nil {
		t.Error("got no error")
	}
	expect(t, gate.Addr().String(), "gate")
	if err := table.Close(); err != nil {
		t.Fatal(err)
	}
	if err := table.Add(1, listen, activation.FamilyDefault, "", to); !errors.Is(err, os.ErrClosed) {
		t.Errorf("after Close: got %v, want ErrClosed", err)
	}
}

// A socket of MPTCP cannot be in a map of sockets.
func TestMultipath(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces, func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_MPTCP)
		if err == nil {
			err = unix.Close(fd)
		}
		return err
	})
	table := mustOpen(t)
	gate, destination := mustGate(t, "tcp", "127.0.0.1:0"), mustStart(t, "mptcp", "tcp", "127.0.0.1:0")
	err := table.Add(1, gate.address(), activation.FamilyDefault, "", destination.to)
	if !errors.Is(err, lookup.ErrUnfit) || !strings.Contains(err.Error(), "MPTCP") {
		t.Errorf("got %v, want ErrUnfit", err)
	}
	expect(t, gate.Addr().String(), "gate")
}

// withCapabilities runs f on a thread that has no others.
func withCapabilities(t *testing.T, capabilities []int, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var data [2]unix.CapUserData
		for _, c := range capabilities {
			d := &data[c/32]
			d.Effective |= 1 << (c % 32)
			d.Permitted = d.Effective
		}
		if err := unix.Capset(&header, &data[0]); err != nil {
			t.Error(err)
			return
		}
		f()
	}()
	<-done
}

// Without a capability it is said which.
func TestPermission(t *testing.T) {
	t.Parallel()
	table := mustOpen(t)
	gate, destination := mustGate(t, "tcp", "127.0.0.1:0"), mustStart(t, "tcp", "127.0.0.1:0")
	add := func(table *lookup.Table) error {
		return table.Add(1, gate.address(), activation.FamilyDefault, "", destination.to)
	}
	withCapabilities(t, nil, func() {
		if _, err := lookup.Open(); !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "CAP_BPF") {
			t.Errorf("open without capabilities: got %v, want EPERM", err)
		}
		if err := add(table); !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "CAP_SYS_PTRACE") {
			t.Errorf("add without capabilities: got %v, want EPERM", err)
		}
	})
	expect(t, gate.Addr().String(), "gate")
	for _, one := range []int{unix.CAP_BPF, unix.CAP_NET_ADMIN} {
		withCapabilities(t, []int{one}, func() {
			if _, err := lookup.Open(); !errors.Is(err, unix.EPERM) {
				t.Errorf("open with one capability: got %v, want EPERM", err)
			}
		})
	}
	withCapabilities(t, []int{unix.CAP_BPF, unix.CAP_NET_ADMIN, unix.CAP_SYS_PTRACE}, func() {
		few, err := lookup.Open()
		if err != nil {
			t.Error(err)
			return
		}
		defer few.Close()
		if err := add(few); err != nil {
			t.Error(err)
		}
		expect(t, gate.Addr().String(), "destination")
	})
}
