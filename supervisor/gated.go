package supervisor

import (
	"fmt"
	"time"
)

// gated is the policy of a service that is not our child: a command launches it, another one stops it, and what comes to its
// sockets is led to its destination while that is up.
type gated struct {
	lifecycle
	spec *Service

	wanted   wanted
	looking  bool      // a look is under way
	lookAt   time.Time // when the next look is due; zero: never
	draining bool      // in Stopping: the stop command has not been run yet
	late     bool      // in Starting and Stopping: the time for it is over
	gone     *lost     // in Confirming: the destination does not answer any more
	failing  *failure  // in Stopping; nil: the run will not count as a failure

	unstopped int    // times in a row that the stop command failed
	starts    bucket // limits.wake_rate
	idle      idleness
}

func newGated(spec *Service, now time.Time) *gated {
	return &gated{
		spec:      spec,
		lifecycle: lifecycle{state: Listening, reason: ReasonStarted, since: now},
		idle:      idleness{spec: &spec.Idle, exact: spec.ownAccount()},
	}
}

// step implements policy.
func (m *gated) step(now time.Time, ev event) []action {
	switch ev := ev.(type) {
	case opened:
		return m.open(now)
	case openFailed:
		return m.cannotOpen(now, &m.spec.Restart, ev.err)
	case addressAppeared:
		return m.tryOpen()
	case socketReady:
		return m.ready(now, ev)
	case socketBroken:
		if m.state == Listening {
			return append([]action{disarm{}}, m.fail(now, &m.spec.Restart, ReasonBroken, ev.err)...)
		}
	case resourcesFreed:
		if m.state == Backoff && m.reason == ReasonResources {
			return m.rest(now, ReasonRetry)
		}
	case upAlready:
		if m.state == Listening && !m.unopened {
			return m.run(now, ReasonUp, []action{disarm{}})
		}
	case roused:
		if m.state == Starting {
			return m.roused(now, ev)
		}
	case lost:
		return m.lost(now, ev)
	case looked:
		if m.state == Running && m.looking {
			return m.judge(now, ev)
		}
	case confirmed:
		if m.state == Confirming {
			return m.verdict(now, ev)
		}
	case drained:
		if m.state == Stopping && m.draining {
			return m.runCommand(now)
		}
	case commandEnded:
		if m.state == Stopping && !m.draining {
			return m.stopped(now, ev.err)
		}
	case deadlinePassed:
		return m.timeout(now)
	case wakeRequested:
		return m.wake(now)
	case sleepRequested:
		return m.stopFor(now, wantSleep)
	case restartRequested:
		return m.stopFor(now, wantRestart)
	case resetRequested:
		return m.reset(now)
	case shutdownRequested:
		if ev.now {
			return m.stopFor(now, wantShutdownNow)
		}
		return m.stopFor(now, wantShutdown)
	case freezeRequested, thawRequested, addresses, launched, readiness, launchFailed, served, exited, emptied, queueRead, frozen: // of our children only
	}
	return nil
}

// ready handles traffic.
func (m *gated) ready(now time.Time, ev socketReady) []action {
	switch {
	case m.state == Failed && m.spec.Restart.OnFailure == Reject:
		return []action{refuse(ev)}
	case m.state != Listening:
		return nil
	}
	if instead := m.admitStart(now, &m.starts, m.spec.Limits.WakeRate); instead != nil {
		return instead
	}
	return m.start(now, ReasonTraffic, ev.socket)
}

// rest leaves Backoff or Failed: the next traffic launches the destination.
func (m *gated) rest(now time.Time, reason Reason) []action {
	return []action{m.enter(now, Listening, reason, nil), arm{}}
}

// nobody is the socket of a start for which none of them is to blame.
const nobody = -1

// start enters Starting.
func (m *gated) start(now time.Time, reason Reason, socket int) []action {
	m.looking, m.busy, m.gone, m.late = false, "", nil, false
	report := m.enter(now, Starting, reason, nil)
	if t := m.spec.Start.Timeout; t > 0 {
		m.deadline = now.Add(t)
	}
	return []action{rouse{reason: reason, socket: socket}, disarm{}, report}
}

