package supervisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation"
	"hibergate/activation/adopt"
	"hibergate/supervisor/process"
)

// execLauncher starts real programs.
type execLauncher struct {
	spawner *process.Spawner
	stderr  int
	stdout  int
}

func newExecLauncher(name string) (*execLauncher, error) {
	spawner, err := process.NewSpawner(name)
	if err != nil {
		return nil, err
	}
	return &execLauncher{spawner: spawner, stdout: int(os.Stdout.Fd()), stderr: int(os.Stderr.Fd())}, nil
}

// Close implements Launcher.
func (l *execLauncher) Close() error { return l.spawner.Close() }

// Abort implements Launcher.
func (l *execLauncher) Abort() { l.spawner.Abort() }

// Tree implements Launcher.
func (l *execLauncher) Tree(svc *Service) Tree { return l.spawner.NewTree(svc.Name) }

// Tracking implements Launcher.
func (l *execLauncher) Tracking() string { return l.spawner.Tracking() }

// Launch implements Launcher.
func (l *execLauncher) Launch(svc *Service, tree Tree, sockets []*activation.Socket, notify string) (Process, error) {
	if svc.Handoff == Adopt {
		// What waits is for the program to take from the socket that it binds.
		return l.start(svc, tree, svc.Exec.Command, withNotify(activation.Handoff{First: 3}, notify), filterOf(svc))
	}
	for _, s := range sockets {
		// The flag is in the open file description, so the last process may have set it.
		if err := unix.SetNonblock(s.FD(), false); err != nil {
			return nil, err
		}
	}
	h := activation.ListenFDs(sockets)
	if svc.Handoff == Stdio {
		h = activation.StdioSocket(sockets[0])
	}
	return l.start(svc, tree, svc.Exec.Command, withNotify(h, notify), nil)
}

// withNotify adds the variable of sd_notify(3).
func withNotify(h activation.Handoff, notify string) activation.Handoff {
	if notify != "" {
		h.Env = append(h.Env, "NOTIFY_SOCKET="+notify)
	}
	return h
}

// filterOf is what a program that adopts is asked about.
func filterOf(svc *Service) []unix.SockFilter {
	paths := slices.ContainsFunc(svc.Sockets, func(s activation.Spec) bool { return s.Address.Network.Unix() && !s.Address.Abstract() })
	abstract := slices.ContainsFunc(svc.Sockets, func(s activation.Spec) bool { return s.Address.Abstract() })
	auto := slices.ContainsFunc(svc.Learn, func(l Learn) bool { return l.Pattern == adopt.Auto })
	return adopt.Filter(abstract || auto, paths)
}

// batchSize is how many connections one Serve takes at most: enough to share the cost of
// a wake-up, and few enough to be fair to other services.
const batchSize = 16

// Serve implements Launcher.
func (l *execLauncher) Serve(svc *Service, tree Tree, socket *activation.Socket, order serveOrder) (b batch, err error) {
	c := order.held
	for range batchSize {
		if c == nil {
			if len(b.procs) >= order.room && !order.refuse {
				return b, nil
			}
			fd, peer, err := socket.Accept()
			if err != nil {
				switch activation.KindOfAcceptError(err) {
				case activation.AcceptEmpty, activation.AcceptShutDown: // the watcher sees the hangup
					return b, nil
				case activation.AcceptSkip:
					continue
				case activation.AcceptPause, activation.AcceptFailed:
				}
				b.pause = true
				return b, err
			}
			b.accepted++
			c = &connection{fd: fd, peer: peer}
			if !b.admit(c, socket, order) {
				closeConnection(c)
				c = nil
				continue
			}
		}
		if len(b.procs) >= order.room { // held, and the room is gone meanwhile
			b.held = c
			return b, nil
		}
		p, err := l.startConnection(svc, tree, c)
		if err != nil {
			b.held, b.pause = c, lacksResources(err)
			return b, err
		}
		closeConnection(c)
		b.procs, c = append(b.procs, servedProcess{p, c.source}), nil
	}
	return b, nil
}

