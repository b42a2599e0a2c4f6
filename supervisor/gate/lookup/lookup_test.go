package lookup_test

import (
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"

	"hibergate/activation"
	"hibergate/activation/nettest"
	"hibergate/supervisor/gate/lookup"
)

// Clients are handed over while there is a gate, and stay there after it; the destination sees them.
func TestHandOver(t *testing.T) {
	t.Parallel()
	for name, host := range map[string]string{"v4": "127.0.0.1", "v6": "::1"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			table := mustOpen(t)
			address := net.JoinHostPort(host, "0")
			gate, destination := mustGate(t, "tcp", address), mustStart(t, "tcp", address)
			listen := gate.Addr().String()

			relayed := dial(t, listen)
			expectOn(t, relayed, "gate")
			if table.Check(1) {
				t.Error("handed over before Add")
			}
			mustAdd(t, table, 1, gate, destination.to)
			mustAdd(t, table, 1, gate, destination.to) // again
			expectOn(t, relayed, "gate")
			handed := dial(t, listen)
			if who, ends, err := say(handed, "who"); err != nil || who != "destination" || ends != handed.LocalAddr().String()+" "+listen {
				t.Errorf("got %s %s, %v, want destination %v %s", who, ends, err, handed.LocalAddr(), listen)
			}
			expect(t, listen, "destination")
			expect(t, destination.to.String(), "destination")
			if !table.Check(1) {
				t.Error("not handed over")
			}
			begun := func(want uint64) {
				t.Helper()
				if got := table.Begun(1); got != want {
					t.Errorf("%d connections were counted, want %d", got, want)
				}
			}
			begun(2)

			mustRemove(t, table, 1)
			begun(2)
			mustRemove(t, table, 1) // again
			if table.Check(1) {
				t.Error("handed over after Remove")
			}
			expect(t, listen, "gate")
			expectOn(t, handed, "destination")
			expectOn(t, relayed, "gate")
			mustAdd(t, table, 1, gate, destination.to)
			expect(t, listen, "destination")
			begun(3)
		})
	}
}

// A gate on all addresses leads to a destination on loopback; clients whose version of IP the destination does not take stay with it.
func TestVersions(t *testing.T) {
	t.Parallel()
	const d, g = "destination", "gate"
	for _, c := range []struct{ gate, network, destination, to, four, six string }{
		{"[::]:0", "tcp4", "127.0.0.1:0", "127.0.0.1", d, g},
		{"[::]:0", "tcp4", "0.0.0.0:0", "127.0.0.1", d, g},
		{"[::]:0", "tcp", "[::1]:0", "::1", g, d},
		{"[::]:0", "tcp", "[::]:0", "127.0.0.1", d, d},
		{"[::]:0", "tcp", "[::]:0", "::1", d, d},
		{"[::]:0", "tcp6", "[::]:0", "::1", g, d}, // IPv6 alone
		{"[::]:0", "tcp", "[::ffff:127.0.0.1]:0", "127.0.0.1", d, g},
		{"0.0.0.0:0", "tcp", "[::]:0", "127.0.0.1", d, ""},
	} {
		t.Run(c.gate+" to "+c.network+" "+c.destination, func(t *testing.T) {
			t.Parallel()
			table := mustOpen(t)
			network := "tcp"
			if c.six == "" {
				network = "tcp4"
			}
			gate, destination := mustGate(t, network, c.gate), mustStart(t, c.network, c.destination)
			to := netip.AddrPortFrom(netip.MustParseAddr(c.to), destination.to.Port())
			mustAdd(t, table, 1, gate, to)
			expect(t, gate.at("127.0.0.1"), c.four)
			expect(t, gate.at("127.0.0.2"), c.four)
			if c.six != "" {
				expect(t, gate.at("::1"), c.six)
			}
			mustRemove(t, table, 1)
			expect(t, gate.at("127.0.0.1"), "gate")
			if c.six != "" {
				expect(t, gate.at("::1"), "gate")
			}
		})
	}
}

