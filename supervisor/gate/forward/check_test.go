package forward_test

import (
	"errors"
	"net/netip"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"hibergate/activation"
	"hibergate/activation/nettest"
	"hibergate/supervisor/gate/forward"
)

func TestCheck(t *testing.T) {
	t.Parallel()
	const ok = ""
	for _, c := range []struct {
		listen, to string
		options    activation.Options
		want       string // in the error
	}{
		{"tcp://:8080", "tcp://192.0.2.1:80", activation.Options{}, ok},
		{"tcp://:8080", "tcp://192.0.2.1:80", activation.Options{Family: activation.FamilyIPv4}, ok},
		{"tcp://:8080", "tcp://192.0.2.1:80", activation.Options{Family: activation.FamilyIPv6}, "another version of IP"},
		{"tcp://:8080", "tcp://[2001:db8::1]:80", activation.Options{Family: activation.FamilyIPv4}, "another version of IP"},
		{"tcp://[::]:8080", "tcp://192.0.2.1:80", activation.Options{}, ok},
		{"tcp://0.0.0.0:8080", "tcp://192.0.2.1:80", activation.Options{}, ok},
		{"tcp://0.0.0.0:8080", "tcp://[2001:db8::1]:80", activation.Options{}, "another version of IP"},
		{"tcp://192.0.2.9:8080", "tcp://192.0.2.1:80", activation.Options{}, ok},
		{"tcp://192.0.2.9:8080", "tcp://[2001:db8::1]:80", activation.Options{}, "another version of IP"},
		{"tcp://[2001:db8::9]:8080", "tcp://[2001:db8::1]:80", activation.Options{}, ok},
		{"tcp://[fe80::1%eth0]:8080", "tcp://[2001:db8::1]:80", activation.Options{}, ok},
		{"tcp://[2001:db8::9]:8080", "tcp://[fe80::1%eth0]:80", activation.Options{}, "cannot be sent to fe80::1%eth0"},
		{"tcp://192.0.2.9:8080", "tcp://224.0.0.1:80", activation.Options{}, "cannot be sent to 224.0.0.1"},
		{"tcp://192.0.2.9:8080", "tcp://0.0.0.0:80", activation.Options{}, "cannot be sent to 0.0.0.0"},
		{"tcp://127.0.0.1:8080", "tcp://127.0.0.1:80", activation.Options{}, ok},
		{"tcp://127.0.0.1:8080", "tcp://127.0.0.1:8080", activation.Options{}, "leads to itself"},
		{"tcp://[::1]:8080", "tcp://[::1]:80", activation.Options{}, ok},
		{"tcp://127.0.0.1:8080", "tcp://192.0.2.1:80", activation.Options{}, "clients of the loopback address 127.0.0.1 cannot be sent to 192.0.2.1"},
		{"tcp://192.0.2.9:8080", "tcp://127.0.0.1:80", activation.Options{}, "clients of other machines cannot be sent to the loopback address 127.0.0.1"},
		{"tcp://:8080", "tcp://127.0.0.1:80", activation.Options{}, "clients of other machines"},
		{"tcp://[::]:8080", "tcp://[::1]:80", activation.Options{}, "clients of other machines"},
		{"udp://:8080", "udp://192.0.2.1:80", activation.Options{}, "only TCP"},
		{"tcp://:8080", "unix:///run/x", activation.Options{}, "only TCP"},
		{"unix:///run/x", "tcp://192.0.2.1:80", activation.Options{}, "only TCP"},
		{"tcp://:8080", "tcp://192.0.2.1:80", activation.Options{ReusePort: true}, "shares its port"},
		{"tcp://:8080", "tcp://192.0.2.1:80", activation.Options{Transparent: true}, "transparent"},
		{"tcp://:8080", "tcp://192.0.2.1:80", activation.Options{Access: &activation.Access{Allow: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}}}, "access list"},
		{"tcp://:8080", "tcp://192.0.2.1:80", activation.Options{Access: &activation.Access{}}, ok},
	} {
		to, err := activation.ParseAddress(c.to)
		if err != nil {
			t.Fatal(err)
		}
		from, err := activation.ParseAddress(c.listen)
		if err != nil {
			t.Fatal(err)
		}
		err = forward.Check(activation.Spec{Address: from, Options: c.options}, to)
		if (err == nil) != (c.want == ok) || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s to %s, %+v: got %v, want %q", c.listen, c.to, c.options, err, c.want)
		}
	}
	// A name that is yet to be looked up.
	if err := forward.Check(activation.Spec{Address: activation.Address{Network: activation.TCP, Port: 1}}, activation.Address{Network: activation.TCP, Port: 80}); err != nil {
		t.Error(err)
	}
}

