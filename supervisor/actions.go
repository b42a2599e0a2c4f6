package supervisor

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation"
	"hibergate/supervisor/activity"
)

// do performs one action.
func (s *Supervisor) do(u *unit, a action) {
	switch a := a.(type) {
	case arm:
		s.arm(u)
	case armOne:
		s.armPort(u, a.socket)
	case disarm:
		s.disarm(u)
	case launch:
		s.launch(u, a.queue)
	case serve:
		s.serve(u, a.socket)
	case look:
		s.toLook = append(s.toLook, u)
	case confirm:
		s.confirm(u)
	case thaw:
		s.each(u, "thaw", Process.Thaw)
	case signal:
		s.each(u, "signal", func(p Process) error { return p.Signal(a.signal) })
	case report:
		s.report(u, a)
	}
}

func (s *Supervisor) arm(u *unit) {
	for i := range u.ports {
		s.armPort(u, i)
	}
}

func (s *Supervisor) armPort(u *unit, i int) {
	p := &u.ports[i]
	p.gen++
	p.armed = true
	if err := s.watcher.Arm(p.sock.FD(), socketToken(u.index, i, p.gen)); err != nil {
		p.armed = false
		s.post(func(now time.Time) { s.step(now, u, socketBroken{err}) }) // it is tried again after the backoff
	}
}

func (s *Supervisor) disarm(u *unit) {
	for i := range u.ports {
		if p := &u.ports[i]; p.armed {
			p.armed = false
			if err := s.watcher.Disarm(p.sock.FD(), socketToken(u.index, i, p.gen)); err != nil {
				s.log.Error("socket still watched", slog.String("service", u.spec.Name), slog.String("address", p.sock.Address().String()), slog.Any("err", err))
			}
		}
	}
}

// each does something to every process of the unit.
func (s *Supervisor) each(u *unit, what string, f func(Process) error) {
	for _, p := range u.procs {
		if err := f(p); err != nil {
			s.log.Error("process not reached", slog.String("service", u.spec.Name), slog.String("action", what), slog.Int("pid", p.PID()), slog.Any("err", err))
		}
	}
}

// goDo runs work outside the loop; what it returns is run by the loop, or undo where the
// loop has ended meanwhile (nil: there is nothing to undo). The work comes
// first: it is what a client waits for, and here its caches are warm.
func (s *Supervisor) goDo(work func() message, undo func()) {
	s.inFlight++
	go func() {
		result := work()
		posted := s.post(func(now time.Time) {
			s.inFlight--
			result(now)
		})
		if !posted && undo != nil {
			undo()
		}
	}()
	runtime.Gosched()
}

func (s *Supervisor) launch(u *unit, queue bool) {
	u.run++
	var p Process
	var err error
	s.goDo(func() message {
		var ids []uint64
		if queue {
			if ids = s.queued(u); len(ids) == 0 && s.waits(u) {
				ids = []uint64{unidentified}
			}
		}
		p, err = s.launcher.Launch(u.spec, u.sockets())
		return func(now time.Time) {
			if err != nil {
				u.fails++
				s.step(now, u, launchFailed{err})
				return
			}
			s.adopt(u, p, queue)
			s.step(now, u, launched{ids})
		}
	}, func() { abandon(p) })
}

func (s *Supervisor) serve(u *unit, socket int) {
	p := &u.ports[socket]
	held := p.held
	p.held = nil
	var b batch
	var err error
	s.goDo(func() message {
		b, err = s.launcher.Serve(u.spec, p.sock, held)
		return func(now time.Time) {
			p.held = b.held
			p.accepted += uint64(b.accepted)
			for _, proc := range b.procs {
				s.adopt(u, proc, false)
			}
			if err != nil {
				u.fails++
			}
			s.step(now, u, served{socket: socket, started: len(b.procs), err: err, pause: b.pause})
		}
	}, func() { abandon(b.procs...) })
}

// abandon ends processes that were started when nobody was left to take charge of them.
func abandon(procs ...Process) {
	for _, p := range procs {
		if p != nil {
			_ = p.Signal(syscall.SIGKILL) // there is nobody left to tell, either
		}
	}
}

