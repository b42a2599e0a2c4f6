package process

import (
	"fmt"
	"strings"
	"testing"
)

// fifteen fields stand between the session and the start.
const fifteen = " 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0"

func FuzzParseStat(f *testing.F) {
	f.Add([]byte("1 (a) S 0 1 1" + fifteen + " 99"))
	f.Add([]byte("1 (a) (b) S 0) T 1 7 1" + fifteen + " 99 0"))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, ok := parseStat(b)
		if ok && (!strings.Contains(string(b), string([]byte{s.state})) || len(strings.Fields(string(b))) < 21) {
			t.Errorf("parseStat(%q) = %v", b, s)
		}
	})
}

func TestParseStat(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"12 (sh) S 1 12 13" + fifteen + " 99":           "S 12 13 99 true",
		"12 (a) T 3 (b)) t 1 34 -1" + fifteen + " 9 8":  "t 34 -1 9 true",
		"12 (a\nb c) R 1 7 7" + fifteen + " 99":         "R 7 7 99 true",
		"12 (sh) S 1 12 13" + fifteen:                   "\x00 0 0 0 false",
		"12 sh S 1 12 13" + fifteen + " 99 1 1 1 1 1 1": "\x00 0 0 0 false",
		"": "\x00 0 0 0 false",
		"12 (sh) Sleeping 1 12 12" + fifteen + " 99": "\x00 0 0 0 false",
		"12 (sh) S 1 twelve 12" + fifteen + " 99":    "\x00 0 0 0 false",
		"12 (sh) S 1 12 12" + fifteen + " -1":        "\x00 0 0 0 false",
	} {
		s, ok := parseStat([]byte(in))
		if got := fmt.Sprintf("%c %d %d %d %v", s.state, s.group, s.session, s.start, ok); got != want {
			t.Errorf("parseStat(%q): got %q, want %q", in, got, want)
		}
	}
}

// treeOf returns the pids of a process and its descendants that are alive, the
// process first. Descendants whose parent has died are no longer found.
func treeOf(p *Process) []int {
	var pids []int
	_ = walk([]int{p.pid}, func(m member) {
		if !m.dead {
			pids = append(pids, m.pid)
		}
	})
	return pids
}
