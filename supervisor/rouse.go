package supervisor

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"hibergate/activation"
	"hibergate/supervisor/gate"
)

// How the destination of a gate is launched, waited for and stopped.

// runner runs commands of a gate. env is what they are told beside what the service has.
func (s *Supervisor) runner(u *unit, env []string) gate.Runner {
	tree := u.tree
	return func(ctx context.Context, argv []string) error { return s.launcher.Run(ctx, u.spec, tree, argv, env) }
}

// gateEnv is what the commands of a gate are told.
func (s *Supervisor) gateEnv(ctx context.Context, u *unit, reason Reason, p *port) []string {
	env := []string{"HIBERGATED_SERVICE=" + u.spec.Name, "HIBERGATED_REASON=" + string(reason)}
	if p == nil {
		return env
	}
	env = append(env, "HIBERGATED_SOCKET="+p.sock.Address().String())
	if p.sock.Spec().Address.Network != activation.TCP {
		return env
	}
	// Who was accepted came first.
	if accepted := u.door.gate.Flows(slices.Index(u.ports, p), 1); len(accepted) > 0 && accepted[0].State == gate.Pending {
		return append(env, "HIBERGATED_CLIENT="+accepted[0].Peer.String())
	}
	clients, err := s.looker.Waiting(ctx, p.key)
	if err == nil && len(clients) > 0 {
		env = append(env, "HIBERGATED_CLIENT="+clients[0].Remote.String())
	}
	return env
}

// findUp looks at the beginning whether the destination is up already.
func (s *Supervisor) findUp(u *unit) {
	d := u.door
	s.plant(u)
	ctx, cancel := context.WithCancel(context.Background())
	d.giveUp = cancel
	run := u.run
	s.goDo(func() message {
		defer cancel()
		s.probes <- struct{}{}
		limited, end := context.WithTimeout(ctx, d.spec.Ready.Timeout) // from now on: others may have taken their time
		targets, err := d.spec.Probe(limited, s.runner(u, s.gateEnv(limited, u, ReasonStarted, nil)))
		end()
		<-s.probes
		gate.Abandon(targets)
		return func(now time.Time) {
			if u.run != run {
				return
			}
			d.giveUp = nil
			if err == nil {
				d.targets = spent(targets)
				s.step(now, u, upAlready{})
			}
		}
	}, nil)
}

// maxProbes is how many destinations are asked at a time, at the beginning, whether they are up.
const maxProbes = 64

// rouse launches the destination, unless it is up, and waits until it is ready.
func (s *Supervisor) rouse(u *unit, a rouse) {
	d := u.door
	if d.giveUp != nil {
		d.giveUp() // findUp
	}
	u.run++
	s.plant(u)
	if _, err := s.room(1); err != nil {
		s.post(func(now time.Time) {
			u.refused.Pauses++
			s.pause(u)
			s.step(now, u, roused{err: err, pause: true})
		})
		return
	}
	s.inOrder(u, func() message {
		if err := d.gate.Collect(); err != nil {
			s.log.Warn("clients wait in the queue of the kernel", slog.String("service", u.spec.Name), slog.Any("err", err))
		}
		return nil
	})
	ctx, cancel := context.WithCancel(context.Background())
	d.giveUp, d.lacks = cancel, ""
	var from *port
	if a.socket != nobody {
		from = u.at(a.socket)
	}
	r := rousing{s: s, u: u, spec: d.spec, stopped: d.stopped}
	d.stopped = false
	before := d.launch
	s.goDo(func() message {
		before.end()
		r.run = s.runner(u, s.gateEnv(ctx, u, a.reason, from))
		ev := r.rouse(ctx)
		cancel()
		if from == nil || ev.err != nil {
			gate.Abandon(r.targets) // nobody waits who could have the connection
		}
		return func(now time.Time) {
			d.giveUp, d.launch = nil, r.launch
			if ev.err == nil {
				d.targets = r.targets
				if from == nil {
					d.targets = spent(r.targets)
				}
			}
			if ev.launched {
				u.starts++
			}
			if ev.pause {
				u.refused.Pauses++
				s.pause(u)
			}
			s.step(now, u, ev)
			if life := u.policy.life(); ev.err == nil && life.state != Running {
				gate.Abandon(d.targets) // somebody wanted it to stop meanwhile
				d.targets = spent(d.targets)
			}
		}
	}, func() {
		gate.Abandon(r.targets)
		r.launch.end()
	})
}

// rousing is one start.
type rousing struct {
	s       *Supervisor
	u       *unit
	spec    *gate.Spec
	run     gate.Runner
	targets []gate.Target
	launch  *launching // nil: nothing was launched
	stopped bool       // we have stopped it ourselves
	said    string     // what was missing, as status has it
}

