package storm

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"
)

// record is one line of the journal of a service: MICROSECONDS PID EVENT PORT NAME.
type record struct {
	at    time.Time
	pid   int
	event string // start, accept, answer, drop, term, exit
	port  uint16 // of the client; 0: not about a client
	name  string // what the client calls itself, or why it was dropped
}

// journal is what a service wrote about its clients, in the order of its writes.
type journal map[uint16][]record

// readJournal reads the journal of a service; one that is missing is empty.
func readJournal(path string) (journal, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	j, err := parseJournal(f)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return j, nil
}

func parseJournal(r io.Reader) (journal, error) {
	j := journal{}
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		var rec record
		var micro int64
		if _, err := fmt.Sscanf(lines.Text(), "%d %d %s %d %s", &micro, &rec.pid, &rec.event, &rec.port, &rec.name); err != nil {
			return nil, fmt.Errorf("line %q: %w", lines.Text(), err)
		}
		rec.at = time.UnixMicro(micro)
		if rec.port != 0 {
			j[rec.port] = append(j[rec.port], rec)
		}
	}
	return j, lines.Err()
}

// clockSlack is how far the time of a record may be off: a line is written after what it tells, and
// Node takes the wall clock once, at its start.
const clockSlack = 20 * time.Millisecond

// of returns the records about one connection: from its accept to the next with the same port.
func (j journal) of(c *client) []record {
	if c.port == 0 {
		return nil
	}
	var found []record
	for _, rec := range j[c.port] {
		if rec.event == "accept" {
			if found != nil {
				return found
			}
			if rec.at.Before(c.begin.Add(-clockSlack)) || rec.at.After(c.end.Add(clockSlack)) {
				continue // another client, that had this port before or since
			}
			found = []record{}
		}
		if found != nil {
			found = append(found, rec)
		}
	}
	return found
}

// verdict says whether the service itself lost the client: it accepted it and did not answer. One
// that was answered by the journal and yet got nothing is not the service's fault.
func verdict(records []record) (dropped bool) {
	for _, rec := range records {
		switch rec.event {
		case "accept":
			dropped = true
		case "answer":
			return false
		}
	}
	return dropped
}
