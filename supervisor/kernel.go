package supervisor

import (
	"context"
	"syscall"
	"time"

	"hibergate/activation"
	"hibergate/supervisor/activity"
	"hibergate/supervisor/process"
)

// What the loop needs of the world. Tests put fakes here; everywhere else these
// are *activation.Watcher, *activity.Tracker and *execLauncher.

// Watcher is where the loop waits: for a descriptor that is ready (once for each
// Arm), for Wake, or for a deadline.
type Watcher interface {
	Add(fd int, token uint64) error
	Arm(fd int, token uint64) error
	Disarm(fd int, token uint64) error
	Remove(fd int) error
	Wait(deadline time.Time) ([]activation.Ready, error)
	Wake() error
	Close() error
}

// Looker tells what the kernel knows about the traffic of sockets.
type Looker interface {
	Look(ctx context.Context, now time.Time, keys []uint32) []activity.Summary
	Held(ctx context.Context, key uint32, roots []int) (int, error)
	Read(ctx context.Context, roots []int) (uint64, error)
	Queued(ctx context.Context, keys []uint32) ([]uint64, error)
	Flows(ctx context.Context, key uint32, roots []int) ([]activity.Flow, string)
	Close() error
}

// Launcher starts processes. Its methods may block and are called outside the loop.
type Launcher interface {
	// Launch starts the one process of a service, which gets all sockets.
	Launch(svc *Service, sockets []*activation.Socket) (Process, error)
	// Serve accepts what waits on a socket and starts a process for each connection,
	// first for held if there is one. It returns the connection for which no process
	// could be started; pause says that err is about resources, not about the service.
	Serve(svc *Service, socket *activation.Socket, held *connection) (batch, error)
	// Abort ends starts that are held up.
	Abort()
	Close() error
}

// batch is what came of one Serve.
type batch struct {
	procs    []Process
	accepted int
	held     *connection
	pause    bool
}

// Process is a handle on a running process and its process group.
type Process interface {
	PID() int
	PIDFD() int // readable once it has ended; borrowed
	Signal(sig syscall.Signal) error
	Freeze(ctx context.Context) error
	Thaw() error
	Reap() (process.ExitStatus, error)
}

var _ Process = (*process.Process)(nil)
