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
// are *activation.Watcher, *activity.Tracker, *execLauncher and *process.Tree.

// Watcher is where the loop waits: for a descriptor that is ready (once for each
// Arm, for each arrival after ArmEdge), for Wake, or for a deadline.
type Watcher interface {
	Add(fd int, token uint64) error
	Arm(fd int, token uint64) error
	ArmEdge(fd int, token uint64) error
	Disarm(fd int, token uint64) error
	Remove(fd int) error
	Wait(deadline time.Time) ([]activation.Ready, error)
	Wake() error
	Close() error
}

// Looker tells what the kernel knows about the traffic of sockets.
type Looker interface {
	Add(sock activity.Socket)
	Remove(key uint32)
	Look(ctx context.Context, now time.Time, keys []uint32) []activity.Summary
	Held(ctx context.Context, key uint32, roots []int) (int, error)
	Read(ctx context.Context, roots []int) (uint64, error)
	Queued(ctx context.Context, keys []uint32) ([]uint64, error)
	Waiting(ctx context.Context, key uint32) ([]activity.Client, error)
	Handshakes(ctx context.Context, key uint32) ([]uint64, error)
	Flows(ctx context.Context, key uint32, roots []int) ([]activity.Flow, string)
	Close() error
}

// Launcher starts processes. Its methods may block and are called outside the loop,
// except for Tree and Tracking.
type Launcher interface {
	// Tree makes the tree of a service, without asking the kernel for anything.
	Tree(svc *Service) Tree
	// Tracking says in words how descendants are found.
	Tracking() string
	// Launch starts the one process of a service, which gets all sockets. notify is what NOTIFY_SOCKET says; empty:
	// nothing.
	Launch(svc *Service, tree Tree, sockets []*activation.Socket, notify string) (Process, error)
	// Serve accepts what waits on a socket and starts a process for each connection.
	Serve(svc *Service, tree Tree, socket *activation.Socket, order serveOrder) (batch, error)
	// Run runs a command of the service to its end. When ctx ends it is killed, with its process group.
	Run(ctx context.Context, svc *Service, tree Tree, argv, env []string) error
	// Abort ends starts that are held up.
	Abort()
	Close() error
}

// serveOrder is what one Serve is to do.
type serveOrder struct {
	held    *connection // accepted before; it is served first. nil: none
	room    int         // how many processes may be started
	refuse  bool        // what waits above room is accepted and closed
	sources *sources    // nil: every source is as good as any other
}

// batch is what came of one Serve.
type batch struct {
	procs    []servedProcess
	accepted int
	refused  Refused
	held     *connection // no process could be started for it
	pause    bool        // the error is about resources, not about the service
}

// servedProcess is a process and whom it serves.
type servedProcess struct {
	Process
	source source
}

// Process is a handle on a process that was started.
type Process interface {
	PID() int
	PIDFD() int // readable once it has ended; borrowed
	Signal(sig syscall.Signal) error
	KillGroup() error
	TakeListener() int // where the kernel asks what it may bind; the caller's to close; -1: nowhere
	Reap() (process.ExitStatus, error)
}

// Tree is all processes of a service, with all descendants.
type Tree interface {
	Signal(sig syscall.Signal) error
	Kill() error
	Freeze(ctx context.Context) error
	Thaw() error
	PIDs() ([]int, error)
	Empty() (bool, error)
	Ended() (fd int, err error) // readable when it is worth asking Empty again; the caller's to close
	Rest() error                // nobody is in it for now
	Close() error
}

var (
	_ Process = (*process.Process)(nil)
	_ Tree    = (*process.Tree)(nil)
)