// admit says whether an accepted connection may have a process, and counts it where not.
func (b *batch) admit(c *connection, socket *activation.Socket, order serveOrder) bool {
	if a := socket.Spec().Options.Access; a != nil && c.peer.Remote.IsValid() && !a.Permits(c.peer.Remote.Addr()) {
		b.refused.Access++
		return false
	}
	if len(b.procs) >= order.room {
		b.refused.MaxConnections++
		return false
	}
	var why sourceLimit
	if c.source, why = order.sources.admit(time.Now(), &c.peer); why != withinLimits {
		b.refused.count(why)
		return false
	}
	return true
}

func (l *execLauncher) startConnection(svc *Service, tree Tree, c *connection) (Process, error) {
	h := activation.ListenConnection(c.fd, c.peer)
	if svc.Handoff == Stdio {
		h = activation.StdioConnection(c.fd, c.peer)
	}
	if svc.Exec.UCSPIEnv {
		h.Env = append(h.Env, activation.UCSPI(c.peer, svc.Sockets[0].Address.Network)...)
	}
	return l.start(svc, tree, svc.Exec.Command, h, nil)
}

// Run implements Launcher.
func (l *execLauncher) Run(ctx context.Context, svc *Service, tree Tree, argv, env []string) error {
	p, err := l.start(svc, tree, argv, activation.Handoff{First: 3, Env: env}, nil)
	if err != nil {
		return err
	}
	killed := make(chan error, 1)
	keep := context.AfterFunc(ctx, func() { killed <- errors.Join(p.KillGroup(), p.Signal(unix.SIGKILL)) })
	waitReadable(p.PIDFD(), -1)
	late := !keep()
	if late {
		err = <-killed // before the pid is anybody else's
	}
	status, reapErr := p.Reap()
	switch {
	case reapErr != nil:
		return errors.Join(err, reapErr)
	case late && status.Signal == unix.SIGKILL:
		return fmt.Errorf("%s: killed: %w", argv[0], context.Cause(ctx))
	case status != process.ExitStatus{}:
		return fmt.Errorf("%s: %s", argv[0], status)
	}
	return nil
}

// waitReadable blocks until a descriptor is readable, at most for a time (negative: for ever).
func waitReadable(fd int, limit time.Duration) bool {
	end := time.Now().Add(limit)
	for {
		ms := -1
		if limit >= 0 {
			ms = int(max(0, time.Until(end)).Milliseconds()) + 1
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, ms)
		switch {
		case n > 0, err != nil && !errors.Is(err, unix.EINTR):
			return true
		case limit >= 0 && !time.Now().Before(end):
			return false
		}
	}
}

func (l *execLauncher) start(svc *Service, tree Tree, argv []string, h activation.Handoff, filter []unix.SockFilter) (Process, error) {
	id, err := svc.Exec.Resolve()
	if err != nil {
		return nil, err
	}
	env, err := svc.Exec.Environ(id, h.Env)
	if err != nil {
		return nil, err
	}
	x := &svc.Exec
	if !slices.Equal(argv, x.Command) {
		other := *x
		other.Command, other.Argv0 = argv, ""
		x = &other
	}
	p, err := l.spawner.Start(&process.Spec{
		Exec: x, Identity: id, Env: env, PIDEnv: h.PIDEnv, Tree: tree.(*process.Tree),
		Filter: filter, FDs: h.FDs, First: h.First, Stdout: l.stdout, Stderr: l.stderr,
	})
	if err != nil {
		return nil, err // not a nil *process.Process in an interface
	}
	return p, nil
}

// lacksResources says whether a start failed for want of what will be there again: descriptors,
// memory, processes.
func lacksResources(err error) bool {
	for _, errno := range []error{unix.EMFILE, unix.ENFILE, unix.ENOMEM, unix.EAGAIN, unix.ENOBUFS} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}

// mainPID is what a stop command is told.
func mainPID(pid int) string { return "MAINPID=" + strconv.Itoa(pid) }

func closeConnection(c *connection) { _ = unix.Close(c.fd) } // close(2) releases it whatever it returns
