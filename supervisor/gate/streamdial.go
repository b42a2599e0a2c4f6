package gate

import (
	"errors"
	"log/slog"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation"
)

// connect begins to connect a client to a destination, the next one where one refuses at once. Where none is left, the
// gate is held and hooks.lost will be told why, which is last if nothing was tried; where resources are short, the gate
// pauses: in both cases it says false and the client has to wait. It is called with the lock held, by the loop of the
// pair.
func (s *streams) connect(l *loop, p *pair, last error) bool {
	if p.epoch != s.epoch {
		p.epoch, p.tried, p.since = s.epoch, 0, l.now
	}
	for {
		i := s.pick(p)
		if i < 0 {
			s.lose(last)
			return false
		}
		t := s.targets[i]
		established, e := s.dial(p, t)
		switch {
		case e == 0:
			p.tried |= 1 << i
			s.attach(p, t)
			p.stage = stageConnecting // and not in the list yet
			if established {
				p.stage = stageYoung
				s.establish(p)
			}
			return true
		case e == unix.EAGAIN && time.Duration(l.now-p.since) < s.spec.ConnectTimeout:
			s.pause(e, queuePause)
			return false
		case isShortage(e):
			s.pause(e, resourcePause)
			return false
		}
		p.tried |= 1 << i
		last = refusal(t, e)
		s.shun(t, last)
	}
}

// errNoTarget says that an admission had no target.
var errNoTarget = errors.New("no destination for connections")

// refusal says which target did not take a connection, and why.
func refusal(t *target, err error) error {
	return &activation.SocketError{Op: "connect to", Address: t.Address, Err: err}
}

// attach counts a pair that has a connection, or is getting one. It is called with the lock held.
func (s *streams) attach(p *pair, t *target) {
	p.target = t
	t.open++
	s.totals[t.Index].open++
	s.active++
	if !p.ignored {
		p.source.open++
		p.source.peers ^= identity(p.serial)
		p.source.last.Store(s.clock())
	}
}

// detach undoes attach. It is called with the lock held.
func (s *streams) detach(p *pair) {
	p.target.open--
	s.totals[p.target.Index].open--
	s.active--
	p.target = nil
	if !p.ignored {
		p.source.open--
		p.source.peers ^= identity(p.serial)
		p.source.last.Store(s.clock())
	}
}

