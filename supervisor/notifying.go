package supervisor

import (
	"log/slog"
	"os"
	"slices"
	"time"

	"hibergate/supervisor/process"
)

// beginNotify makes the socket on which a run says that it is ready (ready.type = "notify"), and returns its address; empty where it is to
// say nothing. A goroutine listens to it until endNotify: what comes over it can take any time to be got rid of.
func (s *Supervisor) beginNotify(u *unit) (address string, err error) {
	s.endNotify(u)
	if u.spec.Ready.Type != ReadyNotify {
		return "", nil
	}
	n, err := process.NewNotify()
	if err != nil {
		return "", err
	}
	u.notify = n
	run, tree := u.run, u.tree
	go func() {
		ready := false
		for {
			m, ok := n.Receive()
			if !ok {
				break
			}
			if m.Ready && !ready && s.believes(tree, m) {
				ready = true
				s.post(func(now time.Time) {
					if u.run == run {
						u.saidReady = true
						s.tellReadiness(now, u)
					}
				})
			}
			m.Release()
		}
		if err := n.Close(); err != nil {
			s.log.Error("notification socket not closed", slog.String("service", u.spec.Name), slog.Any("err", err))
		}
	}()
	return n.Address(), nil
}

// endNotify hears no more of the run.
func (s *Supervisor) endNotify(u *unit) {
	if u.notify != nil {
		u.notify.Stop()
		u.notify = nil
	}
}

// believePause is how long nobody is listened to who says what is not for him to say.
const believePause = 10 * time.Millisecond

// believes says whether a message comes from a process of the service. A process that has ended since is not known any more, unless it
// waits for the answer, as systemd-notify(1) does.
func (s *Supervisor) believes(tree Tree, m process.Notification) bool {
	pids, err := tree.PIDs()
	if err == nil && slices.Contains(pids, m.PID) {
		return true
	}
	if m.UID != os.Geteuid() {
		wait(believePause)
	}
	return false
}
