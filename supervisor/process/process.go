package process

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// Process is a running program, as Start made it: the leader of its own session and process
// group, and a main process of its [Tree]. Until Reap its pid and group belong to it even if
// it is dead, so signals never reach a stranger. Its methods may be called from several
// goroutines.
type Process struct {
	pid   int
	pidfd int

	mu       sync.Mutex // held over a signal, so that Reap cannot come between
	reaped   bool
	listener int // of Spec.Filter; owned until it is taken; -1: none
}

// PID returns the process id, which is the id of its group too.
func (p *Process) PID() int { return p.pid }

// PIDFD returns a descriptor that becomes readable when the process is dead;
// see pidfd_open(2). It is borrowed: Reap closes it.
func (p *Process) PIDFD() int { return p.pidfd }

// TakeListener returns the descriptor on which the kernel asks about what Spec.Filter says (seccomp_unotify(2)), and
// which is the caller's from then on; -1 where there is none, or it was taken. Until it is closed the
// program waits for the answers. One that nobody takes is closed by Reap.
func (p *Process) TakeListener() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	fd := p.listener
	p.listener = -1
	return fd
}

// Signal sends a signal to this process alone. It does nothing if the process has ended.
func (p *Process) Signal(sig syscall.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.reaped {
		return nil
	}
	if err := unix.PidfdSendSignal(p.pidfd, sig, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("send %s to process %d: %w", signalName(sig), p.pid, err)
	}
	return nil
}

// KillGroup sends SIGKILL to the process group, which may outlive its leader. It does
// nothing if nobody is left in it, and nothing after Reap: as long as the dead leader is
// not collected, the group's id cannot mean anybody else.
func (p *Process) KillGroup() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.reaped {
		return nil
	}
	if err := unix.Kill(-p.pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process group %d: %w", p.pid, err)
	}
	return nil
}

// Reap collects a process whose PIDFD has become readable, and leaves the rest of its group
// and tree alone. It should be called soon: orphans that died later may have to wait for
// it. Calling it for a running process is an error and does nothing; after the first
// success it returns os.ErrProcessDone.
func (p *Process) Reap() (ExitStatus, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.reaped {
		return ExitStatus{}, fmt.Errorf("reap process %d: %w", p.pid, os.ErrProcessDone)
	}
	dead, err := p.dead()
	if err != nil {
		return ExitStatus{}, fmt.Errorf("reap process %d: %w", p.pid, err)
	}
	if !dead {
		return ExitStatus{}, fmt.Errorf("reap process %d: still running", p.pid)
	}
	return p.collect()
}

// dead asks the pidfd whether the process has ended.
func (p *Process) dead() (bool, error) {
	fds := []unix.PollFd{{Fd: int32(p.pidfd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 0)
		if !errors.Is(err, unix.EINTR) {
			return n > 0, err
		}
	}
}

// discard collects a child that failed before its program ran.
func (p *Process) discard() error {
	_ = unix.Kill(p.pid, unix.SIGKILL) // for the steps at which it has begun to run
	_, err := p.collect()
	return err
}

// collect waits for the end of the process and closes the pidfd. Until then the
// pid is that of our child, alive or dead, so it needs no waitid on the pidfd.
func (p *Process) collect() (ExitStatus, error) {
	var status unix.WaitStatus
	for {
		_, err := unix.Wait4(p.pid, &status, 0, nil)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EINTR) {
			return ExitStatus{}, fmt.Errorf("wait for process %d: %w", p.pid, err)
		}
	}
	p.reaped = true
	family.reaped(p.pid)
	if p.listener >= 0 {
		_ = unix.Close(p.listener) // nobody can ask any more, or is to be answered
		p.listener = -1
	}
	if err := unix.Close(p.pidfd); err != nil {
		return ExitStatus{}, fmt.Errorf("close pidfd of process %d: %w", p.pid, err)
	}
	if status.Signaled() {
		return ExitStatus{Signal: status.Signal(), Core: status.CoreDump()}, nil
	}
	return ExitStatus{Code: status.ExitStatus()}, nil
}

// ExitStatus says how a process ended. The zero value is success.
type ExitStatus struct {
	Code   int            // what it passed to exit(2); 0 if a signal ended it
	Signal syscall.Signal // the signal that ended it; 0: it exited by itself
	Core   bool           // it left a core dump
}

// String reads like "exit status 3" or "killed by SIGTERM".
func (e ExitStatus) String() string {
	if e.Signal == 0 {
		return fmt.Sprintf("exit status %d", e.Code)
	}
	name := signalName(e.Signal)
	if e.Core {
		name += " (core dumped)"
	}
	return "killed by " + name
}

func signalName(sig syscall.Signal) string {
	if name := unix.SignalName(sig); name != "" {
		return name
	}
	return fmt.Sprintf("signal %d", int(sig)) // real-time signals have no names
}
