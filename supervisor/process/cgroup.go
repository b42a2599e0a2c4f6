package process

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// cgroup is a directory of the unified hierarchy that holds one service; see cgroups(7)
// and the kernel's Documentation/admin-guide/cgroup-v2.rst. All of it reaches down to the
// groups that the service may have made inside.
type cgroup struct {
	parent *cgroups
	name   string // in the directory of the supervisor
	path   string // as in /proc/PID/cgroup
	fd     int    // of the directory; processes are born into it
	events int    // cgroup.events, held open for the one who waits for the end; -1: nobody did

	// Guarded by the tree.
	freezer int  // cgroup.freeze, held open since the first Freeze so that Thaw needs no descriptor; -1
	users   int  // who needs fd
	removed bool // the directory is gone; fd is closed when nobody needs it
}

// control writes to a control file of the group. Nothing can be done to one that somebody has
// removed, which means that nobody was in it.
func (g *cgroup) control(file, value string) error {
	fd, err := unix.Openat(g.fd, file, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err == nil {
		_, err = unix.Write(fd, []byte(value))
		err = errors.Join(err, unix.Close(fd))
	}
	if err != nil && !gone(err) {
		return fmt.Errorf("write %s of cgroup %s: %w", file, g.path, err)
	}
	return nil
}

// is asks cgroup.events about "populated" or "frozen".
func (g *cgroup) is(key string) (bool, error) {
	b, err := readAt(g.fd, "cgroup.events")
	if gone(err) {
		return key == "frozen", nil
	}
	if err != nil {
		return false, fmt.Errorf("read cgroup.events of cgroup %s: %w", g.path, err)
	}
	return parseEvents(b, key), nil
}

// parseEvents reads one key of cgroup.events, which is 0 or 1.
func parseEvents(b []byte, key string) bool {
	for line := range bytes.Lines(b) {
		if k, v, _ := strings.Cut(strings.TrimSpace(string(line)), " "); k == key {
			return v == "1"
		}
	}
	return false
}

// setFrozen writes cgroup.freeze.
func (g *cgroup) setFrozen(value string) (err error) {
	if g.freezer < 0 {
		g.freezer, err = unix.Openat(g.fd, "cgroup.freeze", unix.O_WRONLY|unix.O_CLOEXEC, 0)
	}
	if err == nil {
		_, err = unix.Pwrite(g.freezer, []byte(value), 0)
	}
	if err != nil && !gone(err) {
		return fmt.Errorf("write cgroup.freeze of cgroup %s: %w", g.path, err)
	}
	return nil
}

// waitFrozen returns once all that is in the group stands still.
func (g *cgroup) waitFrozen(ctx context.Context) error {
	// The kernel notifies at most every 10 ms, so we look.
	return poll(ctx, func() error {
		frozen, err := g.is("frozen")
		if err == nil && !frozen {
			err = errStillRunning
		}
		return err
	})
}

// pids lists the living processes of the group and of those inside it.
func (g *cgroup) pids() ([]int, error) {
	var out []int
	err := descend(g.fd, func(_, fd int, _ string) error {
		b, err := readAt(fd, "cgroup.procs")
		if errors.Is(err, unix.EOPNOTSUPP) {
			return nil // threads only; their processes are listed further up
		}
		out = append(out, parsePIDs(b)...)
		return err
	})
	if err != nil && !gone(err) {
		return nil, fmt.Errorf("list processes of cgroup %s: %w", g.path, err)
	}
	return out, nil
}

// holds reports whether a process is in the group.
func (g *cgroup) holds(pid int) bool {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cgroup")
	path, ok := parseOwnCgroup(b)
	return err == nil && ok && (path == g.path || strings.HasPrefix(path, g.path+"/"))
}

// signal sends a signal to all processes, also to those that appear meanwhile.
func (g *cgroup) signal(sig unix.Signal) error {
	sent := map[int]bool{}
	var errs []error
	for range signalRounds {
		pids, err := g.pids()
		if err != nil {
			return errors.Join(append(errs, err)...)
		}
		found := false
		for _, pid := range pids {
			if sent[pid] {
				continue
			}
			sent[pid], found = true, true
			if err := signalIf(pid, sig, func() bool { return g.holds(pid) }); err != nil {
				errs = append(errs, err)
			}
		}
		if !found {
			break
		}
	}
	return errors.Join(errs...)
}

// ended returns an epoll set that becomes readable when cgroup.events has changed.
func (g *cgroup) ended() (int, error) {
	if g.events < 0 {
		fd, err := unix.Openat(g.fd, "cgroup.events", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if gone(err) {
			return readable()
		}
		if err != nil {
			return -1, fmt.Errorf("open cgroup.events of cgroup %s: %w", g.path, err)
		}
		g.events = fd
	}
	set, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("watch cgroup %s: %w", g.path, err)
	}
	// From this reading on a change is one that the caller has not seen.
	var buf [256]byte
	n, err := unix.Pread(g.events, buf[:], 0)
	if err == nil {
		err = unix.EpollCtl(set, unix.EPOLL_CTL_ADD, g.events, &unix.EpollEvent{Events: unix.EPOLLPRI})
	}
	if err == nil && parseEvents(buf[:n], "populated") {
		return set, nil
	}
	_ = unix.Close(set) // nothing to report about a set
	if err != nil && !gone(err) {
		return -1, fmt.Errorf("watch cgroup %s: %w", g.path, err)
	}
	return readable()
}

// remove removes the directory, with what is inside it, if nobody is in there.
func (g *cgroup) remove() error {
	if err := g.parent.remove(g.name); err != nil {
		return fmt.Errorf("remove cgroup %s: %w", g.path, err)
	}
	g.removed = true
	return nil
}

// close gives the descriptors back.
func (g *cgroup) close() error { return errors.Join(unix.Close(g.fd), g.rest()) }

// rest gives back those that can be opened again.
func (g *cgroup) rest() error {
	var err error
	for _, fd := range []*int{&g.events, &g.freezer} {
		if *fd >= 0 {
			err = errors.Join(err, unix.Close(*fd))
			*fd = -1
		}
	}
	return err
}

// descend visits a directory and those below it, which may vanish at any time: the inner
// ones after the outer ones. It passes what unlinkat needs, and a descriptor of its own.
func descend(fd int, visit func(parent, fd int, name string) error) error {
	if err := visit(-1, fd, ""); err != nil {
		return err
	}
	names, err := subdirectories(fd)
	if err != nil {
		return err
	}
	for _, name := range names {
		sub, err := openDirAt(fd, name)
		if err == nil {
			err = errors.Join(descend(sub, visit), unix.Close(sub))
		}
		if err != nil && !gone(err) {
			return err
		}
	}
	return nil
}

// gone reports whether err is of a directory that somebody has removed meanwhile.
func gone(err error) bool { return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) }

