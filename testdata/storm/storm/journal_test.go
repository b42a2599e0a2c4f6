package storm

import (
	"strings"
	"testing"
	"time"
)

// Of the clients of one port, each finds what the journal says about it, and nothing of the others.
func TestVerdict(t *testing.T) {
	t.Parallel()
	at := func(s float64) time.Time { return time.UnixMicro(int64(s * 1e6)) }
	j, err := parseJournal(strings.NewReader(`
1000000 7 start 0 -
1000100 7 accept 5001 -
1000200 7 accept 5002 -
1000300 7 answer 5001 a1
1000400 7 drop 5002 eof
2000000 7 accept 5001 -
2000100 7 accept 5003 -
2000200 7 term 0 -
3000000 8 start 0 -
3000100 8 accept 5001 -
3000200 8 answer 5001 a3
`[1:]))
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		port       uint16
		begin, end float64
		records    int
		dropped    bool
	}{
		"accepted and answered":            {5001, 0.9, 1.1, 2, false},
		"dropped, and said so":             {5002, 0.9, 1.1, 2, true},
		"the port again, accepted only":    {5001, 1.9, 2.1, 1, true},
		"the last that was accepted":       {5003, 1.9, 2.1, 1, true},
		"the port again, by another pid":   {5001, 2.9, 3.1, 2, false},
		"never accepted":                   {5004, 0.9, 3.1, 0, false},
		"never accepted, with a used port": {5001, 5, 6, 0, false},
		"never connected":                  {0, 0.9, 3.1, 0, false},
	} {
		c := &client{port: test.port, begin: at(test.begin), end: at(test.end)}
		records := j.of(c)
		if len(records) != test.records || verdict(records) != test.dropped {
			t.Errorf("%s: got %v, dropped %v; want %d records, %v", name, records, verdict(records), test.records, test.dropped)
		}
	}
}

func TestParseJournalBroken(t *testing.T) {
	t.Parallel()
	if _, err := parseJournal(strings.NewReader("1 2 accept\n")); err == nil {
		t.Error("half a line was read")
	}
}
