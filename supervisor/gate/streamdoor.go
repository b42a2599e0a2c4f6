package gate

import (
	"log/slog"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation"
)

// The door of a gate is kept by the porter, the first loop: it alone accepts and connects.

// maxBurst is how many connections are accepted, or connected, before those that are there get their turn.
const maxBurst = 32

// usher lets in those who wait, and then watches the listening sockets or not, whichever is right now.
func (l *loop) usher() {
	s := l.s
	s.mu.Lock()
	if s.paused != 0 && s.paused <= s.clock() {
		s.paused = 0
	}
	waiting := &l.lists[stageWaiting]
	for n := 0; s.open() && waiting.first != nil; n++ {
		if n == maxBurst {
			l.rung = true
			break
		}
		p := waiting.first
		s.unawait(p)
		l.unlink(p)
		if s.connect(l, p, errNoTarget) {
			l.fresh = append(l.fresh, p)
		} else {
			s.await(p)
			l.line(p)
		}
	}
	s.dropSpares(l)
	s.watch(l)
	l.pause = s.paused
	s.mu.Unlock()
	l.placeFresh()
}

// open says whether a client may be connected to a destination. It is called with the lock held.
func (s *streams) open() bool {
	return s.mode == admitting && s.paused == 0 && (s.spec.MaxConnections == 0 || s.active < s.spec.MaxConnections)
}

// wants says whether a connection is to be accepted. It is called with the lock held.
func (s *streams) wants(porter *loop) bool {
	switch s.mode {
	case admitting:
		// Those who wait come first.
		return s.paused == 0 && porter.lists[stageWaiting].first == nil &&
			(s.spec.MaxConnections == 0 || s.spec.CloseExcess || s.active < s.spec.MaxConnections)
	case collecting:
		return s.paused == 0 && s.waiting < s.spec.MaxPending
	case held, closed:
	}
	return false
}

// watch has the porter hear of new connections where they are wanted. It is called with the lock held, by the porter.
func (s *streams) watch(porter *loop) {
	switch want := s.wants(porter); {
	case want && !s.watched:
		for i, src := range s.sources {
			if fd := src.socket.FD(); fd >= 0 && !src.failed {
				// Level-triggered: what is not accepted now is told of again.
				_ = epollControl(porter.epoll, unix.EPOLL_CTL_ADD, int32(fd), unix.EPOLLIN, firstSource+uint32(i), 0)
			}
		}
		s.watched = true
	case !want && s.watched:
		s.unwatch(porter)
	}
}

// unwatch ends watch. It is called with the lock held.
func (s *streams) unwatch(porter *loop) {
	for _, src := range s.sources {
		if fd := src.socket.FD(); fd >= 0 {
			_ = epollControl(porter.epoll, unix.EPOLL_CTL_DEL, int32(fd), 0, 0, 0)
		}
	}
	s.watched = false
}

// prepare makes a listening socket non-blocking, as whoever had it before may have left it otherwise, and gives it the
// options that accepted connections inherit. What the user has configured stays.
func (src *source) prepare() {
	fd := src.socket.FD()
	if fd < 0 {
		return
	}
	_ = unix.SetNonblock(fd, true) // a descriptor that is bad shows in accept
	if !src.unix {
		o := &src.socket.Spec().Options
		keepAlive(int32(fd), o)
		_ = setInt(int32(fd), unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	}
}

// keepAlive has the kernel find out when the other end of a connection is no longer there. What the user has configured
// for the listening socket holds for both ends; o is not changed.
func keepAlive(fd int32, o *activation.Options) {
	set := func(option int, configured, standard int) {
		if configured == 0 {
			configured = standard
		}
		_ = setInt(fd, unix.IPPROTO_TCP, option, int32(configured)) // they have been there since Linux 2.4
	}
	_ = setInt(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1)
	set(unix.TCP_KEEPIDLE, seconds(o.KeepAliveTime), 60)
	set(unix.TCP_KEEPINTVL, seconds(o.KeepAliveInterval), 15)
	set(unix.TCP_KEEPCNT, o.KeepAliveProbes, 4)
}

// seconds rounds up.
func seconds(d time.Duration) int { return int((d + time.Second - 1) / time.Second) }

// accept takes connections from one listening socket.
func (l *loop) accept(src *source) {
	s := l.s
	s.mu.Lock()
	n := 0
	for n < l.burst && s.wants(l) {
		if !l.acceptOne(src) {
			l.burst = 1
			break
		}
		n++
	}
	if n == l.burst {
		l.burst = min(2*l.burst, maxBurst) // it may be one of many
	}
	s.dropSpares(l)
	s.watch(l)
	l.pause = s.paused
	s.mu.Unlock()
	l.placeFresh()
	s.tellLoss()
}

// acceptOne accepts one connection, and says whether it makes sense to try again. It is called with the lock held.
func (l *loop) acceptOne(src *source) bool {
	s := l.s
	var from unix.RawSockaddrAny
	fd, e := accept4(src.socket.FD(), &from)
	if e != 0 {
		return s.acceptFailed(src, e)
	}
	peer := peerOf(&from)
	switch {
	case !src.unix && !src.access.Permits(peer.Addr()):
		s.denied++
		closeFD(fd)
		return true
	case s.mode == admitting && s.spec.MaxConnections > 0 && s.active >= s.spec.MaxConnections:
		s.excess++
		closeFD(fd)
		return true
	}
	s.serial++
	p := &pair{source: src, peer: peer, serial: s.serial, accepted: l.now, stage: stageNone}
	p.client.fd, p.server.fd = fd, -1
	p.client.flags = prompt // inherited
	if src.unix {
		p.client.flags = local
	}
	p.ignored = s.hooks.ignore != nil && peer.IsValid() && s.hooks.ignore(peer.Addr())
	l.load++
	if s.mode == collecting || !s.connect(l, p, errNoTarget) {
		s.await(p)
	}
	l.fresh = append(l.fresh, p)
	return true
}

// acceptFailed says whether it makes sense to accept another connection after an error. It is called with the lock held.
func (s *streams) acceptFailed(src *source, e unix.Errno) bool {
	switch activation.KindOfAcceptError(e) {
	case activation.AcceptSkip:
		return true
	case activation.AcceptPause:
		s.pause(e, resourcePause)
	case activation.AcceptShutDown, activation.AcceptFailed:
		// It would be reported again and again. Whoever may mend it admits anew.
		src.failed = true
		s.hooks.log.Error("accept failed", slog.String("address", src.socket.Address().String()), slog.Any("err", e))
		if s.watched {
			_ = epollControl(s.loops[0].epoll, unix.EPOLL_CTL_DEL, int32(src.socket.FD()), 0, 0, 0)
		}
	case activation.AcceptEmpty:
	}
	return false
}

// placeFresh gives each pair that was accepted or connected to the loop that is to have it.
func (l *loop) placeFresh() {
	s := l.s
	for _, p := range l.fresh {
		to := l
		for p.target != nil {
			e := l.hasten(p)
			if e == 0 || !l.retry(p, e) {
				break
			}
		}
		if p.target != nil && len(s.loops) > 1 {
			s.mu.Lock()
			if to = s.place(l); to != l {
				l.load--
				to.load++
				l.forget(p)
				to.inbox = append(to.inbox, p)
				to.ring()
			}
			s.mu.Unlock()
		}
		if to == l {
			l.receive(p)
		}
	}
	clear(l.fresh)
	l.fresh = l.fresh[:0]
}
