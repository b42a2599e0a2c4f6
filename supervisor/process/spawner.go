package process

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/supervisor/process/internal/nofile"
)

// Spawner starts processes. It holds what every start needs and what is to be
// known from before: reserved descriptors, the signals that the supervisor
// ignores, and the limit on open files it was started with. Make it early, while
// low descriptor numbers are free.
//
// Its methods may be called from several goroutines. It needs Linux 5.9.
type Spawner struct {
	null     int          // /dev/null; immutable
	ignored  []uint       // signals; immutable
	limit    nofile.Limit // immutable, as is
	known    bool         // limit is known, and differs from ours
	timeout  time.Duration
	noClone3 atomic.Bool   // the kernel or a seccomp filter refuses clone3
	starts   chan struct{} // holds one for each start that is under way and not slow

	leftovers []Leftover // immutable

	mu     sync.Mutex      // held to take or to give, never over a start
	free   []*slots        // those that no start is using
	busy   map[*child]bool // starts that are under way
	closed bool

	tracking sync.Mutex // guards the following
	groups   *cgroups   // nil: there never were any
	why      string     // why no more groups are made; empty: they are
	watches  int        // how many watches of family are ours
}

// slots are reserved descriptors for the use of one start at a time. They make the
// cost of a start independent of the number of sockets that the supervisor has
// open: a new process shares the descriptor table and copies only its low end, so
// what it is to inherit is put into slots there for that moment. Between starts a
// slot holds /dev/null, never a socket: the copy of a connection left behind would
// keep its client waiting for the end.
//
// The numbers ascend, and the i-th is above i+2.
type slots struct {
	fds  []int
	kept bool // made early, so the numbers are low; others are for one start
}

const (
	// 0 to 2 and a service with 16 sockets; more are reserved when first needed.
	initialSlots = 3 + 16
	// How many sets are kept. Each one makes the table longer that all starts copy. When
	// all are in use (a program on a file system that hangs), another is made for one start.
	keptSets = 2
	// With a lower limit on open files one small set is kept, which grows when it has to.
	manyFiles = 512
	// Starts leave this part of all descriptors free, at most maxSpare: without any nothing could be
	// put to sleep again, and nobody could ask what is wrong.
	spareFraction = 4
	maxSpare      = 64
	// A child that takes another user's identity and does not come to its exec is killed
	// after this time.
	execTimeout = 30 * time.Second
)

// NewSpawner reserves the descriptors, looks at the state of this process and finds out how
// trees are to be tracked. Signals must be ignored (signal.Ignore) before, or children will
// ignore them too.
//
// The name tells this supervisor from others on the machine and is the same at each run; it
// becomes that of a cgroup, so it is not empty and has no "/". Where there is no cgroup, the
// program becomes the parent of orphans (PR_SET_CHILD_SUBREAPER), and reaps children that are
// not in its own session and were not made by Start; so it does as process 1 of a container.
func NewSpawner(name string) (*Spawner, error) {
	if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\n\x00") {
		return nil, fmt.Errorf("prepare to start processes: %q cannot name a supervisor", name)
	}
	// A range that holds nothing: this only asks whether the call is there.
	if err := unix.CloseRange(1<<31, 1<<31, 0); err != nil {
		return nil, fmt.Errorf("prepare to start processes: close_range (Linux 5.9): %w", err)
	}
	ignored, err := ignoredSignals()
	if err != nil {
		return nil, fmt.Errorf("prepare to start processes: %w", err)
	}
	null, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("prepare to start processes: open /dev/null: %w", err)
	}
	s := &Spawner{null: null, ignored: ignored, timeout: execTimeout, busy: map[*child]bool{}, starts: make(chan struct{}, maxStarts)}
	if s.limit, s.known = nofile.AtStart(); s.known {
		var now unix.Rlimit
		if err := unix.Prlimit(0, unix.RLIMIT_NOFILE, nil, &now); err == nil && now.Cur == s.limit.Soft {
			s.known = false // nothing was raised, so nothing has to be put back
		}
	}
	sets, size := keptSets, initialSlots
	if limit, err := fileLimit(); err == nil && limit.Cur < manyFiles {
		sets, size = 1, 3
	}
	for i := range sets {
		set := &slots{kept: true}
		if err := s.reserve(set, size); err != nil {
			err = errors.Join(err, set.close())
			if i > 0 {
				break // one will do where descriptors are few
			}
			return nil, errors.Join(fmt.Errorf("prepare to start processes: %w", err), s.Close())
		}
		s.free = append(s.free, set)
	}
	if err := s.track(name); err != nil {
		return nil, errors.Join(fmt.Errorf("prepare to start processes: %w", err), s.Close())
	}
	return s, nil
}

