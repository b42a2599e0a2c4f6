package supervisor

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"hibergate/activation"
	"hibergate/supervisor/activity"
)

// ask has the loop run f, and waits until it has.
func (s *Supervisor) ask(f func()) error {
	done := make(chan struct{})
	if !s.post(func(time.Time) { f(); close(done) }) {
		return ErrShuttingDown
	}
	<-done // the loop never blocks
	return nil
}

// Ping returns once the loop has answered: it is alive.
func (s *Supervisor) Ping(ctx context.Context) error {
	done := make(chan struct{})
	if !s.post(func(time.Time) { close(done) }) {
		return ErrShuttingDown
	}
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// abortTimeout is how long Run waits after KillNow for a start that is held up where not even
// SIGKILL ends it.
const abortTimeout = time.Second

// KillNow kills every process that still runs, without waiting for stop.timeout.
// It is for a second signal, after the context of Run has ended; it never blocks.
func (s *Supervisor) KillNow() {
	posted := s.post(func(now time.Time) {
		if s.givesUp.IsZero() {
			s.givesUp = now.Add(abortTimeout)
		}
		s.all(shutdownRequested{now: true})
	})
	if posted {
		s.launcher.Abort()
	}
}

// request is what somebody may ask of a service.
type request uint8

const (
	requestWake request = iota
	requestSleep
	requestRestart
	requestFreeze
	requestThaw
	requestReset
)

func (r request) event() event {
	switch r {
	case requestWake:
		return wakeRequested{}
	case requestSleep:
		return sleepRequested{}
	case requestRestart:
		return restartRequested{}
	case requestFreeze:
		return freezeRequested{}
	case requestThaw:
		return thawRequested{}
	case requestReset:
		return resetRequested{}
	}
	panic("supervisor: unknown request")
}

// Wake starts the process of a service if none runs, thaws it if it is frozen, and returns once it runs
// or the start has failed.
func (s *Supervisor) Wake(ctx context.Context, name string) (Status, error) {
	status, err := s.request(ctx, name, requestWake)
	return status, failedTo("wake", status, err)
}

// Sleep stops the processes of a service, busy or not, and returns once they
// have ended. The sockets stay open: the next traffic starts it again.
func (s *Supervisor) Sleep(ctx context.Context, name string) (Status, error) {
	status, err := s.request(ctx, name, requestSleep)
	if err == nil && status.Reason == string(ReasonNotStopped) {
		return status, fmt.Errorf("sleep service %q: %s", name, status.Error)
	}
	return status, err
}

// Restart stops the processes of a service and starts it again, and returns once it runs. It
// does nothing to a service that sleeps: its next traffic starts it anyway.
func (s *Supervisor) Restart(ctx context.Context, name string) (Status, error) {
	status, err := s.request(ctx, name, requestRestart)
	if err == nil && status.Reason == string(ReasonNotStopped) {
		return status, fmt.Errorf("restart service %q: %s", name, status.Error)
	}
	return status, failedTo("restart", status, err)
}

// failedTo makes an error of a status that tells of one.
func failedTo(what string, status Status, err error) error {
	if err == nil && (status.State == Backoff.String() || status.State == Failed.String()) {
		return fmt.Errorf("%s service %q: %s", what, status.Name, status.Error)
	}
	return err
}

// Freeze stops the processes of a service in memory, and returns once they stand still. The next
// traffic on its sockets, Wake or Thaw lets them run on. The error is [ErrNotRunning] where there is nothing to freeze.
func (s *Supervisor) Freeze(ctx context.Context, name string) (Status, error) {
	status, err := s.request(ctx, name, requestFreeze)
	switch {
	case err != nil, status.State == Frozen.String(), status.Reason == string(ReasonTraffic): // or thawed again already
		return status, err
	case status.State == Running.String():
		return status, fmt.Errorf("freeze service %q: it %s", name, status.Reason)
	}
	return status, fmt.Errorf("freeze service %q: %w: %s", name, ErrNotRunning, status.State)
}

// Thaw lets a frozen service run on. It does nothing to one that is not frozen.
func (s *Supervisor) Thaw(ctx context.Context, name string) (Status, error) {
	return s.request(ctx, name, requestThaw)
}

// Reset forgets the failures of a service. One that was given up, or waits for its next try, listens again.
func (s *Supervisor) Reset(ctx context.Context, name string) (Status, error) {
	return s.request(ctx, name, requestReset)
}

// Learn tells where the program of a service listens, as learned sockets or as configured. Where that is not known yet the service
// is woken first. The error is [ErrNothingToLearn] where the program does not bind its sockets itself.
func (s *Supervisor) Learn(ctx context.Context, name string) ([]LearnedSocket, error) {
	var known, adopts bool
	err := s.ask(func() {
		if u := s.byName[name]; u != nil {
			known, adopts = u.known(), u.spec.Handoff == Adopt
		}
	})
	if err == nil && adopts && !known {
		_, err = s.Wake(ctx, name)
	}
	if err != nil {
		return nil, err
	}
	var all []*activation.Socket
	askErr := s.ask(func() {
		u := s.byName[name]
		switch {
		case u == nil:
			err = fmt.Errorf("service %q: %w", name, ErrUnknownService)
			return
		case !adopts:
			err = fmt.Errorf("service %q: %w", name, ErrNothingToLearn)
			return
		}
		all = u.ports.sockets()
	})
	if err = errors.Join(err, askErr); err != nil {
		return nil, err
	}
	out := make([]LearnedSocket, 0, len(all))
	for _, sock := range all {
		if l, err := describeSocket(sock); err == nil { // else it is not open
			out = append(out, l)
		}
	}
	return out, nil
}

func (s *Supervisor) request(ctx context.Context, name string, what request) (Status, error) {
	var status Status
	var failed error
	w := waiter{wants: what, done: make(chan struct{})}
	err := s.ask(func() {
		u := s.byName[name]
		switch {
		case u == nil:
			failed = fmt.Errorf("service %q: %w", name, ErrUnknownService)
			return
		case s.stopping:
			failed = ErrShuttingDown
			return
		case u.spec.Accept && (what == requestWake || what == requestFreeze || what == requestThaw):
			failed = fmt.Errorf("service %q: %w", name, ErrPerConnection)
			return
		case u.door != nil && (what == requestFreeze || what == requestThaw):
			failed = fmt.Errorf("service %q: %w", name, ErrGate)
			return
		}
		w.run = u.run
		if (what == requestReset || what == requestWake) && u.restorable() && !u.policy.life().unopened {
			s.restore(u) // somebody may have removed a path
		}
		s.step(time.Now(), u, what.event())
		if u.settled(w) {
			close(w.done)
		} else {
			u.waiters = append(u.waiters, w)
		}
	})
	if err == nil {
		err = failed
	}
	if err != nil {
		return status, err
	}
	select {
	case <-w.done:
	case <-ctx.Done():
		s.post(func(time.Time) {
			u := s.byName[name]
			u.waiters = slices.DeleteFunc(u.waiters, func(o waiter) bool { return o.done == w.done })
		})
		return status, ctx.Err()
	}
	all, err := s.Status(ctx, name, false)
	if err != nil {
		return status, err
	}
	return all[0], nil
}

// Status tells what a service is doing, or all of them where name is empty, in
// the order of the configuration. It looks at the traffic at this moment; flows
// asks for each single connection too, which costs more.
func (s *Supervisor) Status(ctx context.Context, name string, flows bool) ([]Status, error) {
	var all []Status
	var targets []target
	err := s.ask(func() {
		for _, u := range s.units {
			if name == "" || u.spec.Name == name {
				all = append(all, s.status(u))
				targets = append(targets, u.target())
			}
		}
	})
	if err != nil {
		return nil, err
	}
	if all == nil && name != "" {
		return nil, fmt.Errorf("service %q: %w", name, ErrUnknownService)
	}
	for i, sums := range s.look(ctx, targets...) {
		keys := targets[i].ports.keys()
		pids := all[i].PIDs
		if headless := pids == nil && targets[i].live; targets[i].tree != nil && (flows || headless) {
			if every, err := targets[i].tree.PIDs(); err == nil {
				pids = every
			}
			if headless {
				all[i].PIDs = pids
			}
		}
		for j := range all[i].Sockets {
			sock := &all[i].Sockets[j]
			sock.account(sums[j])
			switch d := targets[i].unit.door; {
			case flows && d != nil:
				sock.Flows, sock.FlowsWhy = d.flows(ctx, j)
			case flows:
				sock.Flows, sock.FlowsWhy = s.looker.Flows(ctx, keys[j], pids)
			}
		}
	}
	return all, ctx.Err()
}

// status copies what the loop knows of a unit.
func (s *Supervisor) status(u *unit) Status {
	life := u.policy.life()
	st := Status{
		Name: u.spec.Name, State: life.state.String(), Reason: string(life.reason), Since: life.since,
		Handoff: u.spec.Handoff.String(), Accept: u.spec.Accept,
		Starts: u.starts, Failures: u.fails,
		Idle:     IdleStatus{When: u.spec.Idle.When.String()},
		Sockets:  make([]SocketStatus, len(u.ports)),
		Tracking: s.launcher.Tracking(),
		Refused:  u.refused,
		Notes:    slices.Clone(u.notes),
	}
	if life.err != nil {
		st.Error = life.err.Error()
	}
	switch m := u.policy.(type) {
	case *solo:
		if m.awaiting {
			st.WaitsFor = m.lacks.lacks
		}
	case *gated:
		st.Gate = u.door.status(&st.Refused)
		if life.state == Starting {
			st.WaitsFor = u.door.lacks
		}
	}
	if u.parks() {
		st.Parking = "on"
		if why := s.noParking + u.noPark; why != "" {
			st.Parking = "off: " + why
		}
	}
	if !life.deadline.IsZero() && (life.state == Backoff || life.state == Failed) {
		at := life.deadline
		st.RetryAt = &at
	}
	for _, p := range u.procs {
		st.PIDs = append(st.PIDs, p.PID())
	}
	if after := u.spec.Idle.StopAfter; after > 0 {
		st.Idle.StopAfter = after.String()
		st.Idle.Busy = life.busy
		if at := u.stopsAt(); life.state == Running && !at.IsZero() {
			st.Idle.StopsAt = &at
		}
	}
	for i := range u.ports {
		p := u.ports[i]
		sock := SocketStatus{Name: p.sock.Spec().Name, Address: p.sock.Address().String(), Accepted: p.accepted}
		if p.sock.FD() >= 0 {
			sock.Dropped = p.sock.Drops()
		}
		if p.failed != nil {
			sock.Error = p.failed.Error()
		}
		st.Sockets[i] = sock
	}
	return st
}

// stopsAt is when a service that runs can be stopped for idleness at the earliest; the zero Time: nobody knows, or never.
func (u *unit) stopsAt() time.Time {
	var at, since time.Time
	switch m := u.policy.(type) {
	case *solo:
		at, since = m.lookAt, m.idle.since
	case *gated:
		at, since = m.lookAt, m.idle.since
	}
	if idle := since.Add(u.spec.Idle.StopAfter); !at.IsZero() && idle.After(at) {
		return idle // that look comes too early to find it idle
	}
	return at
}

// account fills in what the kernel says.
func (s *SocketStatus) account(sum activity.Summary) {
	s.Known, s.Why, s.Open, s.Queued, s.In, s.Out = sum.Known, sum.Why, sum.Open, sum.Queued, sum.In, sum.Out
	last := sum.Last
	if sum.LastPayload.After(last) {
		last = sum.LastPayload
	}
	// The ledger begins with "a packet just now", and nothing may have come since.
	packets := sum.In.Packets + sum.Out.Packets
	if !last.IsZero() && (packets > 0 || !sum.LastPayload.IsZero() || strings.HasPrefix(s.Address, activation.FIFO.String())) {
		s.LastActivity = &last
	}
}
