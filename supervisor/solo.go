package supervisor

import (
	"errors"
	"fmt"
	"slices"
	"syscall"
	"time"

	"hibergate/supervisor/process"
)

// solo is the policy of a service with one process that holds all its sockets.
type solo struct {
	lifecycle
	spec *Service

	started time.Time // of the running process
	wanted  wanted    // what somebody asked for while something else was under way
	looking bool      // a look is under way

	unfrozen int // times in a row that it could not be frozen

	idle  idleness
	stuck stuckness
}

// wanted is what to do as soon as the present step is over.
type wanted uint8

const (
	wantNothing wanted = iota
	wantSleep
	wantWake
	wantShutdown
	wantShutdownNow
)

func newSolo(spec *Service, now time.Time) *solo {
	return &solo{
		spec:      spec,
		lifecycle: lifecycle{state: Listening, reason: ReasonStarted, since: now},
		idle:      idleness{spec: &spec.Idle},
		stuck:     stuckness{after: firstBracket},
	}
}

var errNothingRead = errors.New("the process ended, and what woke it still waits on the socket")

// step implements policy.
func (m *solo) step(now time.Time, ev event) []action {
	switch ev := ev.(type) {
	case socketReady:
		if m.state == Listening {
			return m.start(now, ReasonTraffic)
		}
	case socketBroken:
		if m.state == Listening {
			return append(m.fail(now, ReasonBroken, ev.err), disarm{})
		}
	case wakeRequested:
		return m.wake(now)
	case sleepRequested:
		return m.stopFor(now, wantSleep)
	case shutdownRequested:
		if ev.now {
			return m.stopFor(now, wantShutdownNow)
		}
		return m.stopFor(now, wantShutdown)
	case launched:
		if m.state == Starting {
			return m.run(now, ev)
		}
	case launchFailed:
		if m.state == Starting {
			return m.ended(now, m.fail(now, ReasonStartFailed, ev.err))
		}
	case looked:
		if m.state == Running && m.looking {
			return m.judge(now, ev)
		}
	case confirmed:
		if m.state == Confirming {
			return m.verdict(now, ev)
		}
	case deadlinePassed:
		return m.timeout(now)
	case exited:
		return m.exit(now, ev)
	case served: // accept = true only
	}
	return nil
}

// start leaves Listening or Backoff.
func (m *solo) start(now time.Time, reason Reason) []action {
	m.stuck.launch()
	report := m.enter(now, Starting, reason, nil)
	return []action{launch{queue: m.stuck.bracket}, disarm{}, report}
}

// wake handles a request for a running process: there is one soon, or the one
// that there is stays, as if it had just been used.
func (m *solo) wake(now time.Time) []action {
	switch m.state {
	case Listening, Backoff:
		return m.start(now, ReasonRequested)
	case Confirming, Stopping, Killing:
		if m.wanted < wantShutdown {
			m.wanted = wantWake
		}
	case Running:
		m.idle.since = now
	case Starting:
		if m.wanted < wantShutdown {
			m.wanted = wantNothing
		}
	case Stopped:
	}
	return nil
}

// run enters Running, or goes on to Stopping when somebody asked for that meanwhile.
func (m *solo) run(now time.Time, ev launched) []action {
	m.started, m.unfrozen = now, 0
	m.stuck.before = ev.queued
	m.idle.begin(now)
	acts := []action{m.enter(now, Running, ReasonLaunched, nil)}
	if m.wanted != wantNothing {
		return append(acts, m.stop(now, m.wanted)...)
	}
	m.deadline = m.idle.first(now)
	return acts
}

// judge reads the answer to a look in Running.
func (m *solo) judge(now time.Time, ev looked) []action {
	m.looking = false
	next, busy := m.idle.judge(now, ev.sums)
	m.busy = busy
	if busy == "" {
		return []action{m.enter(now, Confirming, ReasonIdle, nil), confirm{}}
	}
	m.deadline = next
	return nil
}

// verdict reads the answer to a look at the frozen process: it is thawed and
// carries on, or is stopped. The stop signal is sent while it is still frozen,
// so that it is the first thing it meets when it thaws.
func (m *solo) verdict(now time.Time, ev confirmed) []action {
	switch m.wanted {
	case wantSleep, wantShutdown, wantShutdownNow:
		return m.stop(now, m.wanted)
	case wantWake:
		m.idle.since = now
	case wantNothing:
	}
	m.wanted = wantNothing
	if ev.err != nil {
		// Each try makes it stand still for a moment, so they become fewer.
		m.busy = ev.err.Error()
		wait := m.idle.again(now).Sub(now) << min(m.unfrozen, 10)
		m.unfrozen++
		acts := []action{m.enter(now, Running, ReasonFreeze, ev.err)}
		m.deadline = now.Add(min(wait, maxBackoff))
		return acts
	}
	m.unfrozen = 0
	next, busy := m.idle.judge(now, ev.sums)
	m.busy = busy
	if busy != "" {
		acts := []action{thaw{}, m.enter(now, Running, ReasonBusy, nil)}
		m.deadline = next
		return acts
	}
	acts := []action{m.enter(now, Stopping, ReasonIdle, nil), signal{m.spec.Stop.Signal}, thaw{}}
	m.deadline = now.Add(m.spec.Stop.Timeout)
	return acts
}

