package supervisor

import (
	"slices"
	"time"
)

// timers is the queue of deadlines, the earliest first (container/heap).
// Services without a deadline are not in it.
type timers []*unit

func (t timers) Len() int           { return len(t) }
func (t timers) Less(i, j int) bool { return t[i].due.Before(t[j].due) }
func (t timers) Swap(i, j int) {
	t[i], t[j] = t[j], t[i]
	t[i].place, t[j].place = i, j
}

// Push and Pop are for container/heap.
func (t *timers) Push(x any) {
	u := x.(*unit)
	u.place = len(*t)
	*t = append(*t, u)
}

// Pop is for container/heap.
func (t *timers) Pop() any {
	last := len(*t) - 1
	u := (*t)[last]
	(*t)[last] = nil
	*t = (*t)[:last]
	u.place = -1
	return u
}

// timeouts tells every unit whose deadline has come.
func (s *Supervisor) timeouts(now time.Time) {
	for len(s.timers) > 0 && !s.timers[0].due.After(now) {
		u := s.timers[0]
		s.step(now, u, deadlinePassed{})
		if u.place >= 0 && !u.due.After(now) {
			panic("supervisor: " + u.spec.Name + ": a deadline was not handled") // it would spin
		}
	}
}

// chore is something to be done later that is no unit's deadline.
type chore struct {
	at time.Time
	do message
}

// after has the loop do something when a time is over.
func (s *Supervisor) after(now time.Time, d time.Duration, do message) {
	c := chore{now.Add(d), do}
	i, _ := slices.BinarySearchFunc(s.chores, c, func(a, b chore) int { return a.at.Compare(b.at) })
	s.chores = slices.Insert(s.chores, i, c)
}

// chore does what is due.
func (s *Supervisor) chore(now time.Time) {
	for len(s.chores) > 0 && !s.chores[0].at.After(now) {
		c := s.chores[0]
		s.chores = slices.Delete(s.chores, 0, 1)
		c.do(now)
	}
}

// next is when the loop has to do something by itself; the zero Time: never.
func (s *Supervisor) next() time.Time {
	var at time.Time
	if len(s.timers) > 0 {
		at = s.timers[0].due
	}
	if len(s.chores) > 0 && (at.IsZero() || s.chores[0].at.Before(at)) {
		at = s.chores[0].at
	}
	return at
}
