package process

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"

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
	null     int          // /dev/null
	free     chan *slots  // those that no start is using; closed by Close
	ignored  []uint       // signals; immutable
	limit    nofile.Limit // immutable, as is
	known    bool         // limit is known, and differs from ours
	noClone3 atomic.Bool  // the kernel or a seccomp filter refuses clone3
}

// slots are reserved descriptors for the use of one start at a time. They make the
// cost of a start independent of the number of sockets that the supervisor has
// open: a new process shares the descriptor table and copies only its low end, so
// what it is to inherit is put into slots there for that moment. Between starts a
// slot holds /dev/null, never a socket: the copy of a connection left behind would
// keep its client waiting for the end.
//
// The numbers ascend, and the i-th is above i+2.
type slots struct{ fds []int }

const (
	// 0 to 2 and a service with 16 sockets; more are reserved when first needed.
	initialSlots = 3 + 16
	// A start keeps a processor (in Go's sense) until exec, so that few can go on
	// at once; each more set makes the table longer that all of them copy.
	maxSets = 4
)

// NewSpawner reserves the descriptors and looks at the state of this process.
// Signals must be ignored (signal.Ignore) before, or children will ignore them too.
func NewSpawner() (*Spawner, error) {
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
	s := &Spawner{null: null, ignored: ignored, free: make(chan *slots, min(runtime.GOMAXPROCS(0), maxSets))}
	if s.limit, s.known = nofile.AtStart(); s.known {
		var now unix.Rlimit
		if err := unix.Prlimit(0, unix.RLIMIT_NOFILE, nil, &now); err == nil && now.Cur == s.limit.Soft {
			s.known = false // nothing was raised, so nothing has to be put back
		}
	}
	for range cap(s.free) {
		set := &slots{}
		err = errors.Join(err, s.reserve(set, initialSlots))
		s.free <- set
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("prepare to start processes: %w", err), s.Close())
	}
	return s, nil
}

// Close waits for starts that are under way and gives the reserved descriptors
// back. Processes are not touched. Closing again does nothing.
func (s *Spawner) Close() error {
	var errs []error
	for range cap(s.free) {
		set, ok := <-s.free
		if !ok {
			return nil
		}
		for _, fd := range set.fds {
			errs = append(errs, unix.Close(fd))
		}
	}
	close(s.free) // nobody has a set to put back
	return errors.Join(append(errs, unix.Close(s.null))...)
}

// reserve sees to it that there are n slots in the set.
func (s *Spawner) reserve(set *slots, n int) error {
	for len(set.fds) < n {
		lowest := 3 // above 0..2, so that slot i is above every target up to i
		if len(set.fds) > 0 {
			lowest = set.fds[len(set.fds)-1] + 1
		}
		fd, err := unix.FcntlInt(uintptr(s.null), unix.F_DUPFD_CLOEXEC, lowest)
		if err != nil {
			return fmt.Errorf("reserve descriptor: %w", err)
		}
		set.fds = append(set.fds, fd)
	}
	return nil
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