func TestCheckMachine(t *testing.T) {
	t.Parallel()
	m := mustBoot(t, "check0", nil, []string{"10.80.0.2/24", "fd80::2/64"})
	check := func(to, want string) {
		t.Helper()
		var err error
		m.do(func() { err = forward.CheckMachine(netip.MustParseAddrPort(to)) })
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", to, err, want)
		}
	}
	for _, ours := range []string{"127.0.0.1:80", "127.9.9.9:80", "[::1]:80", "10.80.0.2:80", "[fd80::2]:80", "[::ffff:10.80.0.2]:80"} {
		check(ours, "")
	}
	for _, state := range []string{"0\n", "1\n"} {
		m.do(func() {
			for _, path := range []string{"/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding"} {
				if err := os.WriteFile(path, []byte(state), 0); err != nil {
					t.Error(err)
				}
			}
		})
		want4, want6 := "", ""
		if state == "0\n" {
			want4, want6 = "net.ipv4.ip_forward is 0", "net.ipv6.conf.all.forwarding is 0"
		}
		check("10.80.0.1:80", want4)
		check("198.51.100.1:80", want4) // no way there, yet
		check("[fd80::1]:80", want6)
		check("[2001:db8::1]:80", want6)
	}
	m.do(func() { // the thread ends with the machine
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var none [2]unix.CapUserData
		if err := unix.Capset(&header, &none[0]); err != nil {
			t.Error(err)
		}
		if err := forward.CheckMachine(netip.MustParseAddrPort("127.0.0.1:80")); !errors.Is(err, unix.EPERM) {
			t.Errorf("got %v without capabilities, want EPERM", err)
		}
		if _, err := forward.Open("denied"); !errors.Is(err, unix.EPERM) {
			t.Errorf("got %v without capabilities, want EPERM", err)
		}
	})
}

// What cannot be forwarded is refused, and the clients stay with the gate.
func TestAddRefuses(t *testing.T) {
	t.Parallel()
	table := mustOpen(t)
	gate, destination := mustServe(t, "gate", "127.0.0.1:0"), mustServe(t, "destination", "127.0.0.1:0")
	listen, to := gate.address(), destination.addrPort()
	zero, ours, everywhere := listen, listen, listen
	zero.Port, everywhere.IP = 0, netip.Addr{}
	mustAdd(t, table, 9, destination, netip.MustParseAddrPort("127.0.0.1:9"))
	for name, err := range map[string]error{
		"no port":             table.Add(1, zero, activation.FamilyDefault, "", to),
		"no destination port": table.Add(1, listen, activation.FamilyDefault, "", netip.AddrPortFrom(to.Addr(), 0)),
		"no destination":      table.Add(1, listen, activation.FamilyDefault, "", netip.AddrPort{}),
		"loopback":            table.Add(1, everywhere, activation.FamilyDefault, "", to),
		"no such device":      table.Add(1, listen, activation.FamilyDefault, "nosuch0", to),
		"long device":         table.Add(1, listen, activation.FamilyDefault, "a234567890123456", to),
		"twice":               table.Add(1, destination.address(), activation.FamilyDefault, "", netip.MustParseAddrPort("127.0.0.1:8")),
	} {
		if err == nil {
			t.Errorf("%s: got no error", name)
		}
	}
	mustRemove(t, table, 9)
	expect(t, gate.Addr().String(), "gate")
	// Somebody has one of the addresses.
	everywhere.Port = ours.Port
	if err := table.Add(1, everywhere, activation.FamilyDefault, "", netip.MustParseAddrPort("192.0.2.1:80")); !errors.Is(err, forward.ErrShared) {
		t.Errorf("got %v, want ErrShared", err)
	}
	if err := table.Add(1, everywhere, activation.FamilyDefault, "", netip.MustParseAddrPort("[2001:db8::1]:80")); err != nil {
		t.Error(err) // that is of the other version
	}
}

// Nothing is drained that is still forwarded.
func TestDrainRefuses(t *testing.T) {
	t.Parallel()
	table := mustOpen(t)
	gate := mustServe(t, "gate", "127.0.0.1:0")
	to := netip.MustParseAddrPort("127.0.0.1:1")
	mustAdd(t, table, 1, gate, to)
	if _, err := table.Drain(t.Context(), gate.address(), to); err == nil {
		t.Error("got no error")
	}
}

// With the table goes what was forwarded, and the clients come to the gate. Not in parallel: NAT goes on while anybody has a table with it.
func TestClose(t *testing.T) {
	nettest.Need(t, nettest.Namespaces)
	table, err := forward.Open("closed")
	if err != nil {
		t.Fatal(err)
	}
	if table.Name() != "closed" {
		t.Errorf("got name %q", table.Name())
	}
	gate, destination := mustServe(t, "gate", "127.0.0.1:0"), mustServe(t, "destination", "127.0.0.1:0")
	mustAdd(t, table, 1, gate, destination.addrPort())
	c := dial(t, gate.Addr().String())
	expectOn(t, c, "destination")
	if err := table.Close(); err != nil {
		t.Fatal(err)
	}
	if !isReset(c) {
		t.Error("the client was not reset")
	}
	expect(t, gate.Addr().String(), "gate")
}
