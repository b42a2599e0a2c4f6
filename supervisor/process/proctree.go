package process

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A tree without a cgroup is found in /proc, from our own children downwards:
//
//   - the main processes that Start made, and all their descendants;
//   - orphans, which have become our children (PR_SET_CHILD_SUBREAPER), and all theirs. An
//     orphan is of this tree if it is in the session of one of its main processes, if the
//     INVOCATION_ID it was started with is of this tree, or if it was seen in it before.
//
// What escapes: a process that left the session and whose environment, since its exec, does
// not say INVOCATION_ID (or that we may not read: a setuid program), if its parents were
// gone before anybody looked. And between two looks anything may be born, so all that is
// done to a tree is done until two looks in a row show nothing new.

// killTime bounds the work of killAll, and killRounds how often it looks each time.
const (
	killTime   = 2 * time.Second
	killRounds = 100
)

// dyingRounds is how often scanTwice looks at most. A dead orphan may be there for longer than that takes:
// until a main process is reaped that stands before it.
const dyingRounds = 20

// scan returns the living processes, parents before children.
func (t *Tree) scan() ([]member, error) {
	members, _, err := t.look()
	return members, err
}

// look is scan that says, too, whether dead orphans were seen: what they may have made last was maybe not.
func (t *Tree) look() (members []member, dying bool, err error) {
	pids, err := ownChildren()
	if err != nil {
		return nil, false, err
	}
	t.mu.Lock()
	known := t.known
	t.mu.Unlock()
	var roots []int
	for _, pid := range pids {
		if t.owns(pid) {
			roots = append(roots, pid)
			continue
		}
		// A process that is exiting has no environment any more, while its children are not ours yet.
		if env, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/environ"); err == nil && len(env) > 0 {
			continue
		}
		if _, main := family.main(pid); main {
			continue
		}
		_ = walk([]int{pid}, func(m member) {
			if m.pid != pid && t.owns(m.pid) {
				roots = append(roots, m.pid)
			}
		})
	}
	for pid, start := range known { // wherever they are now
		if now, ok := started(pid); ok && now == start {
			roots = append(roots, pid)
		}
	}
	var out []member
	now := map[int]uint64{}
	err = walk(roots, func(m member) {
		if !m.dead {
			out = append(out, m)
			now[m.pid] = m.start
		} else if _, main := family.main(m.pid); !main {
			dying = true
		}
	})
	if err != nil {
		return nil, false, err
	}
	t.mu.Lock()
	t.known = now
	t.mu.Unlock()
	return out, dying, nil
}

// scanTwice is scan for the one who wants to know that nobody is left: a process may move
// in the lists of the kernel while they are being read. While somebody is dying it looks again: one that
// forks and ends, again and again, is seen dead more often than alive.
func (t *Tree) scanTwice() ([]member, error) {
	quiet := 0
	for range dyingRounds {
		members, dying, err := t.look()
		if err != nil || len(members) > 0 {
			return members, err
		}
		if quiet++; dying {
			quiet = 0
		}
		if quiet == 2 {
			break
		}
	}
	return nil, nil
}

// owns reports whether a child of ours is of this tree.
func (t *Tree) owns(pid int) bool {
	if of, main := family.main(pid); main {
		return of == t
	}
	sid, err := unix.Getsid(pid)
	if err != nil || inOwnSession(sid) {
		return false
	}
	if of := family.session(sid); of != nil {
		return of == t
	}
	env, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/environ")
	return err == nil && hasInvocation(env, t.mark)
}

// invocationEnv is the variable that systemd, too, gives to every start of a service.
const invocationEnv = "INVOCATION_ID"

// hasInvocation looks in /proc/PID/environ for an INVOCATION_ID that begins with mark.
func hasInvocation(environ []byte, mark string) bool {
	want := []byte(invocationEnv + "=" + mark)
	return bytes.HasPrefix(environ, want) || bytes.Contains(environ, append([]byte{0}, want...))
}

