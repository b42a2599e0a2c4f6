package process

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// children knows which of this program's child processes are whose: those that Start
// made, until they are reaped, and the sessions they have led, by which orphans are
// recognised. A child that is not one of these was born elsewhere in a service, and came
// to us when its parent died: nobody else will reap it.
//
// What is in the session of this program itself is left alone. Every service has left it,
// so this is a child that another part of the program made (os/exec) and waits for.
type children struct {
	mu       sync.Mutex
	starting map[*child]*Tree // they tell their pid themselves, before they leave our session
	mains    map[int]*Tree    // by pid, of a process not yet reaped; nil: in no tree
	sessions map[int]*Tree    // by id, of trees without a cgroup
	prune    int              // how many sessions call for a look at which are left

	watchers int            // Spawners that want orphans to be reaped
	unset    bool           // it was we who made this program a subreaper
	signals  chan os.Signal // SIGCHLD
	again    chan struct{}  // a main process that stood before others has been reaped
	stop     chan struct{}
	done     sync.WaitGroup
}

// minSessions is how many sessions are remembered before the first look at which are left.
const minSessions = 1024

// family is one for the program, as the kernel's wait knows no smaller unit.
//
//nolint:gochecknoglobals // children belong to the program and to nothing smaller in it
var family = &children{
	starting: map[*child]*Tree{}, mains: map[int]*Tree{}, sessions: map[int]*Tree{},
	prune: minSessions, again: make(chan struct{}, 1),
}

// begin notes a start that is under way.
func (f *children) begin(c *child, t *Tree) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.starting[c] = t
}

// began ends what begin began: pid is what became of it, 0 nothing.
func (f *children) began(c *child, pid int, t *Tree, fallback bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.starting, c)
	if pid == 0 {
		return
	}
	f.mains[pid] = t
	delete(f.sessions, pid) // of an older process of this number, so nobody is left in it
	if fallback && t != nil {
		f.sessions[pid] = t
	}
}

// reaped forgets a process that Start made. It is called when the pid is free again.
func (f *children) reaped(pid int) {
	f.mu.Lock()
	delete(f.mains, pid)
	full := len(f.sessions) >= f.prune
	f.mu.Unlock()
	if full {
		f.pruneSessions()
	}
	select {
	case f.again <- struct{}{}:
	default: // it will look anyway
	}
}

// forget drops what is remembered of a tree in which nobody is left.
func (f *children) forget(t *Tree) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for sid, of := range f.sessions {
		if _, living := f.mains[sid]; of == t && !living {
			delete(f.sessions, sid)
		}
	}
}

// pruneSessions drops the sessions that nobody is in any more. Only orphans and their
// descendants can be in the session of a main process that is gone.
func (f *children) pruneSessions() {
	pids, err := ownChildren()
	if err != nil {
		return // there will be another occasion
	}
	var orphans []int
	for _, pid := range pids {
		if _, main := f.main(pid); !main {
			orphans = append(orphans, pid)
		}
	}
	left := map[int]bool{}
	if walk(orphans, func(m member) { left[m.session] = true }) != nil {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for sid := range f.sessions {
		if _, living := f.mains[sid]; !living && !left[sid] {
			delete(f.sessions, sid)
		}
	}
	f.prune = max(minSessions, 2*len(f.sessions))
}

// main returns the tree of a process that Start made or is making; false: it did not.
func (f *children) main(pid int) (*Tree, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if t, ok := f.mains[pid]; ok {
		return t, true
	}
	for c, t := range f.starting {
		if int(atomic.LoadInt32(&c.tid)) == pid {
			return t, true
		}
	}
	return nil, false
}

// session returns the tree whose main process led a session; nil: none is known.
func (f *children) session(sid int) *Tree {
	f.mu.Lock()
	defer f.mu.Unlock()
	if t := f.sessions[sid]; t != nil {
		return t
	}
	for c, t := range f.starting {
		if int(atomic.LoadInt32(&c.tid)) == sid {
			return t
		}
	}
	return nil
}

// kinship says what a child process is to us.
type kinship uint8

const (
	orphan      kinship = iota // ours to reap as soon as it is dead
	startedHere                // made by Start; its Process reaps it
	foreign                    // made by another part of this program
)

// kin looks at the session first: who has left ours has told its pid before.
func (f *children) kin(pid int) kinship {
	if sid, err := unix.Getsid(pid); err != nil || inOwnSession(sid) {
		return foreign
	}
	if _, ok := f.main(pid); ok {
		return startedHere
	}
	return orphan
}

func inOwnSession(sid int) bool {
	own, err := unix.Getsid(0)
	return err == nil && sid == own
}

// watch begins to reap orphans. With subreap it also asks the kernel to make them our
// children rather than those of init; see PR_SET_CHILD_SUBREAPER, prctl(2).
func (f *children) watch(subreap bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if subreap {
		var is int32
		if _, _, errno := unix.RawSyscall(unix.SYS_PRCTL, unix.PR_GET_CHILD_SUBREAPER, uintptr(unsafe.Pointer(&is)), 0); errno != 0 {
			return fmt.Errorf("become the parent of orphans: %w", errno)
		}
		if is == 0 {
			if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
				return fmt.Errorf("become the parent of orphans: %w", err)
			}
			f.unset = true
		}
	}
	f.watchers++
	if f.watchers == 1 {
		f.signals, f.stop = make(chan os.Signal, 1), make(chan struct{})
		signal.Notify(f.signals, unix.SIGCHLD)
		f.done.Go(func() { f.run(f.signals, f.stop) })
	}
	return nil
}

