package adopt

import (
	"time"

	"golang.org/x/sys/unix"
)

// budget bounds the processor time for the answers to the processes of one service, so that none of them can keep us busy.
// A program binds a few times in its life, which takes well below a millisecond; one that binds a source address for each of its
// connections, some thousand times a second.
type budget struct {
	left time.Duration // may be negative
	at   time.Time     // when left was right
}

const (
	burst = 250 * time.Millisecond // at once
	share = 8                      // in the long run this part of a processor
)

func newBudget(now time.Time) budget { return budget{left: burst, at: now} }

// spend notes what answers took, and returns for how long nobody is to be answered; 0: go on.
func (b *budget) spend(now time.Time, took time.Duration) time.Duration {
	b.left = min(burst, b.left+now.Sub(b.at)/share) - took
	b.at = now
	if b.left > 0 {
		return 0
	}
	return (rest - b.left) * share
}

// rest is what there is to be when it goes on, as each wait costs something, too.
const rest = 2 * time.Millisecond

// threadTime is the processor time that this thread has used.
func threadTime() time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t); err != nil {
		return 0 // it does not fail
	}
	return time.Duration(t.Nano())
}
