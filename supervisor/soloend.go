package supervisor

import (
	"fmt"
	"syscall"
	"time"
)

// How a solo service comes to its end: told to, or by itself.

// ending is how far a stop has come.
type ending uint8

const (
	endingDrain   ending = iota // what came before is being taken
	endingCommand               // the stop command runs
	endingSignal                // the signal was sent
)

// failure is what a run that is being ended will count as.
type failure struct {
	reason Reason
	err    error
}

// stop begins to end a service that runs or is frozen.
func (m *solo) stop(now time.Time, why wanted) []action {
	from := m.state
	m.wanted, m.looking, m.awaiting = why, false, false
	reason := ReasonRequested
	if why >= wantShutdown {
		reason = ReasonShutdown
	}
	var acts []action
	if from == Frozen {
		acts = append(acts, disarm{})
	}
	if why == wantShutdownNow {
		acts = append(acts, m.kill(now, reason)...)
		if from == Frozen || from == Confirming {
			acts = append(acts, thaw{}) // for those who are not to be killed
		}
		return acts
	}
	acts = append(acts, m.enter(now, Stopping, reason, nil))
	asleep := from == Frozen || from == Confirming
	if asleep && why == wantShutdown && len(m.spec.Stop.Command) == 0 {
		return append(append(acts, m.sendSignal(now)...), thaw{})
	}
	if asleep {
		acts = append(acts, thaw{})
	}
	if why == wantShutdown {
		return append(acts, m.runCommand(now)...) // the queue ends with us
	}
	m.ending, m.parked = endingDrain, true
	m.deadline = now.Add(m.spec.Stop.Timeout)
	return append(acts, drain{})
}

// unpark appends what undoes confirm and drain.
func (m *solo) unpark(acts []action) []action {
	if m.parked {
		m.parked = false
		acts = append(acts, unpark{})
	}
	return acts
}

// commandGrace is how long after stop.timeout the end of the stop command must be known.
const commandGrace = 5 * time.Second

// runCommand goes on with a stop.
func (m *solo) runCommand(now time.Time) []action {
	if len(m.spec.Stop.Command) == 0 {
		return m.sendSignal(now)
	}
	m.ending = endingCommand
	m.deadline = now.Add(m.spec.Stop.Timeout + commandGrace)
	return []action{command{}}
}

// sendSignal goes on with a stop.
func (m *solo) sendSignal(now time.Time) []action {
	m.ending = endingSignal
	m.deadline = now.Add(m.spec.Stop.Timeout)
	switch {
	case m.spec.Stop.KillMode == KillControlGroup:
		return []action{signal{m.spec.Stop.Signal, everybody}}
	case m.headless:
		return []action{signal{m.spec.Stop.FinalSignal, everybody}}
	}
	return []action{signal{m.spec.Stop.Signal, started}}
}

// kill ends a service that does not end as it was asked to.
func (m *solo) kill(now time.Time, reason Reason) []action {
	sig := m.spec.Stop.FinalSignal
	wait := m.spec.Stop.Timeout
	if reason == ReasonShutdown {
		sig = syscall.SIGKILL
	}
	if sig == syscall.SIGKILL {
		wait = killAgain
	}
	m.kills = 0
	a := m.enter(now, Killing, reason, nil)
	m.deadline = now.Add(wait)
	return []action{a, signal{sig, m.spec.Stop.KillMode.whom()}}
}

// killAgain is when SIGKILL is sent again, where it did not reach all (processes that are made
// faster than they can be found, without a cgroup).
const killAgain = time.Second

// whom says who gets the final signal.
func (k KillMode) whom() whom {
	if k == KillProcess {
		return started
	}
	return everybody
}

// exit handles the end of the process that was started.
func (m *solo) exit(now time.Time, ev exited) []action {
	if m.spec.Stop.KillMode == KillProcess {
		ev.left = false // they are nobody's business
	}
	if now.Sub(m.started) >= goodRun {
		m.forgive()
	}
	switch m.state {
	case Stopping, Killing:
		if !ev.left {
			return m.finished(now)
		}
		m.headless = true
		if m.state == Stopping && m.ending == endingSignal && m.spec.Stop.KillMode == KillMixed {
			return []action{signal{m.spec.Stop.FinalSignal, everybody}}
		}
	case Running, Confirming, Frozen:
		m.headless = ev.left
		switch {
		case !clean(ev.status):
			return m.crashed(now, ev)
		case !ev.left:
			return m.runEnded(now, ev.queued)
		}
	case Starting:
		if m.awaiting {
			m.headless = ev.left
			return m.endedEarly(now, ev)
		}
	case Listening, Backoff, Failed, Stopped:
	}
	return nil
}