// adopt takes charge of a process that was just started.
func (s *Supervisor) adopt(u *unit, p Process, queue bool) {
	s.lastToken++
	inst := &instance{Process: p, unit: u, token: s.lastToken | processToken, queue: queue}
	u.starts++
	u.procs = append(u.procs, inst)
	s.procs[inst.token] = inst
	if err := s.watcher.Arm(p.PIDFD(), inst.token); err != nil {
		s.log.Warn("process watched by a thread", slog.String("service", u.spec.Name), slog.Int("pid", p.PID()), slog.Any("err", err))
		s.goDo(func() message {
			waitReadable(p.PIDFD())
			return func(now time.Time) { s.reap(now, inst) }
		}, nil)
	}
}

// waitReadable blocks until a descriptor is readable.
func waitReadable(fd int) {
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1)
		if n > 0 || err != nil && !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

// target is a unit that is looked at, as it was when the look was wanted.
type target struct {
	unit *unit
	run  uint64
	pids []int
}

func (u *unit) target() target {
	t := target{unit: u, run: u.run}
	for _, p := range u.procs {
		t.pids = append(t.pids, p.PID())
	}
	return t
}

// look asks the kernel about all sockets of the targets in one pass. It runs
// outside the loop and returns the answers of each target.
func (s *Supervisor) look(ctx context.Context, targets ...target) [][]activity.Summary {
	var keys []uint32
	for _, t := range targets {
		keys = append(keys, t.unit.keys()...)
	}
	sums := s.looker.Look(ctx, time.Now(), keys)
	answers := make([][]activity.Summary, len(targets))
	for i, t := range targets {
		n := len(t.unit.ports)
		answers[i], sums = sums[:n], sums[n:]
		for j := range answers[i] {
			s.lookIntoProcesses(ctx, t, j, &answers[i][j])
		}
	}
	return answers
}

// lookIntoProcesses finds what only the processes of a service can tell: Unix connections
// that sock_diag does not show, as their clients are in another network namespace
// (containers), and whether anything was read from a FIFO.
func (s *Supervisor) lookIntoProcesses(ctx context.Context, t target, socket int, sum *activity.Summary) {
	p := &t.unit.ports[socket]
	network := p.sock.Address().Network
	var err error
	switch {
	case !sum.Known || len(t.pids) == 0:
	case network == activation.FIFO:
		sum.Peers, err = s.looker.Read(ctx, t.pids)
		sum.Peers *= 2*uint64(socket) + 1 // the same for each FIFO, and two would cancel out
	case network.Unix() && network.Connections():
		var held int
		if held, err = s.looker.Held(ctx, p.key, t.pids); held > sum.Open {
			sum.Open, sum.PayloadUnseen = held, true
		}
	}
	if err != nil {
		sum.Known, sum.Why = false, fmt.Sprintf("look into processes: %v", err)
	}
}

// confirm freezes the process and looks at it.
func (s *Supervisor) confirm(u *unit) {
	if len(u.procs) == 0 {
		return // it has just ended, and exited is on its way
	}
	t, proc := u.target(), u.procs[0].Process
	s.goDo(func() message {
		var sums []activity.Summary
		err := proc.Freeze(context.Background())
		if err == nil {
			sums = s.look(context.Background(), t)[0]
		}
		return func(now time.Time) {
			if u.run == t.run {
				s.step(now, u, confirmed{sums: sums, err: err})
			}
		}
	}, nil)
}

// startLook looks at all that want it, in one pass.
func (s *Supervisor) startLook() {
	if s.looking || len(s.toLook) == 0 {
		return
	}
	var targets []target
	for _, u := range s.toLook {
		targets = append(targets, u.target())
	}
	s.toLook, s.looking = nil, true
	s.goDo(func() message {
		answers := s.look(context.Background(), targets...)
		return func(now time.Time) {
			s.looking = false
			for i, t := range targets {
				if t.unit.run == t.run {
					s.step(now, t.unit, looked{answers[i]})
				}
			}
		}
	}, nil)
}

func (s *Supervisor) report(u *unit, a report) {
	level := slog.LevelInfo
	attrs := []slog.Attr{
		slog.String("service", u.spec.Name),
		slog.String("from", a.from.String()), slog.String("to", a.to.String()), slog.String("reason", string(a.reason)),
	}
	if len(u.procs) > 0 {
		attrs = append(attrs, slog.Int("pid", u.procs[len(u.procs)-1].PID()))
	}
	if a.to == Backoff {
		level = slog.LevelWarn
	}
	if a.err != nil {
		attrs = append(attrs, slog.Any("err", a.err))
	}
	s.log.LogAttrs(context.Background(), level, "service changed state", attrs...)
}