// stopFor handles a request to stop, in any state.
func (m *solo) stopFor(now time.Time, why wanted) []action {
	switch m.state {
	case Listening, Backoff:
		if why == wantSleep {
			return nil
		}
		return []action{m.enter(now, Stopped, ReasonShutdown, nil), disarm{}}
	case Starting, Confirming, Killing:
		m.want(why)
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

// stop sends the stop signal to a process that runs or is frozen.
func (m *solo) stop(now time.Time, why wanted) []action {
	m.wanted, m.looking = why, false
	reason := ReasonRequested
	if why >= wantShutdown {
		reason = ReasonShutdown
	}
	if why == wantShutdownNow {
		return m.kill(now, reason)
	}
	acts := []action{m.enter(now, Stopping, reason, nil), signal{m.spec.Stop.Signal}, thaw{}}
	m.deadline = now.Add(m.spec.Stop.Timeout)
	return acts
}

func (m *solo) kill(now time.Time, reason Reason) []action {
	return []action{m.enter(now, Killing, reason, nil), signal{syscall.SIGKILL}}
}

func (m *solo) timeout(now time.Time) []action {
	if !m.due(now) {
		return nil
	}
	m.deadline = time.Time{}
	switch m.state {
	case Running:
		m.looking = true
		return []action{look{}}
	case Stopping:
		return m.kill(now, ReasonTimeout)
	case Backoff:
		return []action{m.enter(now, Listening, ReasonRetry, nil), arm{}}
	case Listening, Starting, Confirming, Killing, Stopped:
	}
	return nil
}

// exit handles the end of the process.
func (m *solo) exit(now time.Time, ev exited) []action {
	m.looking, m.busy = false, ""
	if now.Sub(m.started) >= goodRun {
		m.failures = 0
	}
	switch m.state {
	case Stopping, Killing:
		m.failures, m.err = 0, nil
		return m.ended(now, []action{m.enter(now, Listening, ReasonStopped, nil), arm{}})
	case Running, Confirming:
		if !clean(ev.status) {
			return m.ended(now, m.fail(now, ReasonFailed, fmt.Errorf("%s", ev.status)))
		}
		if m.stuck.exit(ev.queued) {
			return m.ended(now, m.fail(now, ReasonNothingRead, errNothingRead))
		}
		m.failures, m.err = 0, nil
		return m.ended(now, []action{m.enter(now, Listening, ReasonExited, nil), arm{}})
	case Listening, Starting, Backoff, Stopped:
	}
	return nil
}

// clean says whether a process ended as one that was not told to may: by itself,
// with status 0, or by a signal that asks a program to end (systemd.service(5),
// Restart=).
func clean(s process.ExitStatus) bool {
	if s.Signal == 0 {
		return s.Code == 0
	}
	return slices.Contains([]syscall.Signal{syscall.SIGHUP, syscall.SIGINT, syscall.SIGTERM, syscall.SIGPIPE}, s.Signal)
}

// ended carries out what was asked for while a process was there, now that none is.
func (m *solo) ended(now time.Time, acts []action) []action {
	w := m.wanted
	m.wanted = wantNothing
	switch w {
	case wantShutdown, wantShutdownNow:
		return append(acts, m.stopFor(now, w)...)
	case wantWake:
		return append(acts, m.start(now, ReasonRequested)...)
	case wantNothing, wantSleep:
	}
	return acts
}

// stuckness finds runs that end without having taken what woke them. A process
// may well end while others wait (one that serves a single connection does), so
// a queue that is not empty says nothing. Therefore, after some clean ends in
// a row with something still waiting, one run is put between two looks at
// the queue: it took nothing if all that waited before still waits after.
// The distance between two such runs doubles as long as they make progress.
type stuckness struct {
	inRow   int      // clean ends in a row with something still waiting
	after   int      // bracket the run that follows this many
	bracket bool     // the present run is bracketed
	before  []uint64 // what waited when it was launched
}

// firstBracket is how many ends in a row are not looked at.
const firstBracket = 2

func (s *stuckness) launch() { s.bracket = s.inRow >= s.after }

// exit says whether the run that ended was stuck. queued is what waits now:
// nil where nothing does; its elements matter for a bracketed run only.
func (s *stuckness) exit(queued []uint64) bool {
	if len(queued) == 0 {
		*s = stuckness{after: firstBracket}
		return false
	}
	s.inRow++
	if !s.bracket {
		return false
	}
	left := make(map[uint64]bool, len(queued))
	for _, id := range queued {
		left[id] = true
	}
	for _, id := range s.before {
		if !left[id] {
			s.after = 2 * s.inRow
			return false
		}
	}
	if len(s.before) == 0 {
		return false // it came during the run
	}
	s.after = 0 // from now on every run is looked at
	return true
}
