package supervisor

import (
	"fmt"
	"slices"
	"syscall"
	"time"
)

// perConnection is the policy of a service with accept = true: each connection
// is accepted and gets a process of its own.
type perConnection struct {
	lifecycle
	spec *Service

	live    int         // processes that were started and have not ended
	left    bool        // live is 0, and descendants of them are there
	sockets []accepting // by socket
	wanted  wanted
	kills   int    // in Killing: how often SIGKILL was repeated
	rate    bucket // limits.accept_rate
}

// accepting is what one socket of a perConnection is at. The zero value: it is armed, or the state
// does not permit it.
type accepting struct {
	serving bool // a serve action is under way
	room    int  // how many connections that may accept
	held    bool // a connection was accepted and could not get its process yet
	waits   bool // something waits, and there is no room
}

func newPerConnection(spec *Service, now time.Time) *perConnection {
	return &perConnection{
		spec:      spec,
		lifecycle: lifecycle{state: Listening, reason: ReasonStarted, since: now},
		sockets:   make([]accepting, len(spec.Sockets)),
	}
}

// step implements policy.
func (m *perConnection) step(now time.Time, ev event) []action {
	switch ev := ev.(type) {
	case opened:
		return m.open(now)
	case openFailed:
		return m.cannotOpen(now, &m.spec.Restart, ev.err)
	case addressAppeared:
		return m.tryOpen()
	case socketBroken:
		if m.accepts() {
			return m.failed(now, ReasonBroken, ev.err)
		}
	case resourcesFreed:
		if m.state == Backoff && m.reason == ReasonResources {
			return m.retry(now, ReasonRetry)
		}
	case socketReady:
		switch {
		case m.accepts() && !m.sockets[ev.socket].serving:
			return m.serve(now, ev.socket)
		case m.state == Failed && m.spec.Restart.OnFailure == Reject:
			return []action{refuse(ev)}
		}
	case served:
		return m.served(now, ev)
	case exited:
		m.live--
		m.left = m.live == 0 && ev.left && m.spec.Stop.KillMode != KillProcess
		return m.ended(now)
	case emptied:
		m.left = false
		return m.ended(now)
	case deadlinePassed:
		return m.timeout(now)
	case sleepRequested, restartRequested: // the next connection starts the program anew anyway
		return m.stopFor(now, wantSleep)
	case shutdownRequested:
		if ev.now {
			return m.stopFor(now, wantShutdownNow)
		}
		return m.stopFor(now, wantShutdown)
	case resetRequested:
		return m.reset(now)
	case wakeRequested, freezeRequested, thawRequested, addresses, launched, readiness, launchFailed, looked, confirmed, queueRead, frozen, drained, commandEnded, upAlready, roused, lost: // one process for all sockets, and gates, only
	}
	return nil
}

// accepts says whether connections are accepted in the present state.
func (m *perConnection) accepts() bool { return m.state == Listening || m.state == Running }

// failed enters Backoff or Failed.
func (m *perConnection) failed(now time.Time, reason Reason, err error) []action {
	acts := append([]action{disarm{}}, m.fail(now, &m.spec.Restart, reason, err)...)
	if m.state != Failed || m.spec.Restart.OnFailure != Reject {
		return acts
	}
	for i := range m.sockets {
		if s := &m.sockets[i]; s.held {
			s.held = false
			acts = append(acts, refuse{i})
		}
	}
	return acts
}

// serve takes what waits on a socket, as far as the limits allow; what is above them waits on.
func (m *perConnection) serve(now time.Time, socket int) []action {
	s := &m.sockets[socket]
	s.waits = false
	room, full := batchSize, false
	if most := m.spec.Limits.MaxConnections; most > 0 {
		free := most - m.live
		for i := range m.sockets {
			free -= m.sockets[i].room
		}
		if free <= room {
			room, full = max(0, free), true
		}
	}
	rate := m.spec.Limits.AcceptRate
	if tokens := m.rate.fill(now, rate); tokens >= 0 && tokens < room {
		room, full = tokens, false
		if tokens == 0 {
			s.waits = true
			m.deadline = m.rate.next(now, rate)
			return []action{limited{}}
		}
	}
	over := full && m.spec.Limits.Overflow == OverflowClose
	if room == 0 && !over {
		s.waits = true
		return []action{limited{}}
	}
	m.rate.take(room)
	s.serving, s.room = true, room
	return []action{serve{socket: socket, room: room, refuse: over}}
}

