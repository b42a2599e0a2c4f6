package process

import (
	"errors"
	"fmt"
	"os"
	"os/user"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Spec is one start of a program.
type Spec struct {
	Exec *Exec
	// FDs become the descriptors First, First+1, ... of the process. They are
	// borrowed, may be anywhere in our table, and may repeat: inetd's way is
	// First 0 and the connection twice. O_NONBLOCK belongs to the open file, not
	// to the descriptor, so whoever hands a socket over makes it blocking first.
	FDs   []int
	First int
	// Env is the whole environment beside PIDEnv.
	Env []string
	// PIDEnv names the variable that carries the pid of the new process, such as
	// LISTEN_PID; empty for none.
	PIDEnv string
	// Stdout and Stderr become 1 and 2 where FDs do not cover them; they are
	// borrowed. -1: /dev/null. (The zero value is our own standard input.)
	// Standard input is /dev/null where FDs do not cover it.
	Stdout, Stderr int
	// Identity is who the process runs as; nil: as the supervisor.
	Identity *Identity
	// Filter is a seccomp filter that asks about system calls (SECCOMP_RET_USER_NOTIF, seccomp(2)), of the program and all
	// that descend from it; [Process.TakeListener] is where it asks. Without CAP_SYS_ADMIN the program gets
	// no_new_privs, too (prctl(2)). nil: none.
	Filter []unix.SockFilter
	// Tree is where the process and its descendants are kept together; nil: nowhere. With
	// one, the environment says INVOCATION_ID: 32 hexadecimal digits, others for each start.
	Tree *Tree
}

// StartError says which step of a start failed, and on what.
type StartError struct {
	Op   string // "exec", "chdir", "setuid", "setgid", "setgroups", "clone", "dup", ...
	Path string // the program, the directory, the user or group; may be empty
	Err  error  // mostly a syscall.Errno
}

// Error reads like "exec /usr/bin/x: no such file or directory".
func (e *StartError) Error() string {
	if e.Path == "" {
		return e.Op + ": " + e.Err.Error()
	}
	return e.Op + " " + e.Path + ": " + e.Err.Error()
}

// Unwrap returns the cause.
func (e *StartError) Unwrap() error { return e.Err }

// Start runs the program in a new session with a clean state: no signal blocked,
// ignored or handled, umask 022, the limit on open files that the supervisor was
// started with, and no descriptor but those of the Spec. It returns when the
// program has begun to run; every error is a *StartError and leaves no process behind.
func (s *Spawner) Start(spec *Spec) (*Process, error) {
	c, err := s.prepare(spec)
	if err != nil {
		return nil, err
	}
	wanted := spec.descriptors()
	defer s.enterStart()()

	// syscall.ForkLock is not needed: it guards descriptors that are not yet
	// close-on-exec, and this child closes all that it was not given.
	set, err := s.take(c)
	if err != nil {
		return nil, &StartError{Op: "start", Path: spec.Exec.Command[0], Err: err}
	}
	var pid, pidfd int
	var errno syscall.Errno
	var groupErr error
	if err = s.spare(); err == nil {
		err = s.fill(set, wanted)
	}
	if err == nil {
		c.fds = set.fds[:len(wanted)]
		c.above = c.fds[len(c.fds)-1] + 1
		pid, pidfd, errno, groupErr = s.cloneInto(c, spec.Tree)
	}
	releaseErr := errors.Join(s.empty(set, wanted), s.give(c, set))

	switch {
	case err != nil:
		return nil, &StartError{Op: "dup", Err: err}
	case groupErr != nil:
		return nil, &StartError{Op: "start", Path: spec.Exec.Command[0], Err: groupErr}
	case errno != 0:
		return nil, &StartError{Op: "clone", Err: errno}
	}
	p := &Process{pid: pid, pidfd: pidfd, listener: int(c.listener)}
	if c.failed != stageNone {
		err = c.startError(spec)
	} else if releaseErr != nil {
		err = &StartError{Op: "dup", Err: releaseErr}
	}
	if err == nil {
		return p, nil
	}
	if discardErr := p.discard(); discardErr != nil {
		err = &StartError{Op: "start", Path: spec.Exec.Command[0], Err: errors.Join(err, discardErr)}
	}
	return nil, err
}

// cloneInto makes the process as one of a tree, where there is one.
func (s *Spawner) cloneInto(c *child, t *Tree) (pid, pidfd int, errno syscall.Errno, err error) {
	for tries := 1; ; tries++ {
		group, err := t.enter()
		if err != nil {
			return 0, -1, 0, err
		}
		family.begin(c, t)
		pid, pidfd, errno = s.clone(c, group)
		family.began(c, pid, t, group == nil)
		again := group != nil && errno != 0 && tries < 3 && t.refused(group, errno)
		t.leave(group)
		if !again {
			return pid, pidfd, errno, nil
		}
	}
}

// clone prefers clone3, which spares the child sixty system calls. Container
// runtimes hide it behind ENOSYS, as their filters cannot look into its argument.
// It alone can put the child into a cgroup (Linux 5.7); nil: ours.
func (s *Spawner) clone(c *child, group *cgroup) (pid, pidfd int, errno syscall.Errno) {
	if !s.noClone3.Load() {
		c.clone3 = cloneArgs{flags: cloneFlags | unix.CLONE_CLEAR_SIGHAND, exitSignal: uint64(unix.SIGCHLD)}
		if group != nil {
			c.clone3.flags |= unix.CLONE_INTO_CGROUP
			c.clone3.cgroup = uint64(group.fd)
		}
		if pid, pidfd, errno = c.spawn(true); errno != unix.ENOSYS {
			return pid, pidfd, errno
		}
		s.noClone3.Store(true)
	}
	if group != nil {
		return 0, -1, unix.ENOSYS
	}
	return c.spawn(false)
}

// descriptors lists what becomes descriptor 0, 1, 2, ...; -1 is /dev/null.
func (spec *Spec) descriptors() []int {
	out := make([]int, max(3, spec.First+len(spec.FDs)))
	for i := range out {
		out[i] = -1
	}
	out[1], out[2] = spec.Stdout, spec.Stderr
	copy(out[spec.First:], spec.FDs)
	return out
}

// prepare lays out everything that the child will need.
func (s *Spawner) prepare(spec *Spec) (*child, error) {
	c := &child{ignore: s.ignored, pidfd: -1, listener: -1}
	if n := len(spec.Filter); n > 0 {
		c.filter = unix.SockFprog{Len: uint16(n), Filter: &spec.Filter[0]}
		c.filterFlags = filterFlags()
	}
	c.alarm.value = unix.NsecToTimespec(int64(s.timeout))
	c.event.signal = int32(unix.SIGKILL)
	x := spec.Exec
	path := x.Command[0]
	argv := append([]string(nil), x.Command...)
	if x.Argv0 != "" {
		argv[0] = x.Argv0
	}
	var err error
	if c.path, err = syscall.BytePtrFromString(path); err != nil {
		return nil, &StartError{Op: "exec", Path: path, Err: err}
	}
	if c.argv, err = syscall.SlicePtrFromStrings(argv); err != nil {
		return nil, &StartError{Op: "exec", Path: path, Err: err}
	}
	// A second value of a variable, from an environment file, would hide ours.
	vars := make([]string, 0, len(spec.Env)+1)
	if spec.Tree != nil {
		vars = append(vars, invocationEnv+"="+spec.Tree.invocation())
	}
	for _, v := range spec.Env {
		name, _, _ := strings.Cut(v, "=")
		if name != spec.PIDEnv && (spec.Tree == nil || name != invocationEnv) {
			vars = append(vars, v)
		}
	}
	env, err := syscall.SlicePtrFromStrings(vars)
	if err != nil {
		return nil, &StartError{Op: "exec", Path: path, Err: err}
	}
	if spec.PIDEnv != "" {
		// Room for any pid and the final zero. The buffer is this start's own.
		buf := make([]byte, len(spec.PIDEnv)+1+len("4294967295")+1)
		n := copy(buf, spec.PIDEnv+"=")
		c.pid = buf[n : len(buf)-1]
		env = append(env[:len(env)-1], &buf[0], nil)
	}
	c.env = env

	dir, err := x.directory(spec.Identity)
	if err == nil {
		c.dir, err = syscall.BytePtrFromString(dir)
	}
	if err != nil {
		return nil, &StartError{Op: "chdir", Path: x.WorkingDirectory, Err: err}
	}
	if s.known {
		var now unix.Rlimit
		if err := unix.Prlimit(0, unix.RLIMIT_NOFILE, nil, &now); err != nil {
			return nil, &StartError{Op: "getrlimit", Err: err}
		}
		c.setLimit = true
		c.limit = unix.Rlimit{Cur: min(s.limit.Soft, now.Max), Max: now.Max}
	}
	c.identify(spec.Identity)
	return c, nil
}

// filterFlags are those that seccomp(2) gets. With WAIT_KILLABLE_RECV (Linux 5.19) signals other than those that kill wait until
// a call that was asked about is answered.
func filterFlags() uintptr {
	flags := uintptr(unix.SECCOMP_FILTER_FLAG_NEW_LISTENER | unix.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV)
	// With a program that is nowhere, flags that the kernel knows are EFAULT, and nothing comes of it.
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, 0); errno == unix.EFAULT {
		return flags
	}
	return unix.SECCOMP_FILTER_FLAG_NEW_LISTENER
}