// send sends a signal to a process that was found by scan, if it is still the same.
func send(m member, sig syscall.Signal) error {
	return signalIf(m.pid, sig, func() bool {
		start, ok := started(m.pid)
		return ok && start == m.start
	})
}

// each calls do once for every process, until two looks in a row show nobody new. The zero
// deadline is none.
func (t *Tree) each(rounds int, deadline time.Time, do func(member) error) error {
	type id struct {
		pid   int
		start uint64
	}
	done := map[id]bool{}
	var errs []error
	quiet := 0
	for n := 0; quiet < 2; n++ {
		if n == rounds || !deadline.IsZero() && time.Now().After(deadline) {
			return errors.Join(append(errs, errors.New("processes appear faster than they can be reached"))...)
		}
		members, err := t.scan()
		if err != nil {
			return errors.Join(append(errs, err)...)
		}
		quiet++
		for _, m := range members {
			if i := (id{m.pid, m.start}); !done[i] {
				done[i] = true
				quiet = 0
				if err := do(m); err != nil {
					errs = append(errs, err)
				}
			}
		}
	}
	return errors.Join(errs...)
}

// signalAll sends a signal to all, also to those that appear in the first rounds.
func (t *Tree) signalAll(sig syscall.Signal) error {
	return t.each(signalRounds, time.Time{}, func(m member) error { return send(m, sig) })
}

// killAll stops them all before it kills: while nobody runs, nobody is born, neither for
// those that die (a master's next worker) nor because they make room (a fork bomb).
func (t *Tree) killAll() error {
	t.stopGroups()
	now := time.Now()
	// Who cannot be stopped can still be killed.
	_ = t.each(killRounds, now.Add(killTime/2), func(m member) error { return send(m, unix.SIGSTOP) })
	return t.each(killRounds, now.Add(killTime), func(m member) error { return send(m, unix.SIGKILL) })
}

// stopGroups sends SIGSTOP to the process groups of all that are found, also of the dead. The kernel reaches a group as
// a whole: also a process that forks and ends again and again, which for a signal to one pid is always gone already.
func (t *Tree) stopGroups() {
	pids, err := ownChildren()
	if err != nil {
		return // one by one they may be reached
	}
	groups := map[int]bool{}
	_ = walk(slices.DeleteFunc(pids, func(pid int) bool { return !t.owns(pid) }), func(m member) { groups[m.group] = true })
	for group := range groups {
		if group > 1 && group != unix.Getpgrp() {
			_ = unix.Kill(-group, unix.SIGSTOP) // nobody is left in it
		}
	}
}

// stopAll sends SIGSTOP until two looks in a row show the same processes, all stopped.
func (t *Tree) stopAll(ctx context.Context) error {
	quiet := 0
	return poll(ctx, func() error {
		for {
			members, err := t.scan()
			if err != nil {
				return err
			}
			running := 0
			for _, m := range members {
				if !m.stopped {
					running = m.pid
					if err := send(m, unix.SIGSTOP); err != nil {
						return err
					}
				}
			}
			if running != 0 {
				quiet = 0
				return fmt.Errorf("process %d: %w", running, errStillRunning)
			}
			if quiet++; quiet >= 2 {
				return nil
			}
		}
	})
}

// endOfOne returns the pidfd of a process of the tree.
func (t *Tree) endOfOne() (int, error) {
	for {
		members, err := t.scanTwice()
		if err != nil {
			return -1, err
		}
		if len(members) == 0 {
			return readable()
		}
		for _, m := range members {
			pidfd, err := unix.PidfdOpen(m.pid, 0)
			if ended(err) {
				continue
			}
			if err != nil {
				return -1, fmt.Errorf("open pidfd of process %d: %w", m.pid, err)
			}
			if start, ok := started(m.pid); ok && start == m.start {
				return pidfd, nil
			}
			if err := unix.Close(pidfd); err != nil {
				return -1, fmt.Errorf("close pidfd: %w", err)
			}
		}
	}
}
