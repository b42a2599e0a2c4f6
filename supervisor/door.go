package supervisor

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"hibergate/activation"
	"hibergate/supervisor/activity"
	"hibergate/supervisor/gate"
)

// door is what a unit with handoff = "gate" has in the place of a process. It is owned by Supervisor.Run, but for what
// work reads that goes on outside.
type door struct {
	gate    *gate.Gate
	spec    *gate.Spec
	sockets []*activation.Socket
	traffic bool // idle.when = "no-traffic"
	tables  *tables
	ways    []bypass                         // by which the kernel may lead past the gate, the best first; not changed
	way     atomic.Pointer[bypass]           // that was begun last; nil: none was ever
	led     atomic.Pointer[[]netip.AddrPort] // the destinations by TCP, as they were last admitted to; nil: never

	targets  []gate.Target      // as they were last found ready
	giveUp   context.CancelFunc // ends what rouse, command or the first probe waits for; nil: nothing does
	checks   uint64             // counts admissions after which the destination is asked now and then whether it is there
	endCheck context.CancelFunc // ends the last of these questions; nil: there was none
	launch   *launching         // the last launch command, which may still run; nil: none
	stopped  bool               // the stop command has ended well, and nobody has launched it since, as far as we know
	lacks    string             // in Starting: why it is not ready yet
	relayed  string             // forward = "kernel": why the kernel did not, when the gate was last opened; empty: it did
	work     []func() message   // not begun yet, in order
	working  bool
}

// newDoor makes the gate of a unit. It costs nothing before the first client.
func (s *Supervisor) newDoor(u *unit) *door {
	d := &door{
		spec: u.spec.Gate, sockets: u.ports.sockets(), traffic: u.spec.Idle.When == activity.NoTraffic,
		tables: s.tables, ways: s.bypasses(u.spec, u.ports),
	}
	hooks := gate.Hooks{
		Logger: s.log.With(slog.String("service", u.spec.Name)),
		Lost: func(err error, served bool) {
			s.post(func(now time.Time) { s.step(now, u, lost{err: err, served: served}) })
		},
		Waits: func() {
			s.post(func(time.Time) {
				if u.mayArm() {
					s.armDoor(u)
				}
			})
		},
	}
	if len(u.spec.Wake.Ignore) > 0 {
		hooks.Ignore = func(from netip.Addr) bool { return u.spec.Wake.ignores(from) }
	}
	d.gate = gate.New(d.spec, d.sockets, hooks)
	return d
}

// inOrder runs work of a door outside the loop: one after another, as it was asked for.
func (s *Supervisor) inOrder(u *unit, work func() message) {
	d := u.door
	d.work = append(d.work, work)
	if !d.working {
		d.working = true
		s.nextWork(u)
	}
}

func (s *Supervisor) nextWork(u *unit) {
	d := u.door
	work := d.work[0]
	d.work = d.work[1:]
	s.goDo(func() message {
		done := work()
		return func(now time.Time) {
			// What done asks for comes after what was asked for before.
			if done != nil {
				done(now)
			}
			if len(d.work) > 0 {
				s.nextWork(u)
			} else {
				d.working, d.work = false, nil
			}
		}
	}, nil)
}

// admit opens the gate.
func (s *Supervisor) admit(u *unit) {
	d := u.door
	targets := d.targets
	d.targets = spent(targets)
	s.inOrder(u, func() message {
		err := d.gate.Admit(targets)
		way, why := d.beginBypass(targets)
		return func(now time.Time) {
			if err != nil {
				pause := lacksResources(err)
				if pause {
					u.refused.Pauses++
					s.pause(u)
				}
				s.step(now, u, lost{err: fmt.Errorf("open the gate: %w", err), pause: pause})
				return
			}
			before := d.relayed
			d.relayed = ""
			if why != nil {
				if d.relayed = why.Error(); d.relayed != before {
					s.log.Warn("connections are relayed, not led by the kernel", slog.String("service", u.spec.Name), slog.Any("err", why))
				}
			}
			if _, unseen := way.(*translation); unseen {
				d.checks++
				s.checkLater(now, u, d.checks)
			}
		}
	})
}