// launching is a launch command at work.
type launching struct {
	cancel context.CancelFunc // kills it
	done   chan struct{}      // closed when it has ended
	err    error              // how; to be read after done
}

// errLaunchTimeout is why a launch command is killed that has neither ended nor made the destination ready in time.
var errLaunchTimeout = errors.New("it has taken longer than launch_timeout")

// end kills a launch command that has not ended yet, and waits until it has. It does nothing to nil.
func (l *launching) end() {
	if l != nil {
		l.cancel()
		<-l.done
	}
}

// rouse runs outside the loop, until ctx ends at the latest.
func (r *rousing) rouse(ctx context.Context) roused {
	if !r.stopped && r.up(ctx) {
		return roused{}
	}
	if len(r.spec.Launch) == 0 {
		return roused{launched: true, err: r.await(ctx)}
	}
	r.begin(ctx)
	var err error
	var ready chan error // gets one value
	waiting, stop := context.WithCancel(ctx)
	if r.spec.Ready.Type != gate.ReadyLaunched {
		ready = make(chan error, 1)
		go func() { ready <- r.await(waiting) }()
	}
	var tooLong <-chan time.Time
	if t := r.spec.LaunchTimeout; t > 0 {
		timer := time.NewTimer(t)
		defer timer.Stop()
		tooLong = timer.C
	}
	select {
	case err = <-ready: // before the command has ended, which it may do in its own time
		stop()
		return roused{launched: true, err: err}
	case <-r.launch.done:
	case <-tooLong:
		r.launch.end()
		r.launch.err = errLaunchTimeout
	case <-ctx.Done():
		r.launch.end()
		r.launch.err = errors.New("the command has not ended")
	}
	if r.launch.err != nil {
		stop()
		if ready != nil && <-ready == nil {
			gate.Abandon(r.targets)
		}
		// One that was killed may have launched something.
		err = fmt.Errorf("launch: %w", r.launch.err)
		return roused{launched: ctx.Err() != nil || errors.Is(err, errLaunchTimeout), err: err, pause: lacksResources(err)}
	}
	defer stop()
	if ready == nil {
		r.targets, err = r.spec.Launched(ctx)
	} else {
		err = <-ready
	}
	return roused{launched: true, err: err}
}

// firstProbe is how long a destination has to say that it is up before it is launched. A machine that is off does not answer at all,
// and a ready command may wait for what is to be launched.
const firstProbe = time.Second

// up says whether the destination is ready without our doing.
func (r *rousing) up(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, firstProbe)
	defer cancel()
	var err error
	r.targets, err = r.spec.Probe(ctx, r.run)
	return err == nil
}

// await waits until the destination is ready.
func (r *rousing) await(ctx context.Context) (err error) {
	r.targets, err = r.spec.Await(ctx, r.run, r.lacks)
	return err
}

// lacks notes what is missing, for status.
func (r *rousing) lacks(err error) {
	said := err.Error()
	if said == r.said {
		return
	}
	r.said = said
	u, d := r.u, r.u.door
	r.s.post(func(time.Time) {
		if u.policy.life().state == Starting {
			d.lacks = said
		}
	})
}

// begin runs the launch command. It may go on when the destination is ready already.
func (r *rousing) begin(ctx context.Context) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	l := &launching{cancel: cancel, done: make(chan struct{})}
	r.launch = l
	go func() {
		defer close(l.done)
		l.err = r.run(ctx, r.spec.Launch)
		cancel()
	}()
}

// stopDoor runs the stop command of a gate, and waits until the destination is not there any more.
func (s *Supervisor) stopDoor(u *unit) {
	d := u.door
	launch := d.launch
	d.launch = nil
	ctx, cancel := context.WithCancel(context.Background())
	d.giveUp = cancel
	reason := u.policy.life().reason
	s.inOrder(u, func() message {
		defer cancel()
		run := s.runner(u, s.gateEnv(ctx, u, reason, nil))
		var err error
		if len(d.spec.Stop) > 0 {
			err = run(ctx, d.spec.Stop)
		}
		launch.end()
		if len(d.spec.Stop) > 0 && err == nil && d.spec.AwaitEnd(ctx, run) != nil {
			s.log.Warn("the stop command ended well, and the destination is still there", slog.String("service", u.spec.Name))
		}
		if err == nil {
			if severErr := d.sever(context.WithoutCancel(ctx)); severErr != nil {
				s.log.Warn("what the kernel led to the destination is not ended", slog.String("service", u.spec.Name), slog.Any("err", severErr))
			}
		}
		return func(now time.Time) {
			d.giveUp = nil
			d.stopped = err == nil && len(d.spec.Stop) > 0
			s.step(now, u, commandEnded{err})
		}
	})
}
