package process

import (
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
)

const (
	hybridMounts = `31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw
39 31 0:36 / /sys/fs/cgroup/pids rw,relatime shared:1 - cgroup cgroup rw,pids
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw,nsdelegate
`
	partMounts = `50 1 0:36 /docker/1 /a\040b rw - cgroup cgroup rw,cpu,pids
51 1 0:38 / /sys/fs/cgroup rw - cgroup2 none rw
52 1 0:38 / /sys/fs/cgroup rw - cgroup2 none rw
`
)

func TestTaskGroups(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		list, mounts string
		want         []string
	}{
		"hybrid": {
			"8:pids:/a/b\n4:memory:/m\n1:name=systemd:/s\n0::/u\n", hybridMounts,
			[]string{"/sys/fs/cgroup/pids", "/sys/fs/cgroup/pids/a", "/sys/fs/cgroup/pids/a/b", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/unified/u"},
		},
		"root":             {"0::/\n", hybridMounts, []string{"/sys/fs/cgroup/unified"}},
		"part of it":       {"3:cpu,pids:/docker/1/x\n", partMounts, []string{"/a b", "/a b/x"}},
		"mounted twice":    {"0::/u (deleted)\n", partMounts, []string{"/sys/fs/cgroup", "/sys/fs/cgroup/u"}},
		"only like prefix": {"3:pids:/docker/12\n", partMounts, nil},
		"colon in name":    {"0::/a:b\n", partMounts, []string{"/sys/fs/cgroup", "/sys/fs/cgroup/a:b"}},
		"not mounted":      {"0::/a\n", "", nil},
		"nothing":          {"", hybridMounts, nil},
		"other controller": {"3:notpids:/\n", hybridMounts, nil},
		"above namespace":  {"3:pids:/../x\n", partMounts, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if diff := cmp.Diff(tt.want, taskGroups([]byte(tt.list), []byte(tt.mounts))); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func FuzzTaskGroups(f *testing.F) {
	f.Add([]byte("8:pids:/a/b\n0::/u\n"), []byte(hybridMounts))
	f.Add([]byte("3:cpu,pids:/docker/1/x\n0::/../x"), []byte(partMounts))
	f.Fuzz(func(t *testing.T, list, mounts []byte) {
		for _, dir := range taskGroups(list, mounts) {
			if !filepath.IsAbs(dir) || filepath.Clean(dir) != dir {
				t.Errorf("got %q", dir)
			}
		}
	})
}

func TestParseFree(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		limit, used string
		want        int
		fails       bool
	}{
		{"100\n", "30\n", 70, false},
		{"10\n", "30\n", 0, false},
		{"0", "0", 0, false},
		{"", "1", 0, true},
		{"1", "", 0, true},
		{"-1", "1", 0, true},
	} {
		if got, err := parseFree([]byte(tt.limit), []byte(tt.used)); got != tt.want || (err != nil) != tt.fails {
			t.Errorf("%q, %q: got %d, %v", tt.limit, tt.used, got, err)
		}
	}
}

func TestWholeMachine(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]bool{
		"         0          0 4294967295\n": true,
		"         0     100000      65536\n": false,
		"         0          0          1\n": false,
		"0 0 1000\n1000 1000 4294966295\n":   false,
		"":                                   false,
	} {
		if got := wholeMachine([]byte(in)); got != want {
			t.Errorf("%q: got %t", in, got)
		}
	}
}

func TestFreeInGroup(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write := func(file, s string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, file), []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want := func(want int, fails bool) {
		t.Helper()
		if got, err := freeInGroup(dir); got != want || (err != nil) != fails {
			t.Errorf("got %d, %v, want %d", got, err, want)
		}
	}
	want(math.MaxInt, false)
	write("pids.max", "max\n")
	want(math.MaxInt, false)
	write("pids.max", "20\n")
	want(math.MaxInt, true)
	write("pids.current", "3\n")
	want(17, false)
	write("pids.current", "x\n")
	want(math.MaxInt, true)
}

// A start that hangs gives its turn on, so others come to theirs.
func TestTurnsAreGivenOn(t *testing.T) {
	t.Parallel()
	s := &Spawner{starts: make(chan struct{}, maxStarts)}
	var leave []func()
	for range 3 * maxStarts {
		leave = append(leave, s.enterStart())
	}
	for _, f := range leave {
		f()
	}
	if n := len(s.starts); n != 0 {
		t.Errorf("%d turns are left", n)
	}
}

// A supervisor that has spare threads lives on when there are no more tasks to be had.
func TestNoMoreTasks(t *testing.T) {
	nettest.Need(t, nettest.RealRoot)
	run := func(t *testing.T, arg string, attr *syscall.SysProcAttr) {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), "/proc/self/exe", arg)
		cmd.Env = append(os.Environ(), helperEnv+"=tasks")
		cmd.SysProcAttr = attr
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v:\n%.3000s", err, out)
		}
	}
	t.Run("cgroup", func(t *testing.T) {
		mounts, err := os.ReadFile("/proc/self/mountinfo")
		if err != nil {
			t.Fatal(err)
		}
		dirs := groupDirs(mounts, "cgroup", "pids", "/")
		if len(dirs) == 0 {
			t.Skip("no cgroup v1 that counts tasks")
		}
		dir := filepath.Join(dirs[0], testName())
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := os.Remove(dir); err != nil {
				t.Error(err)
			}
		}()
		run(t, dir, nil)
	})
	t.Run("user", func(t *testing.T) {
		const nobodyElse = 54321 // the kernel counts by user
		run(t, "", &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobodyElse, Gid: nobodyElse}})
	})
}

