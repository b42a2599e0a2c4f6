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
		return m.open(now)
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
			return []action{m.enter(now, Listening, ReasonRetry, nil), arm{}}
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
	case launched:
		if m.state == Starting {
			return m.run(now, ev)
		}
	case launchFailed:
		if m.state == Starting {
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
		return []action{thaw{}} // too late, and it may have frozen what was left
	case frozen:
		if m.state == Frozen && m.freezing {
			return m.froze(now, ev)
		}
		return []action{thaw{}}
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
	case served: // accept = true only
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
		switch m.starts.fill(now, m.spec.Limits.WakeRate) {
		case -1:
		case 0:
			a := m.enter(now, Backoff, ReasonRate, nil)
			m.deadline = m.starts.next(now, m.spec.Limits.WakeRate)
			return []action{a, disarm{}}
		default:
			m.starts.take(1)
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

// start leaves Listening, Backoff or Failed.
func (m *solo) start(now time.Time, reason Reason) []action {
	m.stuck.launch()
	report := m.enter(now, Starting, reason, nil)
	if t := m.spec.Start.Timeout; t > 0 {
		m.deadline = now.Add(t)
	}
	return []action{launch{queue: m.stuck.bracket}, disarm{}, report}
}

// notLaunched leaves Starting without a process.
func (m *solo) notLaunched(now time.Time, ev launchFailed) []action {
	if ev.pause {
		m.err = fmt.Errorf("%s: %w", ReasonResources, ev.err)
		return m.ended(now, []action{m.pause(now, ReasonResources, ev.err)})
	}
	return m.ended(now, m.fail(now, &m.spec.Restart, ReasonStartFailed, ev.err))
}

// run enters Running, or goes on to Stopping when somebody asked for that meanwhile.
func (m *solo) run(now time.Time, ev launched) []action {
	m.started, m.unfrozen, m.pauses = now, 0, 0
	m.headless, m.failing = false, nil
	m.stuck.before = ev.queued
	m.idle.begin(now)
	m.take.begin(now, m.spec.Start.Timeout)
	acts := []action{m.enter(now, Running, ReasonLaunched, nil)}
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
	m.schedule()
	return acts
}

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
		m.want(wantWake)
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
		m.want(wantWake)
	case Frozen:
		if !m.freezing {
			return m.thaw(now, ReasonRequested)
		}
		m.want(wantWake)
	case Running:
		m.idle.since = now
	case Starting:
		m.want(wantNothing)
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
		m.want(wantFreeze)
	case Frozen:
		if m.freezing {
			m.want(wantNothing)
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
	return []action{m.enter(now, Listening, ReasonReset, nil), arm{}}
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
		if why == wantRestart {
			why = wantNothing // it is the new process
		}
		m.want(why)
	case Confirming, Killing:
		m.want(why)
	case Frozen:
		if m.freezing {
			m.want(why)
			return nil
		}
		return m.stop(now, why)
	case Running:
		return m.stop(now, why)
	case Stopping:
		m.want(why)
		if why == wantShutdownNow {
			return m.kill(now, ReasonShutdown)
		}
	case Stopped:
	}
	return nil
}

// want notes what to do next. The last request wins, but there is no way back from a shutdown.
func (m *solo) want(why wanted) {
	if m.wanted < wantShutdown || why > m.wanted {
		m.wanted = why
	}
}

// stop begins to end a service that runs or is frozen.
func (m *solo) stop(now time.Time, why wanted) []action {
	from := m.state
	m.wanted, m.looking = why, false
	reason := ReasonRequested
	if why >= wantShutdown {
		reason = ReasonShutdown
	}
	var acts []action
	if from == Frozen {
		acts = append(acts, disarm{})
	}
	if why == wantShutdownNow {
		return append(acts, m.kill(now, reason)...)
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

func (m *solo) timeout(now time.Time) []action {
	if !m.due(now) {
		return nil
	}
	m.deadline = time.Time{}
	switch m.state {
	case Starting:
		return []action{signal{syscall.SIGKILL, everybody}} // launchFailed comes of it
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
		return []action{m.enter(now, Listening, ReasonRetry, nil), arm{}}
	case Failed:
		return []action{m.enter(now, Listening, ReasonRetry, nil), arm{}}
	case Listening, Confirming, Frozen, Stopped:
	}
	return nil
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
	case Listening, Starting, Backoff, Failed, Stopped:
	}
	return nil
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
	case Listening, Starting, Backoff, Failed, Stopped:
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