// track finds the cgroup of the supervisor, or does without.
func (s *Spawner) track(name string) error {
	groups, err := openCgroups(name)
	if err != nil {
		s.giveUp(err)
	} else {
		s.groups = groups
		s.leftovers = groups.sweep()
		if err := s.tryCgroup(); err != nil {
			return err
		}
	}
	if os.Getpid() != 1 {
		return nil
	}
	s.watches++
	return family.watch(false)
}

// tryCgroup starts what is no program in a cgroup: only so is it known that the kernel lets us.
func (s *Spawner) tryCgroup() error {
	t := s.NewTree(probeTree)
	p, err := s.Start(&Spec{Tree: t, Exec: &Exec{Command: []string{"/"}}, Stdout: -1, Stderr: -1})
	if err == nil {
		// Linux 6.14 and later, if our own group was killed once (cgroup.kill): it takes what is
		// born in another one for too late.
		s.giveUp(errors.New("the kernel kills what is started in a cgroup; start the supervisor in another one"))
		if _, err := p.collect(); err != nil {
			return err
		}
	} else if e := (*StartError)(nil); !errors.As(err, &e) || e.Op != "exec" {
		s.giveUp(err)
	}
	if err := t.Close(); err != nil {
		s.giveUp(err)
	}
	return nil
}

// probeTree cannot be the name of a service.
const probeTree = ".probe"

// giveUp makes no more cgroups from now on.
func (s *Spawner) giveUp(why error) {
	s.tracking.Lock()
	defer s.tracking.Unlock()
	if s.why != "" {
		return
	}
	s.why = why.Error()
	if err := family.watch(true); err != nil {
		s.why += "; " + err.Error()
		return
	}
	s.watches++
}

// cgroups returns where groups are made; nil: nowhere.
func (s *Spawner) cgroups() *cgroups {
	s.tracking.Lock()
	defer s.tracking.Unlock()
	if s.why != "" {
		return nil
	}
	return s.groups
}

// Tracking says for people how the processes of a tree are found: "cgroup", or "process
// tree: " and why there is no cgroup v2, and what would help.
func (s *Spawner) Tracking() string {
	s.tracking.Lock()
	defer s.tracking.Unlock()
	if s.why != "" {
		return "process tree: " + s.why
	}
	return "cgroup"
}

// Leftovers returns the cgroups in which processes of an earlier supervisor of this name
// lived when this one was made. The caller must not change it.
func (s *Spawner) Leftovers() []Leftover { return s.leftovers }

// Close gives the reserved descriptors back, those of a start that is still under way when
// it ends, and removes the supervisor's cgroup if no tree is left in it. Processes are not
// touched. Closing again does nothing.
func (s *Spawner) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	var errs []error
	for _, set := range s.free {
		errs = append(errs, set.close())
	}
	s.free = nil
	if len(s.busy) == 0 {
		errs = append(errs, unix.Close(s.null))
	}
	s.tracking.Lock()
	defer s.tracking.Unlock()
	if s.groups != nil {
		errs = append(errs, s.groups.close())
	}
	for ; s.watches > 0; s.watches-- {
		family.unwatch()
	}
	return errors.Join(errs...)
}

// Abort kills the children that have not come to their exec, such as those that wait for
// a file system that hangs. Their Start returns soon, as if the process had been killed at once.
func (s *Spawner) Abort() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.busy {
		if pidfd := atomic.LoadInt32(&c.pidfd); pidfd >= 0 { // the kernel writes it before the child runs
			_ = unix.PidfdSendSignal(int(pidfd), unix.SIGKILL, nil, 0) // it may be through by now
		}
	}
}

