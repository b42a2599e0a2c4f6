package gate

import (
	"time"

	"golang.org/x/sys/unix"
)

// How long pairs stay in the stages that are not configured.
const (
	youth       = 15 * time.Second // most connections end before, and need no options
	halfTime    = time.Minute      // as the kernel gives half-closed connections that nobody holds (tcp_fin_timeout)
	brokenTime  = 10 * time.Second
	partingTime = 2 * time.Second
)

// length returns how long a stage lasts; 0: it does not end by itself.
func (s *streams) length(of stage) time.Duration {
	switch of {
	case stageWaiting:
		return s.spec.PendingTimeout
	case stageConnecting:
		return s.spec.ConnectTimeout
	case stageYoung:
		return youth
	case stageHalf:
		return halfTime
	case stageBroken:
		return brokenTime
	case stageParting:
		return partingTime
	case stageNone, stageSettled, stages:
	}
	return 0
}

// deadline returns when the stage of a pair ends; 0: never.
func (l *loop) deadline(p *pair) int64 {
	n := l.s.length(p.stage)
	switch {
	case n <= 0:
		return 0
	case p.stage == stageWaiting:
		return p.accepted + int64(n)
	}
	return p.since + int64(n)
}

// insert puts a pair behind another one; nil: at the front.
func (q *list) insert(p, after *pair) {
	p.prev = after
	if after == nil {
		p.next, q.first = q.first, p
	} else {
		p.next, after.next = after.next, p
	}
	if p.next == nil {
		q.last = p
	} else {
		p.next.prev = p
	}
}

// remove takes a pair out of the list that it is in.
func (q *list) remove(p *pair) {
	if p.prev == nil {
		q.first = p.next
	} else {
		p.prev.next = p.next
	}
	if p.next == nil {
		q.last = p.prev
	} else {
		p.next.prev = p.prev
	}
	p.prev, p.next = nil, nil
}

// enter has a pair begin a stage now.
func (l *loop) enter(p *pair, at stage) {
	l.unlink(p)
	p.stage, p.since = at, l.now
	q := &l.lists[at]
	q.insert(p, q.last)
}

// unlink takes a pair out of its list, where it is in one.
func (l *loop) unlink(p *pair) {
	if q := &l.lists[p.stage]; q.first == p || p.prev != nil {
		q.remove(p)
	}
	p.stage = stageNone
}

// expire ends the stages whose time is over.
func (l *loop) expire() {
	for i := range l.lists {
		for p := l.lists[i].first; p != nil; p = l.lists[i].first {
			if end := l.deadline(p); end == 0 || end > l.now {
				break
			}
			l.lapse(p)
		}
	}
	if l.pause != 0 && l.pause <= l.now {
		l.pause, l.rung = 0, true
	}
}

// lapse does what is to be done at the end of the stage of a pair.
func (l *loop) lapse(p *pair) {
	switch p.stage {
	case stageWaiting:
		l.answer(p)
	case stageConnecting:
		l.refused(p, unix.ETIMEDOUT)
	case stageYoung:
		if !p.server.has(local) {
			keepAlive(p.server.fd, &p.source.socket.Spec().Options)
		}
		l.enter(p, stageSettled)
	case stageHalf:
		if now := p.in.Load(); now == p.mark && !p.server.owed() && !p.client.owed() {
			l.end(p, nil)
		} else {
			p.mark = now
			l.enter(p, stageHalf)
		}
	case stageBroken:
		if p.client.has(broken) {
			l.end(p, &p.server)
		} else {
			l.end(p, &p.client)
		}
	case stageParting:
		l.end(p, nil)
	case stageNone, stageSettled, stages:
	}
}