// roused leaves Starting.
func (m *gated) roused(now time.Time, ev roused) []action {
	switch {
	case m.wanted >= wantShutdown:
		return m.leave(now)
	case ev.err == nil && ev.launched:
		return m.run(now, ReasonReady, nil)
	case ev.err == nil:
		return m.run(now, ReasonUp, nil)
	}
	acts := []action{shut{}} // who comes is not accepted any more, who was accepted may go on waiting
	switch {
	case m.givenUp() && ev.launched:
		return append(acts, m.begin(now, ReasonRequested, nil)...)
	case m.givenUp():
		return m.ended(now, append(acts, m.enter(now, Listening, ReasonStopped, nil), arm{}))
	case ev.pause:
		m.err = fmt.Errorf("%s: %w", ReasonResources, ev.err)
		return m.ended(now, append(acts, m.pause(now, ReasonResources, ev.err)))
	}
	if m.late {
		ev.err = fmt.Errorf("after start.timeout: %w", ev.err)
	}
	if ev.launched {
		m.failing = &failure{ReasonNotReady, ev.err}
		return append(acts, m.begin(now, ReasonNotReady, ev.err)...)
	}
	return m.ended(now, append(acts, m.fail(now, &m.spec.Restart, ReasonStartFailed, ev.err)...))
}

// givenUp says whether somebody wanted the start to end.
func (m *gated) givenUp() bool { return m.wanted == wantSleep || m.wanted == wantRestart }

// onceMore handles a request in Starting for a destination that is up: it is about to be, or has to be launched anew where the
// start was given up for another request.
func (m *gated) onceMore() {
	if m.givenUp() {
		m.wanted.want(wantRestart)
	}
}

// run enters Running, or goes on to Stopping when somebody asked for that meanwhile. acts come first.
func (m *gated) run(now time.Time, reason Reason, acts []action) []action {
	if m.pauses > 0 {
		m.err = nil // it was not the service's fault
	}
	m.pauses, m.unstopped, m.failing = 0, 0, nil
	m.idle.begin(now)
	acts = append(acts, m.enter(now, Running, reason, nil))
	m.lookAt = m.idle.first(now)
	m.deadline = m.lookAt
	w := m.wanted
	m.wanted = wantNothing
	if w == wantSleep {
		return append(acts, m.stop(now, w)...)
	}
	return append(acts, admit{})
}

// judge reads the answer to a look in Running.
func (m *gated) judge(now time.Time, ev looked) []action {
	m.looking = false
	next, busy := m.idle.judge(now, ev.sums)
	m.busy = busy
	if busy == "" {
		return []action{m.enter(now, Confirming, ReasonIdle, nil), confirm{}}
	}
	m.lookAt, m.deadline = next, next
	return nil
}

// verdict reads the answer to a look with the gate shut: it opens again, or the destination is stopped.
func (m *gated) verdict(now time.Time, ev confirmed) []action {
	w := m.wanted
	m.wanted = wantNothing
	switch w {
	case wantShutdown, wantShutdownNow:
		return m.leave(now)
	case wantSleep, wantRestart:
		return m.stop(now, w)
	case wantWake:
		m.idle.since = now
	case wantNothing, wantFreeze:
	}
	if m.gone != nil {
		return m.vanished(now, *m.gone)
	}
	if ev.err != nil {
		m.busy = ev.err.Error()
		return m.carryOn(now, ReasonBusy, ev.err, m.idle.again(now))
	}
	next, busy := m.idle.judge(now, ev.sums)
	m.busy = busy
	if busy != "" {
		return m.carryOn(now, ReasonBusy, nil, next)
	}
	return m.begin(now, ReasonIdle, nil)
}

// carryOn goes back to Running.
func (m *gated) carryOn(now time.Time, reason Reason, err error, next time.Time) []action {
	acts := []action{m.enter(now, Running, reason, err), admit{}}
	m.lookAt, m.deadline = next, next
	return acts
}

// lost handles a destination that does not answer any more. Who waits for it is kept.
func (m *gated) lost(now time.Time, ev lost) []action {
	switch m.state { //nolint:exhaustive // elsewhere nothing is led there
	case Running:
		return m.vanished(now, ev)
	case Confirming:
		m.gone = &ev
	}
	return nil
}

// vanished handles a destination that has ended by itself: who waits for it wakes it again. One that was found ready and then
// served nobody has failed.
func (m *gated) vanished(now time.Time, ev lost) []action {
	if now.Sub(m.since) >= goodRun {
		m.forgive()
	}
	m.looking, m.busy, m.gone = false, "", nil
	if ev.pause {
		m.err = fmt.Errorf("%s: %w", ReasonResources, ev.err)
		return []action{shut{}, m.pause(now, ReasonResources, ev.err)}
	}
	if !ev.served {
		return append([]action{shut{}}, m.fail(now, &m.spec.Restart, ReasonLost, ev.err)...)
	}
	return []action{shut{}, m.enter(now, Listening, ReasonLost, nil), arm{}}
}

// stop begins to end a destination that is up, busy or not.
func (m *gated) stop(now time.Time, why wanted) []action {
	m.wanted, m.looking = why, false
	acts := []action{m.enter(now, Stopping, ReasonRequested, nil), drain{}}
	m.draining = true
	return acts
}

