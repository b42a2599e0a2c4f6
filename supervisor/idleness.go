package supervisor

import (
	"fmt"
	"time"

	"hibergate/supervisor/activity"
)

// idleness judges looks at the sockets of one running process: is it idle, and
// if not, when is the next look worth while? Pure.
//
// Where the kernel tells the time of the last packet (Summary.Exact), one look
// each stop_after is enough to stop in time: the look after the last activity
// knows when that was. Elsewhere activity is only seen by looking, about each
// second or each tenth of stop_after, whichever is longer.
type idleness struct {
	spec  *Idle
	since time.Time // no activity since, as far as is known from looks

	// exact is whether the last look found the kernel's clock; false before the first
	// look. It outlives a process.
	exact bool

	// At the previous look: its time, and the connections of sockets with the kernel's
	// clock and of those without.
	looked          time.Time
	clocked, polled connections
}

// connections are the open connections of several sockets: how many, and which.
type connections struct {
	open  int
	peers uint64
}

func (c *connections) add(s activity.Summary) {
	c.open += s.Open
	c.peers ^= s.Peers
}

// begin forgets the previous process. Its start counts as activity.
func (i *idleness) begin(now time.Time) {
	*i = idleness{spec: i.spec, exact: i.exact, since: now, looked: now}
}

// first returns when to look for the first time; the zero Time: never.
func (i *idleness) first(now time.Time) time.Time {
	if i.spec.StopAfter <= 0 {
		return time.Time{}
	}
	if !i.exact {
		return i.again(now)
	}
	return now.Add(i.spec.StopAfter)
}

// again returns when to look again where activity is only seen by looking: so
// soon that the stop comes within a second or a tenth of stop_after of its time,
// with something to spare for the look itself.
func (i *idleness) again(now time.Time) time.Time {
	return now.Add(min(i.spec.StopAfter, max(900*time.Millisecond, i.spec.StopAfter*9/100)))
}

// judge returns when to look again and what keeps the service busy, in words;
// empty: it is idle.
func (i *idleness) judge(now time.Time, sums []activity.Summary) (next time.Time, busy string) {
	exact, held := true, false
	var clocked, polled connections
	for _, s := range sums {
		if !s.Known {
			i.since, i.exact = now, false
			return i.again(now), "unknown: " + s.Why
		}
		if s.Exact {
			clocked.add(s)
		} else {
			exact = false
			polled.add(s)
		}
		if s.Queued > 0 {
			i.since = now
			busy = "something waits on a socket"
		}
		if s.Last.After(i.since) {
			i.since = s.Last
		}
		if i.spec.When == activity.NoTraffic {
			if s.LastPayload.After(i.since) {
				i.since = s.LastPayload
			}
			held = held || s.PayloadUnseen
		}
	}
	// A connection can end without a packet (the peer is gone, and the kernel gives up).
	changed := clocked != i.clocked && !i.since.After(i.looked) || polled != i.polled
	i.exact, i.looked, i.clocked, i.polled = exact, now, clocked, polled
	open := clocked.open + polled.open
	if i.spec.When == activity.NoConnections {
		held = open > 0
	}
	if changed || held && !exact {
		i.since = now
	}
	switch {
	case busy != "":
		return i.again(now), busy
	case held && exact:
		return now.Add(i.spec.StopAfter), inWords(open)
	case held:
		return i.again(now), inWords(open)
	case now.Sub(i.since) < i.spec.StopAfter:
		next = i.since.Add(i.spec.StopAfter)
		if !exact {
			next = earlier(next, i.again(now))
		}
		return next, fmt.Sprintf("active %s ago", now.Sub(i.since).Round(time.Millisecond))
	}
	return time.Time{}, ""
}

func inWords(n int) string {
	if n == 1 {
		return "1 open connection"
	}
	return fmt.Sprintf("%d open connections", n)
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}
