package supervisor

import (
	"fmt"
	"slices"
	"syscall"
	"time"

	"hibergate/supervisor/activity"
	"hibergate/supervisor/process"
)

// A policy decides about one service. It is pure: no clock, no I/O, no
// goroutine; step is told what happened and when, and returns what to do, in
// order. There are three: solo (one process for all sockets), perConnection
// (accept = true) and gated (no process of ours).
type policy interface {
	step(now time.Time, ev event) []action
	life() *lifecycle
}

// event is a fact that a policy is told.
//
//sumtype:decl
type event interface{ event() }

type (
	// opened: the sockets that could not be opened before are open now.
	opened struct{}
	// openFailed: a socket cannot be opened yet, at the start or in answer to open.
	openFailed struct{ err error }
	// addressAppeared: the machine has got an address.
	addressAppeared struct{}
	// socketReady: something waits on a socket that was armed.
	socketReady struct{ socket int }
	// socketBroken: a socket was shut down and cannot be made to listen again.
	socketBroken struct{ err error }
	// addresses says whether it is known where the program listens (Service.Learn). Only a run can tell.
	addresses struct{ known bool }
	// launched: the process of this run was executed. queued are the identities of
	// what waited on the sockets before, where launch asked for them.
	launched struct{ queued []uint64 }
	// readiness: what the process still lacks to be ready, in words; empty: nothing. spare: it lacks only
	// sockets that an earlier run had and that it can do without.
	readiness struct {
		lacks string
		spare bool
	}
	// launchFailed: there is no process. pause: for want of resources, which is not the service's fault.
	launchFailed struct {
		err   error
		pause bool
	}
	// served: connections were accepted, and each has its process. err says why not
	// more: nil where nobody waits any longer or the room was full.
	served struct {
		socket  int
		started int
		err     error
		pause   bool // err is about the supervisor's resources, not about the service
		held    bool // a connection was accepted and waits for its process
	}
	// exited: a process that was started for the service ended. left: others of the service
	// live. queued as in launched where that asked; else only whether anything waits
	// counts. It holds unidentified where something waits that cannot be named.
	exited struct {
		status process.ExitStatus
		queued []uint64
		left   bool
	}
	// emptied: after an exited with left, the last process has ended. queued is what waits.
	emptied struct{ queued []uint64 }
	// looked: the answer to look, one Summary for each socket.
	looked struct{ sums []activity.Summary }
	// confirmed: the answer to confirm. The service is frozen unless err is set.
	confirmed struct {
		sums []activity.Summary
		err  error
	}
	// queueRead: the answer to readQueue: what waits, and the account at the same moment.
	queueRead struct {
		queued []uint64
		sums   []activity.Summary
	}
	// frozen: the answer to freeze.
	frozen struct{ err error }
	// drained: the answer to drain.
	drained struct{}
	// commandEnded: the stop command has ended. err: a gate's destination may still be up.
	commandEnded struct{ err error }
	// upAlready: a gate's destination is up, without our doing.
	upAlready struct{}
	// roused: the answer to rouse. launched: there is something to stop, also where err says that it is not ready. pause as
	// in launchFailed.
	roused struct {
		launched, pause bool
		err             error
	}
	// lost: a gate's destination refuses connections, or the gate could not be opened. served: it had accepted some since admit.
	// pause as in launchFailed.
	lost struct {
		err    error
		served bool
		pause  bool
	}
	// deadlinePassed: the deadline may have come. It is harmless when it has not.
	deadlinePassed struct{}
	// resourcesFreed: what a pause waits for may be there.
	resourcesFreed   struct{}
	wakeRequested    struct{}
	sleepRequested   struct{}
	restartRequested struct{}
	freezeRequested  struct{}
	thawRequested    struct{}
	resetRequested   struct{}
	// shutdownRequested: the supervisor goes down; now says to kill without waiting.
	shutdownRequested struct{ now bool }
)

func (opened) event()            {}
func (openFailed) event()        {}
func (addressAppeared) event()   {}
func (socketReady) event()       {}
func (socketBroken) event()      {}
func (addresses) event()         {}
func (launched) event()          {}
func (readiness) event()         {}
func (launchFailed) event()      {}
func (served) event()            {}
func (exited) event()            {}
func (emptied) event()           {}
func (looked) event()            {}
func (confirmed) event()         {}
func (queueRead) event()         {}
func (frozen) event()            {}
func (drained) event()           {}
func (commandEnded) event()      {}
func (upAlready) event()         {}
func (roused) event()            {}
func (lost) event()              {}
func (deadlinePassed) event()    {}
func (resourcesFreed) event()    {}
func (wakeRequested) event()     {}
func (sleepRequested) event()    {}
func (restartRequested) event()  {}
func (freezeRequested) event()   {}
func (thawRequested) event()     {}
func (resetRequested) event()    {}
func (shutdownRequested) event() {}

