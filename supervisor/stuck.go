package supervisor

import (
	"slices"
	"time"
)

// stuckness finds runs that end without having taken what woke them. A process
// may well end while others wait (one that serves a single connection does), so
// a queue that is not empty says nothing. Therefore, after some ends in
// a row with something still waiting, one run is put between two looks at
// the queue: it took nothing if all that waited before still waits after.
// The distance between two such runs doubles as long as they make progress.
type stuckness struct {
	inRow   int      // ends in a row with something still waiting
	after   int      // bracket the run that follows this many
	bracket bool     // the present run is bracketed
	before  []uint64 // what waited when it was launched
	untaken int      // runs in a row that took nothing
}

const (
	// firstBracket is how many ends in a row are not looked at.
	firstBracket = 2
	// maxUntaken is how many runs a datagram may survive.
	maxUntaken = 3
)

func (s *stuckness) launch() { s.bracket = s.inRow >= s.after }

// exit says whether the run that ended was stuck. queued is what waits now:
// nil where nothing does; its elements matter for a bracketed run only.
func (s *stuckness) exit(queued []uint64) bool {
	if len(queued) == 0 {
		*s = stuckness{after: firstBracket}
		return false
	}
	s.inRow++
	if !s.bracket {
		return false
	}
	if len(s.before) == 0 || !allOf(s.before, queued) {
		s.untaken = 0
		if len(s.before) > 0 { // else it came during the run
			s.after = 2 * s.inRow
		}
		return false
	}
	s.after = 0 // from now on every run is looked at
	s.untaken++
	return true
}

// untakenRun returns what follows a run that was stuck: after some of them in a row,
// a datagram is dropped, as it would keep those behind it from being read for ever.
func (s *stuckness) untakenRun() []action {
	if s.untaken < maxUntaken {
		return nil
	}
	s.untaken = 0
	return []action{drop{s.before}}
}

// allOf says whether all of before are still in now.
func allOf(before, now []uint64) bool {
	left := make(map[uint64]bool, len(now))
	for _, id := range now {
		left[id] = true
	}
	return !slices.ContainsFunc(before, func(id uint64) bool { return !left[id] })
}

// taking finds a process that runs and takes nothing: of what waits half a
// start.timeout after its start, everything still waits when the whole of it is over, and
// meanwhile it has no open connection and sent nothing.
type taking struct {
	at      time.Time // of the next look at the queue; zero: none
	reading bool      // it is under way
	before  []uint64  // what waited at the first one
	sent    uint64    // packets, by then
}

func (t *taking) begin(now time.Time, timeout time.Duration) {
	*t = taking{}
	if timeout > 0 {
		t.at = now.Add(timeout / 2)
	}
}

// judge reads a look at the queue and says whether the process has failed.
func (t *taking) judge(now time.Time, ev queueRead, timeout time.Duration) bool {
	t.reading = false
	var sent uint64
	for _, sum := range ev.sums {
		if !sum.Known || sum.Open > 0 {
			return false // it has taken something, or nobody can tell
		}
		sent += sum.Out.Packets
	}
	switch {
	case len(ev.queued) == 0 || slices.Contains(ev.queued, unidentified):
		return false
	case t.before == nil:
		t.before, t.sent, t.at = ev.queued, sent, now.Add(timeout-timeout/2)
		return false
	}
	return sent == t.sent && allOf(t.before, ev.queued)
}