// identity spreads the number of a connection over all bits (the finalizer of splitmix64), so that sums of few differ.
func identity(serial uint64) uint64 {
	x := serial + 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// establish notes that a destination has taken the connection. It is called with the lock held.
func (s *streams) establish(p *pair) {
	p.target.trust()
	s.totals[p.target.Index].total++
	s.served = true
}

// dial begins to connect to one target; established says that it is done already. It is called with the lock held.
func (s *streams) dial(p *pair, t *target) (established bool, _ unix.Errno) {
	p.server = side{fd: -1, rest: p.server.rest}
	if t.family == unix.AF_UNIX {
		p.server.flags = local
	}
	if s.spec.Transparent {
		t.closeSpare()
	} else if fd := t.takeSpare(); fd >= 0 {
		p.server.fd = fd
		return true, 0
	}
	fd, e := socket(t.family)
	if e != 0 {
		return false, e
	}
	if t.family != unix.AF_UNIX {
		if s.spec.Transparent {
			s.impersonate(p, t, fd)
		}
		// The last packet of the handshake waits for the first data, see hasten.
		_ = setInt(fd, unix.IPPROTO_TCP, unix.TCP_QUICKACK, 0)
	}
	e = connect(fd, t.name)
	if e != 0 && e != unix.EINPROGRESS {
		closeFD(fd)
		return false, e
	}
	p.server.fd = fd
	if e == 0 {
		return true, 0
	}
	p.server.flags |= watched
	return false, 0
}

// impersonate has a connection come from the client's own address. Where that cannot be, it comes from this machine's,
// as it would otherwise; that is logged once.
func (s *streams) impersonate(p *pair, t *target, fd int32) {
	var e unix.Errno
	from, family, err := sockaddr(activation.Address{Network: activation.TCP, IP: p.peer.Addr()})
	switch {
	case !p.peer.IsValid() || err != nil || family != t.family:
		e = unix.EAFNOSUPPORT
	case family == unix.AF_INET:
		e = setInt(fd, unix.IPPROTO_IP, unix.IP_TRANSPARENT, 1)
	default:
		e = setInt(fd, unix.IPPROTO_IPV6, unix.IPV6_TRANSPARENT, 1)
	}
	if e == 0 {
		_ = setInt(fd, unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1) // else there are fewer ports, which shows
		e = bind(fd, from)
	}
	if e != 0 && !s.plain {
		s.plain = true
		s.hooks.log.Warn("destination does not see the client's address",
			slog.String("client", p.peer.String()), slog.String("destination", t.Address.String()), slog.Any("err", e))
	}
}

// begin is called when a destination has taken the connection of a placed pair.
func (l *loop) begin(p *pair) {
	l.enter(p, stageYoung)
	if version := l.s.spec.ProxyProtocol; version != NoProxyProtocol {
		header := appendProxyHeader(nil, version, p.peer, localOf(p.client.fd))
		if early := p.server.rest; len(early) > 0 {
			p.server.rest = append(header, early...) // and pump writes it
		} else {
			l.give(p, &p.server, header, 0)
		}
	}
}

// hasten gives a destination what its client has sent already, before the pair is placed. A connection to this machine
// is there as soon as connect(2) returns, and then the data go with the last packet of the handshake. Where there are
// none, that packet is sent now: the server may be the one to speak first. The error is the destination's refusal.
func (l *loop) hasten(p *pair) unix.Errno {
	c, s := &p.client, &p.server
	if p.stage != stageConnecting || l.s.spec.ProxyProtocol != NoProxyProtocol {
		return 0
	}
	data, kept := s.rest, len(s.rest) > 0 // of a client that was tried on another destination before
	if !kept && l.s.kept.Load() < maxKept {
		n, e := recv(c.fd, l.buffer[:firstRead], 0)
		c.flags |= readable
		if c.took(n, firstRead, e) {
			l.count(p, c, n)
			data = l.buffer[:n]
		}
	}
	taken := 0
	if len(data) > 0 {
		n, e := send(s.fd, data, 0)
		if e == 0 {
			s.flags = s.flags&^watched | written
			l.s.mu.Lock()
			l.s.establish(p)
			l.s.mu.Unlock()
			p.stage = stageYoung
			taken = n
		}
		switch left := data[taken:]; {
		case len(left) == 0:
			l.unkeep(s)
		case kept:
			s.rest = left
		default:
			l.keep(s, left)
		}
		if e != 0 && e != unix.EAGAIN {
			return e
		}
	}
	if taken == 0 {
		_ = setInt(s.fd, unix.IPPROTO_TCP, unix.TCP_QUICKACK, 1) // of a socket that was refused
	}
	return 0
}

// noteConnecting does what an event of a pair asks for that is being connected.
func (l *loop) noteConnecting(p *pair, side *side, events uint32) {
	if side == &p.client {
		side.note(events)
		if side.has(broken) || side.has(hungUp) && l.isSilent(p) {
			l.end(p, &p.server) // nobody wants the connection any more
		}
		return
	}
	if events&(unix.EPOLLERR|unix.EPOLLHUP) != 0 {
		e, err := unix.GetsockoptInt(int(side.fd), unix.SOL_SOCKET, unix.SO_ERROR)
		if e == 0 || err != nil {
			e = int(unix.ECONNREFUSED) // it hung up without a reason
		}
		if errno := unix.Errno(e); errno != unix.ECONNRESET && errno != unix.EPIPE {
			l.refused(p, errno)
			return
		} // else it took the connection, and has reset it meanwhile
	} else if events&unix.EPOLLOUT == 0 {
		return
	}
	l.s.mu.Lock()
	l.s.establish(p)
	l.s.mu.Unlock()
	l.begin(p)
	side.note(events)
	l.pump(p)
}

// refused has a placed pair tried on another destination; where none is left, it waits, before all that came after it.
func (l *loop) refused(p *pair, e unix.Errno) {
	l.unlink(p)
	if l.retry(p, e) {
		l.settle(p)
	} else {
		l.retreat(p)
	}
	l.s.tellLoss()
}

// retry notes that a destination has refused a client, and begins to connect it to another one. Where it says false the
// client waits, and is counted so. A client of an earlier admission waits too: it has its turn by the order of
// acceptance.
func (l *loop) retry(p *pair, e unix.Errno) bool {
	s := l.s
	closeFD(p.server.fd)
	p.server.fd = -1
	s.mu.Lock()
	defer s.mu.Unlock()
	err := refusal(p.target, e)
	s.shun(p.target, err)
	s.detach(p)
	if s.mode == admitting && s.paused == 0 && p.epoch == s.epoch && s.connect(l, p, err) {
		return true
	}
	s.await(p)
	s.stray = s.stray || s.mode == held
	return false
}