// Clients of other machines are led to a destination on loopback; what comes through other devices than the gate's is not.
func TestRemote(t *testing.T) {
	t.Parallel()
	one := mustBoot(t, "look0", []string{"10.85.0.1/24", "fd85::1/64"}, []string{"10.85.0.2/24", "fd85::2/64"})
	two := mustBoot(t, "look1", []string{"10.86.0.1/24"}, []string{"10.86.0.2/24"})
	table := mustOpen(t)
	gate, four, six := mustGate(t, "tcp", "[::]:0"), mustStart(t, "tcp4", "127.0.0.1:0"), mustStart(t, "tcp", "[::1]:0")
	all := func(device bool, wantFour, wantSix string) {
		t.Helper()
		elsewhere := wantFour
		if device {
			elsewhere = "gate"
		}
		one.expect(t, gate.at("10.85.0.1"), wantFour)
		one.expect(t, gate.at("fd85::1"), wantSix)
		two.expect(t, gate.at("10.86.0.1"), elsewhere)
		expect(t, gate.at("10.85.0.1"), wantFour) // the kernel takes it for one that comes through the device of the address
		expect(t, gate.at("127.0.0.1"), elsewhere)
	}
	all(false, "gate", "gate")
	mustAdd(t, table, 1, gate, four.to)
	all(false, "destination", "gate")
	mustAdd(t, table, 1, gate, six.to) // in its place
	all(false, "gate", "destination")
	add := func(key uint32, ip string, to netip.AddrPort) {
		t.Helper()
		a := gate.address()
		a.IP = netip.MustParseAddr(ip)
		if err := table.Add(key, a, activation.FamilyDual, "look0", to); err != nil {
			t.Fatal(err)
		}
	}
	add(1, "::", four.to)
	all(true, "destination", "gate")
	add(1, "10.85.0.1", four.to)
	all(true, "destination", "gate")
	add(2, "fd85::1", six.to)
	all(true, "destination", "destination")
	mustRemove(t, table, 1)
	all(true, "gate", "destination")
}

// Of sockets that share the destination's port the kernel chooses one for each client.
func TestSharedPort(t *testing.T) {
	t.Parallel()
	table := mustOpen(t)
	gate := mustGate(t, "tcp", "127.0.0.1:0")
	one := mustStart(t, "name=one", "reuseport", "tcp", "127.0.0.1:0")
	two := mustStart(t, "name=two", "reuseport", "tcp", one.to.String())
	mustAdd(t, table, 1, gate, one.to)
	count := func() map[string]int {
		t.Helper()
		n := map[string]int{}
		for range 100 {
			name, err := visit(gate.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			n[name]++
		}
		return n
	}
	if n := count(); n["one"] == 0 || n["two"] == 0 || len(n) != 2 {
		t.Errorf("got %v, want both", n)
	}
	one.stop()
	if !table.Check(1) {
		mustAdd(t, table, 1, gate, two.to)
	}
	if n := count(); n["two"] != 100 {
		t.Errorf("got %v, want the second one", n)
	}
}

// What is not for the gate is not touched.
func TestNothingElse(t *testing.T) {
	t.Parallel()
	table := mustOpen(t)
	gate, destination := mustGate(t, "tcp", "127.0.0.1:0"), mustStart(t, "tcp", "127.0.0.1:0")
	_, port, _ := net.SplitHostPort(gate.Addr().String())
	mustAdd(t, table, 1, gate, destination.to)
	for _, address := range []string{"127.0.0.2:" + port, "[::1]:" + port, "127.0.0.1:0"} {
		other := mustStart(t, "name=other", "tcp", address)
		expect(t, other.to.String(), "other")
	}
	if _, err := visit("127.0.0.3:" + port); err == nil {
		t.Error("somebody listens on an address that is nobody's")
	}
	udp, err := net.ListenPacket("udp4", "127.0.0.1:"+port)
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	c, err := net.Dial("udp", udp.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("datagram")); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 16)
	if n, _, err := udp.ReadFrom(b); err != nil || string(b[:n]) != "datagram" {
		t.Errorf("got %q, %v", b[:n], err)
	}
	expect(t, gate.Addr().String(), "destination")
}

// Several programs work beside each other. Where two want a client, one of them gets it.
func TestOtherProgram(t *testing.T) {
	t.Parallel()
	first, second := mustOpen(t), mustOpen(t)
	gate, other, both := mustGate(t, "tcp", "127.0.0.1:0"), mustGate(t, "tcp", "127.0.0.1:0"), mustGate(t, "tcp", "127.0.0.1:0")
	one, two := mustStart(t, "name=one", "tcp", "127.0.0.1:0"), mustStart(t, "name=two", "tcp", "127.0.0.1:0")
	mustAdd(t, first, 1, gate, one.to)
	mustAdd(t, second, 1, other, two.to)
	mustAdd(t, first, 2, both, one.to)
	mustAdd(t, second, 2, both, two.to)
	expect(t, gate.Addr().String(), "one")
	expect(t, other.Addr().String(), "two")
	expect(t, both.Addr().String(), "one")
	mustRemove(t, first, 2)
	expect(t, both.Addr().String(), "two")
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	expect(t, gate.Addr().String(), "gate")
	expect(t, other.Addr().String(), "two")
}

