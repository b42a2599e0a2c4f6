package gate

import (
	"golang.org/x/sys/unix"
)

// receive places a pair: it gets a slot, and its events come from now on. It does nothing with one that it has already,
// but for what is new about it.
func (l *loop) receive(p *pair) {
	if !p.placed {
		p.placed = true
		if n := len(l.free); n > 0 {
			p.slot, l.free = l.free[n-1], l.free[:n-1]
			l.pairs[p.slot] = p
		} else {
			p.slot = uint32(len(l.pairs))
			l.pairs = append(l.pairs, p)
		}
		if !l.watch(p, &p.client, unix.EPOLL_CTL_ADD) {
			l.end(p, &p.client)
			return
		}
	}
	if p.target != nil {
		l.settle(p)
		return
	}
	if q := &l.lists[stageWaiting]; q.first != p && p.prev == nil {
		l.line(p)
		l.rung = true
	}
}

// settle watches the new connection of a pair to a destination, and goes on from where it is.
func (l *loop) settle(p *pair) {
	if !l.watch(p, &p.server, unix.EPOLL_CTL_ADD) {
		l.end(p, &p.client)
		return
	}
	if p.stage == stageConnecting {
		l.enter(p, stageConnecting)
		return
	}
	l.begin(p)
	l.pump(p)
}

// watch tells the kernel which events of a side to report. It says false where the kernel has no room for that.
func (l *loop) watch(p *pair, s *side, op int) bool {
	token := p.slot << 1
	if s == &p.server {
		token |= 1
	}
	events := uint32(unix.EPOLLIN | unix.EPOLLPRI | unix.EPOLLRDHUP | unix.EPOLLET)
	if s.has(watched) {
		events |= unix.EPOLLOUT
	}
	return epollControl(l.epoll, op, s.fd, events, token, uint32(p.serial)) == 0
}

// forget takes a pair out of the loop that goes to another one.
func (l *loop) forget(p *pair) {
	if !p.placed {
		return
	}
	p.placed = false
	l.pairs[p.slot] = nil
	l.free = append(l.free, p.slot)
	_ = epollControl(l.epoll, unix.EPOLL_CTL_DEL, p.client.fd, 0, 0, 0)
}

// end closes both sides of a pair; the one that is given, if any, gets a reset.
func (l *loop) end(p *pair, reset *side) {
	s := l.s
	if p.stage == stageWaiting {
		s.mu.Lock()
		s.unawait(p)
		s.mu.Unlock()
		l.rung = true
	}
	l.unlink(p)
	for _, x := range []*side{&p.server, &p.client} {
		if x.pipe != nil && x.pipe.held == 0 {
			l.giveBack(x)
		}
		l.drop(x)
		switch {
		case x.fd < 0:
		case x == reset && !x.has(local):
			resetFD(x.fd)
		default:
			closeFD(x.fd)
		}
		x.fd = -1
	}
	if p.placed {
		p.placed = false
		l.pairs[p.slot] = nil
		l.free = append(l.free, p.slot)
	}
	s.mu.Lock()
	l.load--
	if p.target != nil {
		s.detach(p)
	}
	s.paused = 0
	if s.mode != admitting && s.mode != collecting || !s.watched {
		l.rung = true
		if porter := s.loops[0]; porter != nil && porter != l {
			porter.ring()
		}
	}
	s.mu.Unlock()
}
