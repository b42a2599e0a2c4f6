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
	soon bool // somebody is there who may send more
}

// screen judges the clients in a queue that has room for backlog of them.
func (w *Wake) screen(clients []activity.Client, backlog int) (s screening) {
	left := 0
	for i := range clients {
		c := &clients[i]
		ignored := w.ignores(c.Remote.Addr())
		if !ignored && c.Bytes >= w.MinBytes {
			return screening{wake: true}
		}
		if c.Left {
			left++
		} else if !ignored {
			s.soon = true
		}
	}
	if 2*len(clients) >= backlog {
		return screening{wake: true} // or nobody else would get in
	}
	if left == len(clients) {
		s.gone = left
	}
	return s
}

func (w *Wake) ignores(addr netip.Addr) bool {
	addr = addr.Unmap().WithZone("")
	return slices.ContainsFunc(w.Ignore, func(p netip.Prefix) bool { return p.Contains(addr) })
}

// The queue is looked at again after the first of these, then twice that, while somebody may send more.
const (
	minScreenAgain = 200 * time.Millisecond
	maxScreenAgain = time.Minute
)

// screen looks at who waits on an armed socket.
func (s *Supervisor) screen(u *unit, socket int) {
	p := &u.ports[socket]
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
			if !p.armed || p.gen != gen {
				return
			}
			var v screening
			info, infoErr := unix.GetsockoptTCPInfo(p.sock.FD(), unix.IPPROTO_TCP, unix.TCP_INFO)
			if err != nil || infoErr != nil {
				v.wake = true // nobody can tell who it is
			} else {
				v = u.spec.Wake.screen(clients, int(info.Sacked)) // of a listening socket: the backlog
			}
			s.screened(now, u, socket, v, again)
		}
	}, nil)
}

// screened does what a look at the queue asks for.
func (s *Supervisor) screened(now time.Time, u *unit, socket int, v screening, again bool) {
	p := &u.ports[socket]
	switch {
	case v.wake:
		p.screens = 0
		if err := s.watcher.Disarm(p.sock.FD(), socketToken(u.index, socket, p.gen)); err != nil {
			s.log.Error("socket still watched", slog.String("service", u.spec.Name), slog.Any("err", err))
		}
		p.armed = false
		s.step(now, u, socketReady{socket})
		return
	case again:
		s.screen(u, socket)
		return
	}
	// They are the first in the queue, whoever has come meanwhile.
	for range v.gone {
		if unix.SetNonblock(p.sock.FD(), true) != nil {
			break
		}
		fd, _, err := p.sock.Accept()
		if err != nil {
			break
		}
		closeFD(fd)
		u.refused.Ignored++
	}
	if !v.soon {
		p.screens = 0
		return
	}
	gen, wait := p.gen, growing(minScreenAgain, maxScreenAgain, p.screens)
	p.screens++
	s.after(now, wait, func(time.Time) {
		if p.armed && p.gen == gen {
			s.screen(u, socket)
		}
	})
}
