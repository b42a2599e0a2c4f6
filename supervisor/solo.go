package supervisor

import (
	"errors"
	"fmt"
	"syscall"
	"time"
)

// solo is the policy of a service with one process that holds all its sockets.
type solo struct {
	lifecycle
	spec *Service

	started  time.Time // of the running process
	headless bool      // the process that was started has ended, and others of the service live
	awaiting bool      // in Starting: there is a process, and it is not ready
	lacks    readiness // what it lacks, in Starting
	unknown  bool      // nobody knows where the program listens
	wanted   wanted    // what somebody asked for while something else was under way
	looking  bool      // a look is under way
	freezing bool      // in Frozen: the freeze is still under way
	lookAt   time.Time // when the next look is due; zero: never

	unfrozen int      // times in a row that it could not be frozen
	parked   bool     // confirm or drain was asked for, and unpark not yet
	ending   ending   // in Stopping
	failing  *failure // in Stopping and Killing; nil: the run will not count as one
	kills    int      // in Killing: how often SIGKILL was repeated
	starts   bucket   // limits.wake_rate

	idle  idleness
	take  taking
	stuck stuckness
}

func newSolo(spec *Service, now time.Time) *solo {
	return &solo{
		spec:      spec,
		lifecycle: lifecycle{state: Listening, reason: ReasonStarted, since: now},
		idle:      idleness{spec: &spec.Idle},
		stuck:     stuckness{after: firstBracket},
	}
}

var (
	errNothingRead  = errors.New("the process ended, and what woke it still waits on the socket")
	errNothingTaken = errors.New("what woke the process still waits on the socket after start.timeout")
)

// step implements policy.
func (m *solo) step(now time.Time, ev event) []action {
	switch ev := ev.(type) {
	case opened:
		acts := m.open(now)
		if acts == nil || !m.unknown {
			return acts
		}
		return append(acts, m.start(now, ReasonLearn)...)
	case openFailed:
		return m.cannotOpen(now, &m.spec.Restart, ev.err)
	case addressAppeared:
		return m.tryOpen()
	case socketReady:
		return m.ready(now, ev)
	case socketBroken:
		return m.broken(now, ev.err)
	case resourcesFreed:
		if m.state == Backoff && m.reason == ReasonResources {
			return m.rest(now, ReasonRetry)
		}
	case wakeRequested:
		return m.wake(now)
	case sleepRequested:
		return m.stopFor(now, wantSleep)
	case restartRequested:
		return m.stopFor(now, wantRestart)
	case shutdownRequested:
		if ev.now {
			return m.stopFor(now, wantShutdownNow)
		}
		return m.stopFor(now, wantShutdown)
	case freezeRequested:
		return m.freeze(now)
	case thawRequested:
		return m.thawFor(now)
	case resetRequested:
		return m.reset(now)
	case addresses:
		return m.learn(now, ev)
	case launched:
		if m.state == Starting && !m.awaiting {
			return m.launched(now, ev)
		}
	case readiness:
		return m.hear(now, ev)
	case launchFailed:
		if m.state == Starting && !m.awaiting {
			return m.notLaunched(now, ev)
		}
	case looked:
		if m.state == Running && m.looking {
			return m.judge(now, ev)
		}
	case queueRead:
		if m.state == Running && m.take.reading {
			return m.taken(now, ev)
		}
	case confirmed:
		if m.state == Confirming {
			return m.verdict(now, ev)
		}
	case frozen:
		if m.state == Frozen && m.freezing {
			return m.froze(now, ev)
		}
	case drained:
		if m.state == Stopping && m.ending == endingDrain {
			return m.runCommand(now)
		}
	case commandEnded:
		if m.state == Stopping && m.ending == endingCommand {
			return m.sendSignal(now)
		}
	case deadlinePassed:
		return m.timeout(now)
	case exited:
		return m.exit(now, ev)
	case emptied:
		return m.empty(now, ev.queued)
	case served, upAlready, roused, lost: // accept = true and gates only
	}
	return nil
}

// broken handles a socket that was shut down while no process had it.
func (m *solo) broken(now time.Time, err error) []action {
	switch m.state { //nolint:exhaustive // elsewhere a process has it
	case Listening:
		return append([]action{disarm{}}, m.fail(now, &m.spec.Restart, ReasonBroken, err)...)
	case Frozen:
		if !m.freezing {
			return m.thaw(now, ReasonTraffic)
		}
	}
	return nil
}