// A destination that closes its socket has its clients come to the gate; when it listens anew, Add finds it.
func TestListensAnew(t *testing.T) {
	t.Parallel()
	table := mustOpen(t)
	gate, destination := mustGate(t, "tcp", "[::]:0"), mustStart(t, "tcp", "[::]:0")
	to := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), destination.to.Port())
	all := func(want string) {
		t.Helper()
		expect(t, gate.at("127.0.0.1"), want)
		expect(t, gate.at("::1"), want)
		if got := table.Check(1); got != (want == "destination") {
			t.Errorf("Check: got %v", got)
		}
	}
	mustAdd(t, table, 1, gate, to)
	all("destination")
	handed := dial(t, gate.at("127.0.0.1"))
	expectOn(t, handed, "destination")
	destination.tell(t, "close")
	all("gate")
	destination.tell(t, "listen")
	all("gate")
	mustAdd(t, table, 1, gate, to)
	all("destination")
	expectOn(t, handed, "destination")
	mustRemove(t, table, 1)
	all("gate")
}

// A destination that shuts its socket down has its clients come to the gate.
func TestShutsDown(t *testing.T) {
	t.Parallel()
	for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
		table := mustOpen(t)
		gate, destination := mustGate(t, "tcp", address), mustStart(t, "tcp", address)
		mustAdd(t, table, 1, gate, destination.to)
		expect(t, gate.Addr().String(), "destination")
		destination.tell(t, "shutdown")
		expect(t, gate.Addr().String(), "gate")
	}
}

// With the end of the process that has the table, in good order or not, new clients come to the gate, and what was handed over goes on.
func TestEnd(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(*destination){"stop": (*destination).stop, "kill": (*destination).kill} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			mustOpen(t)
			gate, destination := mustGate(t, "tcp", "127.0.0.1:0"), mustStart(t, "tcp", "127.0.0.1:0")
			other, err := start("table " + gate.Addr().String() + " " + destination.to.String())
			if err != nil {
				t.Fatal(err)
			}
			defer other.stop()
			if got := other.line(); got != "<nil>" {
				t.Fatal(got)
			}
			handed := dial(t, gate.Addr().String())
			expectOn(t, handed, "destination")
			end(other)
			expect(t, gate.Addr().String(), "gate")
			expectOn(t, handed, "destination")
		})
	}
}

// The address of the gate can be bound again while connections are with a destination that sets SO_REUSEADDR, and not with another.
func TestBindAgain(t *testing.T) {
	t.Parallel()
	for option, want := range map[string]bool{"": true, "noreuse": false} {
		table := mustOpen(t)
		gate, destination := mustGate(t, "tcp", "127.0.0.1:0"), mustStart(t, option, "tcp", "127.0.0.1:0")
		mustAdd(t, table, 1, gate, destination.to)
		handed := dial(t, gate.Addr().String())
		expectOn(t, handed, "destination")
		syscall.ForkLock.RLock() // a program of another test that is being started may hold a copy of the socket
		gate.stop()
		syscall.ForkLock.RUnlock()
		l, err := listen("tcp", gate.Addr().String())
		if (err == nil) != want {
			t.Errorf("%s: got %v", option, err)
		}
		if err == nil {
			l.Close()
		}
		expectOn(t, handed, "destination")
	}
}

// Many gates do not get into each other's way.
func TestMany(t *testing.T) {
	t.Parallel()
	table := mustOpen(t)
	destination := mustStart(t, "tcp", "127.0.0.1:0")
	var gates []*server
	for key := range uint32(50) {
		gate := mustGate(t, "tcp", "127.0.0.1:0")
		gates = append(gates, gate)
		mustAdd(t, table, key, gate, destination.to)
	}
	for key, gate := range gates {
		if key%2 == 0 {
			mustRemove(t, table, uint32(key))
		}
		want := map[bool]string{true: "gate", false: "destination"}[key%2 == 0]
		expect(t, gate.Addr().String(), want)
	}
	destination.kill()
	for _, gate := range gates {
		expect(t, gate.Addr().String(), "gate")
	}
}

// With SYN cookies the last packet of a handshake is led like the first. It is the only test that changes the machine, and so
// is not parallel to the others.
func TestCookies(t *testing.T) {
	table := mustOpen(t)
	const path = "/proc/sys/net/ipv4/tcp_syncookies"
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("2\n"), 0); err != nil { // for every client
		t.Fatal(err)
	}
	defer os.WriteFile(path, before, 0)
	for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
		gate, destination := mustGate(t, "tcp", address), mustStart(t, "tcp", address)
		expect(t, gate.Addr().String(), "gate")
		mustAdd(t, table, 1, gate, destination.to)
		for range 10 {
			expect(t, gate.Addr().String(), "destination")
		}
		mustRemove(t, table, 1)
		expect(t, gate.Addr().String(), "gate")
	}
}

// Addresses of this machine are local.
func TestLocal(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	for to, want := range map[string]bool{"127.0.0.1": true, "127.9.9.9": true, "::1": true, "::ffff:127.0.0.1": true, "192.0.2.1": false, "2001:db8::1": false} {
		if got := lookup.Local(netip.AddrPortFrom(netip.MustParseAddr(to), 80)); got != want {
			t.Errorf("%s: got %v", to, got)
		}
	}
}
