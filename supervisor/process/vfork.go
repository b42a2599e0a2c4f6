//go:build linux && (amd64 || arm64)

package process

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// child is everything that the new process needs between vfork and exec, laid
// out by the parent beforehand, and the place where it says what went wrong.
// It is on the heap, so its address does not change, and belongs to one spawn:
// the child writes into it while other threads of the parent run on.
type child struct {
	path *byte
	argv []*byte // ends in nil
	env  []*byte // ends in nil
	dir  *byte

	pid    []byte   // where the digits of the child's pid go; nil: nowhere
	fds    []int    // fds[i] becomes descriptor i; fds[i] >= i+1, ascending
	above  int      // one more than the highest of fds
	ignore []uint   // signals that the supervisor ignores
	groups []uint32 // with setGroups
	uid    int
	gid    int

	filter      unix.SockFprog // a seccomp filter; none where Len is 0
	filterFlags uintptr        // of seccomp(2)
	listener    int32          // on which the kernel asks about what the filter says, in the supervisor's table; written by the child

	setGroups bool
	setIDs    bool
	setLimit  bool
	limit     unix.Rlimit

	event   sigevent // SIGKILL ...
	alarm   itimer   // ... when this is over and the child has not come to its exec
	timer   int32    // id of the timer, written by the kernel
	clone3  cloneArgs
	handler [4]uint64 // a kernel sigaction of zeros: SIG_DFL
	mask    uint64    // the empty signal set

	pidfd  int32 // written by the kernel
	tid    int32 // its pid, written by the child before it leaves our session
	failed stage // written by the child
	errno  syscall.Errno
}

// stage is the step of the child that failed. The zero value: none did.
type stage uint8

const (
	stageNone stage = iota
	stageFilter
	stageUnshare
	stageTimer
	stageSession
	stageSignals
	stageDup
	stageClose
	stageGroups
	stageGID
	stageUID
	stageDir
	stageLimit
	stageMask
	stageExec
)

// cloneArgs is struct clone_args of clone3(2), the version of Linux 5.7.
type cloneArgs struct {
	flags, pidfd, childTID, parentTID, exitSignal, stack, stackSize, tls, setTID, setTIDSize, cgroup uint64
}

// sigevent and itimer are the kernel's struct sigevent (64 bytes; SIGEV_SIGNAL is 0)
// and struct itimerspec.
type sigevent struct {
	value  uint64
	signal int32
	notify int32
	_      [48]byte
}

type itimer struct{ interval, value unix.Timespec }

// What clone(2) and clone3(2) are both asked for. VM and VFORK: no copy of the
// address space, and the parent waits until the child is through. FILES: no copy
// of the descriptor table, which the child then makes of its few low entries only.
const cloneFlags = unix.CLONE_VM | unix.CLONE_VFORK | unix.CLONE_FILES | unix.CLONE_PIDFD

// The runtime's own preparations for a fork. It keeps these names for programs
// like this one (go.dev/issue/67401): before, it blocks all signals in this
// thread, pins the goroutine and turns any growth of its stack into a crash.

//go:linkname runtimeBeforeFork syscall.runtime_BeforeFork
func runtimeBeforeFork()

//go:linkname runtimeAfterFork syscall.runtime_AfterFork
func runtimeAfterFork()

//go:linkname runtimeAfterForkInChild syscall.runtime_AfterForkInChild
func runtimeAfterForkInChild()

// The goroutine counts as being in a system call until the child is through, so
// that a child which is held up (by a file system that hangs, or by a SIGSTOP of the
// user it has become) holds up nobody else: neither the processor (in Go's sense) nor
// the garbage collector waits for it.

//go:linkname runtimeEnterSyscall runtime.entersyscall
func runtimeEnterSyscall()

//go:linkname runtimeExitSyscall runtime.exitsyscall
func runtimeExitSyscall()

//go:noescape
func rawVfork(trap, a1, a2, a3 uintptr) (r1, errno uintptr)