// spent returns targets as they are after their connections were used.
func spent(targets []gate.Target) []gate.Target {
	after := make([]gate.Target, len(targets))
	for i, t := range targets {
		t.FD = -1
		after[i] = t
	}
	return after
}

// beginBypass has the kernel lead new connections to the destination, if it is to. It returns the way, or why there is none.
func (d *door) beginBypass(targets []gate.Target) (bypass, error) {
	var led []netip.AddrPort
	for _, t := range targets {
		if t.Address.Network == activation.TCP {
			led = append(led, netip.AddrPortFrom(t.Address.IP, t.Address.Port))
		}
	}
	if len(led) == 0 {
		return nil, nil //nolint:nilnil // it is not to
	}
	d.led.Store(&led)
	var failed error
	for i, way := range d.ways {
		err := way.begin(led[0])
		if err == nil {
			d.way.Store(&d.ways[i])
			return way, nil
		}
		failed = errors.Join(failed, fmt.Errorf("%s: %w", way, err))
	}
	return nil, failed
}

// endBypass has new connections come to the sockets again.
func (d *door) endBypass() error {
	if way := d.way.Load(); way != nil {
		return (*way).end()
	}
	return nil
}

// shut lets nobody through any more. It runs outside the loop.
func (d *door) shut() error {
	err := d.endBypass()
	d.gate.Shut()
	return err
}

// shutDoor shuts the gate.
func (s *Supervisor) shutDoor(u *unit) {
	d := u.door
	s.inOrder(u, func() message {
		err := d.shut()
		return func(time.Time) { s.sayShut(u, err) }
	})
}

// armDoor arms the sockets of a gate once it is shut. Who was accepted before waits on none of them, and is told the
// same as those who do.
func (s *Supervisor) armDoor(u *unit) {
	d := u.door
	failed := u.policy.life().state == Failed
	s.inOrder(u, func() message {
		dismissed := 0
		if failed {
			dismissed = d.gate.Dismiss()
		}
		return func(now time.Time) {
			u.refused.Failed += uint64(dismissed)
			if !u.mayArm() {
				return // not any more
			}
			for _, p := range u.ports {
				s.armPort(u, p)
			}
			if d.gate.Waiting() {
				s.step(now, u, socketReady{u.ports[0].slot})
			}
		}
	})
}

// mayArm says whether a gate wants to know of its next client.
func (u *unit) mayArm() bool {
	state := u.policy.life().state
	return state == Listening || state == Failed && u.spec.Restart.OnFailure == Reject
}

func (s *Supervisor) sayShut(u *unit, err error) {
	if err != nil {
		s.log.Error("the kernel may still forward", slog.String("service", u.spec.Name), slog.Any("err", err))
	}
}

// cutDoor ends all connections, and whatever the door waits for.
func (s *Supervisor) cutDoor(u *unit) {
	d := u.door
	for _, end := range []context.CancelFunc{d.giveUp, d.endCheck} {
		if end != nil {
			end()
		}
	}
	launch := d.launch
	d.launch = nil
	s.inOrder(u, func() message {
		err := d.endBypass()
		d.gate.Close()
		launch.end()
		return func(time.Time) { s.sayShut(u, err) }
	})
}

// confirmDoor looks at a gate that is shut.
func (s *Supervisor) confirmDoor(u *unit) {
	d := u.door
	s.inOrder(u, func() message {
		ev := confirmed{err: d.shut()}
		ev.sums = d.sums(context.Background(), time.Now(), true)
		return func(now time.Time) { s.step(now, u, ev) }
	})
}

