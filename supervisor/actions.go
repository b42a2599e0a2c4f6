package supervisor

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"hibergate/activation"
	"hibergate/supervisor/activity"
)

// do performs one action.
func (s *Supervisor) do(u *unit, a action) {
	switch a := a.(type) {
	case open:
		s.open(u)
	case arm:
		s.arm(u)
	case armOne:
		s.armPort(u, u.at(a.socket))
	case disarm:
		s.disarm(u)
	case launch:
		s.launch(u, a)
	case forget:
		s.forget(u)
	case serve:
		s.serve(u, a)
	case refuse:
		s.refuse(u, a.socket)
	case drop:
		s.drop(u, a.ids)
	case look:
		s.toLook = append(s.toLook, u)
	case readQueue:
		s.readQueue(u)
	case confirm:
		if u.door != nil {
			s.confirmDoor(u)
		} else {
			s.confirm(u)
		}
	case freeze:
		s.freeze(u)
	case thaw:
		if err := u.tree.Thaw(); err != nil {
			s.log.Error("service not thawed", slog.String("service", u.spec.Name), slog.Any("err", err))
		}
	case drain:
		if u.door != nil {
			s.drainDoor(u)
		} else {
			s.drain(u)
		}
	case unpark:
		u.park = false
		if !u.parking { // else parkDone does it
			s.unpark(u)
		}
	case command:
		s.command(u)
	case rouse:
		s.rouse(u, a)
	case giveUp:
		if u.door.giveUp != nil {
			u.door.giveUp()
		}
	case admit:
		s.admit(u)
	case shut:
		s.shutDoor(u)
	case cut:
		s.cutDoor(u)
	case signal:
		s.signal(u, a)
	case limited:
		u.refused.Pauses++
	case report:
		s.report(u, a)
	}
}

func (s *Supervisor) arm(u *unit) {
	if u.door != nil {
		s.armDoor(u)
		return
	}
	for _, p := range u.ports {
		s.armPort(u, p)
	}
}

func (s *Supervisor) armPort(u *unit, p *port) {
	p.gen++
	p.armed = true
	arm := s.watcher.Arm
	if u.screened() {
		arm = s.watcher.ArmEdge
	}
	if err := arm(p.sock.FD(), socketToken(u.index, p.slot, p.gen)); err != nil {
		p.armed = false
		s.post(func(now time.Time) { s.step(now, u, socketBroken{err}) }) // it is tried again after the backoff
	}
}

func (s *Supervisor) disarm(u *unit) {
	for _, p := range u.ports {
		if p.armed {
			p.armed = false
			if err := s.watcher.Disarm(p.sock.FD(), socketToken(u.index, p.slot, p.gen)); err != nil {
				s.log.Error("socket still watched", slog.String("service", u.spec.Name), slog.String("address", p.sock.Address().String()), slog.Any("err", err))
			}
		}
	}
}

// signal sends a signal. One that asks processes to end is followed by SIGCONT, as somebody may have
// stopped them (systemd.kill(5)).
func (s *Supervisor) signal(u *unit, a signal) {
	var err error
	switch {
	case a.whom == started:
		for _, p := range u.procs {
			err = errors.Join(err, p.Signal(a.signal))
			if a.signal != syscall.SIGKILL {
				err = errors.Join(err, p.Signal(syscall.SIGCONT))
			}
		}
	case a.signal == syscall.SIGKILL:
		s.kill(u)
	default:
		err = errors.Join(u.tree.Signal(a.signal), u.tree.Signal(syscall.SIGCONT))
	}
	if err != nil {
		s.log.Error("signal not sent", slog.String("service", u.spec.Name), slog.String("signal", a.signal.String()), slog.Any("err", err))
	}
}

