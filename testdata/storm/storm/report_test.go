package storm

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// The journal decides whether an unanswered client is the program's fault; only what is not fails the storm.
func TestReport(t *testing.T) {
	t.Parallel()
	begin := time.UnixMicro(1_000_000)
	path := filepath.Join(t.TempDir(), "journal")
	if err := os.WriteFile(path, []byte("1000100 7 accept 5001 -\n1000200 7 accept 5002 -\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	gone := func(port uint16, byHand bool) client {
		return client{port: port, byHand: byHand, begin: begin, end: begin.Add(time.Millisecond), outcome: unanswered, err: errors.New("EOF")}
	}
	of := func(clients ...client) *report {
		l := &lane{target: &target{kind: kinds()[0], journal: path}, tally: tally{
			clients: len(clients) + 3, answered: 3, unanswered: clients,
			latency: []time.Duration{3 * time.Millisecond, time.Millisecond, 2 * time.Millisecond},
		}}
		r := &report{}
		r.problem(r.add(l))
		r.finish()
		return r
	}
	r := of(gone(5001, true), gone(5002, false))
	if k := r.Kinds[0]; r.Failed || k.Dropped != 2 || k.DroppedByHand != 1 || k.Lost != 0 || k.P50 != 2000 || k.P99 != 3000 {
		t.Errorf("with dropped clients only: failed %v, %+v", r.Failed, k)
	}
	r = of(gone(5001, true), gone(5003, false))
	var out strings.Builder
	if err := r.write(&out, false); err != nil {
		t.Fatal(err)
	}
	if k := r.Kinds[0]; !r.Failed || k.Dropped != 1 || k.Lost != 1 || !strings.Contains(out.String(), "lost: ") {
		t.Errorf("with a lost client: failed %v, %+v\n%s", r.Failed, k, &out)
	}
	r = &report{Before: holdings{FDs: 7, Processes: []int{1}}, After: holdings{FDs: 8, Processes: []int{1, 2}}}
	if r.finish(); !r.Failed || r.LeakedFDs != 1 || len(r.Leaked) != 1 {
		t.Errorf("with leaks: %+v", r)
	}
}
