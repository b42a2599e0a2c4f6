package supervisor

import (
	"context"
	"log/slog"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/supervisor/activity"
)

// A service with wake.ignore or wake.min_bytes is not woken by any client, so its sockets
// are armed for each arrival while others may wait, and each time the queue is looked at.

// screened says whether the unit looks at its clients before they wake it.
func (u *unit) screened() bool { return len(u.spec.Wake.Ignore) > 0 || u.spec.Wake.MinBytes > 0 }

// screening is what a look at the queue of a sleeping service says.
type screening struct {
	wake bool // somebody is there for whom it is to wake
	gone int  // all are without interest and have left; so many may be taken out
	soon bool // somebody is there who may send more, or leave
}

// screen judges a queue of some length, which has room for backlog. clients are those of
// whom something is known; the others have reset their connections.
func (w *Wake) screen(clients []activity.Client, length, backlog int) screening {
	length = max(length, len(clients))
	left := length - len(clients)
	for i := range clients {
		c := &clients[i]
		ignored := w.ignores(c.Remote.Addr())
		if !ignored && c.Bytes >= w.MinBytes {
			return screening{wake: true}
		}
		if c.Left && (!ignored || c.Bytes == 0) { // else it may want its answer
			left++
		}
	}
	switch {
	case left == length:
		return screening{gone: left}
	case 2*length >= backlog:
		return screening{wake: true} // or nobody else would get in
	}
	return screening{soon: true}
}

func (w *Wake) ignores(addr netip.Addr) bool {
	addr = addr.Unmap().WithZone("")
	return slices.ContainsFunc(w.Ignore, func(p netip.Prefix) bool { return p.Contains(addr) })
}

// The queue is looked at again after the first of these, then twice that, while somebody is there. Each
// arrival begins anew.
const (
	minScreenAgain = 200 * time.Millisecond
	maxScreenAgain = time.Minute
)

// screen looks at who waits on an armed socket.
func (s *Supervisor) screen(u *unit, p *port) {
	if p.screening {
		p.again = true
		return
	}
	p.screening = true
	gen := p.gen
	s.goDo(func() message {
		clients, err := s.looker.Waiting(context.Background(), p.key)
		return func(now time.Time) {
			again := p.again
			p.screening, p.again = false, false
			switch {
			case !p.armed || p.gen != gen:
				return
			case again:
				s.screen(u, p)
				return
			}
			v := screening{wake: true} // where nobody can tell who it is
			if info, e := unix.GetsockoptTCPInfo(p.sock.FD(), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil && e == nil {
				v = u.spec.Wake.screen(clients, int(info.Unacked), int(info.Sacked)) // of a listening socket: its queue and its backlog
			}
			s.screened(now, u, p, v)
		}
	}, nil)
}

// screened does what a look at the queue asks for.
func (s *Supervisor) screened(now time.Time, u *unit, p *port, v screening) {
	if v.wake {
		p.screens = 0
		if err := s.watcher.Disarm(p.sock.FD(), socketToken(u.index, p.slot, p.gen)); err != nil {
			s.log.Error("socket still watched", slog.String("service", u.spec.Name), slog.Any("err", err))
		}
		p.armed = false
		s.step(now, u, socketReady{p.slot})
		return
	}
	// They are the first in the queue, whoever has come meanwhile. A frozen process may be about to take them, and
	// shares O_NONBLOCK with us.
	if u.policy.life().state == Listening && v.gone > 0 {
		s.takeAway(p, v.gone, func(n int) { u.refused.Ignored += uint64(n) })
	}
	if !v.soon {
		return
	}
	looks, gen := p.looks, p.gen
	s.after(now, growing(minScreenAgain, maxScreenAgain, p.screens), func(time.Time) {
		if p.armed && p.gen == gen && p.looks == looks {
			p.looks++
			s.screen(u, p)
		}
	})
	p.screens++
}
