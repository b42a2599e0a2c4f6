package supervisor

import (
	"fmt"
	"syscall"
	"time"

	"hibergate/supervisor/activity"
	"hibergate/supervisor/process"
)

// A policy decides about one service. It is pure: no clock, no I/O, no
// goroutine; step is told what happened and when, and returns what to do, in
// order. There are two: solo (one process for all sockets) and perConnection
// (accept = true).
type policy interface {
	step(now time.Time, ev event) []action
	life() *lifecycle
}

// event is a fact that a policy is told.
//
//sumtype:decl
type event interface{ event() }

type (
	// socketReady: something waits on a socket that was armed.
	socketReady struct{ socket int }
	// socketBroken: a socket was shut down and cannot be made to listen again.
	socketBroken struct{ err error }
	// launched: the process of this run was executed. queued are the identities of
	// what waited on the sockets before, where launch asked for them.
	launched struct{ queued []uint64 }
	// launchFailed: there is no process.
	launchFailed struct{ err error }
	// served: connections were accepted, and each has its process. err says why not
	// more: nil where nobody waits any longer or the batch was full.
	served struct {
		socket  int
		started int
		err     error
		pause   bool // err is about the supervisor's resources, not about the service
	}
	// exited: a process of the service ended. queued as in launched where that asked; else
	// only whether anything waits counts. It holds unidentified where something waits that
	// cannot be named.
	exited struct {
		status process.ExitStatus
		queued []uint64
	}
	// looked: the answer to look, one Summary for each socket.
	looked struct{ sums []activity.Summary }
	// confirmed: the answer to confirm. The process is frozen unless err is set.
	confirmed struct {
		sums []activity.Summary
		err  error
	}
	// deadlinePassed: the deadline may have come. It is harmless when it has not.
	deadlinePassed struct{}
	wakeRequested  struct{}
	sleepRequested struct{}
	// shutdownRequested: the supervisor goes down; now says to kill without waiting.
	shutdownRequested struct{ now bool }
)

func (socketReady) event()       {}
func (socketBroken) event()      {}
func (launched) event()          {}
func (launchFailed) event()      {}
func (served) event()            {}
func (exited) event()            {}
func (looked) event()            {}
func (confirmed) event()         {}
func (deadlinePassed) event()    {}
func (wakeRequested) event()     {}
func (sleepRequested) event()    {}
func (shutdownRequested) event() {}

// unidentified stands for what waits on a socket and has no identity that we know.
const unidentified = 1<<64 - 1

// action is what a policy wants done. All of them succeed or come back as an event.
//
//sumtype:decl
type action interface{ action() }

type (
	// arm all sockets of the service: the next traffic comes back as socketReady.
	arm struct{}
	// armOne socket.
	armOne struct{ socket int }
	// disarm all sockets.
	disarm struct{}
	// launch the process; launched or launchFailed follows.
	launch struct{ queue bool }
	// serve accepts what waits on a socket and starts a process for each; served follows.
	serve struct{ socket int }
	// look at the activity of all sockets; looked follows.
	look struct{}
	// confirm freezes the process and looks; confirmed follows.
	confirm struct{}
	// thaw a frozen process.
	thaw struct{}
	// signal all processes of the service, with their process groups.
	signal struct{ signal syscall.Signal }
	// report a change of state.
	report struct {
		from, to State
		reason   Reason
		err      error
	}
)

func (arm) action()     {}
func (armOne) action()  {}
func (disarm) action()  {}
func (launch) action()  {}
func (serve) action()   {}
func (look) action()    {}
func (confirm) action() {}
func (thaw) action()    {}
func (signal) action()  {}
func (report) action()  {}

// The delays of Backoff, and how long a run must last for its end to count as
// the first failure again.
const (
	minBackoff = time.Second
	maxBackoff = time.Minute
	goodRun    = time.Minute
)

// lifecycle is what both policies have in common.
type lifecycle struct {
	state    State
	reason   Reason
	since    time.Time // when state was entered
	deadline time.Time // the one timer; zero: none
	failures int       // in a row
	err      error     // of the last failure; nil once a run went well
	busy     string    // what kept the service awake at the last look
}

func (l *lifecycle) life() *lifecycle { return l }

// enter changes the state. It clears the deadline: every state sets its own.
func (l *lifecycle) enter(now time.Time, to State, reason Reason, err error) action {
	r := report{from: l.state, to: to, reason: reason, err: err}
	l.state, l.reason, l.since, l.deadline = to, reason, now, time.Time{}
	return r
}

// fail enters Backoff. The delay doubles with each failure in a row.
func (l *lifecycle) fail(now time.Time, reason Reason, err error) []action {
	l.failures++
	l.err = fmt.Errorf("%s: %w", reason, err)
	delay := maxBackoff
	if n := l.failures - 1; n < 6 {
		delay = min(minBackoff<<n, maxBackoff)
	}
	a := l.enter(now, Backoff, reason, err)
	l.deadline = now.Add(delay)
	return []action{a}
}

// due says whether the deadline has come.
func (l *lifecycle) due(now time.Time) bool {
	return !l.deadline.IsZero() && !now.Before(l.deadline)
}
