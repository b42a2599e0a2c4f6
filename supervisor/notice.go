package supervisor

import (
	"errors"
	"log/slog"
	"time"

	"hibergate/activation"
)

// notice turns a report of the watcher into an event.
func (s *Supervisor) notice(now time.Time, r activation.Ready) {
	if r.Token == addressToken {
		s.addressAppeared(now)
		return
	}
	if r.Token&processToken != 0 {
		if p := s.procs[r.Token]; p != nil {
			s.reap(now, p)
		} else if e := s.ends[r.Token]; e != nil {
			s.treeChanged(now, e)
		}
		return
	}
	index, slot, gen := splitToken(r.Token)
	u := s.units[index]
	p := u.at(slot)
	if p == nil || !p.armed || p.gen != gen {
		return // disarmed, or given up, while the report was on its way
	}
	if state := u.policy.life().state; u.screened() && !r.Hangup && (state == Listening || state == Frozen) {
		p.screens = 0
		p.looks++
		s.screen(u, p)
		return
	}
	if u.screened() { // it was armed for more than one report
		if err := s.watcher.Disarm(p.sock.FD(), r.Token); err != nil {
			s.log.Error("socket still watched", slog.String("service", u.spec.Name), slog.Any("err", err))
		}
	}
	p.armed = false
	if !r.Hangup {
		p.hangups = 0
		s.step(now, u, socketReady{slot})
		return
	}
	// If it is sound again and something waits, arming it says so.
	err := s.revive(u, p.sock)
	if p.hangups++; err == nil && p.hangups > maxHangups {
		err = errHungUp
	}
	if err != nil {
		p.hangups = 0
		s.step(now, u, socketBroken{err})
		return
	}
	s.armPort(u, p)
}

// maxHangups is how many hang-ups in a row, with nothing to read between them, a socket may
// report that is found to be sound.
const maxHangups = 3

var errHungUp = errors.New("the socket reports a hang-up again and again")

// revive makes a socket listen again that a process has shut down.
func (s *Supervisor) revive(u *unit, sock *activation.Socket) error {
	// Revive may put another socket under the same descriptor.
	if err := s.watcher.Remove(sock.FD()); err != nil {
		return err
	}
	revived, err := sock.Revive()
	if revived && err == nil {
		s.sayRevived(u, sock)
	}
	return err
}

func (s *Supervisor) sayRevived(u *unit, sock *activation.Socket) {
	s.log.Warn("listening socket revived: a process had shut it down",
		slog.String("service", u.spec.Name), slog.String("address", sock.Address().String()))
}