// ready handles traffic.
func (m *solo) ready(now time.Time, ev socketReady) []action {
	switch m.state { //nolint:exhaustive // elsewhere nothing is armed
	case Listening:
		if instead := m.admitStart(now, &m.starts, m.spec.Limits.WakeRate); instead != nil {
			return instead
		}
		return m.start(now, ReasonTraffic)
	case Frozen:
		if !m.freezing {
			return m.thaw(now, ReasonTraffic)
		}
	case Failed:
		if m.spec.Restart.OnFailure == Reject {
			return []action{refuse(ev)}
		}
	}
	return nil
}

// rest leaves Backoff or Failed: the next traffic starts a process, or nobody knows where that would come.
func (m *solo) rest(now time.Time, reason Reason) []action {
	if m.unknown {
		return m.start(now, ReasonLearn)
	}
	return []action{m.enter(now, Listening, reason, nil), arm{}}
}

// learn hears whether it is known where the program listens. If not it is started, so that it tells.
func (m *solo) learn(now time.Time, ev addresses) []action {
	m.unknown = !ev.known
	if m.unknown && m.state == Listening && m.reason == ReasonStarted {
		return m.start(now, ReasonLearn)
	}
	return nil
}

// start leaves Listening, Backoff or Failed.
func (m *solo) start(now time.Time, reason Reason) []action {
	m.stuck.launch()
	report := m.enter(now, Starting, reason, nil)
	if t := m.spec.Start.Timeout; t > 0 {
		m.deadline = now.Add(t)
	}
	m.parked = m.spec.Ready.Hold
	return []action{launch{queue: m.stuck.bracket, hold: m.parked}, disarm{}, report}
}

// notLaunched leaves Starting without a process.
func (m *solo) notLaunched(now time.Time, ev launchFailed) []action {
	if ev.pause {
		m.err = fmt.Errorf("%s: %w", ReasonResources, ev.err)
		return m.ended(now, []action{m.pause(now, ReasonResources, ev.err)})
	}
	return m.ended(now, m.fail(now, &m.spec.Restart, ReasonStartFailed, ev.err))
}

// launched goes on with a process that was executed.
func (m *solo) launched(now time.Time, ev launched) []action {
	if m.pauses > 0 {
		m.err = nil // it was not the service's fault
	}
	m.started, m.unfrozen, m.pauses = now, 0, 0
	m.headless, m.failing = false, nil
	m.stuck.before = ev.queued
	if m.spec.Ready.Type == ReadyExec {
		return m.run(now, ReasonLaunched, nil)
	}
	m.awaiting, m.lacks = true, readiness{lacks: "it has only just begun"}
	m.deadline = m.startDeadline()
	switch w := m.wanted; w {
	case wantSleep, wantShutdown, wantShutdownNow:
		return m.stop(now, w)
	case wantNothing, wantWake, wantRestart, wantFreeze:
	}
	return nil
}

// startDeadline is when a process that was executed has to be ready; the zero Time: never.
func (m *solo) startDeadline() time.Time {
	if t := m.spec.Start.Timeout; t > 0 {
		return m.started.Add(t)
	}
	return time.Time{}
}

// hear is told what the process lacks to be ready.
func (m *solo) hear(now time.Time, ev readiness) []action {
	m.lacks = ev
	switch {
	case m.state != Starting || !m.awaiting:
	case ev.lacks == "":
		return m.run(now, ReasonReady, nil)
	case ev.spare:
		// The rest is bound soon, or never again.
		if at := now.Add(spareTime); m.deadline.IsZero() || at.Before(m.deadline) {
			m.deadline = at
		}
	}
	return nil
}

// spareTime is how long a program that has bound something may take for the rest of what it had before.
const spareTime = 2 * time.Second

// run enters Running, or goes on to Stopping when somebody asked for that meanwhile. acts come first.
func (m *solo) run(now time.Time, reason Reason, acts []action) []action {
	m.awaiting = false
	m.idle.begin(now)
	m.take.begin(now, m.spec.Start.Timeout)
	acts = append(acts, m.enter(now, Running, reason, nil))
	acts = m.unpark(acts)
	m.lookAt = m.idle.first(now)
	w := m.wanted
	m.wanted = wantNothing
	switch w {
	case wantSleep, wantShutdown, wantShutdownNow:
		return append(acts, m.stop(now, w)...)
	case wantFreeze:
		return append(acts, m.freeze(now)...)
	case wantNothing, wantWake, wantRestart:
	}
	m.schedule()
	return acts
}

// schedule sets the deadline of Running to what is due first.
func (m *solo) schedule() {
	m.deadline = m.lookAt
	if at := m.take.at; !at.IsZero() && (m.deadline.IsZero() || at.Before(m.deadline)) {
		m.deadline = at
	}
}

