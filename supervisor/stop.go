package supervisor

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"hibergate/activation"
	"hibergate/activation/adopt"
)

// The actions of a stop: freezing, looking, and parking new connections meanwhile.

// allowParking prepares to park connections, or notes why not.
func (s *Supervisor) allowParking() {
	if s.global.NoParking {
		s.noParking = "off in the configuration"
		return
	}
	tcp := false
	for _, u := range s.units {
		tcp = tcp || u.parks()
	}
	if !tcp {
		return
	}
	give, err := activation.AllowParking()
	if err != nil {
		s.noParking = err.Error()
		s.log.Warn("connections are not parked while a service stops", slog.Any("err", err))
		return
	}
	s.unparked = give
}

// parks says whether a unit has sockets whose connections can be parked while it stops.
func (u *unit) parks() bool {
	if u.spec.Accept || u.door != nil {
		return false // we are the one who accepts
	}
	for i := range u.ports {
		if u.ports[i].sock.Spec().Address.Network == activation.TCP {
			return true
		}
	}
	return slices.ContainsFunc(u.spec.Learn, func(l Learn) bool {
		return l.Pattern == adopt.Auto || l.Pattern.Network == activation.TCP
	})
}

// parkPorts parks new connections where that is possible. It runs outside the loop, and returns why
// it was not possible, where it could have been.
func (s *Supervisor) parkPorts(u *unit, all ports) (why error) {
	if s.noParking != "" || u.spec.Accept {
		return nil
	}
	for _, p := range all {
		sock := p.sock
		if sock.Spec().Address.Network != activation.TCP {
			continue
		}
		if err := sock.Park(); err != nil {
			why = err
		}
	}
	return why
}

// stow parks new connections, and those that wait, before a process gets the sockets. It runs outside the loop, and returns why
// it was not possible.
func (s *Supervisor) stow(u *unit, all ports) (why error) {
	why = s.parkPorts(u, all)
	for _, p := range all {
		if p.parked() {
			why = errors.Join(why, p.sock.Stow())
		}
	}
	return why
}

// parkDone is to be called in the loop when parkPorts has returned.
func (s *Supervisor) parkDone(u *unit, why error) {
	u.parking = false
	before := u.noPark
	u.noPark = ""
	if why != nil {
		u.noPark = why.Error()
		if before == "" {
			s.log.Warn("connections are not parked while the service stops", slog.String("service", u.spec.Name), slog.Any("err", why))
		}
	}
	if !u.park {
		s.unpark(u) // it was given up meanwhile
	}
}

// unpark has new connections come to the sockets that the service has, at once, and then moves there those
// that came meanwhile, which takes the kernel some 10 ms.
func (s *Supervisor) unpark(u *unit) {
	var parked ports
	for i := range u.ports {
		sock := u.ports[i].sock
		if sock.Spec().Address.Network != activation.TCP || !sock.Parked() {
			continue
		}
		// One that was shut down could take nothing.
		revived, err := sock.Revive()
		if revived && err == nil {
			s.sayRevived(u, sock)
		}
		if err = errors.Join(err, sock.Readmit()); err != nil {
			s.log.Error("connections not unparked", slog.String("service", u.spec.Name), slog.String("address", sock.Address().String()), slog.Any("err", err))
		}
		parked = append(parked, u.ports[i])
	}
	if len(parked) == 0 {
		return
	}
	s.goDo(func() message {
		var failed error
		for _, p := range parked {
			s.waitForHandshakes(p.key)
			if err := p.sock.FinishUnpark(); err != nil {
				failed = errors.Join(failed, fmt.Errorf("%s: %w", p.sock.Address(), err))
			}
		}
		return func(now time.Time) {
			if failed == nil {
				return
			}
			s.log.Error("connections not unparked", slog.String("service", u.spec.Name), slog.Any("err", failed))
			s.after(now, unparkAgain, func(time.Time) {
				if !u.parking && !u.park {
					s.unpark(u)
				}
			})
		}
	}, nil)
}

// unparkAgain is when what could not be unparked is tried again.
const unparkAgain = time.Second

// handshakeTimeout is how long handshakes get that are under way before a parked socket is given
// up; see activation.Socket.Unpark. Those who wait on it have waited for the stop already.
const handshakeTimeout = 50 * time.Millisecond

func (s *Supervisor) waitForHandshakes(key uint32) {
	end := time.Now().Add(handshakeTimeout)
	begun := s.handshakes(key)
	for len(begun) > 0 && time.Now().Before(end) {
		wait(5 * time.Millisecond)
		begun = both(begun, s.handshakes(key))
	}
}

// handshakes lists those that are under way; where nobody can tell, none.
func (s *Supervisor) handshakes(key uint32) []uint64 {
	ids, err := s.looker.Handshakes(context.Background(), key)
	if err != nil {
		return nil
	}
	return ids
}

// both returns what is in a and in b.
func both(a, b []uint64) []uint64 {
	return slices.DeleteFunc(a, func(id uint64) bool { return !slices.Contains(b, id) })
}

