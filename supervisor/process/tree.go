package process

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Tree is every process of one service: those that Start put there, and all of their
// descendants, also those that called setsid, forked twice or outlived their parent.
//
// Where the supervisor may use cgroups v2 a tree is a cgroup, which nobody leaves (but
// root) and nothing escapes. Elsewhere it is what /proc shows, as well as that can be:
// see [Spawner.Tracking], and proctree.go for what it cannot see. There the supervisor is
// the parent of orphans and reaps them.
//
// Its methods may be called from several goroutines. Whether they reach a process whose Start
// is under way is open.
type Tree struct {
	spawner *Spawner
	name    string
	mark    string // the first half of every INVOCATION_ID here, by which orphans are known

	mu       sync.Mutex
	group    *cgroup        // nil: none is made, or fallback
	fallback bool           // it lives without a cgroup
	frozen   bool           // the group is, or should be
	killed   bool           // the group was; see Kill
	known    map[int]uint64 // fallback: pid and start of who was seen in it last
}

const (
	// freezeTimeout bounds Freeze. A process at rest stops within microseconds, busy
	// threads on a loaded machine when each comes to run (100 ms were seen), and one in
	// an uninterruptible wait (a disk, a network file system) maybe never.
	freezeTimeout = 250 * time.Millisecond
	// signalRounds is how often Signal looks for processes that were born meanwhile.
	signalRounds = 10
)

// NewTree returns a tree without processes, for a service whose name is made of letters,
// digits, ".", "_" and "-", and has at most 64 bytes. It costs the kernel nothing until the
// first Start or Prepare.
func (s *Spawner) NewTree(name string) *Tree {
	return &Tree{spawner: s, name: name, mark: fmt.Sprintf("%016x", rand.Uint64())}
}

// Prepare makes the cgroup, if there is to be one. It only spares the first Start the time.
func (t *Tree) Prepare() {
	t.mu.Lock()
	defer t.mu.Unlock()
	_ = t.makeLocked() // Start will find out
}

// makeLocked decides how the tree lives: in a cgroup of its own or without. The error is of
// means that are lacking for the moment.
func (t *Tree) makeLocked() error {
	if t.group != nil || t.fallback {
		return nil
	}
	groups := t.spawner.cgroups()
	if groups == nil {
		t.fallback = true
		return nil
	}
	group, err := groups.make(t.name)
	if lacking(err) != nil {
		return err
	}
	if err != nil {
		t.spawner.giveUp(err)
		t.fallback = true
		return nil
	}
	t.group = group
	return nil
}

// enter returns the cgroup that a process is to be born in; nil: none. It stays until leave.
func (t *Tree) enter() (*cgroup, error) {
	if t == nil {
		return nil, nil //nolint:nilnil // no cgroup is not an error, and the documented answer
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.group != nil && t.frozen { // by a Freeze whose processes have ended since
		if living, err := t.group.is("populated"); err == nil && !living {
			t.frozen = t.group.setFrozen("0") != nil
		}
	}
	if t.group != nil && t.killed {
		_ = t.dropLocked() // or it is too early, and the new one dies with the others
	}
	if err := t.makeLocked(); err != nil {
		return nil, err
	}
	if t.group != nil {
		t.group.users++
	}
	return t.group, nil
}

// use returns the cgroup, which stays until leave; nil: there is none. With fallback the
// processes must be looked for in /proc; without either there has been none.
func (t *Tree) use() (group *cgroup, fallback bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.group != nil {
		t.group.users++
	}
	return t.group, t.fallback
}

func (t *Tree) leave(group *cgroup) {
	if group == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if group.users--; group.users == 0 && group.removed {
		_ = group.close() // descriptors that were only read
	}
}

// dropLocked removes the cgroup if nobody lives in it. The next Start makes another.
func (t *Tree) dropLocked() error {
	if err := t.group.remove(); err != nil {
		return err
	}
	group := t.group
	t.group, t.frozen, t.killed = nil, false, false
	if group.users == 0 {
		return group.close()
	}
	return nil
}

// refused is told why the kernel let nobody be born in a cgroup, and returns true if it is
// worth trying again: in a fresh one where somebody removed it or (EBUSY) the service gave it
// controllers, which keeps processes out; else in none.
func (t *Tree) refused(group *cgroup, errno syscall.Errno) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch errno { //nolint:exhaustive // others are not about the cgroup
	case unix.ENODEV, unix.ENOENT, unix.EBUSY, unix.ENOSYS, unix.EPERM, unix.EACCES, unix.EINVAL, unix.EOPNOTSUPP:
	default:
		return false
	}
	if t.group == group && t.dropLocked() != nil {
		return false // somebody lives there
	}
	switch errno { //nolint:exhaustive // see above
	case unix.ENODEV, unix.ENOENT, unix.EBUSY:
	case unix.ENOSYS:
		t.spawner.giveUp(errNoClone3)
	default:
		t.spawner.giveUp(fmt.Errorf("start a process in cgroup %s: %w", group.path, errno))
	}
	return true
}

// invocation returns a new value of INVOCATION_ID.
func (t *Tree) invocation() string { return fmt.Sprintf("%s%016x", t.mark, rand.Uint64()) }

// Signal sends a signal to every process. Nobody there is no error.
func (t *Tree) Signal(sig syscall.Signal) error {
	group, fallback := t.use()
	defer t.leave(group)
	var err error
	switch {
	case group != nil:
		err = group.signal(sig)
	case fallback:
		err = t.signalAll(sig)
	}
	return t.wrap("send "+signalName(sig)+" to", err)
}

