package lookup_test

import "testing"

// BenchmarkAddRemove is a gate that is opened and shut. Most of it is the search for the process, and the wait for packets.
func BenchmarkAddRemove(b *testing.B) {
	table := mustOpen(b)
	gate, destination := mustGate(b, "tcp", "127.0.0.1:0"), mustStart(b, "tcp", "127.0.0.1:0")
	for b.Loop() {
		mustAdd(b, table, 1, gate, destination.to)
		mustRemove(b, table, 1)
	}
}

// BenchmarkCheck asks whether a destination is there.
func BenchmarkCheck(b *testing.B) {
	table := mustOpen(b)
	gate, destination := mustGate(b, "tcp", "127.0.0.1:0"), mustStart(b, "tcp", "127.0.0.1:0")
	mustAdd(b, table, 1, gate, destination.to)
	for b.Loop() {
		if !table.Check(1) {
			b.Fatal("not handed over")
		}
	}
}