// unidentified stands for what waits on a socket and has no identity that we know.
const unidentified = 1<<64 - 1

// action is what a policy wants done. All of them succeed or come back as an event.
//
//sumtype:decl
type action interface{ action() }

type (
	// open the sockets that are not; opened or openFailed follows.
	open struct{}
	// arm all sockets of the service: the next traffic comes back as socketReady.
	arm struct{}
	// armOne socket.
	armOne struct{ socket int }
	// disarm all sockets.
	disarm struct{}
	// launch the process; launched or launchFailed follows. With hold new connections are parked, and so are those that
	// wait.
	launch struct{ queue, hold bool }
	// forget the sockets of earlier runs that this one does not have.
	forget struct{}
	// serve accepts what waits on a socket and starts a process for each, at most room; served
	// follows. With refuse what waits above that is accepted and closed.
	serve struct {
		socket, room int
		refuse       bool
	}
	// refuse what waits on a socket: connections are accepted and closed.
	refuse struct{ socket int }
	// drop the first datagram of each datagram socket, where it is one of these.
	drop struct{ ids []uint64 }
	// look at the activity of all sockets; looked follows.
	look struct{}
	// readQueue asks what waits; queueRead follows.
	readQueue struct{}
	// confirm parks new connections, freezes the service and looks; confirmed follows. A gate is shut.
	confirm struct{}
	// freeze the service; frozen follows.
	freeze struct{}
	// thaw a frozen service.
	thaw struct{}
	// drain parks new connections and waits a moment for the service to take those that
	// came before; drained follows.
	drain struct{}
	// unpark gives the service's own queue what came since confirm or drain.
	unpark struct{}
	// command runs the stop command; commandEnded follows.
	command struct{}
	// rouse launches a gate's destination, unless it is up, and waits until it is ready; roused follows. socket is
	// where the traffic came, or nobody.
	rouse struct {
		reason Reason
		socket int
	}
	// giveUp what rouse or command waits for.
	giveUp struct{}
	// admit leads to the destination who waits and who comes.
	admit struct{}
	// shut the gate: who comes waits. Who was admitted goes on.
	shut struct{}
	// cut all connections of a gate.
	cut struct{}
	// signal the processes of the service.
	signal struct {
		signal syscall.Signal
		whom   whom
	}
	// limited: what waits on a socket has to go on waiting, for a limit. It is to be counted.
	limited struct{}
	// report a change of state.
	report struct {
		from, to State
		reason   Reason
		err      error
	}
)

// whom says which processes get a signal.
type whom uint8

const (
	everybody whom = iota // all processes of the service
	started               // those that were started for it, not their descendants
)

func (open) action()      {}
func (arm) action()       {}
func (armOne) action()    {}
func (disarm) action()    {}
func (launch) action()    {}
func (forget) action()    {}
func (serve) action()     {}
func (refuse) action()    {}
func (drop) action()      {}
func (look) action()      {}
func (readQueue) action() {}
func (confirm) action()   {}
func (freeze) action()    {}
func (thaw) action()      {}
func (drain) action()     {}
func (unpark) action()    {}
func (command) action()   {}
func (rouse) action()     {}
func (giveUp) action()    {}
func (admit) action()     {}
func (shut) action()      {}
func (cut) action()       {}
func (signal) action()    {}
func (limited) action()   {}
func (report) action()    {}

const (
	// goodRun is how long a run must last for its end to count as the first failure again.
	goodRun = time.Minute
	// The delays of a pause: nothing is wrong with the service.
	minPause = 100 * time.Millisecond
	maxPause = 5 * time.Second
	// maxWait bounds every delay that grows and is not configured.
	maxWait = time.Minute
)

// lifecycle is what both policies have in common.
type lifecycle struct {
	state    State
	reason   Reason
	since    time.Time // when state was entered
	deadline time.Time // the one timer; zero: none
	err      error     // of the last failure; nil once a run went well
	busy     string    // what kept the service awake at the last look

	failures int         // in a row
	recent   []time.Time // failures within restart.interval, the oldest first
	pauses   int         // in a row
	unopened bool        // a socket could not be opened yet
}

func (l *lifecycle) life() *lifecycle { return l }

// enter changes the state. It clears the deadline: every state sets its own.
func (l *lifecycle) enter(now time.Time, to State, reason Reason, err error) action {
	r := report{from: l.state, to: to, reason: reason, err: err}
	l.state, l.reason, l.since, l.deadline = to, reason, now, time.Time{}
	return r
}

