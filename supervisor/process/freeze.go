package process

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// freezeTimeout bounds Freeze. A process at rest stops within microseconds, busy
// threads on a loaded machine when each comes to run (100 ms were seen), and one in
// an uninterruptible wait (a disk, a network file system, vfork) maybe never.
const freezeTimeout = 250 * time.Millisecond

// Freeze stops the process group (SIGSTOP) and returns once every thread of every
// process in it stands still, so that none of them can accept a connection any
// more. Descendants that left the group are not stopped. If they do not stop within
// 250 ms or ctx ends, the group is thawed and an error returned.
func (p *Process) Freeze(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, freezeTimeout)
	defer cancel()
	return p.freeze(ctx)
}

// freeze is Freeze with no limit but that of ctx.
func (p *Process) freeze(ctx context.Context) error {
	err := p.Signal(unix.SIGSTOP)
	if err == nil {
		err = p.waitStopped(ctx)
	}
	if err != nil {
		return fmt.Errorf("freeze process %d: %w", p.pid, errors.Join(err, p.Thaw()))
	}
	return nil
}

// Thaw lets the process group run on (SIGCONT).
func (p *Process) Thaw() error { return p.Signal(unix.SIGCONT) }

func (p *Process) waitStopped(ctx context.Context) error {
	pause := 50 * time.Microsecond
	timer := time.NewTimer(pause)
	defer timer.Stop()
	for {
		// The time is looked at before the processes: if it is up because we
		// ourselves did not get to run, they have had their chance all the same.
		late := ctx.Err()
		running := p.running()
		switch {
		case running == 0:
			return nil
		case late != nil:
			return fmt.Errorf("process %d does not stop: %w", running, late)
		}
		select {
		case <-ctx.Done():
		case <-timer.C:
			pause = min(2*pause, 5*time.Millisecond)
			timer.Reset(pause)
		}
	}
}

// running returns a process of the group that is not stopped; 0: there is none.
func (p *Process) running() int {
	pid := 0
	walk(p.pid, func(m member) {
		if m.group == p.pid && !m.dead && !m.stopped {
			pid = m.pid
		}
	})
	return pid
}

// member is what /proc says about one process of a tree.
type member struct {
	pid     int
	group   int
	dead    bool // a zombie or gone
	stopped bool // all of its threads are
}

// walk calls visit for a process and its descendants, parents first. The state
// of a process is read before its children: one that is seen stopped made none since.
func walk(pid int, visit func(member)) {
	seen := map[int]bool{} // a pid may be reused, and so appear twice, while we read
	queue := []int{pid}
	for len(queue) > 0 {
		pid, queue = queue[0], queue[1:]
		if seen[pid] {
			continue
		}
		seen[pid] = true
		m, children := inspect(pid)
		visit(m)
		queue = append(queue, children...)
	}
}

// inspect reads the state and the children of every thread of a process.
func inspect(pid int) (m member, children []int) {
	m = member{pid: pid, dead: true, stopped: true}
	dir := "/proc/" + strconv.Itoa(pid) + "/task/"
	tasks, err := os.ReadDir(dir)
	if err != nil {
		return m, nil // gone
	}
	for _, task := range tasks {
		stat, err := os.ReadFile(dir + task.Name() + "/stat")
		if err != nil {
			continue // this thread ended
		}
		state, group, ok := parseStat(stat)
		if !ok {
			continue
		}
		m.group = group
		switch state {
		case 'Z', 'X', 'x': // a dead leader may have living threads
		case 'T', 't':
			m.dead = false
		default:
			m.dead, m.stopped = false, false
		}
	}
	for _, task := range tasks {
		list, err := os.ReadFile(dir + task.Name() + "/children")
		if err != nil {
			continue
		}
		for field := range bytes.FieldsSeq(list) {
			if n, err := strconv.Atoi(string(field)); err == nil {
				children = append(children, n)
			}
		}
	}
	slices.Sort(children)
	return m, children
}

// parseStat takes state and process group out of /proc/PID/stat. The program's
// name is in parentheses and may hold anything, also parentheses; see proc_pid_stat(5).
func parseStat(stat []byte) (state byte, group int, ok bool) {
	i := bytes.LastIndexByte(stat, ')')
	if i < 0 {
		return 0, 0, false
	}
	f := bytes.Fields(stat[i+1:]) // state, ppid, pgrp, ...
	if len(f) < 3 || len(f[0]) != 1 {
		return 0, 0, false
	}
	group, err := strconv.Atoi(string(f[2]))
	return f[0][0], group, err == nil
}
