package process

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// Each start that is under way blocks a thread, and so do other system calls.
	spareThreads = 24
	// Spare threads take no more than this part of what a limit leaves free.
	threadFraction = 4
	// So many starts are under way at a time; more wait for slowStart at most, as those before
	// them may be on a file system that hangs. A start takes about a millisecond.
	maxStarts = 8
	slowStart = 100 * time.Millisecond
)

// SpareThreads makes threads in advance where a limit on tasks applies to this process, and
// returns how many it made sure of: 0 where there is no limit, or no room. The Go runtime ends
// a program that needs a thread and does not get one, and it keeps those that it has.
//
// A limit is a pids.max, of cgroup v1 or v2, of our own group or one above it that is mounted
// here, and RLIMIT_NPROC (setrlimit(2)), unless we are root of the machine. An error says what
// could not be read; what could be read is still minded.
//
// It makes the end of the program unlikely, not impossible: more threads may be needed than
// these, as by many starts that hang; others may take the last tasks while this runs; limits
// that are set or lowered later are not seen, nor are those of the whole machine
// (kernel.threads-max, kernel.pid_max) and of groups that are not mounted here.
func SpareThreads() (int, error) {
	groups, groupsErr := freeInGroups()
	user, userErr := freeOfUser()
	free := min(groups, user)
	if free == math.MaxInt {
		return 0, errors.Join(groupsErr, userErr)
	}
	// LockOSThread makes one more, once.
	n := max(0, min(spareThreads, free/threadFraction-1))
	var met sync.WaitGroup
	met.Add(n)
	var all sync.WaitGroup
	for range n {
		all.Go(func() {
			runtime.LockOSThread() // so each waits in a thread of its own
			defer runtime.UnlockOSThread()
			met.Done()
			met.Wait()
		})
	}
	all.Wait()
	return n, errors.Join(groupsErr, userErr)
}

// freeInGroups returns how many more tasks the cgroups allow; math.MaxInt: no limit.
func freeInGroups() (int, error) {
	list, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return math.MaxInt, err
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return math.MaxInt, err
	}
	free := math.MaxInt
	var errs []error
	for _, dir := range taskGroups(list, mounts) {
		n, err := freeInGroup(dir)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		free = min(free, n)
	}
	return free, errors.Join(errs...)
}

func freeInGroup(dir string) (int, error) {
	limit, err := os.ReadFile(filepath.Join(dir, "pids.max"))
	if errors.Is(err, fs.ErrNotExist) {
		return math.MaxInt, nil // the root has none, nor has a group without the controller
	}
	if err != nil {
		return math.MaxInt, err
	}
	if string(bytes.TrimSpace(limit)) == "max" {
		return math.MaxInt, nil
	}
	used, err := os.ReadFile(filepath.Join(dir, "pids.current"))
	if err != nil {
		return math.MaxInt, err
	}
	n, err := parseFree(limit, used)
	if err != nil {
		return math.MaxInt, fmt.Errorf("read limit of cgroup %s: %w", dir, err)
	}
	return n, nil
}

// parseFree subtracts pids.current from a pids.max that is a number. More than the limit may be in use.
func parseFree(limit, used []byte) (int, error) {
	most, err := strconv.ParseUint(string(bytes.TrimSpace(limit)), 10, 31)
	if err != nil {
		return 0, err
	}
	now, err := strconv.ParseUint(string(bytes.TrimSpace(used)), 10, 31)
	if err != nil {
		return 0, err
	}
	return max(0, int(most)-int(now)), nil
}

// taskGroups returns the directories of the groups that may limit the number of our tasks, by
// /proc/self/cgroup and /proc/self/mountinfo: ours and those above it, as far as they are mounted.
func taskGroups(list, mountinfo []byte) []string {
	var out []string
	for line := range bytes.Lines(list) {
		f := strings.SplitN(strings.TrimSuffix(string(line), "\n"), ":", 3)
		if len(f) != 3 || !strings.HasPrefix(f[2], "/") {
			continue
		}
		own := path.Clean(strings.TrimSuffix(f[2], " (deleted)"))
		switch {
		case f[0] == "0" && f[1] == "":
			out = append(out, groupDirs(mountinfo, "cgroup2", "", own)...)
		case slices.Contains(strings.Split(f[1], ","), "pids"):
			out = append(out, groupDirs(mountinfo, "cgroup", "pids", own)...)
		}
	}
	slices.Sort(out)
	return slices.Compact(out) // a hierarchy may be mounted twice
}

// groupDirs finds the mounts of one type, and of one controller if it is not empty, in which the
// group of a path can be seen: see proc_pid_mountinfo(5).
func groupDirs(mountinfo []byte, kind, controller, own string) []string {
	var out []string
	for line := range bytes.Lines(mountinfo) {
		before, after, ok := strings.Cut(string(line), " - ")
		f, g := strings.Fields(before), strings.Fields(after)
		if !ok || len(f) < 6 || len(g) < 3 || g[0] != kind {
			continue
		}
		if controller != "" && !slices.Contains(strings.Split(g[2], ","), controller) {
			continue
		}
		root, point := unescape(f[3]), path.Clean(unescape(f[4]))
		rest, ok := strings.CutPrefix(own, strings.TrimSuffix(root, "/"))
		if !ok || !strings.HasPrefix(rest+"/", "/") || !path.IsAbs(point) {
			continue
		}
		for dir := path.Join(point, rest); ; dir = path.Dir(dir) {
			out = append(out, dir)
			if dir == point {
				break
			}
		}
	}
	return out
}

// freeOfUser returns how many more tasks RLIMIT_NPROC allows; math.MaxInt: no limit.
func freeOfUser() (int, error) {
	var limit unix.Rlimit
	if err := unix.Prlimit(0, unix.RLIMIT_NPROC, nil, &limit); err != nil {
		return math.MaxInt, fmt.Errorf("read limit on processes: %w", err)
	}
	if limit.Cur == unix.RLIM_INFINITY {
		return math.MaxInt, nil
	}
	uid := os.Getuid()
	if uid == 0 {
		// Not the root of a container: the kernel asks for that of the machine.
		if b, err := os.ReadFile("/proc/self/uid_map"); err == nil && wholeMachine(b) {
			return math.MaxInt, nil
		}
	}
	// What other containers run as this user counts for the kernel, but cannot be seen.
	tasks, err := filepath.Glob("/proc/[1-9]*/task")
	if err != nil {
		return math.MaxInt, err
	}
	used := uint64(0)
	for _, dir := range tasks {
		var st unix.Stat_t
		if unix.Stat(dir, &st) == nil && int(st.Uid) == uid { // else it has ended, or is another's
			links := uint64(st.Nlink) //nolint:unconvert // 32 bits on arm64
			used += max(links, 2) - 2 // a directory for each thread
		}
	}
	return int(min(limit.Cur-min(limit.Cur, used), math.MaxInt32)), nil
}

// wholeMachine tells by /proc/self/uid_map whether users are those of the machine.
func wholeMachine(uidMap []byte) bool {
	return slices.Equal(strings.Fields(string(uidMap)), []string{"0", "0", "4294967295"})
}

// enterStart waits until few starts are under way, and returns what ends this one. It does not wait long: those
// that are under way may hang.
func (s *Spawner) enterStart() (leave func()) {
	free := func() { <-s.starts }
	select {
	case s.starts <- struct{}{}:
		return free
	default:
	}
	timer := time.NewTimer(slowStart)
	defer timer.Stop()
	select {
	case s.starts <- struct{}{}:
		return free
	case <-timer.C:
		return func() {}
	}
}