// judge reads the answer to a look in Running.
func (m *solo) judge(now time.Time, ev looked) []action {
	m.looking = false
	next, busy := m.idle.judge(now, ev.sums)
	m.busy = busy
	if busy == "" {
		m.parked = true
		return []action{m.enter(now, Confirming, ReasonIdle, nil), confirm{}}
	}
	m.lookAt = next
	m.schedule()
	return nil
}

// taken reads the answer to readQueue: has the process taken what woke it?
func (m *solo) taken(now time.Time, ev queueRead) []action {
	if !m.take.judge(now, ev, m.spec.Start.Timeout) {
		m.schedule()
		return nil
	}
	m.failing = &failure{ReasonNothingRead, errNothingTaken}
	acts := []action{m.enter(now, Stopping, ReasonNothingRead, errNothingTaken)}
	return append(acts, m.sendSignal(now)...)
}

// verdict reads the answer to a look at the frozen service: it is thawed and
// carries on, or is stopped. The stop signal is sent while it is still frozen,
// so that it is the first thing it meets when it thaws.
func (m *solo) verdict(now time.Time, ev confirmed) []action {
	w := m.wanted
	m.wanted = wantNothing
	switch w {
	case wantSleep, wantRestart, wantShutdown, wantShutdownNow:
		return m.stop(now, w)
	case wantFreeze:
		if ev.err == nil {
			acts := append(m.unpark(nil), m.enter(now, Frozen, ReasonRequested, nil))
			return append(acts, arm{})
		}
	case wantWake:
		m.idle.since = now
	case wantNothing:
	}
	if ev.err != nil {
		// Each try makes it stand still for a moment, so they become fewer.
		m.busy = ev.err.Error()
		wait := m.idle.again(now).Sub(now) << min(m.unfrozen, 10)
		m.unfrozen++
		return m.carryOn(now, ReasonFreeze, ev.err, now.Add(min(wait, maxWait)))
	}
	m.unfrozen = 0
	next, busy := m.idle.judge(now, ev.sums)
	m.busy = busy
	if busy != "" {
		return m.carryOn(now, ReasonBusy, nil, next)
	}
	acts := []action{m.enter(now, Stopping, ReasonIdle, nil)}
	if len(m.spec.Stop.Command) > 0 {
		return append(append(acts, thaw{}), m.runCommand(now)...)
	}
	return append(append(acts, m.sendSignal(now)...), thaw{})
}

// carryOn goes back to Running.
func (m *solo) carryOn(now time.Time, reason Reason, err error, next time.Time) []action {
	acts := append(m.unpark(nil), thaw{}, m.enter(now, Running, reason, err))
	m.lookAt = next
	if m.take.reading { // what came of it was not heard
		m.take.reading, m.take.at = false, now.Add(m.spec.Start.Timeout/2)
	}
	m.schedule()
	return acts
}

func (m *solo) timeout(now time.Time) []action {
	if !m.due(now) {
		return nil
	}
	m.deadline = time.Time{}
	switch m.state {
	case Starting:
		switch {
		case !m.awaiting:
			return []action{signal{syscall.SIGKILL, everybody}} // launchFailed comes of it
		case m.lacks.spare:
			return m.run(now, ReasonReady, []action{forget{}})
		}
		if m.deadline = m.startDeadline(); m.deadline.IsZero() || now.Before(m.deadline) {
			return nil // it was for what was lacking then
		}
		err := fmt.Errorf("after start.timeout: %s", m.lacks.lacks)
		m.failing = &failure{ReasonNotReady, err}
		m.awaiting = false
		return append([]action{m.enter(now, Stopping, ReasonNotReady, err)}, m.sendSignal(now)...)
	case Running:
		var acts []action
		if !m.lookAt.IsZero() && !now.Before(m.lookAt) {
			m.lookAt, m.looking = time.Time{}, true
			acts = append(acts, look{})
		}
		if at := m.take.at; !at.IsZero() && !now.Before(at) {
			m.take.at, m.take.reading = time.Time{}, true
			acts = append(acts, readQueue{})
		}
		m.schedule()
		return acts
	case Stopping:
		switch m.ending {
		case endingDrain:
			return m.runCommand(now)
		case endingCommand:
			return m.sendSignal(now)
		case endingSignal:
			return m.kill(now, ReasonTimeout)
		}
	case Killing:
		m.deadline = now.Add(growing(killAgain, maxWait, m.kills))
		m.kills++
		return []action{signal{syscall.SIGKILL, m.spec.Stop.KillMode.whom()}}
	case Backoff:
		if m.unopened {
			return m.tryOpen()
		}
		return m.rest(now, ReasonRetry)
	case Failed:
		return m.rest(now, ReasonRetry)
	case Listening, Confirming, Frozen, Stopped:
	}
	return nil
}
