package forward_test

import (
	"fmt"
	"testing"

	"hibergate/activation"
	"hibergate/activation/nettest"
	"hibergate/supervisor/gate/forward"
)

// Clients of this machine are led to the destination while there is a rule, and stay there after it.
func TestLocal(t *testing.T) {
	t.Parallel()
	for name, address := range map[string]string{"v4": "127.0.0.1:0", "v6": "[::1]:0"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			table := mustOpen(t)
			gate, destination := mustServe(t, "gate", address), mustServe(t, "destination", address)
			listen := gate.Addr().String()

			relayed := dial(t, listen)
			expectOn(t, relayed, "gate")
			mustAdd(t, table, 1, gate, destination.addrPort())
			mustAdd(t, table, 1, gate, destination.addrPort()) // again
			expectOn(t, relayed, "gate")
			forwarded := dial(t, listen)
			expectOn(t, forwarded, "destination")
			expect(t, listen, "destination")
			var a forward.Account
			nettest.Eventually(t, func() error { // the kernel closes on its own time
				if a = mustFlows(t, table, gate, destination.addrPort()); a.Open != 1 || a.Begun != 2 || len(a.List) != 1 {
					return fmt.Errorf("got %+v, want 1 open of 2", a)
				}
				return nil
			})
			if !a.Counted || a.In.Bytes == 0 || a.Out.Bytes == 0 || a.Peers == 0 {
				t.Errorf("got %+v, want all counted", a)
			}
			if f := a.List[0]; f.Peer.String() != forwarded.LocalAddr().String() || f.Original.String() != listen || f.Local != destination.addrPort() {
				t.Errorf("got %+v, want that of %v", f, forwarded.LocalAddr())
			}

			mustRemove(t, table, 1)
			mustRemove(t, table, 1) // again
			expect(t, listen, "gate")
			expectOn(t, forwarded, "destination")
			expectOn(t, relayed, "gate")
			var err error
			a, err = table.Drain(t.Context(), gate.address(), destination.addrPort())
			if err != nil || a.Open != 1 || a.Begun != 0 {
				t.Errorf("got %+v, %v, want 1 open", a, err)
			}
			expectOn(t, forwarded, "destination")
		})
	}
}

// A socket on all addresses leads clients of any of them to the destination, but for those on loopback and of the other IP version.
func TestWildcard(t *testing.T) {
	t.Parallel()
	other := mustBoot(t, "wild0", []string{"10.71.0.1/24", "fd71::1/64"}, []string{"10.71.0.2/24", "fd71::2/64"})
	table := mustOpen(t)
	gate := mustServe(t, "gate", "[::]:0")
	v4, v6 := mustServe(t, "v4", "10.71.0.1:0"), mustServe(t, "v6", "[fd71::1]:0")
	_, port := split(gate)
	all := func(want4, want6 string) {
		t.Helper()
		other.expect(t, "10.71.0.1:"+port, want4)
		other.expect(t, "[fd71::1]:"+port, want6)
		expect(t, "10.71.0.1:"+port, want4)
		expect(t, "[fd71::1]:"+port, want6)
		expect(t, "127.0.0.1:"+port, "gate")
		expect(t, "[::1]:"+port, "gate")
	}
	all("gate", "gate")
	mustAdd(t, table, 1, gate, v4.addrPort())
	all("v4", "gate")
	if got := mustFlows(t, table, gate, v4.addrPort()); got.Begun != 2 {
		t.Errorf("got %+v, want 2 begun", got)
	}
	mustAdd(t, table, 1, gate, v6.addrPort()) // in its place
	all("gate", "v6")
	mustAdd(t, table, 2, gate, v4.addrPort()) // beside it
	all("v4", "v6")
	mustRemove(t, table, 1)
	mustRemove(t, table, 2)
	all("gate", "gate")
}

