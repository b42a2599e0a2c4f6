package supervisor

import (
	"log/slog"
	"slices"
	"time"

	"hibergate/activation"
)

// reap is told that a process that was started has ended.
func (s *Supervisor) reap(now time.Time, p *instance) {
	u := p.unit
	delete(s.procs, p.token)
	u.procs = slices.DeleteFunc(u.procs, func(q *instance) bool { return q == p })
	if err := s.watcher.Remove(p.PIDFD()); err != nil {
		s.log.Error("process left in the watcher", slog.String("service", u.spec.Name), slog.Any("err", err))
	}
	if u.spec.Accept && u.spec.Stop.KillMode != KillProcess {
		// Its connection ends with it. As long as it is not reaped its group is nobody else's.
		if err := p.KillGroup(); err != nil {
			s.log.Error("process group not killed", slog.String("service", u.spec.Name), slog.Int("pid", p.PID()), slog.Any("err", err))
		}
	}
	status, err := p.Reap()
	if err != nil {
		s.log.Error("process not reaped", slog.String("service", u.spec.Name), slog.Int("pid", p.PID()), slog.Any("err", err))
	}
	s.log.Debug("process ended", slog.String("service", u.spec.Name), slog.Int("pid", p.PID()), slog.String("status", status.String()))
	u.sources.release(p.source)
	left := len(u.procs) == 0 && u.spec.Stop.KillMode != KillProcess && s.left(u) // with KillProcess they are nobody's business
	if left && !u.spec.Accept {
		s.log.Info("first process ended, others of the service run on",
			slog.String("service", u.spec.Name), slog.Int("pid", p.PID()), slog.String("status", status.String()))
	}
	s.over(now, u, left, func(queued []uint64) event { return exited{status: status, queued: queued, left: left} })
	s.resume(now)
}

// over tells a policy that a process has ended. Where it was the last one, what it may have left on the
// sockets is undone, and the policy hears what waits on them.
func (s *Supervisor) over(now time.Time, u *unit, left bool, ev func(queued []uint64) event) {
	if u.reaching > 0 {
		u.deferred = append(u.deferred, func(now time.Time) { s.over(now, u, left, ev) })
		return
	}
	if !left && len(u.procs) == 0 {
		s.endNotify(u)
		if err := u.tree.Rest(); err != nil {
			s.log.Error("cgroup kept open", slog.String("service", u.spec.Name), slog.Any("err", err))
		}
	}
	if u.spec.Accept || left {
		s.step(now, u, ev(nil))
		return
	}
	s.restore(u)
	switch {
	case !u.ports.waits():
		s.step(now, u, ev(nil))
	case !u.queue:
		s.step(now, u, ev([]uint64{unidentified}))
	default:
		all := u.ports
		s.goDo(func() message {
			ids := s.queued(u.spec.Name, all)
			if len(ids) == 0 {
				ids = []uint64{unidentified} // for something does wait
			}
			return func(now time.Time) { s.step(now, u, ev(ids)) }
		}, nil)
	}
}

// left says whether processes of the unit live, and if so waits for their end. What cannot be found out
// counts as living, and is asked again.
func (s *Supervisor) left(u *unit) bool {
	if u.end != nil {
		return true
	}
	left, err := s.watchEnd(u)
	if err != nil {
		s.log.Error("descendants not found", slog.String("service", u.spec.Name), slog.Any("err", err))
		s.lastToken++
		u.end = &treeEnd{unit: u, fd: -1, token: s.lastToken | processToken}
		s.ends[u.end.token] = u.end
		e := u.end
		s.after(time.Now(), leftAgain, func(now time.Time) {
			if u.end == e {
				s.treeChanged(now, e)
			}
		})
		return true
	}
	return left
}

// leftAgain is when it is asked again whether somebody is left, where that could not be found out.
const leftAgain = time.Second

// watchEnd is left without the error.
func (s *Supervisor) watchEnd(u *unit) (left bool, err error) {
	empty, err := u.tree.Empty()
	if err != nil || empty {
		return false, err
	}
	fd, err := u.tree.Ended()
	if err != nil {
		return false, err
	}
	// Now that their end would be noticed: is it not over already?
	if empty, err = u.tree.Empty(); err != nil || empty {
		closeFD(fd)
		return false, err
	}
	s.lastToken++
	token := s.lastToken | processToken
	if err := s.watcher.Arm(fd, token); err != nil {
		closeFD(fd)
		return false, err
	}
	u.end = &treeEnd{unit: u, fd: fd, token: token}
	s.ends[token] = u.end
	return true, nil
}

