package supervisor

import (
	"syscall"
	"time"

	"hibergate/activation"
	"hibergate/supervisor/activity"
	"hibergate/supervisor/process"
)

// Handoff says how the process of a service gets its sockets.
type Handoff uint8

// The ways to hand over, as the configuration names them.
const (
	ListenFDs Handoff = iota // "listen-fds": descriptors from 3 on, as sd_listen_fds(3) describes
	Stdio                    // "stdio": one socket as standard input and output, as inetd does
)

// Service is one service as configured: validated, immutable, shared freely
// between goroutines.
type Service struct {
	Name    string            // [A-Za-z0-9][A-Za-z0-9._-]*, at most 64 bytes
	Sockets []activation.Spec // at least one; their order is the order of the descriptors
	Accept  bool              // one process per connection; else one process for all sockets
	Handoff Handoff
	Exec    process.Exec
	Idle    Idle
	Stop    Stop

	Accounting activity.Accounting
}

// Idle says when a service counts as idle and what follows.
type Idle struct {
	When      activity.When
	StopAfter time.Duration // 0: never stopped for idleness
}

// Stop says how a process is ended. After Timeout the whole process group is killed.
type Stop struct {
	Signal  syscall.Signal // never 0; config sets SIGTERM
	Timeout time.Duration  // never 0; config sets 90 s
}

// DefaultStop is used where the configuration says nothing.
func DefaultStop() Stop { return Stop{Signal: syscall.SIGTERM, Timeout: 90 * time.Second} }

// String returns the word of the configuration.
func (h Handoff) String() string {
	if h == Stdio {
		return "stdio"
	}
	return "listen-fds"
}