// confirm parks new connections, freezes the service and looks at it.
func (s *Supervisor) confirm(u *unit) {
	u.park, u.parking = true, true
	u.reaching++
	t := u.target()
	s.goDo(func() message {
		why := s.parkPorts(u, t.ports)
		var ev confirmed
		if ev.err = t.tree.Freeze(context.Background()); ev.err == nil {
			ev.sums = s.look(context.Background(), t)[0]
		}
		return func(now time.Time) {
			s.parkDone(u, why)
			s.frozen(now, u, ev)
		}
	}, nil)
}

// freeze stops the service in memory.
func (s *Supervisor) freeze(u *unit) {
	u.reaching++
	tree := u.tree
	s.goDo(func() message {
		err := tree.Freeze(context.Background())
		return func(now time.Time) { s.frozen(now, u, frozen{err}) }
	}, nil)
}

// frozen tells the policy that a freeze is over, unless something ended meanwhile, which is told then.
func (s *Supervisor) frozen(now time.Time, u *unit, ev event) {
	if len(u.deferred) == 0 {
		u.reaching--
		s.step(now, u, ev)
		return
	}
	s.reached(now, u)
}

// reached tells what has ended while all processes of the unit were being frozen or killed.
func (s *Supervisor) reached(now time.Time, u *unit) {
	if u.reaching--; u.reaching > 0 {
		return
	}
	ended := u.deferred
	u.deferred = nil
	for _, tell := range ended {
		tell(now)
	}
}

const (
	// drainTimeout is how long a service that is to be stopped has to take the connections that are in its
	// queue, and to be done with them.
	drainTimeout = time.Second
	// What is left is looked at after the first of these, then after twice that, up to the second.
	minDrainPause, maxDrainPause = time.Millisecond, 20 * time.Millisecond
)

// drain parks new connections and gives the service a moment to take those that wait, also those whose handshake had
// begun, and to be done with those that are open. Where they cannot be parked there would be no end to it, so nobody is waited for.
func (s *Supervisor) drain(u *unit) {
	u.park, u.parking = true, true
	t := u.target()
	s.goDo(func() message {
		why := s.parkPorts(u, t.ports)
		begun := make([][]uint64, len(t.ports)) // by socket: handshakes that end in its own queue
		for i, p := range t.ports {
			if p.parked() {
				begun[i] = s.handshakes(p.key)
			}
		}
		end, pause := time.Now().Add(drainTimeout), minDrainPause
		for s.undrained(t, begun) && time.Now().Before(end) {
			wait(pause)
			pause = min(2*pause, maxDrainPause)
		}
		return func(now time.Time) {
			s.parkDone(u, why)
			if u.run == t.run {
				s.step(now, u, drained{})
			}
		}
	}, nil)
}

func (p *port) parked() bool {
	return p.sock.Spec().Address.Network == activation.TCP && p.sock.Parked()
}

// undrained says whether somebody waits on a parked socket of the service's, is about to, or has a connection with it.
func (s *Supervisor) undrained(t target, begun [][]uint64) bool {
	parked := false
	for i, p := range t.ports {
		if !p.parked() {
			continue
		}
		parked = true
		if len(begun[i]) > 0 {
			begun[i] = both(begun[i], s.handshakes(p.key))
		}
		if pending, err := p.sock.Pending(); err == nil && pending || len(begun[i]) > 0 {
			return true
		}
	}
	if !parked {
		return false
	}
	for i, sum := range s.look(context.Background(), t)[0] {
		if t.ports[i].parked() && sum.Known && sum.Open > 0 {
			return true
		}
	}
	return false
}

// command runs the stop command of the service.
func (s *Supervisor) command(u *unit) {
	if u.door != nil {
		s.stopDoor(u)
		return
	}
	run := u.run
	var env []string
	if len(u.procs) > 0 {
		env = []string{mainPID(u.procs[0].PID())}
	}
	limit := u.spec.Stop.Timeout
	s.goDo(func() message {
		ctx, cancel := context.WithTimeoutCause(context.Background(), limit, fmt.Errorf("still running after %s", limit))
		defer cancel()
		err := s.launcher.Run(ctx, u.spec, u.tree, u.spec.Stop.Command, env)
		return func(now time.Time) {
			if err != nil {
				s.log.Warn("stop command failed", slog.String("service", u.spec.Name), slog.Any("err", err))
			}
			if u.run == run {
				s.step(now, u, commandEnded{err})
			}
		}
	}, nil)
}

// readQueue asks what waits, and what the kernel says of the sockets.
func (s *Supervisor) readQueue(u *unit) {
	t := u.target()
	s.goDo(func() message {
		ev := queueRead{}
		if t.ports.waits() {
			ev.queued = s.queued(u.spec.Name, t.ports)
			ev.sums = s.look(context.Background(), t)[0]
		}
		return func(now time.Time) {
			if u.run == t.run {
				s.step(now, u, ev)
			}
		}
	}, nil)
}

// wait is for goroutines that have nothing else to do meanwhile, and not for long.
func wait(d time.Duration) { <-time.NewTimer(d).C }