// drainDoor shuts the gate and gives those who are inside a moment to come to an end.
func (s *Supervisor) drainDoor(u *unit) {
	d := u.door
	s.inOrder(u, func() message {
		err := d.shut()
		end, pause := time.Now().Add(drainTimeout), minDrainPause
		for d.open() && time.Now().Before(end) {
			wait(pause)
			pause = min(2*pause, maxDrainPause)
		}
		return func(now time.Time) {
			s.sayShut(u, err)
			s.step(now, u, drained{})
		}
	})
}

// open says whether connections go through the gate, or past it through the kernel.
func (d *door) open() bool {
	for _, sum := range d.sums(context.Background(), time.Now(), false) {
		if sum.Open > 0 {
			return true
		}
	}
	return false
}

// sums is the account of each socket. It runs outside the loop. last is as in bypass.account.
func (d *door) sums(ctx context.Context, now time.Time, last bool) []activity.Summary {
	sums := d.gate.Sums(now)
	if way := d.way.Load(); way != nil {
		(*way).account(ctx, sums, last)
	}
	if led := d.led.Load(); led != nil && d.spec.WatchDestination {
		d.tables.watchDestinations(ctx, *led, sums, d.traffic)
	}
	return sums
}

// sever ends what the kernel led to a destination that was stopped without waiting for it.
func (d *door) sever(ctx context.Context) error {
	if way := d.way.Load(); way != nil {
		return (*way).sever(ctx)
	}
	return nil
}

// checkLater asks now and then whether a destination is there that the kernel forwards to: nobody else notices when it is not.
// admission is which of them it is; with the next one the questions begin anew.
func (s *Supervisor) checkLater(now time.Time, u *unit, admission uint64) {
	d := u.door
	over := func() bool { return d.checks != admission || u.policy.life().state != Running }
	if d.spec.Ready.Type == gate.ReadyLaunched {
		return // nobody can tell
	}
	s.after(now, d.spec.CheckInterval, func(time.Time) {
		if over() {
			return
		}
		ctx, cancel := context.WithCancel(context.Background())
		d.endCheck = cancel
		s.goDo(func() message {
			defer cancel()
			targets, err := d.spec.Probe(ctx, s.runner(u, s.gateEnv(ctx, u, ReasonReady, nil)))
			gate.Abandon(targets)
			return func(now time.Time) { //nolint:contextcheck // the next question has a context of its own
				switch {
				case over():
				case err != nil:
					s.step(now, u, lost{err: err, served: true})
				default:
					s.checkLater(now, u, admission)
				}
			}
		}, nil)
	})
}

// status says where the gate leads, and adds to refused what clients did not get.
func (d *door) status(refused *Refused) *GateStatus {
	g := d.gate.Status()
	refused.Access += g.Denied
	refused.MaxConnections += g.Excess
	refused.Datagrams += g.Dropped
	st := &GateStatus{Forward: "relay", Pending: g.Pending, TimedOut: g.TimedOut, Destinations: g.Destinations}
	switch way := d.way.Load(); {
	case d.spec.Forward != gate.Kernel:
	case d.relayed != "":
		st.Forward = "relay: " + d.relayed
	case way != nil:
		st.Forward = (*way).String()
	}
	return st
}

// maxFlows bounds how many connections of a socket are told of: they are for people to read.
const maxFlows = 1000

// flows returns the connections of a socket, and why they are not all. It runs outside the loop.
func (d *door) flows(ctx context.Context, socket int) (flows []activity.Flow, why string) {
	flows = d.gate.Flows(socket, maxFlows)
	if way := d.way.Load(); way != nil {
		var more []activity.Flow
		more, why = (*way).flows(ctx, socket)
		for _, f := range more { // sock_diag lists the gate's own as well
			if !slices.ContainsFunc(flows, func(own activity.Flow) bool { return own.Peer == f.Peer }) {
				flows = append(flows, f)
			}
		}
	}
	return flows, why
}

// up says whether the destination of a gate is there, as far as is known, or is about to be.
func (u *unit) up() bool {
	switch u.policy.life().state { //nolint:exhaustive // elsewhere it is down
	case Starting, Running, Confirming, Stopping:
		return true
	}
	return false
}