// endedEarly handles the end of the first process before it was ready. Where others of the service are left, they
// may be the ones that will be: it has become a daemon.
func (m *solo) endedEarly(now time.Time, ev exited) []action {
	good := clean(ev.status)
	if good && ev.left {
		return nil
	}
	m.awaiting = false
	err := fmt.Errorf("%s, and until then: %s", ev.status, m.lacks.lacks)
	reason := ReasonFailed
	if good {
		reason = ReasonNotReady
	}
	if ev.left {
		m.failing = &failure{reason, err}
		return append([]action{m.enter(now, Stopping, reason, err)}, m.sendSignal(now)...)
	}
	return m.ended(now, append(m.leave(), m.fail(now, &m.spec.Restart, reason, err)...))
}

// crashed handles the end of a process that failed. What it leaves behind is ended too.
func (m *solo) crashed(now time.Time, ev exited) []action {
	err := fmt.Errorf("%s", ev.status)
	if !ev.left {
		acts := m.leave()
		if m.stuck.exit(ev.queued) {
			acts = append(acts, m.stuck.untakenRun()...)
		}
		return m.ended(now, append(acts, m.fail(now, &m.spec.Restart, ReasonFailed, err)...))
	}
	acts := m.leave()
	m.failing = &failure{ReasonFailed, err}
	acts = append(acts, m.enter(now, Stopping, ReasonFailed, err))
	return append(acts, m.sendSignal(now)...)
}

// empty handles the end of the last process, after that of the one that was started.
func (m *solo) empty(now time.Time, queued []uint64) []action {
	if !m.headless {
		return nil
	}
	switch m.state {
	case Stopping, Killing:
		return m.finished(now)
	case Running, Confirming, Frozen:
		return m.runEnded(now, queued)
	case Starting:
		return m.endedEarly(now, exited{})
	case Listening, Backoff, Failed, Stopped:
	}
	return nil
}

// leave gives up what a run has beside its processes.
func (m *solo) leave() []action {
	m.looking, m.take.reading, m.busy = false, false, ""
	var acts []action
	if m.state == Frozen && !m.freezing {
		acts = append(acts, disarm{})
	}
	if m.state == Frozen || m.state == Confirming {
		acts = append(acts, thaw{}) // the others of the service
	}
	return acts
}

// runEnded handles the end of a run that was not told to end.
func (m *solo) runEnded(now time.Time, queued []uint64) []action {
	acts := m.unpark(m.leave())
	if m.stuck.exit(queued) {
		acts = append(acts, m.stuck.untakenRun()...)
		return m.ended(now, append(acts, m.fail(now, &m.spec.Restart, ReasonNothingRead, errNothingRead)...))
	}
	m.failures, m.err = 0, nil
	return m.ended(now, append(acts, m.enter(now, Listening, ReasonExited, nil), arm{}))
}

// finished handles the end of a service that was told to end.
func (m *solo) finished(now time.Time) []action {
	acts := m.unpark(m.leave())
	if f := m.failing; f != nil {
		m.failing = nil
		if f.reason == ReasonNothingRead {
			m.stuck.untaken++
			m.stuck.before = m.take.before
			acts = append(acts, m.stuck.untakenRun()...)
		}
		return m.ended(now, append(acts, m.fail(now, &m.spec.Restart, f.reason, f.err)...))
	}
	m.forgive()
	m.err = nil
	return m.ended(now, append(acts, m.enter(now, Listening, ReasonStopped, nil), arm{}))
}

// ended carries out what was asked for while a process was there, now that none is.
func (m *solo) ended(now time.Time, acts []action) []action {
	m.headless, m.freezing = false, false
	acts = m.unpark(acts)
	w := m.wanted
	m.wanted = wantNothing
	switch w {
	case wantShutdown, wantShutdownNow:
		return append(acts, m.stopFor(now, w)...)
	case wantWake, wantRestart:
		return append(acts, m.start(now, ReasonRequested)...)
	case wantNothing, wantSleep, wantFreeze:
	}
	return acts
}