// kill kills all processes of the unit. Without a cgroup it may take a while.
func (s *Supervisor) kill(u *unit) {
	u.reaching++
	tree := u.tree
	s.goDo(func() message {
		err := tree.Kill()
		return func(now time.Time) {
			if err != nil {
				s.log.Error("service not killed", slog.String("service", u.spec.Name), slog.Any("err", err))
			}
			s.reached(now, u)
		}
	}, nil)
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

// room says how many of the processes that somebody wants may be started; with 0, why not.
func (s *Supervisor) room(want int) (int, error) {
	if most := s.global.MaxProcesses; most > 0 {
		free := most - len(s.procs) - s.starting
		if free <= 0 {
			return 0, fmt.Errorf("max_processes: %d run", most)
		}
		want = min(want, free)
	}
	if most := s.global.MaxLoad; most > 0 {
		if load, err := loadAverage(); err == nil && load > most {
			return 0, fmt.Errorf("max_load: the load average is %.2f", load)
		}
	}
	return want, nil
}

func (s *Supervisor) launch(u *unit, a launch) {
	u.run++
	u.queue = a.queue
	u.beginRun()
	s.plant(u)
	u.park = a.hold
	if _, err := s.room(1); err != nil {
		s.post(func(now time.Time) { s.notLaunched(now, u, err, true) })
		return
	}
	s.starting++
	all := u.ports
	notify, err := s.beginNotify(u)
	if err != nil {
		s.starting--
		s.post(func(now time.Time) { s.notLaunched(now, u, err, lacksResources(err)) })
		return
	}
	u.parking = a.hold
	var p Process
	s.goDo(func() message {
		var ids []uint64
		var why error
		if a.queue {
			if ids = s.queued(u.spec.Name, all); len(ids) == 0 && all.waits() {
				ids = []uint64{unidentified}
			}
		}
		p, err = s.launcher.Launch(u.spec, u.tree, all.sockets(), notify)
		if a.hold && err == nil {
			why = s.stow(u, all) // the program, which gets its sockets only after this, has begun meanwhile
		}
		return func(now time.Time) {
			s.starting--
			if a.hold {
				s.parkDone(u, why)
			}
			if err != nil {
				s.endNotify(u)
				s.notLaunched(now, u, err, lacksResources(err))
				return
			}
			s.adopt(u, p, source{})
			s.step(now, u, launched{ids})
			s.attach(u, p)
			s.tellReadiness(now, u)
		}
	}, func() { abandon(p) })
}

// plant makes the tree of a unit at its first start.
func (s *Supervisor) plant(u *unit) {
	if u.tree == nil {
		u.tree = s.launcher.Tree(u.spec)
	}
}

func (s *Supervisor) notLaunched(now time.Time, u *unit, err error, pause bool) {
	if pause {
		u.refused.Pauses++
		s.pause(u)
	}
	s.step(now, u, launchFailed{err, pause})
}

func (s *Supervisor) serve(u *unit, a serve) {
	p := u.at(a.socket)
	s.plant(u)
	room, err := s.room(a.room)
	if err != nil && a.room > 0 {
		s.post(func(now time.Time) {
			u.refused.Pauses++
			s.pause(u)
			s.step(now, u, served{socket: a.socket, err: err, pause: true, held: p.held != nil})
		})
		return
	}
	s.starting += room
	order := serveOrder{held: p.held, room: room, refuse: a.refuse && room == a.room, sources: u.sources}
	p.held = nil
	var b batch
	s.goDo(func() message {
		b, err = s.launcher.Serve(u.spec, u.tree, p.sock, order)
		return func(now time.Time) {
			s.starting -= room
			p.held = b.held
			p.accepted += uint64(b.accepted)
			u.refused.add(&b.refused)
			for _, proc := range b.procs {
				s.adopt(u, proc.Process, proc.source)
			}
			if b.pause {
				u.refused.Pauses++
				s.pause(u)
			}
			s.step(now, u, served{socket: a.socket, started: len(b.procs), err: err, pause: b.pause, held: b.held != nil})
		}
	}, func() {
		for _, proc := range b.procs {
			abandon(proc.Process)
		}
	})
}

// loadAverage is that of the last minute; see proc_loadavg(5).
func loadAverage() (float64, error) {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return 0, err
	}
	first, _, _ := strings.Cut(string(b), " ")
	return strconv.ParseFloat(first, 64)
}

// abandon ends processes that were started when nobody was left to take charge of them.
func abandon(p Process) {
	if p != nil {
		_ = p.Signal(syscall.SIGKILL) // there is nobody left to tell, either
	}
}

// adopt takes charge of a process that was just started.
func (s *Supervisor) adopt(u *unit, p Process, who source) {
	s.lastToken++
	inst := &instance{Process: p, unit: u, token: s.lastToken | processToken, source: who}
	u.starts++
	u.procs = append(u.procs, inst)
	s.procs[inst.token] = inst
	if err := s.watcher.Arm(p.PIDFD(), inst.token); err != nil {
		s.log.Warn("process watched by a thread", slog.String("service", u.spec.Name), slog.Int("pid", p.PID()), slog.Any("err", err))
		s.goDo(func() message {
			waitReadable(p.PIDFD(), -1)
			return func(now time.Time) { s.reap(now, inst) }
		}, nil)
	}
}

// target is a unit that is looked at, as it was when the look was wanted.
type target struct {
	unit  *unit
	ports ports
	run   uint64
	tree  Tree // nil: nothing was ever started
	live  bool
}

func (u *unit) target() target {
	return target{unit: u, ports: u.ports, run: u.run, tree: u.tree, live: len(u.procs) > 0 || u.end != nil}
}

// look asks the kernel about all sockets of the targets in one pass. It runs
// outside the loop and returns the answers of each target.
func (s *Supervisor) look(ctx context.Context, targets ...target) [][]activity.Summary {
	var keys []uint32
	for _, t := range targets {
		if t.unit.door == nil {
			keys = append(keys, t.ports.keys()...)
		}
	}
	sums := s.looker.Look(ctx, time.Now(), keys)
	answers := make([][]activity.Summary, len(targets))
	for i, t := range targets {
		if d := t.unit.door; d != nil {
			answers[i] = d.sums(ctx, time.Now(), false)
			continue
		}
		n := len(t.ports)
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
	p := t.ports[socket]
	network := p.sock.Spec().Address.Network
	needed := network == activation.FIFO || network.Unix() && network.Connections()
	if !sum.Known || !t.live || !needed {
		return
	}
	pids, err := t.tree.PIDs()
	switch {
	case err != nil || len(pids) == 0:
	case network == activation.FIFO:
		sum.Peers, err = s.looker.Read(ctx, pids)
		sum.Peers *= 2*uint64(socket) + 1 // the same for each FIFO, and two would cancel out
	default:
		var held int
		if held, err = s.looker.Held(ctx, p.key, pids); held > sum.Open {
			sum.Open, sum.PayloadUnseen = held, true
		}
	}
	if err != nil {
		sum.Known, sum.Why = false, fmt.Sprintf("look into processes: %v", err)
	}
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
	if a.to == Backoff || a.to == Failed {
		level = slog.LevelWarn
		switch a.reason { //nolint:exhaustive // with the others nothing is wrong with the service
		case ReasonFailed, ReasonStartFailed, ReasonNothingRead, ReasonNotReady, ReasonLost:
			u.fails++
		case ReasonRate:
			u.refused.Pauses++
		}
	}
	if a.err != nil {
		attrs = append(attrs, slog.Any("err", a.err))
	}
	s.log.LogAttrs(context.Background(), level, "service changed state", attrs...)
}
