package forward_test

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"

	"hibergate/activation"
	"hibergate/activation/nettest"
	"hibergate/supervisor/activity/ledger"
	"hibergate/supervisor/gate/forward"

	"golang.org/x/sys/unix"
)

// A ledger beside it counts what comes to the gate, and to the destination, as their sockets see it.
func TestBesideLedger(t *testing.T) {
	t.Parallel()
	table := mustOpen(t)
	gate, destination := mustServe(t, "gate", "127.0.0.1:0"), mustServe(t, "destination", "127.0.0.1:0")
	key := func(a netip.AddrPort) ledger.Key {
		return ledger.Key{Addr: a.Addr(), Family: unix.NFPROTO_IPV4, Protocol: unix.IPPROTO_TCP, Port: a.Port()}
	}
	keys := []ledger.Key{key(gate.addrPort()), key(destination.addrPort())}
	l, err := ledger.Open("beside", []ledger.Account{{Key: keys[0]}, {Key: keys[1]}}, true)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	count := func() (n [2]uint64) {
		t.Helper()
		if err := l.Read(keys); err != nil {
			t.Fatal(err)
		}
		for i, k := range keys {
			n[i] = l.Reading(k).In.Packets
		}
		return n
	}
	expect(t, gate.Addr().String(), "gate")
	mustAdd(t, table, 1, gate, destination.addrPort())
	before := count()
	if before[0] == 0 || before[1] != 0 {
		t.Errorf("got %v packets, want all of them at the gate", before)
	}
	expectOn(t, dial(t, gate.Addr().String()), "destination")
	if after := count(); after[1] < 3 {
		t.Errorf("got %v packets, want some at the destination", after)
	}
}

// An administrator's flush does not touch the table where the kernel knows owners; where it does, the next call says so.
func TestFlushRuleset(t *testing.T) {
	nettest.Need(t, nettest.Namespaces, nettest.Tool("nft"))
	table := mustOpen(t)
	gate, destination := mustServe(t, "gate", "127.0.0.1:0"), mustServe(t, "destination", "127.0.0.1:0")
	mustAdd(t, table, 1, gate, destination.addrPort())
	run(t, "nft", "flush ruleset")
	if _, err := table.Flows(t.Context(), gate.address(), destination.addrPort()); err == nil {
		expect(t, gate.Addr().String(), "destination")
	} else if !errors.Is(err, forward.ErrLost) {
		t.Errorf("got %v, want nil or ErrLost", err)
	}
}

// Two rules that lead from one port to one destination do not need each other.
func TestTwoRulesOneDestination(t *testing.T) {
	mustForward(t)
	backend := mustBoot(t, "two0", []string{"10.81.0.1/24"}, []string{"10.81.0.2/24"})
	client := mustBoot(t, "two1", []string{"10.82.0.1/24", "10.82.0.3/24"}, []string{"10.82.0.2/24"})
	table := mustOpen(t)
	destination := backend.serve(t, "destination", "10.81.0.2:80")
	one := mustServe(t, "one", "10.82.0.1:0")
	_, port := split(one)
	two := mustServe(t, "two", "10.82.0.3:"+port)
	expectAll := func(first, second string) {
		t.Helper()
		client.expect(t, one.Addr().String(), first)
		client.expect(t, two.Addr().String(), second)
	}
	mustAdd(t, table, 1, one, destination.addrPort())
	mustAdd(t, table, 2, two, destination.addrPort())
	expectAll("destination", "destination")
	mustRemove(t, table, 1)
	expectAll("one", "destination")
	mustAdd(t, table, 1, one, destination.addrPort())
	mustRemove(t, table, 2)
	expectAll("destination", "two")
}

// BenchmarkConnect is one connection to a gate, past a number of other gates that are awake.
func BenchmarkConnect(b *testing.B) {
	for _, n := range []int{0, 5000} {
		b.Run(fmt.Sprintf("%d gates beside", n), func(b *testing.B) {
			table := mustOpen(b)
			for i := range n {
				listen := activation.Address{Network: activation.TCP, IP: netip.MustParseAddr("127.0.0.2"), Port: uint16(10000 + i)}
				if err := table.Add(uint32(i), listen, activation.FamilyDefault, "", netip.AddrPortFrom(netip.MustParseAddr("127.0.0.3"), uint16(10000+i))); err != nil {
					b.Fatal(err)
				}
			}
			gate, destination := mustServe(b, "gate", "127.0.0.1:0"), mustServe(b, "destination", "127.0.0.1:0")
			mustAdd(b, table, 9999, gate, destination.addrPort())
			for b.Loop() {
				if name, err := visit(gate.Addr().String()); err != nil || name != "destination" {
					b.Fatal(name, err)
				}
			}
		})
	}
}

// BenchmarkTable is what each call costs without clients.
func BenchmarkTable(b *testing.B) {
	table := mustOpen(b)
	gate := mustServe(b, "gate", "127.0.0.1:0")
	to := [2]netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:1"), netip.MustParseAddrPort("127.0.0.1:2")}
	b.Run("Add", func(b *testing.B) {
		for i := uint32(0); b.Loop(); i++ {
			if err := table.Add(i, activation.Address{Network: activation.TCP, IP: netip.AddrFrom4([4]byte{127, 1, byte(i >> 8), byte(i)}), Port: 1 + uint16(i>>16)},
				activation.FamilyDefault, "", to[0]); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("Flows", func(b *testing.B) {
		for b.Loop() {
			mustFlows(b, table, gate, to[0])
		}
	})
	b.Run("Drain", func(b *testing.B) {
		for b.Loop() {
			if _, err := table.Drain(b.Context(), gate.address(), to[1]); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("Add and Remove", func(b *testing.B) {
		for b.Loop() {
			mustAdd(b, table, 1<<31, gate, to[1])
			mustRemove(b, table, 1<<31)
		}
	})
}
