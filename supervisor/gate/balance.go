package gate

import (
	"fmt"
	"log/slog"
	"time"

	"golang.org/x/sys/unix"
)

// target is one address that the relay may connect to, and how it is doing. It is guarded by the lock of streams.
type target struct {
	Target // FD is -1 once the connection in it is used
	name   []byte
	family int

	open     int           // pairs that have it, or are being connected to it
	shunned  int64         // not to be tried before that, if there is another
	interval time.Duration // how long it is shunned; 0: it has not refused
}

// maxTargets is how many targets an admission uses at most: a pair has a bit for each that it has tried.
const maxTargets = 64

// How long a target that refuses is shunned: at first, and at most.
const (
	firstShun = time.Second
	lastShun  = 30 * time.Second
)

// closeSpares closes the connections that come with targets.
func closeSpares(targets []Target) {
	for _, t := range targets {
		if t.FD >= 0 {
			closeFD(int32(t.FD))
		}
	}
}

// closeSpare closes the connection that nobody has used.
func (t *target) closeSpare() {
	if t.FD >= 0 {
		closeFD(int32(t.FD))
		t.FD = -1
	}
}

// closeSpares closes the connections of all targets that nobody has used. It is called with the lock held.
func (s *streams) closeSpares() {
	s.spare = false
	for _, t := range s.targets {
		t.closeSpare()
	}
}

// dropSpares closes what came with the targets where nobody is left who could use it: the one who was waited for may have left, or
// has got another destination. It is called with the lock held, by the porter.
func (s *streams) dropSpares(porter *loop) {
	if !s.spare || s.mode != admitting || porter.lists[stageWaiting].first != nil {
		return
	}
	for _, src := range s.sources {
		if pending, err := src.socket.Pending(); pending && err == nil {
			return
		}
	}
	s.closeSpares()
}

// takeSpare returns the connection that came with the target; -1 where there is none, or where the other end has closed it.
func (t *target) takeSpare() int32 {
	fd := int32(t.FD)
	if fd < 0 {
		return -1
	}
	t.FD = -1
	var b [1]byte
	if n, e := recv(fd, b[:], unix.MSG_PEEK); e != unix.EAGAIN && (e != 0 || n == 0) {
		closeFD(fd)
		return -1
	}
	return fd
}

// aim takes the targets of a new admission. One that was there before is known again, with its open connections. It is
// called with the lock held; after an error there are no targets.
func (s *streams) aim(targets []Target) error {
	before := s.targets
	for _, t := range before {
		t.closeSpare()
	}
	s.targets, s.next = nil, 0
	if len(targets) > maxTargets {
		closeSpares(targets[maxTargets:])
		targets = targets[:maxTargets]
	}
	for i, t := range targets {
		name, family, err := sockaddr(t.Address)
		if t.Index < 0 || t.Index >= len(s.spec.Destinations) {
			err = unix.EINVAL
		}
		if err != nil {
			closeSpares(targets[i:])
			for _, t := range s.targets {
				t.closeSpare()
			}
			s.targets = nil
			return fmt.Errorf("connect to %s: destination %d: %w", t.Address, t.Index, err)
		}
		if t.FD >= 0 {
			s.spare = true
			_ = unix.SetNonblock(t.FD, true) // a descriptor that is bad shows when it is used
		}
		now := &target{Target: t, name: name, family: family}
		for _, old := range before {
			if old.Index == t.Index && old.Address == t.Address {
				now = old
				now.FD, now.shunned, now.interval = t.FD, 0, 0
			}
		}
		s.targets = append(s.targets, now)
	}
	return nil
}

// pick chooses the target that a pair tries next, and returns its number; -1 where it has tried all. Those that are
// shunned come last. It is called with the lock held.
func (s *streams) pick(p *pair) int {
	best, now := -1, s.clock()
	for i := range s.targets {
		i = (s.next + i) % len(s.targets)
		if p.tried&(1<<i) == 0 && (best < 0 || s.better(s.targets[i], s.targets[best], now)) {
			best = i
		}
	}
	if best >= 0 {
		s.next = best + 1
	}
	return best
}

// better says whether a target is to be tried rather than another whose turn is before.
func (s *streams) better(t, than *target, now int64) bool {
	if shunned := t.shunned > now; shunned != (than.shunned > now) {
		return !shunned
	}
	return s.spec.Balance == LeastConnections && t.open < than.open
}

// shun notes that a target has refused a connection. It is called with the lock held.
func (s *streams) shun(t *target, err error) {
	now := s.clock()
	if t.shunned > now {
		return // connections that began together fail together
	}
	if t.interval == 0 && len(s.targets) > 1 {
		s.hooks.log.Warn("destination refuses connections", slog.String("destination", t.Address.String()), slog.Any("err", err))
	}
	t.interval = min(max(firstShun, 2*t.interval), lastShun)
	t.shunned = now + int64(t.interval)
}

// trust notes that a target has taken a connection. It is called with the lock held.
func (t *target) trust() { t.shunned, t.interval = 0, 0 }