// take returns a set of slots that belongs to one start, until give.
func (s *Spawner) take(c *child) (*slots, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, os.ErrClosed
	}
	s.busy[c] = true
	if n := len(s.free); n > 0 {
		set := s.free[n-1]
		s.free = s.free[:n-1]
		return set, nil
	}
	return &slots{}, nil
}

// give takes a set back.
func (s *Spawner) give(c *child, set *slots) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.busy, c)
	if !s.closed && set.kept {
		s.free = append(s.free, set)
		return nil
	}
	err := set.close()
	if s.closed && len(s.busy) == 0 {
		err = errors.Join(err, unix.Close(s.null))
	}
	return err
}

func (set *slots) close() error {
	var errs []error
	for _, fd := range set.fds {
		errs = append(errs, unix.Close(fd))
	}
	set.fds = nil
	return errors.Join(errs...)
}

// reserve sees to it that there are n slots in the set.
func (s *Spawner) reserve(set *slots, n int) error {
	for len(set.fds) < n {
		lowest := 3 // above 0..2, so that slot i is above every target up to i
		if len(set.fds) > 0 {
			lowest = set.fds[len(set.fds)-1] + 1
		}
		fd, err := unix.FcntlInt(uintptr(s.null), unix.F_DUPFD_CLOEXEC, lowest)
		if errors.Is(err, unix.EINVAL) {
			err = unix.EMFILE // lowest is not below the limit (fcntl(2))
		}
		if err != nil {
			return fmt.Errorf("reserve descriptor: %w", err)
		}
		set.fds = append(set.fds, fd)
	}
	return nil
}

// spare fails with EMFILE where a start would take one of the last descriptors.
func (s *Spawner) spare() error {
	limit, err := fileLimit()
	if err != nil {
		return err
	}
	fd, err := unix.FcntlInt(uintptr(s.null), unix.F_DUPFD_CLOEXEC, 0) // the lowest that is free
	if err != nil {
		return err
	}
	if err := unix.Close(fd); err != nil {
		return err
	}
	if uint64(fd) >= limit.Cur-min(limit.Cur/spareFraction, maxSpare) {
		return fmt.Errorf("leave descriptors free: %w", unix.EMFILE)
	}
	return nil
}

// fileLimit returns the limit on open files of this process; somebody may change it at any time (prlimit(1)).
func fileLimit() (limit unix.Rlimit, err error) {
	err = unix.Prlimit(0, unix.RLIMIT_NOFILE, nil, &limit)
	return limit, err
}

// fill puts the descriptors into the slots, one each; -1 stands for /dev/null.
// Whatever happened, empty must be called afterwards.
func (s *Spawner) fill(set *slots, fds []int) error {
	if err := s.reserve(set, len(fds)); err != nil {
		return err
	}
	for i, fd := range fds {
		if fd < 0 {
			continue
		}
		if err := unix.Dup3(fd, set.fds[i], unix.O_CLOEXEC); err != nil {
			return fmt.Errorf("descriptor %d: %w", fd, err)
		}
	}
	return nil
}

// empty puts /dev/null back into the slots that fill used.
func (s *Spawner) empty(set *slots, fds []int) error {
	for i, fd := range fds {
		if fd < 0 || i >= len(set.fds) {
			continue
		}
		if err := unix.Dup3(s.null, set.fds[i], unix.O_CLOEXEC); err != nil {
			return fmt.Errorf("release descriptor: %w", err)
		}
	}
	return nil
}

// ignoredSignals reads which signals this process ignores; see proc_pid_status(5).
func ignoredSignals() ([]uint, error) {
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(b)) {
		hex, ok := strings.CutPrefix(line, "SigIgn:")
		if !ok {
			continue
		}
		mask, err := strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
		if err != nil {
			return nil, fmt.Errorf("read /proc/self/status: SigIgn: %w", err)
		}
		var out []uint
		for i := range uint(64) {
			if mask&(1<<i) != 0 {
				out = append(out, i+1)
			}
		}
		return out, nil
	}
	return nil, errors.New("read /proc/self/status: no SigIgn")
}