// fail enters Backoff, or Failed when there were too many of them. The delay doubles
// with each failure in a row.
func (l *lifecycle) fail(now time.Time, spec *Restart, reason Reason, err error) []action {
	l.err = fmt.Errorf("%s: %w", reason, err)
	l.recent = slices.DeleteFunc(l.recent, func(t time.Time) bool { return now.Sub(t) >= spec.Interval })
	if spec.Burst > 0 {
		l.recent = append(l.recent, now)
	}
	if spec.Burst > 0 && len(l.recent) >= spec.Burst {
		l.forgive()
		acts := []action{l.enter(now, Failed, reason, err)}
		if spec.FailedDelay > 0 {
			l.deadline = now.Add(spec.FailedDelay)
		}
		if spec.OnFailure == Reject {
			return append(acts, arm{})
		}
		return acts
	}
	a := l.enter(now, Backoff, reason, err)
	l.deadline = now.Add(growing(spec.Delay, spec.MaxDelay, l.failures))
	l.failures++
	return []action{a}
}

// forgive makes the next failure count as the first.
func (l *lifecycle) forgive() { l.failures, l.recent = 0, nil }

// pause enters Backoff for want of something that will be there again.
func (l *lifecycle) pause(now time.Time, reason Reason, err error) action {
	a := l.enter(now, Backoff, reason, err)
	l.deadline = now.Add(growing(minPause, maxPause, l.pauses))
	l.pauses++
	return a
}

// cannotOpen waits for an address that is not to be had yet.
func (l *lifecycle) cannotOpen(now time.Time, spec *Restart, err error) []action {
	var acts []action
	switch {
	case l.state == Listening && l.reason == ReasonStarted:
		acts = []action{l.enter(now, Backoff, ReasonUnopened, err), disarm{}}
	case l.state != Backoff || !l.unopened:
		return nil
	}
	l.unopened, l.err = true, err
	l.deadline = now.Add(growing(spec.Delay, spec.MaxDelay, l.pauses))
	l.pauses++
	return acts
}

// tryOpen tries to open the sockets that are not.
func (l *lifecycle) tryOpen() []action {
	if l.state != Backoff || !l.unopened {
		return nil
	}
	l.deadline = time.Time{}
	return []action{open{}}
}

// open is told that all sockets are open.
func (l *lifecycle) open(now time.Time) []action {
	if l.state != Backoff || !l.unopened {
		return nil
	}
	l.unopened, l.pauses, l.err = false, 0, nil
	return []action{l.enter(now, Listening, ReasonOpened, nil), arm{}}
}

// growing doubles a delay n times, up to limit.
func growing(delay, limit time.Duration, n int) time.Duration {
	for ; n > 0 && delay < limit; n-- {
		delay = min(delay, limit-delay) + delay // without overflow
	}
	return min(delay, limit)
}

// due says whether the deadline has come.
func (l *lifecycle) due(now time.Time) bool {
	return !l.deadline.IsZero() && !now.Before(l.deadline)
}

// wanted is what to do as soon as the present step is over.
type wanted uint8

const (
	wantNothing wanted = iota
	wantSleep
	wantWake
	wantRestart
	wantFreeze
	wantShutdown
	wantShutdownNow
)

// want notes what to do next. The last request wins, but there is no way back from a shutdown.
func (w *wanted) want(why wanted) {
	if *w < wantShutdown || why > *w {
		*w = why
	}
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

// A bucket enforces a Rate: it holds up to Count tokens, and gets Count more in each Per.
// The zero value with the zero Rate never runs empty.
type bucket struct {
	tokens float64
	at     time.Time // when tokens was right; zero: the bucket is full
}

// fill brings the bucket up to date and returns how many whole tokens it has; -1: any number.
func (b *bucket) fill(now time.Time, r Rate) int {
	if r.Count <= 0 {
		return -1
	}
	full := float64(r.Count)
	if b.at.IsZero() || now.Before(b.at) {
		b.tokens = full
	} else {
		b.tokens = min(full, b.tokens+full*float64(now.Sub(b.at))/float64(r.Per))
	}
	b.at = now
	return int(b.tokens + 1e-9) // a token that is due now may lack a rounding error
}

// take removes tokens that fill has found.
func (b *bucket) take(n int) { b.tokens -= float64(n) }

// admitStart takes a token for a start (limits.wake_rate). Where there is none the service waits for the next one.
func (l *lifecycle) admitStart(now time.Time, starts *bucket, r Rate) (instead []action) {
	switch starts.fill(now, r) {
	case -1:
	case 0:
		a := l.enter(now, Backoff, ReasonRate, nil)
		l.deadline = starts.next(now, r)
		return []action{a, disarm{}}
	default:
		starts.take(1)
	}
	return nil
}

// next returns when an empty bucket has a token again.
func (b *bucket) next(now time.Time, r Rate) time.Time {
	lacks := max(0, 1-b.tokens)
	return now.Add(time.Duration(lacks*float64(r.Per)/float64(r.Count)) + 1)
}
