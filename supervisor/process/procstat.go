package process

import (
	"bytes"
	"errors"
	"os"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
)

// member is what /proc says about one process of a tree. A pid and its start name a
// process for ever: the pid alone may be that of another by the time it is used.
type member struct {
	pid     int
	group   int
	session int
	start   uint64 // in clock ticks since boot
	dead    bool   // a zombie or gone
	stopped bool   // all of its threads are
}

// walk calls visit for processes and their descendants, parents first. The state
// of a process is read before its children: one that is seen stopped made none since.
func walk(pids []int, visit func(member)) error {
	seen := map[int]bool{} // a pid may be reused, and so appear twice, while we read
	for queue := slices.Clone(pids); len(queue) > 0; queue = queue[1:] {
		pid := queue[0]
		if seen[pid] {
			continue
		}
		seen[pid] = true
		m, children, err := inspect(pid)
		if err != nil {
			return err
		}
		visit(m)
		queue = append(queue, children...)
	}
	return nil
}

// inspect reads the state and the children of every thread of a process. What cannot be read
// is gone, unless it is we who lack the means.
func inspect(pid int) (m member, children []int, err error) {
	m = member{pid: pid, dead: true, stopped: true}
	dir := "/proc/" + strconv.Itoa(pid) + "/task/"
	tasks, err := os.ReadDir(dir)
	if err != nil {
		return m, nil, lacking(err)
	}
	for _, task := range tasks {
		b, err := os.ReadFile(dir + task.Name() + "/stat")
		if err := lacking(err); err != nil {
			return m, nil, err
		}
		if err != nil {
			continue // this thread ended
		}
		s, ok := parseStat(b)
		if !ok {
			continue
		}
		m.group, m.session = s.group, s.session
		if task.Name() == strconv.Itoa(pid) {
			m.start = s.start // threads have their own
		}
		switch s.state {
		case 'Z', 'X', 'x': // a dead leader may have living threads
		case 'T', 't':
			m.dead = false
		default:
			m.dead, m.stopped = false, false
		}
	}
	for _, task := range tasks {
		list, err := os.ReadFile(dir + task.Name() + "/children")
		if err := lacking(err); err != nil {
			return m, nil, err
		}
		if err == nil {
			children = append(children, parsePIDs(list)...)
		}
	}
	slices.Sort(children)
	return m, children, nil
}

// lacking returns err if it is about our own means and says nothing about a process.
func lacking(err error) error {
	if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) || errors.Is(err, unix.ENOMEM) {
		return err
	}
	return nil
}

// started reads when a process was started; false: it is gone.
func started(pid int) (uint64, bool) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, false
	}
	s, ok := parseStat(b)
	return s.start, ok
}

// parsePIDs reads numbers between blanks or line ends, and passes over what is none. 0 is
// what the kernel writes for a process that has no number here.
func parsePIDs(b []byte) []int {
	var out []int
	for field := range bytes.FieldsSeq(b) {
		if n, err := strconv.Atoi(string(field)); err == nil && n > 0 {
			out = append(out, n)
		}
	}
	return out
}

// stat is a part of /proc/PID/stat.
type stat struct {
	state          byte
	group, session int
	start          uint64
}

// parseStat reads /proc/PID/stat. The program's name is in parentheses and may hold
// anything, also parentheses; see proc_pid_stat(5).
func parseStat(b []byte) (stat, bool) {
	f := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:]) // state, ppid, pgrp, session, ...
	if len(f) < 20 || len(f) == len(bytes.Fields(b)) || len(f[0]) != 1 {
		return stat{}, false
	}
	group, err1 := strconv.Atoi(string(f[2]))
	session, err2 := strconv.Atoi(string(f[3]))
	start, err3 := strconv.ParseUint(string(f[19]), 10, 64)
	if err1 != nil || err2 != nil || err3 != nil {
		return stat{}, false
	}
	return stat{state: f[0][0], group: group, session: session, start: start}, true
}
