package storm

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"hibergate/supervisor/control"
)

// lane is the clients of one service. Owned by its goroutine; the tally is read when that has ended.
type lane struct {
	o       *options
	target  *target
	control control.Client
	random  *rand.Rand
	quota   int           // cycles; 0: until ctx ends
	cycles  *atomic.Int64 // of all lanes

	ended time.Time     // when the last client was done
	aim   time.Duration // from there to where every other client meets a new process
	aimed int           // how often that was corrected
	pid   int           // of the last answer
	moved time.Time     // when a new process last answered
	named int           // clients so far

	tally tally
}

// tally is what a lane has to report.
type tally struct {
	cycles     int // as the clients saw them: processes that answered
	clients    int
	answered   int
	reset      int
	refused    int
	unanswered []client
	latency    []time.Duration // of the answered ones, from the connect to the end, less what they held back themselves

	handFailed int
	handErr    error
}

const (
	near = 5 * time.Millisecond  // clients come that close to the stop mostly
	far  = 40 * time.Millisecond // and sometimes that close
)

// run begins no round once stopped has ended, and breaks one off when ctx ends.
func (l *lane) run(ctx, stopped context.Context) error {
	l.ended, l.moved = time.Now(), time.Now()
	l.aim = l.o.stopAfter + 2*time.Millisecond
	for stopped.Err() == nil && (l.quota == 0 || l.tally.cycles < l.quota) {
		l.round(ctx)
		if limit := 4*l.o.patience + 10*l.o.stopAfter; time.Since(l.moved) > limit {
			return fmt.Errorf("%s: no new process has answered for %v", l.target.name, limit)
		}
	}
	return nil
}

// round lets one or more clients come at about the same time.
func (l *lane) round(ctx context.Context) {
	byHand := !l.target.kind.accept && l.random.Float64() < l.o.byHand
	if !pause(ctx, time.Until(l.ended.Add(l.phase(byHand)))) {
		return
	}
	var all sync.WaitGroup
	if byHand {
		// The clients come from 2 ms before it to 6 ms after it.
		all.Go(func() {
			if pause(ctx, 2*time.Millisecond) {
				l.sleep(ctx)
			}
		})
	}
	clients := l.clients(byHand)
	for i := range clients {
		c := &clients[i]
		all.Go(func() {
			if pause(ctx, c.after) {
				c.run(ctx, l.target.address, l.o.patience)
			}
		})
	}
	all.Wait()
	l.count(clients, byHand)
}

// phase is how long after the last client the next comes.
func (l *lane) phase(byHand bool) time.Duration {
	around := func(aim, by time.Duration) time.Duration {
		return aim - by + time.Duration(l.random.Int64N(int64(2*by)))
	}
	switch n := l.random.IntN(20); {
	case byHand: // while it runs
		return around(l.o.stopAfter/2, l.o.stopAfter/2) * 9 / 10
	case l.target.kind.accept: // nothing stops
		return around(5*time.Millisecond, 5*time.Millisecond)
	case n < 13:
		return around(l.aim, near)
	case n < 19:
		return around(l.aim, far)
	default: // any time
		return around(l.aim, l.aim)
	}
}

func (l *lane) clients(byHand bool) []client {
	n := 1
	if l.random.IntN(3) == 0 {
		n += l.random.IntN(l.o.parallel)
	}
	list := make([]client, n)
	for i := range list {
		after := time.Duration(0)
		switch {
		case byHand:
			after = time.Duration(l.random.Int64N(int64(8 * time.Millisecond)))
		case i > 0:
			after = rand0(l.random, 3)
		}
		list[i] = script(l.random, fmt.Sprintf("%s.%d", l.target.name, l.named), byHand, after)
		l.named++
	}
	return list
}

func (l *lane) sleep(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 2*l.o.patience)
	defer cancel()
	if _, err := l.control.Sleep(ctx, l.target.name); err != nil {
		l.tally.handFailed++
		l.tally.handErr = err
	}
}

func (l *lane) count(clients []client, byHand bool) {
	pid, at := l.pid, time.Time{}
	fresh := map[int]bool{}
	for i := range clients {
		c := &clients[i]
		if c.outcome == canceled {
			continue
		}
		l.tally.clients++
		if c.end.After(l.ended) {
			l.ended = c.end
		}
		switch c.outcome {
		case answered:
			l.tally.answered++
			l.tally.latency = append(l.tally.latency, c.end.Sub(c.begin)-c.deliberate())
			if c.pid != l.pid {
				fresh[c.pid] = true
			}
			if c.end.After(at) {
				pid, at = c.pid, c.end
			}
		case unanswered:
			l.tally.unanswered = append(l.tally.unanswered, *c)
		case wasReset:
			l.tally.reset++
		case refused:
			l.tally.refused++
		case canceled:
		}
	}
	if len(fresh) > 0 {
		l.tally.cycles += len(fresh)
		l.cycles.Add(int64(len(fresh)))
		l.moved = time.Now()
	}
	// Where as many clients meet the old process as a new one, the stop is near.
	if !byHand && !at.IsZero() && l.pid != 0 {
		step := max(time.Millisecond, 16*time.Millisecond>>(l.aimed/3))
		l.aimed++
		if pid == l.pid {
			l.aim += step
		} else {
			l.aim = max(l.o.stopAfter/2, l.aim-step)
		}
	}
	l.pid = pid
}

// deliberate is how long the client itself held its line back.
func (c *client) deliberate() time.Duration {
	var d time.Duration
	for i := range c.pieces {
		d += c.gaps[i]
	}
	return d
}