// spawn makes the process and returns when it runs its program or has failed,
// which c.failed tells. With clearHandlers the kernel resets the signal handlers
// (clone3, Linux 5.5), else the child does, one system call each.
//
//go:norace
//go:nosplit
func (c *child) spawn(clearHandlers bool) (pid, pidfd int, err syscall.Errno) {
	runtimeBeforeFork()
	runtimeEnterSyscall()
	r1, errno := vfork(c, clearHandlers)
	runtimeAfterFork()
	runtimeExitSyscall()
	if errno != 0 {
		return 0, -1, syscall.Errno(errno)
	}
	return int(r1), int(c.pidfd), 0
}

// vfork is where parent and child part: they share memory and this one stack,
// but not their registers. The rules that follow from it:
//
//   - The parent returns at once, into a frame that the child never touched;
//     hence noinline, and hence nothing but "return" may follow the clone.
//   - The child never returns. It calls only functions that need no growth of the
//     stack and are not instrumented (syscall.RawSyscall ends in assembly), so it
//     must not allocate, panic, take a lock or be seen by the race detector.
//   - The child writes no pointers: the parent's garbage collector may be running
//     and a write barrier would go to the buffers of the parent's processor.
//
//go:noinline
//go:norace
//go:nosplit
//go:nocheckptr
func vfork(c *child, clearHandlers bool) (pid, errno uintptr) {
	var (
		r uintptr
		e syscall.Errno
		i int
		s uint
		n int
	)

	if clearHandlers {
		c.clone3.pidfd = uint64(uintptr(unsafe.Pointer(&c.pidfd)))
		pid, errno = rawVfork(unix.SYS_CLONE3, uintptr(unsafe.Pointer(&c.clone3)), unsafe.Sizeof(c.clone3), 0)
	} else {
		pid, errno = rawVfork(unix.SYS_CLONE, cloneFlags|uintptr(unix.SIGCHLD), 0, uintptr(unsafe.Pointer(&c.pidfd)))
	}
	if pid != 0 || errno != 0 {
		return pid, errno
	}

	// From here on: the child.

	// As long as the descriptor table is the supervisor's too, the listener comes into existence there. Without
	// CAP_SYS_ADMIN a filter takes no_new_privs, with which no program that is executed gains privileges.
	if c.filter.Len > 0 {
		r, _, e = syscall.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, c.filterFlags, uintptr(unsafe.Pointer(&c.filter)))
		if e == syscall.EACCES {
			if _, _, e = syscall.RawSyscall6(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, 0); e == 0 {
				r, _, e = syscall.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, c.filterFlags, uintptr(unsafe.Pointer(&c.filter)))
			}
		}
		if e != 0 {
			c.failed = stageFilter
			goto fail
		}
		c.listener = int32(r)
	}
	// A descriptor table of its own. The kernel (5.9) copies only what is below
	// "above", so thousands of sockets in the supervisor's table cost nothing.
	if _, _, e = syscall.RawSyscall(unix.SYS_CLOSE_RANGE, uintptr(c.above), ^uintptr(0)>>32, unix.CLOSE_RANGE_UNSHARE); e != 0 {
		c.failed = stageUnshare
		goto fail
	}
	// Who takes another user's identity may be stopped by that user before it comes to
	// its exec. A timer kills what is stopped, too; exec removes it (timer_create(2)).
	if c.setIDs {
		if _, _, e = syscall.RawSyscall(unix.SYS_TIMER_CREATE, unix.CLOCK_MONOTONIC, uintptr(unsafe.Pointer(&c.event)), uintptr(unsafe.Pointer(&c.timer))); e == 0 {
			_, _, e = syscall.RawSyscall6(unix.SYS_TIMER_SETTIME, uintptr(c.timer), 0, uintptr(unsafe.Pointer(&c.alarm)), 0, 0, 0)
		}
		if e != 0 {
			c.failed = stageTimer
			goto fail
		}
	}
	// In this order: whoever reaps orphans must not take this process for one.
	r, _, _ = syscall.RawSyscall(unix.SYS_GETPID, 0, 0, 0)
	c.tid = int32(r)
	if _, _, e = syscall.RawSyscall(unix.SYS_SETSID, 0, 0, 0); e != 0 {
		c.failed = stageSession
		goto fail
	}

	// No handler of the supervisor may run here. exec would reset them too, but
	// signals are let in before that. Ignored ones stay ignored unless told.
	if !clearHandlers {
		runtimeAfterForkInChild()
	}
	for _, s = range c.ignore {
		if _, _, e = syscall.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(s), uintptr(unsafe.Pointer(&c.handler)), 0, unsafe.Sizeof(c.mask), 0, 0); e != 0 {
			c.failed = stageSignals
			goto fail
		}
	}

	// Each source is above its target and above all earlier sources, so no
	// target is a source that is still needed. The copies survive exec.
	for i, n = range c.fds {
		if _, _, e = syscall.RawSyscall(unix.SYS_DUP3, uintptr(n), uintptr(i), 0); e != 0 {
			c.failed = stageDup
			goto fail
		}
	}
	n = len(c.fds)
	if _, _, e = syscall.RawSyscall(unix.SYS_CLOSE_RANGE, uintptr(n), ^uintptr(0)>>32, 0); e != 0 {
		c.failed = stageClose
		goto fail
	}

	// The directory comes after the user: it may be on a file system (NFS, a
	// private home) that only this user may enter. Until exec, the new user is
	// kept out of our memory by the kernel, which marks it as not to be traced
	// or dumped when one who uses it changes user (PR_SET_DUMPABLE, prctl(2)).
	// That mark stays on the supervisor, as no moment is known to be safe to lift it.
	if c.setGroups {
		if _, _, e = syscall.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(c.groups)), uintptr(unsafe.Pointer(unsafe.SliceData(c.groups))), 0); e != 0 {
			c.failed = stageGroups
			goto fail
		}
	}
	if c.setIDs {
		if _, _, e = syscall.RawSyscall(unix.SYS_SETRESGID, uintptr(c.gid), uintptr(c.gid), uintptr(c.gid)); e != 0 {
			c.failed = stageGID
			goto fail
		}
		if _, _, e = syscall.RawSyscall(unix.SYS_SETRESUID, uintptr(c.uid), uintptr(c.uid), uintptr(c.uid)); e != 0 {
			c.failed = stageUID
			goto fail
		}
	}
	if _, _, e = syscall.RawSyscall(unix.SYS_CHDIR, uintptr(unsafe.Pointer(c.dir)), 0, 0); e != 0 {
		c.failed = stageDir
		goto fail
	}
	_, _, _ = syscall.RawSyscall(unix.SYS_UMASK, 0o022, 0, 0) // cannot fail
	if c.setLimit {                                           // after dup3, as the limit may be below the number of descriptors
		if _, _, e = syscall.RawSyscall6(unix.SYS_PRLIMIT64, 0, unix.RLIMIT_NOFILE, uintptr(unsafe.Pointer(&c.limit)), 0, 0, 0); e != 0 {
			c.failed = stageLimit
			goto fail
		}
	}

	// The pid in decimal, at the start of a buffer of zeros.
	if len(c.pid) > 0 {
		n = 1
		for s = uint(r); s >= 10; s /= 10 {
			n++
		}
		for i = n - 1; i >= 0 && i < len(c.pid); i-- {
			c.pid[i] = byte('0' + r%10)
			r /= 10
		}
	}

	if _, _, e = syscall.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&c.mask)), 0, unsafe.Sizeof(c.mask), 0, 0); e != 0 {
		c.failed = stageMask
		goto fail
	}
	_, _, e = syscall.RawSyscall(unix.SYS_EXECVE, uintptr(unsafe.Pointer(c.path)), uintptr(unsafe.Pointer(unsafe.SliceData(c.argv))), uintptr(unsafe.Pointer(unsafe.SliceData(c.env))))
	c.failed = stageExec

fail:
	c.errno = e
	for {
		_, _, _ = syscall.RawSyscall(unix.SYS_EXIT, 127, 0, 0)
	}
}