// begin enters Stopping where nobody is there to be waited for.
func (m *gated) begin(now time.Time, reason Reason, err error) []action {
	if m.wanted == wantSleep {
		m.wanted = wantNothing
	}
	return append([]action{m.enter(now, Stopping, reason, err)}, m.runCommand(now)...)
}

// runCommand goes on with a stop.
func (m *gated) runCommand(now time.Time) []action {
	m.draining, m.late = false, false
	m.deadline = now.Add(m.spec.Stop.Timeout)
	return []action{command{}}
}

// stopped leaves Stopping.
func (m *gated) stopped(now time.Time, err error) []action {
	m.looking, m.busy, m.gone = false, "", nil
	f := m.failing
	m.failing = nil
	switch {
	case m.wanted >= wantShutdown:
		return m.leave(now)
	case f != nil:
		return m.ended(now, m.fail(now, &m.spec.Restart, f.reason, f.err))
	case err != nil:
		if m.late {
			err = fmt.Errorf("after stop.timeout: %w", err)
		}
		// It is still up, as far as is known. Each try cuts off nobody, but they become fewer.
		m.wanted = wantNothing
		m.err = fmt.Errorf("%s: %w", ReasonNotStopped, err)
		m.idle.since = now
		var next time.Time
		if m.spec.Idle.StopAfter > 0 {
			next = now.Add(growing(max(m.spec.Idle.StopAfter, time.Second), maxStopAgain, m.unstopped))
			m.unstopped++
		}
		return m.carryOn(now, ReasonNotStopped, err, next)
	}
	m.forgive()
	m.err, m.unstopped = nil, 0
	return m.ended(now, []action{m.enter(now, Listening, ReasonStopped, nil), arm{}})
}

// maxStopAgain bounds the time to the next try of a stop command that fails again and again, unless stop_after is
// longer.
const maxStopAgain = time.Hour

// leave ends the service, and not its destination: the next hibergated finds that up.
func (m *gated) leave(now time.Time) []action {
	return []action{m.enter(now, Stopped, ReasonShutdown, nil), disarm{}, cut{}}
}

// ended carries out what was asked for meanwhile, now that the destination is down.
func (m *gated) ended(now time.Time, acts []action) []action {
	w := m.wanted
	m.wanted = wantNothing
	switch w {
	case wantWake, wantRestart:
		return append(acts, m.start(now, ReasonRequested, nobody)...)
	case wantNothing, wantSleep, wantFreeze, wantShutdown, wantShutdownNow:
	}
	return acts
}

// wake handles a request for a destination that is up: there is one soon, or the one that there is stays, as if it had
// just been used.
func (m *gated) wake(now time.Time) []action {
	switch m.state {
	case Listening, Backoff, Failed:
		if m.unopened {
			return m.tryOpen()
		}
		return m.start(now, ReasonRequested, nobody)
	case Confirming, Stopping:
		m.wanted.want(wantWake)
	case Running:
		m.idle.since = now
	case Starting:
		m.onceMore()
	case Frozen, Killing, Stopped:
	}
	return nil
}

// reset forgets failures.
func (m *gated) reset(now time.Time) []action {
	m.forgive()
	m.pauses, m.unstopped = 0, 0
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
func (m *gated) stopFor(now time.Time, why wanted) []action {
	switch m.state {
	case Listening, Backoff, Failed:
		if why < wantShutdown {
			return nil
		}
		return m.leave(now)
	case Starting:
		if why == wantRestart {
			m.onceMore()
			return nil
		}
		m.wanted.want(why)
		return []action{giveUp{}}
	case Confirming:
		m.wanted.want(why)
	case Running:
		if why >= wantShutdown {
			return m.leave(now)
		}
		return m.stop(now, why)
	case Stopping:
		m.wanted.want(why)
		switch {
		case why >= wantShutdown && m.draining:
			return m.leave(now)
		case why == wantShutdownNow:
			return []action{giveUp{}}
		}
	case Frozen, Killing, Stopped:
	}
	return nil
}

func (m *gated) timeout(now time.Time) []action {
	if !m.due(now) {
		return nil
	}
	m.deadline = time.Time{}
	switch m.state {
	case Starting, Stopping:
		m.late = true
		return []action{giveUp{}} // roused or commandEnded comes of it
	case Running:
		m.lookAt, m.looking = time.Time{}, true
		return []action{look{}}
	case Backoff:
		if m.unopened {
			return m.tryOpen()
		}
		return m.rest(now, ReasonRetry)
	case Failed:
		return m.rest(now, ReasonRetry)
	case Listening, Confirming, Frozen, Killing, Stopped:
	}
	return nil
}
