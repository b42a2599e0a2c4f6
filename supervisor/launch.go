package supervisor

import (
	"os"

	"golang.org/x/sys/unix"

	"hibergate/activation"
	"hibergate/supervisor/process"
)

// execLauncher starts real programs.
type execLauncher struct {
	spawner *process.Spawner
	stderr  int
	stdout  int
}

func newExecLauncher() (*execLauncher, error) {
	spawner, err := process.NewSpawner()
	if err != nil {
		return nil, err
	}
	return &execLauncher{spawner: spawner, stdout: int(os.Stdout.Fd()), stderr: int(os.Stderr.Fd())}, nil
}

// Close implements Launcher.
func (l *execLauncher) Close() error { return l.spawner.Close() }

// Abort implements Launcher.
func (l *execLauncher) Abort() { l.spawner.Abort() }

// Launch implements Launcher.
func (l *execLauncher) Launch(svc *Service, sockets []*activation.Socket) (Process, error) {
	for _, s := range sockets {
		// The flag is in the open file description, so the last process may have set it.
		if err := unix.SetNonblock(s.FD(), false); err != nil {
			return nil, err
		}
	}
	if svc.Handoff == Stdio {
		return l.start(svc, activation.StdioSocket(sockets[0]))
	}
	return l.start(svc, activation.ListenFDs(sockets))
}

// batchSize is how many connections one Serve takes: enough to share the cost of
// a wake-up, and few enough to be fair to other services.
const batchSize = 16

// Serve implements Launcher.
func (l *execLauncher) Serve(svc *Service, socket *activation.Socket, held *connection) (b batch, err error) {
	c := held
	for len(b.procs) < batchSize {
		if c == nil {
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
		}
		p, err := l.startConnection(svc, c)
		if err != nil {
			b.held = c
			return b, err
		}
		closeConnection(c)
		b.procs, c = append(b.procs, p), nil
	}
	return b, nil
}

func (l *execLauncher) startConnection(svc *Service, c *connection) (Process, error) {
	h := activation.ListenConnection(c.fd, c.peer)
	if svc.Handoff == Stdio {
		h = activation.StdioConnection(c.fd, c.peer)
	}
	if svc.Exec.UCSPIEnv {
		h.Env = append(h.Env, activation.UCSPI(c.peer, svc.Sockets[0].Address.Network)...)
	}
	return l.start(svc, h)
}

func (l *execLauncher) start(svc *Service, h activation.Handoff) (Process, error) {
	id, err := svc.Exec.Resolve()
	if err != nil {
		return nil, err
	}
	env, err := svc.Exec.Environ(id, h.Env)
	if err != nil {
		return nil, err
	}
	p, err := l.spawner.Start(&process.Spec{
		Exec: &svc.Exec, Identity: id, Env: env, PIDEnv: h.PIDEnv,
		FDs: h.FDs, First: h.First, Stdout: l.stdout, Stderr: l.stderr,
	})
	if err != nil {
		return nil, err // not a nil *process.Process in an interface
	}
	return p, nil
}

func closeConnection(c *connection) { _ = unix.Close(c.fd) } // close(2) releases it whatever it returns