// The destination is on another machine than the clients, and than we.
func TestRemote(t *testing.T) {
	mustForward(t)
	client := mustBoot(t, "remote0", []string{"10.72.0.1/24", "fd72::1/64"}, []string{"10.72.0.2/24", "fd72::2/64"})
	backend := mustBoot(t, "remote1", []string{"10.73.0.1/24", "fd73::1/64"}, []string{"10.73.0.2/24", "fd73::2/64"})
	table := mustOpen(t)
	for name, a := range map[string][3]string{"v4": {"10.72.0.1:0", "10.73.0.2:80", "10.73.0.1"}, "v6": {"[fd72::1]:0", "[fd73::2]:80", "fd73::1"}} {
		t.Run(name, func(t *testing.T) {
			gate, destination := mustServe(t, "gate", a[0]), backend.serve(t, "destination", a[1])
			listen := gate.Addr().String()
			client.expect(t, listen, "gate")
			mustAdd(t, table, 1, gate, destination.addrPort())
			forwarded := client.dial(t, listen)
			expectOn(t, forwarded, "destination")
			mine := dial(t, listen)
			expectOn(t, mine, "destination")
			destination.mu.Lock()
			for c := range destination.open {
				if host, _ := splitAddress(c.RemoteAddr()); host != a[2] {
					t.Errorf("destination: got client %v, want it to be our address", c.RemoteAddr())
				}
			}
			destination.mu.Unlock()
			if got := mustFlows(t, table, gate, destination.addrPort()); got.Open != 2 || got.Begun != 2 {
				t.Errorf("got %+v, want 2 open of 2", got)
			}
			direct := dial(t, destination.Addr().String())
			expectOn(t, direct, "destination")
			if got, err := table.Destination(t.Context(), destination.addrPort()); err != nil || got.Open != 3 {
				t.Errorf("got %+v, %v, want 3 open with the destination", got, err)
			}
			mustRemove(t, table, 1)
			expectOn(t, forwarded, "destination")
			expectOn(t, mine, "destination")
			client.expect(t, listen, "gate")
			expect(t, listen, "gate")
		})
	}
}

// Where the destination is an address of this machine it sees who the client is.
func TestRemoteClientOfOurDestination(t *testing.T) {
	t.Parallel()
	client := mustBoot(t, "ours0", []string{"10.74.0.1/24"}, []string{"10.74.0.2/24"})
	table := mustOpen(t)
	gate, destination := mustServe(t, "gate", "10.74.0.1:0"), mustServe(t, "destination", "10.74.0.1:0")
	mustAdd(t, table, 1, gate, destination.addrPort())
	expectOn(t, client.dial(t, gate.Addr().String()), "destination")
	destination.mu.Lock()
	defer destination.mu.Unlock()
	for c := range destination.open {
		if host, _ := splitAddress(c.RemoteAddr()); host != "10.74.0.2" {
			t.Errorf("got client %v, want 10.74.0.2", c.RemoteAddr())
		}
	}
}

// A socket that is bound to an interface has only what comes through it.
func TestDevice(t *testing.T) {
	t.Parallel()
	one := mustBoot(t, "device0", []string{"10.75.0.1/24", "fe80::75:1/64"}, []string{"10.75.0.2/24", "fe80::75:2/64"})
	two := mustBoot(t, "device1", []string{"10.76.0.1/24"}, []string{"10.76.0.2/24"})
	table := mustOpen(t)
	gate, destination := mustServe(t, "gate", "0.0.0.0:0"), mustServe(t, "destination", "10.75.0.1:0")
	_, port := split(gate)
	listen := gate.address()
	if err := table.Add(1, listen, activation.FamilyIPv4, "device0", destination.addrPort()); err != nil {
		t.Fatal(err)
	}
	one.expect(t, "10.75.0.1:"+port, "destination")
	two.expect(t, "10.76.0.1:"+port, "gate")
	expect(t, "10.75.0.1:"+port, "gate")
	mustRemove(t, table, 1)

	listen.IP = destination.addrPort().Addr()
	if err := table.Add(1, listen, activation.FamilyIPv4, "device0", destination.addrPort()); err != nil {
		t.Fatal(err)
	}
	one.expect(t, "10.75.0.1:"+port, "destination")
	two.run(t, "ip", "route", "add", "10.75.0.0/24", "via", "10.76.0.1")
	two.expect(t, "10.75.0.1:"+port, "gate")
	mustRemove(t, table, 1)
	one.expect(t, "10.75.0.1:"+port, "gate")
}
