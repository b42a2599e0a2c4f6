package process

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// cgroups is the directory of this supervisor in the unified hierarchy, inside the group
// that it runs in itself: with Delegate=yes that is the one of its unit. Every service has
// a directory in it. Nothing outside of it is ever changed or removed.
type cgroups struct {
	name string // of the directory
	path string // as in /proc/PID/cgroup

	mu  sync.Mutex
	own int // the group that the supervisor runs in
	fd  int
}

// Leftover is a cgroup that an earlier supervisor of the same name left behind with
// processes in it. They are not touched, and are no part of any Tree.
type Leftover struct {
	Name string // of the service
	PIDs []int
}

// openCgroups finds the own group and makes the directory in it. The error says why there
// is none, and what would help, in words.
func openCgroups(name string) (*cgroups, error) {
	if err := probeClone3(); err != nil {
		return nil, err
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	list, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, err
	}
	ownPath, ok := parseOwnCgroup(list)
	if !ok {
		return nil, errors.New("this kernel has no cgroup v2")
	}
	dirs := unifiedDirs(mounts, ownPath)
	if len(dirs) == 0 {
		return nil, errors.New("no cgroup v2 is mounted here; mount one (mount -t cgroup2 none /sys/fs/cgroup)")
	}
	var errs []error
	for _, dir := range dirs {
		g, err := openCgroupsIn(dir, ownPath, name)
		if err == nil {
			return g, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

// probeClone3 asks with arguments that are wrong whether clone3(2) is there at all.
func probeClone3() error {
	if _, _, errno := unix.RawSyscall(unix.SYS_CLONE3, 0, 0, 0); errno == unix.ENOSYS || errno == unix.EPERM {
		return errNoClone3
	}
	return nil
}

var errNoClone3 = errors.New("the kernel or the container's seccomp filter refuses clone3; allow it")

func openCgroupsIn(dir, ownPath, name string) (*cgroups, error) {
	own, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open cgroup %s: %w", dir, err)
	}
	g := &cgroups{name: name, path: path.Join(ownPath, name), own: own, fd: -1}
	var fs unix.Statfs_t
	if err = unix.Fstatfs(own, &fs); err == nil && fs.Type != unix.CGROUP2_SUPER_MAGIC {
		err = errors.New("not a cgroup v2")
	}
	if err == nil {
		err = g.open()
	}
	if err == nil && unix.Faccessat(g.fd, "cgroup.kill", unix.W_OK, 0) != nil { // the newest of what is needed
		err = errors.New("there is no cgroup.kill, which came with Linux 5.14")
	}
	if err == nil {
		return g, nil
	}
	if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) || errors.Is(err, unix.EROFS) {
		err = fmt.Errorf("%w; run as root, or delegate it (Delegate=yes in the unit)", err)
	}
	return nil, errors.Join(fmt.Errorf("make cgroup %s: %w", path.Join(dir, name), err), g.close())
}

// open makes the directory of the supervisor, or takes the one that is there.
func (s *cgroups) open() error {
	if err := unix.Mkdirat(s.own, s.name, 0o755); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	fd, err := openDirAt(s.own, s.name)
	if err != nil {
		return err
	}
	if s.fd >= 0 {
		err = unix.Close(s.fd)
	}
	s.fd = fd
	return err
}

// close removes the directory if it is empty.
func (s *cgroups) close() error {
	var errs []error
	if s.fd >= 0 {
		err := unix.Unlinkat(s.own, s.name, unix.AT_REMOVEDIR)
		if !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, unix.EBUSY) && !gone(err) {
			errs = append(errs, err)
		}
		errs = append(errs, unix.Close(s.fd))
	}
	return errors.Join(append(errs, unix.Close(s.own))...)
}

// sweep removes what an earlier supervisor left behind, and returns where somebody lives.
func (s *cgroups) sweep() []Leftover {
	names, err := subdirectories(s.fd)
	if err != nil {
		return nil // whoever makes a group will find out
	}
	var out []Leftover
	for _, name := range names {
		if removeAt(s.fd, name) == nil {
			continue
		}
		fd, err := openDirAt(s.fd, name)
		if err != nil {
			continue
		}
		g := &cgroup{path: path.Join(s.path, name), fd: fd}
		if pids, err := g.pids(); err == nil && len(pids) > 0 {
			service, _, _ := strings.Cut(name, beside)
			out = append(out, Leftover{Name: service, PIDs: pids})
			_ = g.control("cgroup.freeze", "0") // nobody else will let them run on
		}
		_ = unix.Close(fd) // it was only read
	}
	return out
}

// beside stands between the name of a service, in which it cannot occur, and a number,
// where the directory of that name is taken. So many directories are tried.
const (
	beside    = "~"
	maxBeside = 100
)

// make makes the group of one service, a fresh one. A directory that an earlier supervisor
// left is removed if nobody is in it; else another is made beside it.
func (s *cgroups) make(service string) (*cgroup, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	name := service
	for n := 2; ; n++ {
		err := unix.Mkdirat(s.fd, name, 0o755)
		if errors.Is(err, unix.EEXIST) && removeAt(s.fd, name) == nil {
			err = unix.Mkdirat(s.fd, name, 0o755)
		} else if gone(err) { // our own directory was removed by somebody
			if err = s.open(); err == nil {
				err = unix.Mkdirat(s.fd, name, 0o755)
			}
		}
		if errors.Is(err, unix.EEXIST) && n <= maxBeside {
			name = service + beside + strconv.Itoa(n)
			continue
		}
		g := &cgroup{parent: s, name: name, path: path.Join(s.path, name), fd: -1, events: -1, freezer: -1}
		if err == nil {
			g.fd, err = openDirAt(s.fd, name)
		}
		if err != nil {
			return nil, fmt.Errorf("make cgroup %s: %w", g.path, err)
		}
		return g, nil
	}
}

func (s *cgroups) remove(name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return removeAt(s.fd, name)
}

// parseOwnCgroup finds the path in the unified hierarchy in /proc/PID/cgroup.
func parseOwnCgroup(b []byte) (string, bool) {
	for line := range bytes.Lines(b) {
		if p, ok := bytes.CutPrefix(bytes.TrimSuffix(line, []byte("\n")), []byte("0::/")); ok {
			return "/" + strings.TrimSuffix(string(p), " (deleted)"), true
		}
	}
	return "", false
}

// unifiedDirs returns where the group of a path can be seen, by /proc/self/mountinfo: see
// proc_pid_mountinfo(5). In a container the mount may show a part of the hierarchy only.
func unifiedDirs(mountinfo []byte, ownPath string) []string {
	var out []string
	for line := range bytes.Lines(mountinfo) {
		before, after, ok := strings.Cut(string(line), " - ")
		f, kind := strings.Fields(before), strings.Fields(after)
		if !ok || len(f) < 6 || len(kind) < 1 || kind[0] != "cgroup2" {
			continue
		}
		root, point := unescape(f[3]), unescape(f[4])
		rest, ok := strings.CutPrefix(ownPath, strings.TrimSuffix(root, "/"))
		if !ok || rest != "" && rest[0] != '/' || strings.HasPrefix(ownPath+"/", "/../") {
			continue
		}
		out = append(out, path.Join(point, rest))
	}
	return out
}

// unescape replaces the octal escapes of blanks and backslashes.
func unescape(s string) string {
	var out strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				out.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		out.WriteByte(s[i])
	}
	return out.String()
}