// Kill sends SIGKILL to every process, frozen or not, faster than they can fork. It does
// not wait until they are dead; who is started before the tree is empty may be killed, too. Without a cgroup it does so in a bounded number of rounds,
// and returns an error where a fork bomb was faster; it may be called again.
func (t *Tree) Kill() error {
	group, fallback := t.use()
	defer t.leave(group)
	var err error
	switch {
	case group != nil:
		// Linux 6.14 and later kill also what is born by CLONE_INTO_CGROUP in a group that
		// once was killed (seen on 6.18), so the next Start needs a fresh one.
		t.mu.Lock()
		t.killed = true
		t.mu.Unlock()
		err = errors.Join(group.control("cgroup.kill", "1"), t.thawGroup(group))
	case fallback:
		err = t.killAll()
	}
	return t.wrap("kill", err)
}

// Freeze stops every process and returns once every thread of them stands still, so that
// none can accept a connection any more. If that is not so within 250 ms or when ctx ends,
// the tree is thawed and an error returned. A Start in a frozen tree waits for Thaw, except
// where nobody is left in it.
func (t *Tree) Freeze(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, freezeTimeout)
	defer cancel()
	return t.freeze(ctx)
}

// freeze is Freeze with no limit but that of ctx.
func (t *Tree) freeze(ctx context.Context) error {
	group, fallback := t.use()
	defer t.leave(group)
	var err error
	switch {
	case group != nil:
		t.mu.Lock()
		t.frozen = true
		err = group.setFrozen("1")
		t.mu.Unlock()
		if err == nil {
			err = group.waitFrozen(ctx)
		}
	case fallback:
		err = t.stopAll(ctx)
	}
	if err != nil {
		err = errors.Join(err, t.Thaw())
	}
	return t.wrap("freeze", err)
}

// Thaw lets every process run on. Without a cgroup it sends SIGCONT, also to those that
// somebody else has stopped.
func (t *Tree) Thaw() error {
	group, fallback := t.use()
	defer t.leave(group)
	var err error
	switch {
	case group != nil:
		err = t.thawGroup(group)
	case fallback:
		err = t.signalAll(unix.SIGCONT)
	}
	return t.wrap("thaw", err)
}

// thawGroup must not wait for a Start, which may itself be waiting in the frozen group.
func (t *Tree) thawGroup(group *cgroup) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.frozen {
		return nil
	}
	err := group.setFrozen("0")
	t.frozen = err != nil
	return err
}

// PIDs lists the living processes, without zombies, ascending.
func (t *Tree) PIDs() ([]int, error) {
	group, fallback := t.use()
	defer t.leave(group)
	var pids []int
	var err error
	switch {
	case group != nil:
		pids, err = group.pids()
		slices.Sort(pids)
	case fallback:
		var members []member
		members, err = t.scanTwice()
		for _, m := range members {
			pids = append(pids, m.pid)
		}
		slices.Sort(pids)
	}
	return pids, t.wrap("list", err)
}

// Empty reports whether no process is living.
func (t *Tree) Empty() (bool, error) {
	group, fallback := t.use()
	defer t.leave(group)
	living := false
	var err error
	switch {
	case group != nil:
		living, err = group.is("populated")
	case fallback:
		var members []member
		members, err = t.scanTwice()
		living = len(members) > 0
	}
	return err == nil && !living, t.wrap("look into", err)
}

// Ended returns a descriptor, the caller's to close, that becomes readable when it is worth
// asking Empty again, at the latest when nobody is left; at once if nobody is. It stays
// readable, so it is good for one answer. The cgroup tells of the end alone (and of Freeze
// and Thaw), the process tree of the end of any process. A tree has one such descriptor at
// a time: those of earlier calls may miss the end.
func (t *Tree) Ended() (fd int, err error) {
	group, fallback := t.use()
	defer t.leave(group)
	switch {
	case group != nil:
		t.mu.Lock()
		fd, err = group.ended()
		t.mu.Unlock()
	case fallback:
		fd, err = t.endOfOne()
	default:
		fd, err = readable()
	}
	return fd, t.wrap("wait for the end of", err)
}

// Rest gives back descriptors that a tree without processes does not need, and keeps the cgroup for
// the next Start. It invalidates what Ended returned.
func (t *Tree) Rest() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.group == nil || t.frozen {
		return nil
	}
	return t.wrap("rest", t.group.rest())
}

// Close removes the cgroup. It is an error (EBUSY) if somebody is in it. The tree may be used
// again: Start makes it anew.
func (t *Tree) Close() error {
	empty, err := t.Empty()
	if err == nil && !empty {
		err = unix.EBUSY
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case err != nil:
	case t.group != nil:
		err = t.dropLocked()
	case t.fallback:
		family.forget(t)
		t.fallback, t.known = false, nil
	}
	return t.wrap("close", err)
}

func (t *Tree) wrap(verb string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s process tree %s: %w", verb, t.name, err)
}

// signalIf sends a signal to a process of which is says, after its pid has been turned into
// a descriptor and so cannot be another's any more, that it is the right one.
func signalIf(pid int, sig syscall.Signal, is func() bool) error {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err == nil {
		if is() {
			err = unix.PidfdSendSignal(pidfd, sig, nil, 0)
		}
		err = errors.Join(err, unix.Close(pidfd))
	}
	if err != nil && !ended(err) {
		return fmt.Errorf("process %s: %w", strconv.Itoa(pid), err)
	}
	return nil
}

// ended reports whether err says that a process is gone. pidfd_open says EINVAL or ENOENT of
// what was a process when its thread group has just ended.
func ended(err error) bool {
	return errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT)
}
