package supervisor

import (
	"log/slog"
	"slices"
	"time"

	"hibergate/supervisor/process"
)

// notifier hears whether a run is ready (ready.type = "notify"), from its start until it has said so or has ended.
type notifier struct {
	*process.Notify
	unit  *unit
	token uint64
}

// beginNotify makes the socket on which a run says that it is ready, and returns its address; empty where it is to say nothing.
func (s *Supervisor) beginNotify(u *unit) (address string, err error) {
	s.endNotify(u)
	if u.spec.Ready.Type != ReadyNotify {
		return "", nil
	}
	n, err := process.NewNotify()
	if err != nil {
		return "", err
	}
	s.lastToken++
	u.notify = &notifier{Notify: n, unit: u, token: s.lastToken | processToken}
	s.notifiers[u.notify.token] = u.notify
	if err := s.watcher.Arm(n.FD(), u.notify.token); err != nil {
		s.endNotify(u)
		return "", err
	}
	return n.Address(), nil
}

// endNotify hears no more of it.
func (s *Supervisor) endNotify(u *unit) {
	n := u.notify
	if n == nil {
		return
	}
	u.notify = nil
	delete(s.notifiers, n.token)
	err := s.watcher.Remove(n.FD())
	if e := n.Close(); err == nil {
		err = e
	}
	if err != nil {
		s.log.Error("notification socket not closed", slog.String("service", u.spec.Name), slog.Any("err", err))
	}
}

// notified reads what has come. Only processes of the service are believed; without a cgroup, to find them takes a while.
func (s *Supervisor) notified(n *notifier) {
	u, tree := n.unit, n.unit.tree
	said := slices.DeleteFunc(n.Receive(), func(m process.Notification) bool { return !m.Ready })
	listen := func(now time.Time, ready bool) {
		if u.notify != n {
			return // it has ended
		}
		if err := s.watcher.Arm(n.FD(), n.token); err != nil {
			s.log.Error("notification socket not watched", slog.String("service", u.spec.Name), slog.Any("err", err))
		}
		if ready {
			u.saidReady = true
			s.tellReadiness(now, u)
		}
	}
	if len(said) == 0 {
		listen(time.Now(), false)
		return
	}
	s.goDo(func() message {
		pids, err := tree.PIDs()
		ours := err == nil && slices.ContainsFunc(said, func(m process.Notification) bool { return slices.Contains(pids, m.PID) })
		return func(now time.Time) { listen(now, ours) }
	}, nil)
}
