package supervisor

import (
	"net/netip"
	"syscall"
	"time"

	"hibergate/activation"
	"hibergate/activation/adopt"
	"hibergate/supervisor/activity"
	"hibergate/supervisor/gate"
	"hibergate/supervisor/process"
)

// Handoff says how the process of a service gets its sockets.
type Handoff uint8

// The ways to hand over, as the configuration names them.
const (
	ListenFDs Handoff = iota // "listen-fds": descriptors from 3 on, as sd_listen_fds(3) describes
	Stdio                    // "stdio": one socket as standard input and output, as inetd does
	Adopt                    // "adopt": the program's own bind(2) gets them
	Gate                     // "gate": what comes to them is led to what is not our child
)

// Service is one service as configured: validated, immutable, shared freely
// between goroutines.
type Service struct {
	Name    string            // [A-Za-z0-9][A-Za-z0-9._-]*, at most 64 bytes
	Sockets []activation.Spec // at least one, or with Adopt one in Learn; their order is the order of the descriptors
	Learn   []Learn           // with Adopt: sockets that are known once a process has bound them
	Accept  bool              // one process per connection; else one process for all sockets
	Handoff Handoff
	Exec    process.Exec // with Gate it has no Command, and is the context of those that Gate has
	Gate    *gate.Spec   // with Handoff Gate only
	Idle    Idle
	Wake    Wake
	Start   Start
	Ready   Ready
	Stop    Stop
	Restart Restart
	Limits  Limits

	Accounting activity.Accounting

	// RefuseIOUring makes io_uring_setup(2) fail as on a kernel without it. With Adopt only: what a program
	// binds by io_uring cannot be adopted.
	RefuseIOUring bool
}

// Idle says when a service counts as idle and what follows.
type Idle struct {
	When      activity.When
	StopAfter time.Duration // 0: never stopped for idleness
}

// Wake says which traffic wakes a service. The zero value: any.
type Wake struct {
	// Ignore are sources that may use the service but neither wake it nor keep it awake. TCP only.
	Ignore []netip.Prefix
	// MinBytes is how much a client must have sent before it wakes the service; 0: nothing. TCP only.
	MinBytes int
}

// Start says what a start may take.
type Start struct {
	// Timeout bounds the time from the start to the first traffic that is taken: after it, a
	// process that has taken nothing of what woke it has failed. 0: no bound.
	Timeout time.Duration
}

// Learn stands for the sockets that match Pattern. Spec has the name and the options that they get as soon as they are
// ours; its Address means nothing.
type Learn struct {
	Pattern adopt.Pattern
	Spec    activation.Spec
}

// Ready says when a start is over. The zero value: as soon as the program is executed.
type Ready struct {
	Type ReadyType
	// Hold keeps clients out of the queues of the TCP sockets until then. With ReadyNotify and Adopt only.
	Hold bool
}

// ReadyType says what makes a service ready.
type ReadyType uint8

// The types, as the configuration names them.
const (
	ReadyExec   ReadyType = iota // "exec": the program is executed
	ReadyBind                    // "bind": with Adopt, its sockets are bound, and those with connections listen
	ReadyNotify                  // "notify": it says READY=1 (sd_notify(3))
)

// Stop says how a service is ended: Command, then Signal, then after Timeout FinalSignal.
type Stop struct {
	Command     []string       // run first, as the service's user; empty: none
	KillMode    KillMode       // which processes get the signals
	Signal      syscall.Signal // never 0; config sets SIGTERM
	FinalSignal syscall.Signal // never 0; config sets SIGKILL
	Timeout     time.Duration  // never 0; config sets 90 s
}

// KillMode says which processes of a service are ended; see systemd.kill(5).
type KillMode uint8

// The modes, as the configuration names them.
const (
	KillControlGroup KillMode = iota // "control-group": all of them
	KillMixed                        // "mixed": Signal to the first process, FinalSignal to all that are left
	KillProcess                      // "process": the first process alone; what is left runs on
)

// Restart says what follows when a service fails. A run or start that fails is tried again
// after Delay, then twice that, up to MaxDelay. After Burst failures within Interval it is given up for FailedDelay.
type Restart struct {
	Delay, MaxDelay time.Duration // never 0
	Burst           int           // 0: never given up
	Interval        time.Duration // never 0
	FailedDelay     time.Duration // 0: until somebody asks
	OnFailure       OnFailure
}

// OnFailure says what clients of a service meet that was given up.
type OnFailure uint8

// The choices, as the configuration names them.
const (
	Hold   OnFailure = iota // "hold": they wait in the queue
	Reject                  // "reject": they are accepted and closed, so that they learn of it
)

// Limits bound what clients can make a service cost. The zero value: no limits.
type Limits struct {
	// With Accept only: connections that are served at a time, in all and for each source: an IPv4
	// address, an IPv6 prefix of SourcePrefix bits, a user of a Unix socket. 0: any number.
	MaxConnections          int
	MaxConnectionsPerSource int
	SourcePrefix            int      // never 0; config sets 64
	Overflow                Overflow // of MaxConnections; what one source has too many is always closed

	AcceptRate          Rate // with Accept: connections accepted; more wait in the queue
	AcceptRatePerSource Rate // with Accept: the same for each source; more are closed
	WakeRate            Rate // starts of the process; traffic waits
}

// Overflow says what happens to a connection above the limit.
type Overflow uint8

// The choices, as the configuration names them.
const (
	OverflowClose Overflow = iota // "close": it is accepted and closed
	OverflowQueue                 // "queue": it waits until another one ends
)

// Rate is at most Count in Per. The zero value: any.
type Rate struct {
	Count int
	Per   time.Duration
}

// Global bounds all services together. The zero value: no bounds.
type Global struct {
	MaxProcesses int     // processes started and not yet ended; 0: any number
	MaxLoad      float64 // nothing is started while the load average of the last minute is above; 0: whatever it is
	NoParking    bool    // connections are not parked while a service stops
}

// The values where the configuration says nothing.
const (
	DefaultStartTimeout = 90 * time.Second
	DefaultStopTimeout  = 90 * time.Second
	DefaultSourcePrefix = 64
)

// DefaultStop is used where the configuration says nothing.
func DefaultStop() Stop {
	return Stop{Signal: syscall.SIGTERM, FinalSignal: syscall.SIGKILL, Timeout: DefaultStopTimeout}
}

// DefaultRestart is used where the configuration says nothing.
func DefaultRestart() Restart {
	return Restart{
		Delay: time.Second, MaxDelay: time.Minute,
		Burst: 10, Interval: 10 * time.Minute, FailedDelay: 5 * time.Minute,
	}
}

// String returns the word of the configuration.
func (h Handoff) String() string {
	switch h {
	case Stdio:
		return "stdio"
	case Adopt:
		return "adopt"
	case Gate:
		return "gate"
	case ListenFDs:
	}
	return "listen-fds"
}

// ownAccount says whether all that counts as activity goes through the gate: nothing is forwarded by the kernel, or comes to the destination
// by other ways.
func (s *Service) ownAccount() bool {
	return s.Gate == nil || s.Gate.Forward == gate.Relay && !s.Gate.WatchDestination
}