// identify notes what has to be changed to become id. What already holds is
// left alone, so that an ordinary user's supervisor can start services as itself.
func (c *child) identify(id *Identity) {
	if id == nil {
		return
	}
	c.uid, c.gid, c.groups = id.UID, id.GID, id.Groups
	c.setIDs = os.Getuid() != id.UID || os.Geteuid() != id.UID || os.Getgid() != id.GID || os.Getegid() != id.GID
	c.setGroups = !inGroups(id.Groups)
}

// directory is where the program starts.
func (x *Exec) directory(id *Identity) (string, error) {
	switch {
	case x.WorkingDirectory == "":
		return "/", nil
	case x.WorkingDirectory != "~":
		return x.WorkingDirectory, nil
	case id != nil && id.Home != "":
		return id.Home, nil
	}
	u, err := user.LookupId(strconv.Itoa(os.Getuid()))
	if err != nil {
		return "", err
	}
	if id != nil && id.UID != os.Getuid() || u.HomeDir == "" {
		return "", errors.New("the user has no home directory")
	}
	return u.HomeDir, nil
}

// startError puts the child's stage and error number into words.
func (c *child) startError(spec *Spec) error {
	e := &StartError{Err: c.errno}
	switch c.failed {
	case stageNone:
		panic("unreachable: the child did not fail")
	case stageFilter:
		e.Op = "seccomp"
		if errors.Is(e.Err, unix.EBUSY) {
			e.Err = fmt.Errorf("a filter of whoever started the supervisor asks about system calls, and the kernel allows one that does: %w", e.Err)
		}
	case stageUnshare:
		e.Op = "close_range"
	case stageSession:
		e.Op = "setsid"
	case stageTimer:
		e.Op = "timer_create"
	case stageSignals:
		e.Op = "sigaction"
	case stageDup:
		e.Op = "dup"
	case stageClose:
		e.Op = "close_range"
	case stageGroups:
		e.Op = "setgroups"
	case stageGID:
		e.Op, e.Path = "setgid", strconv.Itoa(c.gid)
	case stageUID:
		e.Op, e.Path = "setuid", strconv.Itoa(c.uid)
	case stageDir:
		e.Op, e.Path = "chdir", unix.BytePtrToString(c.dir)
	case stageLimit:
		e.Op = "setrlimit"
	case stageMask:
		e.Op = "sigprocmask"
	case stageExec:
		e.Op, e.Path = "exec", spec.Exec.Command[0]
	}
	return e
}