// removeAt removes an empty group and the groups inside it. The kernel refuses (EBUSY)
// where a process is left.
func removeAt(parent int, name string) error {
	err := unix.Unlinkat(parent, name, unix.AT_REMOVEDIR)
	if err == nil || gone(err) {
		return nil
	}
	fd, openErr := openDirAt(parent, name)
	if openErr != nil {
		return errors.Join(err, openErr)
	}
	defer unix.Close(fd) //nolint:errcheck // it was only read
	names, listErr := subdirectories(fd)
	if listErr != nil || len(names) == 0 {
		return errors.Join(err, listErr)
	}
	for _, inner := range names {
		if err := removeAt(fd, inner); err != nil {
			return err
		}
	}
	if err := unix.Unlinkat(parent, name, unix.AT_REMOVEDIR); err != nil && !gone(err) {
		return err
	}
	return nil
}

func openDirAt(parent int, name string) (int, error) {
	return unix.Openat(parent, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
}

// subdirectories lists the groups directly inside one.
func subdirectories(fd int) ([]string, error) {
	own, err := openDirAt(fd, ".") // with a position of its own
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(own), "cgroup")
	defer f.Close()
	entries, err := f.ReadDir(-1)
	if err != nil {
		return nil, withoutPath(err)
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// readAt reads a control file of a group.
func readAt(dir int, file string) ([]byte, error) {
	fd, err := unix.Openat(dir, file, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd) //nolint:errcheck // it was only read
	var out []byte
	buf := make([]byte, 4096)
	for {
		n, err := unix.Read(fd, buf)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return nil, err
		case n == 0:
			return out, nil
		default:
			out = append(out, buf[:n]...)
		}
	}
}

// readable returns a descriptor that is so at once.
func readable() (int, error) {
	fd, err := unix.Eventfd(1, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return -1, fmt.Errorf("make eventfd: %w", err)
	}
	return fd, nil
}

var errStillRunning = errors.New("still running")

// poll calls cond until it returns something else than errStillRunning.
func poll(ctx context.Context, cond func() error) error {
	pause := 50 * time.Microsecond
	timer := time.NewTimer(pause)
	defer timer.Stop()
	for {
		// The time is looked at before the processes: if it is up because we
		// ourselves did not get to run, they have had their chance all the same.
		late := ctx.Err()
		err := cond()
		switch {
		case !errors.Is(err, errStillRunning):
			return err
		case late != nil:
			return fmt.Errorf("%w: %w", err, late)
		}
		select {
		case <-ctx.Done():
		case <-timer.C:
			pause = min(2*pause, 5*time.Millisecond)
			timer.Reset(pause)
		}
	}
}
