package supervisor

import (
	"context"
	"log/slog"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation"
)

// Refused counts what clients did not get. The zero value: nothing was refused.
type Refused struct {
	Access         uint64 `json:"access,omitempty"`                     // accept = true: connections from sources that may not use it and that the kernel let through
	MaxConnections uint64 `json:"max_connections,omitempty"`            // closed
	PerSource      uint64 `json:"max_connections_per_source,omitempty"` // closed
	SourceRate     uint64 `json:"accept_rate_per_source,omitempty"`     // closed
	Failed         uint64 `json:"failed,omitempty"`                     // closed or dropped, as the service was given up
	Datagrams      uint64 `json:"datagrams,omitempty"`                  // dropped, as no run took them
	Ignored        uint64 `json:"ignored,omitempty"`                    // wake.ignore: they left before the service was awake
	Pauses         uint64 `json:"pauses,omitempty"`                     // times that something had to wait for resources
}

func (r *Refused) count(why sourceLimit) {
	switch why {
	case tooMany:
		r.PerSource++
	case tooFast:
		r.SourceRate++
	case withinLimits:
	}
}

func (r *Refused) add(o *Refused) {
	r.Access += o.Access
	r.MaxConnections += o.MaxConnections
	r.PerSource += o.PerSource
	r.SourceRate += o.SourceRate
}

// refuseBatch is how much is refused at a time, to be fair to other services.
const refuseBatch = 64

// refuse accepts and closes what waits on a socket, so that clients learn that the service has failed.
func (s *Supervisor) refuse(u *unit, socket int) {
	p := u.at(socket)
	if held := p.held; held != nil {
		p.held = nil
		u.sources.release(held.source)
		closeConnection(held)
		u.refused.Failed++
	}
	s.takeAway(p, refuseBatch, func(n int) {
		u.refused.Failed += uint64(n)
		if u.policy.life().state == Failed {
			s.armPort(u, p)
		}
	})
}

// takeAway accepts and closes what waits on a socket, or reads and forgets it, and tells the loop how much it
// was. It runs outside the loop, and nobody waits for it at the end: another process that shares the socket can make it
// blocking at the wrong moment.
func (s *Supervisor) takeAway(p *port, most int, done func(n int)) {
	if p.taking {
		return
	}
	p.taking = true
	sock := p.sock
	go func() {
		n := 0
		for ; n < most; n++ {
			if takeOne(sock) != nil {
				break // nothing is left; or if it was something else, arming tells again
			}
		}
		s.post(func(time.Time) {
			p.taking = false
			done(n)
		})
	}()
}

func takeOne(sock *activation.Socket) error {
	if !sock.Address().Network.Connections() {
		return sock.Discard()
	}
	if err := unix.SetNonblock(sock.FD(), true); err != nil {
		return err
	}
	fd, _, err := sock.Accept()
	if err == nil {
		closeFD(fd)
	}
	return err
}

// drop takes the first datagram away from each socket where that is one of ids.
func (s *Supervisor) drop(u *unit, ids []uint64) {
	for i := range u.ports {
		p := u.ports[i]
		if network := p.sock.Address().Network; network.Connections() || network == activation.FIFO {
			continue
		}
		first, err := s.looker.Queued(context.Background(), []uint32{p.key})
		if err == nil && (len(first) == 0 || !slices.Contains(ids, first[0])) {
			continue
		}
		if err == nil {
			err = p.sock.Discard()
		}
		if err != nil {
			s.log.Error("datagram not dropped", slog.String("service", u.spec.Name), slog.Any("err", err))
			continue
		}
		u.refused.Datagrams++
		s.log.Warn("datagram dropped: no process took it in three runs",
			slog.String("service", u.spec.Name), slog.String("address", p.sock.Address().String()))
	}
}

func closeFD(fd int) { _ = unix.Close(fd) } // close(2) releases it whatever it returns