// unwatch ends one watch. With the last one it waits for the end of the goroutine.
func (f *children) unwatch() {
	f.mu.Lock()
	f.watchers--
	last := f.watchers == 0
	if last {
		close(f.stop)
		if f.unset {
			_ = unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) // was possible to set
			f.unset = false
		}
	}
	f.mu.Unlock()
	if last {
		f.done.Wait()
	}
}

// reapPause is how long a dead orphan may wait for others.
const reapPause = 50 * time.Millisecond

// rest waits, and says whether it could until the end.
func rest(d time.Duration, stop <-chan struct{}) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-stop:
		return false
	}
}

func (f *children) run(signals chan os.Signal, stop <-chan struct{}) {
	defer signal.Stop(signals)
	for {
		f.reapOrphans()
		select {
		case <-signals:
			// Those that end in quick succession are reaped together, and meanwhile the kernel is not to tell
			// of each: a program that does nothing but fork would keep us busy with its signals alone.
			signal.Stop(signals)
			if !rest(reapPause, stop) {
				f.reapOrphans()
				return
			}
			signal.Notify(signals, unix.SIGCHLD) // before the next look, so that nobody is missed
		case <-f.again:
		case <-stop:
			return
		}
	}
}

// reapOrphans reaps the orphans that are dead. A dead main process stands before the
// others until its Process is reaped, which calls for another look.
func (f *children) reapOrphans() {
	for {
		pid := deadChild()
		if pid == 0 {
			return
		}
		switch f.kin(pid) {
		case orphan:
			if !collectOrphan(pid) {
				return
			}
		case startedHere:
			return
		case foreign: // nobody tells us when it is reaped, so look behind it
			pids, _ := ownChildren() // the next SIGCHLD is another occasion
			for _, pid := range pids {
				if f.kin(pid) == orphan {
					collectOrphan(pid)
				}
			}
			return
		}
	}
}

// siginfoPID is where si_pid is in a siginfo_t of a 64-bit machine; see sigaction(2).
const siginfoPID = 16

// deadChild returns one that is not reaped yet, and leaves it so; 0: there is none.
func deadChild() int {
	var info unix.Siginfo
	for {
		err := unix.Waitid(unix.P_ALL, 0, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil: // ECHILD: no child at all
			return 0
		default:
			return int(*(*int32)(unsafe.Add(unsafe.Pointer(&info), siginfoPID)))
		}
	}
}

// collectOrphan reaps a process if it is dead.
func collectOrphan(pid int) bool {
	for {
		if n, err := unix.Wait4(pid, nil, unix.WNOHANG, nil); !errors.Is(err, unix.EINTR) {
			return n == pid
		}
	}
}

// ownChildren lists the child processes of all our threads, also dead ones that are not reaped.
func ownChildren() ([]int, error) {
	const dir = "/proc/self/task/"
	tasks, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("list child processes: %w", err)
	}
	var out []int
	read := false
	for _, task := range tasks {
		b, err2 := os.ReadFile(dir + task.Name() + "/children")
		if err := lacking(err2); err != nil {
			return nil, fmt.Errorf("list child processes: %w", err)
		}
		if err2 != nil {
			err = err2 // this thread ended, or the kernel has no such files (CONFIG_PROC_CHILDREN)
			continue
		}
		read = true
		out = append(out, parsePIDs(b)...)
	}
	if !read {
		return nil, fmt.Errorf("list child processes of %s: %w", strconv.Itoa(os.Getpid()), err)
	}
	return out, nil
}