// forgetEnd gives up the wait for the last process of a unit.
func (s *Supervisor) forgetEnd(e *treeEnd) error {
	delete(s.ends, e.token)
	e.unit.end = nil
	if e.fd < 0 {
		return nil
	}
	err := s.watcher.Remove(e.fd)
	closeFD(e.fd)
	return err
}

// treePause keeps processes that follow one another quickly from taking up the loop. It doubles up to maxTreePause, as
// long as somebody is left each time.
const treePause, maxTreePause = 20 * time.Millisecond, time.Second

// treeChanged is told that processes of a unit have ended, maybe the last one.
func (s *Supervisor) treeChanged(now time.Time, e *treeEnd) {
	u := e.unit
	if err := s.forgetEnd(e); err != nil {
		s.log.Error("process tree left in the watcher", slog.String("service", u.spec.Name), slog.Any("err", err))
	}
	if empty, err := u.tree.Empty(); err == nil && empty {
		s.emptied(now, u)
		return
	}
	u.scans++
	s.after(now, growing(treePause, maxTreePause, u.scans-1), func(now time.Time) {
		if len(u.procs) == 0 && u.end == nil && !s.left(u) {
			s.emptied(now, u)
		}
	})
}

func (s *Supervisor) emptied(now time.Time, u *unit) {
	u.scans = 0
	if len(u.procs) > 0 {
		return // it was started again
	}
	s.over(now, u, false, func(queued []uint64) event { return emptied{queued} })
	s.resume(now)
}

// resume lets the unit go on that has waited longest for a process to end.
func (s *Supervisor) resume(now time.Time) {
	for len(s.paused) > 0 {
		u := s.paused[0]
		s.paused, u.paused = s.paused[1:], false
		if life := u.policy.life(); life.state == Backoff && life.reason == ReasonResources {
			s.step(now, u, resourcesFreed{})
			return
		}
	}
}

// pause has a unit go on when a process has ended.
func (s *Supervisor) pause(u *unit) {
	if !u.paused {
		u.paused = true
		s.paused = append(s.paused, u)
	}
}

// restore undoes what a process, or somebody else, may have left on the sockets of a unit that no process of it has.
func (s *Supervisor) restore(u *unit) {
	for _, p := range u.ports {
		s.restorePort(u, p)
	}
}

func (s *Supervisor) restorePort(u *unit, p *port) {
	var repaired string
	var err error
	if p.sock.Address().Network != activation.TCP {
		err = s.watcher.Remove(p.sock.FD()) // Restore may put another socket under the same descriptor
	}
	if err == nil {
		repaired, err = p.sock.Restore()
	}
	if p.armed {
		s.armPort(u, p)
	}
	if repaired != "" {
		s.log.Warn("socket restored", slog.String("service", u.spec.Name), slog.String("address", p.sock.Address().String()), slog.String("why", repaired))
	}
	if err == nil {
		p.failed, p.restores = nil, 0
		return
	}
	if p.failed == nil { // once, not at each try
		s.log.Error("socket not restored", slog.String("service", u.spec.Name), slog.String("address", p.sock.Address().String()), slog.Any("err", err))
	}
	p.failed = err
	s.after(time.Now(), growing(minRestoreAgain, maxWait, p.restores), func(time.Time) {
		if p.failed != nil && u.asleep() && u.at(p.slot) == p {
			s.restorePort(u, p)
		}
	})
	p.restores++
}

// minRestoreAgain is when a socket that could not be restored is tried again; it doubles.
const minRestoreAgain = time.Second

// asleep says whether the sockets are ours alone: no process is there, or about to be.
func (u *unit) asleep() bool {
	state := u.policy.life().state
	return len(u.procs) == 0 && u.end == nil && (state == Listening || state == Backoff || state == Failed)
}

// restorable says whether sockets may be replaced: a gate may be watching its own unless it sleeps.
func (u *unit) restorable() bool {
	return u.asleep() && (u.door == nil || !u.door.working && u.policy.life().state == Listening)
}
