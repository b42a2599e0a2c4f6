package supervisor

import (
	"syscall"
	"time"
)

// What users ask of a solo service, in any state.

// froze reads the answer to freeze.
func (m *solo) froze(now time.Time, ev frozen) []action {
	m.freezing = false
	w := m.wanted
	m.wanted = wantNothing
	switch w {
	case wantSleep, wantRestart, wantShutdown, wantShutdownNow:
		return m.stop(now, w)
	case wantWake:
		return m.thaw(now, ReasonRequested)
	case wantNothing, wantFreeze:
	}
	if ev.err != nil {
		m.busy = ev.err.Error()
		return m.carryOn(now, ReasonFreeze, ev.err, m.idle.first(now))
	}
	return []action{arm{}}
}

// thaw leaves Frozen.
func (m *solo) thaw(now time.Time, reason Reason) []action {
	acts := []action{disarm{}, thaw{}, m.enter(now, Running, reason, nil)}
	m.idle.since = now
	m.lookAt = m.idle.first(now)
	m.schedule()
	return acts
}

// thawFor handles a request to thaw.
func (m *solo) thawFor(now time.Time) []action {
	switch {
	case m.state == Frozen && m.freezing:
		m.wanted.want(wantWake)
	case m.state == Frozen:
		return m.thaw(now, ReasonThawed)
	}
	return nil
}

// wake handles a request for a running process: there is one soon, or the one
// that there is stays, as if it had just been used.
func (m *solo) wake(now time.Time) []action {
	switch m.state {
	case Backoff, Listening, Failed:
		if m.unopened {
			return m.tryOpen()
		}
		return m.start(now, ReasonRequested)
	case Confirming, Stopping, Killing:
		m.wanted.want(wantWake)
	case Frozen:
		if !m.freezing {
			return m.thaw(now, ReasonRequested)
		}
		m.wanted.want(wantWake)
	case Running:
		m.idle.since = now
	case Starting:
		m.wanted.want(wantNothing)
	case Stopped:
	}
	return nil
}

// freeze handles a request to freeze. Where there is no process yet it is done as soon as there is one.
func (m *solo) freeze(now time.Time) []action {
	switch m.state {
	case Running:
		m.wanted, m.looking, m.freezing, m.take.reading = wantNothing, false, true, false
		return []action{m.enter(now, Frozen, ReasonRequested, nil), freeze{}}
	case Starting, Confirming:
		m.wanted.want(wantFreeze)
	case Frozen:
		if m.freezing {
			m.wanted.want(wantNothing)
		}
	case Listening, Stopping, Killing, Backoff, Failed, Stopped:
	}
	return nil
}

// reset forgets failures.
func (m *solo) reset(now time.Time) []action {
	m.forgive()
	m.pauses = 0
	switch {
	case m.state != Backoff && m.state != Failed:
		return nil
	case m.unopened:
		return m.tryOpen()
	}
	m.err = nil
	return m.rest(now, ReasonReset)
}

// stopFor handles a request to stop, in any state.
func (m *solo) stopFor(now time.Time, why wanted) []action {
	switch m.state {
	case Listening, Backoff, Failed:
		if why < wantShutdown {
			return nil
		}
		return []action{m.enter(now, Stopped, ReasonShutdown, nil), disarm{}}
	case Starting:
		switch {
		case why == wantRestart:
			m.wanted.want(wantNothing) // it is the new process
		case m.awaiting:
			return m.stop(now, why)
		default:
			m.wanted.want(why)
		}
	case Confirming:
		m.wanted.want(why)
	case Killing:
		m.wanted.want(why)
		if why == wantShutdownNow {
			return []action{signal{syscall.SIGKILL, m.spec.Stop.KillMode.whom()}}
		}
	case Frozen:
		if m.freezing {
			m.wanted.want(why)
			return nil
		}
		return m.stop(now, why)
	case Running:
		return m.stop(now, why)
	case Stopping:
		m.wanted.want(why)
		if why == wantShutdownNow {
			return m.kill(now, ReasonShutdown)
		}
	case Stopped:
	}
	return nil
}
