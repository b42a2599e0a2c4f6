package lookup

// Check says whether new connections of a gate are handed over: its destination's socket is there. Once nobody has it any more, they
// come to our socket by themselves, and Add finds the next one. They do so too when it is shut down (shutdown(2)), which Check does not see on
// every kernel. It takes some microseconds.
func (t *Table) Check(key uint32) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	places := t.gates[key]
	for _, p := range places {
		if _, ok := read(t.table, p); !ok {
			return false
		}
	}
	return len(places) > 0
}
