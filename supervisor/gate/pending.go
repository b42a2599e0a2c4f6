package gate

import (
	"golang.org/x/sys/unix"
)

// line puts a client that waits where it belongs by the order of acceptance. It is called by the porter.
func (l *loop) line(p *pair) {
	q := &l.lists[stageWaiting]
	after := q.last
	for after != nil && after.serial > p.serial {
		after = after.prev
	}
	q.insert(p, after)
}

// await counts a client that waits for a destination from now on. It is called with the lock held.
func (s *streams) await(p *pair) {
	p.stage = stageWaiting
	switch {
	case p.gone:
		s.left++
	default:
		s.waiting++
		if !p.ignored {
			p.source.queued++
		}
	}
	if !p.ignored {
		p.source.last.Store(s.clock())
	}
}

// unawait undoes await. It is called with the lock held.
func (s *streams) unawait(p *pair) {
	switch {
	case p.gone:
		s.left--
	default:
		s.waiting--
		if !p.ignored {
			p.source.queued--
		}
	}
	if !p.ignored {
		p.source.last.Store(s.clock())
	}
}

// retreat puts a placed pair that waits into the line, which is the porter's.
func (l *loop) retreat(p *pair) {
	s := l.s
	if l.number == 0 {
		l.line(p)
		l.rung = true
		return
	}
	l.forget(p)
	s.mu.Lock()
	porter, err := s.loop(0)
	if err == nil {
		l.load--
		porter.load++
		porter.inbox = append(porter.inbox, p)
		porter.ring()
	}
	s.mu.Unlock()
	if err != nil {
		l.end(p, &p.client)
	}
}

// isSilent says whether a client has sent nothing, and will not.
func (l *loop) isSilent(p *pair) bool {
	if p.client.inFlight() || p.server.inFlight() {
		return false
	}
	n, e := recv(p.client.fd, l.buffer[:1], unix.MSG_PEEK)
	return n == 0 || e != 0 && e != unix.EAGAIN
}

// noteWaiting does what an event of a client asks for that waits for a destination.
func (l *loop) noteWaiting(p *pair, events uint32) {
	c := &p.client
	c.note(events)
	if !c.has(finished) && !c.has(broken) && !c.has(hungUp) {
		return
	}
	silent := l.isSilent(p)
	switch {
	case c.has(broken), c.has(hungUp) && silent:
		l.end(p, nil)
	case silent && !p.gone:
		s := l.s
		s.mu.Lock()
		s.unawait(p)
		p.gone = true
		s.left++
		tooMany := s.left > s.spec.MaxPending
		s.mu.Unlock()
		if tooMany {
			l.endOldestGone()
		}
	default:
		return
	}
	l.rung = true // there may be room for another
}

// endOldestGone cuts the client that waits longest of those that have closed their side and sent nothing. A half-closed
// client may still want what a server says unasked, but they must not fill the memory.
func (l *loop) endOldestGone() {
	for p := l.lists[stageWaiting].first; p != nil; p = p.next {
		if p.gone {
			l.end(p, nil)
			return
		}
	}
}

// dismiss closes the connections of those who wait, and says how many there were.
func (s *streams) dismiss() (n int) {
	s.ask(0, func(l *loop) {
		for p := l.lists[stageWaiting].first; p != nil; p = l.lists[stageWaiting].first {
			l.end(p, nil)
			n++
		}
	})
	return n
}

// answer tells a client that it has waited too long.
func (l *loop) answer(p *pair) {
	s := l.s
	s.mu.Lock()
	s.unawait(p)
	s.expired++
	s.mu.Unlock()
	l.unlink(p)
	l.rung = true // there is room for another
	if s.spec.OnTimeout.Reset {
		p.stage = stageParting
		l.end(p, &p.client)
		return
	}
	// A close with unread input would be a reset, which can overtake the banner: so its side is closed first, and what
	// it still sends is read away.
	if banner := s.spec.OnTimeout.Banner; banner != "" {
		_, _ = send(p.client.fd, []byte(banner), unix.MSG_MORE) // into an empty buffer; who has left does not get it
	}
	shutdownWrite(p.client.fd)
	l.enter(p, stageParting)
	l.part(p, 0)
}

// part reads away what a client sends that was refused, and ends with it.
func (l *loop) part(p *pair, events uint32) {
	c := &p.client
	c.note(events)
	for range turns {
		n, e := recv(c.fd, l.buffer, 0)
		switch {
		case e == unix.EAGAIN:
			return
		case e != 0 || n == 0:
			l.end(p, nil)
			return
		}
	}
	l.end(p, nil) // it does not listen, it only talks
}