func (m *perConnection) served(now time.Time, ev served) []action {
	s := &m.sockets[ev.socket]
	m.rate.take(ev.started - s.room) // what it had too much comes back
	*s = accepting{held: ev.held}
	m.live += ev.started
	if ev.started > 0 {
		m.left = false
	}
	switch m.state {
	case Listening, Running:
	case Stopping:
		// Accepted just before the stop signal went out.
		return append([]action{m.stopSignal()}, m.ended(now)...)
	case Killing:
		return append([]action{signal{syscall.SIGKILL, m.spec.Stop.KillMode.whom()}}, m.ended(now)...)
	case Starting, Confirming, Frozen, Backoff, Failed, Stopped:
		return nil
	}
	switch {
	case ev.err != nil && ev.pause:
		m.err = fmt.Errorf("%s: %w", ReasonResources, ev.err)
		return []action{disarm{}, m.pause(now, ReasonResources, ev.err)}
	case ev.err != nil:
		return m.failed(now, ReasonStartFailed, ev.err)
	}
	m.forgive()
	m.pauses, m.err = 0, nil
	acts := []action{armOne{ev.socket}}
	if m.live > 0 && m.state == Listening {
		// A socket that waits for its rate keeps its deadline.
		at := m.deadline
		acts = append(acts, m.enter(now, Running, ReasonServing, nil))
		m.deadline = at
	}
	return acts
}

func (m *perConnection) stopSignal() action {
	to := everybody
	if m.spec.Stop.KillMode != KillControlGroup {
		to = started
	}
	return signal{m.spec.Stop.Signal, to}
}

// ended looks what follows now that a process has ended.
func (m *perConnection) ended(now time.Time) []action {
	if m.live > 0 || m.anyServing() || m.left {
		if m.accepts() {
			return m.resume(now, false)
		}
		return nil
	}
	switch m.state {
	case Running:
		at := m.deadline
		acts := []action{m.enter(now, Listening, ReasonServed, nil)}
		m.deadline = at
		return append(acts, m.resume(now, false)...)
	case Stopping, Killing:
		if m.wanted >= wantShutdown {
			return []action{m.enter(now, Stopped, ReasonShutdown, nil), disarm{}}
		}
		m.wanted = wantNothing
		return append([]action{m.enter(now, Listening, ReasonStopped, nil)}, m.resume(now, true)...)
	case Listening, Starting, Confirming, Frozen, Backoff, Failed, Stopped:
	}
	return nil
}

// resume takes up again what waits. all: it arms the sockets on which nothing does, too.
func (m *perConnection) resume(now time.Time, all bool) []action {
	var acts []action
	for i := range m.sockets {
		switch s := &m.sockets[i]; {
		case s.serving: // it is armed when that is over
		case s.waits, all && s.held:
			acts = append(acts, m.serve(now, i)...)
		case all:
			acts = append(acts, armOne{i})
		}
	}
	return acts
}

func (m *perConnection) anyServing() bool {
	return slices.ContainsFunc(m.sockets, func(s accepting) bool { return s.serving })
}

// retry leaves Backoff or Failed.
func (m *perConnection) retry(now time.Time, reason Reason) []action {
	to := Listening
	if m.live > 0 || m.left {
		to = Running
	}
	return append([]action{m.enter(now, to, reason, nil)}, m.resume(now, true)...)
}

// reset forgets failures.
func (m *perConnection) reset(now time.Time) []action {
	m.forgive()
	m.pauses = 0
	switch {
	case m.state != Backoff && m.state != Failed:
		return nil
	case m.unopened:
		return m.tryOpen()
	}
	m.err = nil
	return m.retry(now, ReasonReset)
}

func (m *perConnection) timeout(now time.Time) []action {
	if !m.due(now) {
		return nil
	}
	m.deadline = time.Time{}
	switch m.state {
	case Listening, Running:
		return m.resume(now, false)
	case Stopping:
		return m.kill(now, ReasonTimeout)
	case Killing:
		m.deadline = now.Add(growing(killAgain, maxWait, m.kills))
		m.kills++
		return []action{signal{syscall.SIGKILL, m.spec.Stop.KillMode.whom()}}
	case Backoff:
		if m.unopened {
			return m.tryOpen()
		}
		return m.retry(now, ReasonRetry)
	case Failed:
		return m.retry(now, ReasonRetry)
	case Starting, Confirming, Frozen, Stopped:
	}
	return nil
}

// kill ends processes that do not end as they were asked to.
func (m *perConnection) kill(now time.Time, reason Reason) []action {
	sig, wait := m.spec.Stop.FinalSignal, m.spec.Stop.Timeout
	if reason == ReasonShutdown {
		sig = syscall.SIGKILL
	}
	if sig == syscall.SIGKILL {
		wait = killAgain
	}
	m.kills = 0
	a := m.enter(now, Killing, reason, nil)
	m.deadline = now.Add(wait)
	return []action{a, disarm{}, signal{sig, m.spec.Stop.KillMode.whom()}}
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
	if m.live == 0 && !m.anyServing() && !m.left {
		if why == wantSleep {
			m.wanted = wantNothing
			return nil
		}
		return []action{m.enter(now, Stopped, reason, nil), disarm{}}
	}
	if why == wantShutdownNow && m.state != Killing {
		return m.kill(now, reason)
	}
	if m.state == Killing && why == wantShutdownNow {
		return []action{signal{syscall.SIGKILL, m.spec.Stop.KillMode.whom()}}
	}
	if m.state == Stopping || m.state == Killing {
		return nil
	}
	acts := []action{m.enter(now, Stopping, reason, nil), disarm{}, m.stopSignal()}
	m.deadline = now.Add(m.spec.Stop.Timeout)
	return acts
}
