package supervisor

import (
	"slices"
	"syscall"
	"time"
)

// perConnection is the policy of a service with accept = true: each connection
// is accepted and gets a process of its own.
type perConnection struct {
	lifecycle
	spec *Service

	live    int    // processes
	serving []bool // by socket: a serve action is under way
	refused []bool // by socket: a connection was accepted and could not get its process yet
	wanted  wanted
}

func newPerConnection(spec *Service, now time.Time) *perConnection {
	return &perConnection{
		spec:      spec,
		lifecycle: lifecycle{state: Listening, reason: ReasonStarted, since: now},
		serving:   make([]bool, len(spec.Sockets)),
		refused:   make([]bool, len(spec.Sockets)),
	}
}

// step implements policy.
func (m *perConnection) step(now time.Time, ev event) []action {
	switch ev := ev.(type) {
	case socketReady:
		switch m.state {
		case Listening, Running:
			if !m.serving[ev.socket] {
				m.serving[ev.socket] = true
				return []action{serve(ev)}
			}
		case Starting, Confirming, Stopping, Killing, Backoff, Stopped:
		}
	case socketBroken:
		if m.state == Listening || m.state == Running {
			return append(m.fail(now, ReasonBroken, ev.err), disarm{})
		}
	case served:
		return m.served(now, ev)
	case exited:
		m.live--
		return m.ended(now)
	case deadlinePassed:
		return m.timeout(now)
	case sleepRequested:
		return m.stopFor(now, wantSleep)
	case shutdownRequested:
		if ev.now {
			return m.stopFor(now, wantShutdownNow)
		}
		return m.stopFor(now, wantShutdown)
	case wakeRequested, launched, launchFailed, looked, confirmed: // one process for all sockets only
	}
	return nil
}

func (m *perConnection) served(now time.Time, ev served) []action {
	m.serving[ev.socket] = false
	m.live += ev.started
	m.refused[ev.socket] = ev.err != nil && !ev.pause
	switch m.state {
	case Listening, Running:
	case Stopping:
		// Accepted just before the stop signal went out.
		return append([]action{signal{m.spec.Stop.Signal}}, m.ended(now)...)
	case Killing:
		return append([]action{signal{syscall.SIGKILL}}, m.ended(now)...)
	case Starting, Confirming, Backoff, Stopped:
		return nil
	}
	if ev.err != nil {
		reason := ReasonStartFailed
		if ev.pause {
			reason = ReasonResources
		}
		return append(m.fail(now, reason, ev.err), disarm{})
	}
	m.failures, m.err = 0, nil
	acts := []action{armOne{ev.socket}}
	if m.live > 0 && m.state == Listening {
		acts = append(acts, m.enter(now, Running, ReasonServing, nil))
	}
	return acts
}

// ended looks whether anything is left to wait for.
func (m *perConnection) ended(now time.Time) []action {
	if m.live > 0 || m.anyServing() {
		return nil
	}
	switch m.state {
	case Running:
		return []action{m.enter(now, Listening, ReasonServed, nil)}
	case Stopping, Killing:
		if m.wanted >= wantShutdown {
			return []action{m.enter(now, Stopped, ReasonShutdown, nil), disarm{}}
		}
		m.wanted = wantNothing
		return append([]action{m.enter(now, Listening, ReasonStopped, nil)}, m.resume()...)
	case Listening, Starting, Confirming, Backoff, Stopped:
	}
	return nil
}

// resume takes up again what waits, and arms the sockets on which nothing does.
func (m *perConnection) resume() []action {
	var acts []action
	for i, waits := range m.refused {
		switch {
		case m.serving[i]: // it is armed when that is over
		case waits:
			m.serving[i] = true
			acts = append(acts, serve{i})
		default:
			acts = append(acts, armOne{i})
		}
	}
	return acts
}

func (m *perConnection) anyServing() bool { return slices.Contains(m.serving, true) }

func (m *perConnection) timeout(now time.Time) []action {
	if !m.due(now) {
		return nil
	}
	m.deadline = time.Time{}
	switch m.state {
	case Stopping:
		return []action{m.enter(now, Killing, ReasonTimeout, nil), signal{syscall.SIGKILL}}
	case Backoff:
		to := Listening
		if m.live > 0 {
			to = Running
		}
		return append([]action{m.enter(now, to, ReasonRetry, nil)}, m.resume()...)
	case Listening, Starting, Running, Confirming, Killing, Stopped:
	}
	return nil
}

// stopFor ends the processes that there are. The sockets stay; what arrives
// meanwhile waits in the queue.
func (m *perConnection) stopFor(now time.Time, why wanted) []action {
	m.wanted = max(m.wanted, why)
	if m.state == Stopped {
		return nil
	}
	reason := ReasonRequested
	if why >= wantShutdown {
		reason = ReasonShutdown
	}
	if m.live == 0 && !m.anyServing() {
		if why == wantSleep {
			m.wanted = wantNothing
			return nil
		}
		return []action{m.enter(now, Stopped, reason, nil), disarm{}}
	}
	if why == wantShutdownNow && m.state != Killing {
		return []action{m.enter(now, Killing, reason, nil), disarm{}, signal{syscall.SIGKILL}}
	}
	if m.state == Stopping || m.state == Killing {
		return nil
	}
	acts := []action{m.enter(now, Stopping, reason, nil), disarm{}, signal{m.spec.Stop.Signal}}
	m.deadline = now.Add(m.spec.Stop.Timeout)
	return acts
}