// helperTasks makes many starts at once where no more tasks are to be had, by the limit of a
// cgroup v1, or by that of the user.
func helperTasks(args []string) int {
	if err := startWithoutTasks(args[0]); err != nil {
		fmt.Println(err)
		return 1
	}
	return 0
}

func startWithoutTasks(dir string) error {
	limit := func(n uint64) error { return unix.Setrlimit(unix.RLIMIT_NPROC, &unix.Rlimit{Cur: n, Max: 1000}) }
	if dir != "" {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0); err != nil {
			return err
		}
		limit = func(n uint64) error {
			return os.WriteFile(filepath.Join(dir, "pids.max"), []byte(strconv.FormatUint(n, 10)), 0)
		}
	}
	if err := limit(200); err != nil {
		return err
	}
	if n, err := SpareThreads(); n != spareThreads || err != nil {
		return fmt.Errorf("got %d spare threads, %w", n, err)
	}
	s, err := NewSpawner(testName())
	if err != nil {
		return err
	}
	before, err := tasks()
	if err != nil {
		return err
	}
	if before <= spareThreads {
		return fmt.Errorf("got %d threads", before)
	}
	for _, more := range []int{0, 3} {
		if err := limit(uint64(before + more)); err != nil {
			return err
		}
		free, err := blockThreads()
		if err != nil {
			return err
		}
		if err := errors.Join(manyStarts(s, more == 0), free()); err != nil {
			return err
		}
	}
	if err := limit(200); err != nil {
		return err
	}
	p, err := s.Start(&Spec{Exec: &Exec{Command: []string{"/bin/true"}}, Stdout: -1, Stderr: -1})
	if err != nil {
		return fmt.Errorf("later: %w", err)
	}
	_, err = wait(p)
	return errors.Join(err, s.Close())
}

// manyStarts makes more starts at once than there are threads. They may lack a task; with
// allFail each does.
func manyStarts(s *Spawner, allFail bool) error {
	const n = 300
	errs := make([]error, n)
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() {
			p, err := s.Start(&Spec{Exec: &Exec{Command: []string{"/bin/true"}}, Stdout: -1, Stderr: -1})
			switch {
			case err == nil && allFail:
				_, err = wait(p)
				errs[i] = errors.Join(errors.New("started above the limit"), err)
			case err == nil:
				_, errs[i] = wait(p)
			case !errors.Is(err, unix.EAGAIN):
				errs[i] = err
			}
		})
	}
	all.Wait()
	return errors.Join(errs...)
}

// blockThreads lets as many system calls block as a cold program has no threads for.
func blockThreads() (free func() error, err error) {
	const n = spareThreads / 2
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		return nil, err
	}
	var begun, ended sync.WaitGroup
	begun.Add(n)
	for range n {
		ended.Go(func() {
			begun.Done()
			_, _ = unix.Read(pipe[0], make([]byte, 1)) // ends with the pipe
		})
	}
	begun.Wait()
	return func() error {
		err := unix.Close(pipe[1])
		ended.Wait()
		return errors.Join(err, unix.Close(pipe[0]))
	}, nil
}

// tasks counts the threads of this process.
func tasks() (int, error) {
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(b), "\nThreads:\t")
	line, _, _ := strings.Cut(rest, "\n")
	return strconv.Atoi(line)
}
