package supervisor

import (
	"context"
	"fmt"
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

// Wake starts the process of a service if none runs, and returns once it runs
// or the start has failed.
func (s *Supervisor) Wake(ctx context.Context, name string) (Status, error) {
	status, err := s.request(ctx, name, false)
	if err == nil && status.State == Backoff.String() {
		err = fmt.Errorf("wake service %q: %s", name, status.Error)
	}
	return status, err
}

// Sleep stops the processes of a service, busy or not, and returns once they
// have ended. The sockets stay open: the next traffic starts it again.
func (s *Supervisor) Sleep(ctx context.Context, name string) (Status, error) {
	return s.request(ctx, name, true)
}

func (s *Supervisor) request(ctx context.Context, name string, sleep bool) (Status, error) {
	var status Status
	var failed error
	w := waiter{sleep: sleep, done: make(chan struct{})}
	err := s.ask(func() {
		u := s.byName[name]
		switch {
		case u == nil:
			failed = fmt.Errorf("service %q: %w", name, ErrUnknownService)
			return
		case s.stopping:
			failed = ErrShuttingDown
			return
		case !sleep && u.spec.Accept:
			failed = fmt.Errorf("service %q: %w", name, ErrPerConnection)
			return
		}
		var ev event = wakeRequested{}
		if sleep {
			ev = sleepRequested{}
		}
		w.run = u.run
		s.step(time.Now(), u, ev)
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
		return status, ctx.Err() // the waiter is dropped when it settles
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
				all = append(all, u.status())
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
		keys := targets[i].unit.keys()
		for j := range all[i].Sockets {
			sock := &all[i].Sockets[j]
			sock.account(sums[j])
			if flows {
				sock.Flows, sock.FlowsWhy = s.looker.Flows(ctx, keys[j], all[i].PIDs)
			}
		}
	}
	return all, ctx.Err()
}

// status copies what the loop knows of a unit.
func (u *unit) status() Status {
	life := u.policy.life()
	st := Status{
		Name: u.spec.Name, State: life.state.String(), Reason: string(life.reason), Since: life.since,
		Handoff: u.spec.Handoff.String(), Accept: u.spec.Accept,
		Starts: u.starts, Failures: u.fails,
		Idle:    IdleStatus{When: u.spec.Idle.When.String()},
		Sockets: make([]SocketStatus, len(u.ports)),
	}
	if life.err != nil {
		st.Error = life.err.Error()
	}
	for _, p := range u.procs {
		st.PIDs = append(st.PIDs, p.PID())
	}
	if after := u.spec.Idle.StopAfter; after > 0 {
		st.Idle.StopAfter = after.String()
		st.Idle.Busy = life.busy
		if life.state == Running && !life.deadline.IsZero() {
			at := life.deadline
			st.Idle.StopsAt = &at
		}
	}
	for i := range u.ports {
		p := &u.ports[i]
		st.Sockets[i] = SocketStatus{Name: p.sock.Spec().Name, Address: p.sock.Address().String(), Accepted: p.accepted}
	}
	return st
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
