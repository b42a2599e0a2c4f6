package process

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
)

const helperEnv = "HIBERGATED_PROCESS_HELPER"

func TestMain(m *testing.M) {
	if mode := os.Getenv(helperEnv); mode != "" {
		os.Exit(helper(mode))
	}
	// Let the runtime open its poller now, so that tests can count descriptors.
	if r, w, err := os.Pipe(); err == nil {
		r.Close()
		w.Close()
	}
	os.Exit(nettest.Main(m))
}

// helper is what this binary does when a test starts it as a child.
func helper(mode string) int {
	switch mode {
	case "supervisor": // starts one shell that shows what it inherited
		signal.Ignore(unix.SIGPIPE, unix.SIGUSR2)
		s, err := NewSpawner(testName())
		if err != nil {
			fmt.Println(err)
			return 1
		}
		p, err := s.Start(&Spec{
			Exec:   &Exec{Command: []string{"/bin/sh", "-c", "ulimit -Sn; ulimit -Hn; exec /bin/busybox grep -E '^Sig(Blk|Ign|Cgt)' /proc/self/status"}},
			Stdout: 1, Stderr: 2,
		})
		if err != nil {
			fmt.Println(err)
			return 1
		}
		if _, err := wait(p); err != nil {
			fmt.Println(err)
			return 1
		}
		if err := s.Close(); err != nil {
			fmt.Println(err)
			return 1
		}
	case "init":
		return helperInit()
	case "tasks":
		return helperTasks(os.Args[1:])
	case "count":
		return count(os.Args[1])
	}
	return 0
}

// wait waits for the end of a process and reaps it.
func wait(p *Process) (ExitStatus, error) {
	fds := []unix.PollFd{{Fd: int32(p.PIDFD()), Events: unix.POLLIN}}
	for {
		if _, err := unix.Poll(fds, -1); !errors.Is(err, unix.EINTR) {
			break
		}
	}
	return p.Reap()
}

func mustWait(tb testing.TB, p *Process) ExitStatus {
	tb.Helper()
	status, err := wait(p)
	if err != nil {
		tb.Fatal(err)
	}
	return status
}

// endWithTest kills a process that a failed test has left running.
func endWithTest(t *testing.T, p *Process) {
	t.Helper()
	t.Cleanup(func() {
		if p.reaped {
			return
		}
		if err := p.KillGroup(); err != nil {
			t.Error(err)
		}
		mustWait(t, p)
	})
}

// testName names the supervisor that a test plays.
func testName() string { return "hibergated-test-" + strconv.Itoa(os.Getpid()) }

// newSpawner returns a Spawner for one test, and fails the test if afterwards a
// descriptor or a child is left. So tests that use it are not parallel.
func newSpawner(tb testing.TB) *Spawner {
	tb.Helper()
	before := len(nettest.OpenFDs())
	s, err := NewSpawner(testName())
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		for _, set := range slotSets(s) {
			for i, fd := range set.fds {
				if to, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd)); err != nil || to != "/dev/null" {
					tb.Errorf("slot %d holds %q (%v), want /dev/null", i, to, err)
				}
			}
		}
		if err := s.Close(); err != nil {
			tb.Error(err)
		}
		if after := nettest.OpenFDs(); len(after) != before {
			tb.Errorf("got %d descriptors after the test, want %d: %q", len(after), before, after)
		}
		if left := nettest.Children(os.Getpid()); len(left) > 0 {
			tb.Errorf("children left: %v", left)
		}
	})
	return s
}

// slotSets returns all sets of slots of a Spawner that is not in use.
func slotSets(s *Spawner) []*slots {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.free)
}

// bothClones names the two ways to make a process: clone3, and clone, which is
// the way in containers.
func bothClones() map[string]bool { return map[string]bool{"clone3": false, "clone": true} }

// output runs a program to its end and returns what it wrote, to the spec's
// standard output and error.
func output(tb testing.TB, s *Spawner, spec *Spec) (string, ExitStatus) {
	tb.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		tb.Fatal(err)
	}
	defer r.Close()
	spec.Stdout, spec.Stderr = int(w.Fd()), int(w.Fd())
	p, err := s.Start(spec)
	w.Close()
	if err != nil {
		tb.Fatal(err)
	}
	b, err := io.ReadAll(r)
	if err != nil {
		tb.Error(err)
	}
	return string(b), mustWait(tb, p)
}

func sh(script string, args ...string) *Exec {
	return &Exec{Command: append([]string{"/bin/sh", "-c", script, "sh"}, args...)}
}

const listFDs = `exec /bin/busybox ls -l /proc/self/fd`

// fdTable parses the output of listFDs: descriptor -> target, without the one of ls itself.
func fdTable(out string) map[string]string {
	table := map[string]string{}
	for line := range strings.Lines(out) {
		left, to, ok := strings.Cut(strings.TrimSpace(line), " -> ")
		if !ok || strings.Contains(to, "/proc/") {
			continue
		}
		table[left[strings.LastIndexByte(left, ' ')+1:]] = to
	}
	return table
}

// blockingPipe returns a pipe that children can use as they expect.
func blockingPipe(tb testing.TB) (r, w *os.File) {
	tb.Helper()
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		tb.Fatal(err)
	}
	r, w = os.NewFile(uintptr(fds[0]), "r"), os.NewFile(uintptr(fds[1]), "w")
	tb.Cleanup(func() {
		r.Close()
		w.Close()
	})
	return r, w
}

func target(tb testing.TB, fd int) string {
	tb.Helper()
	to, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
	if err != nil {
		tb.Fatal(err)
	}
	return to
}

// openFDs makes n different descriptors and closes them after the test.
func openFDs(tb testing.TB, n int, flags int) []int {
	tb.Helper()
	var fds []int
	for range n {
		fd, err := unix.Eventfd(0, flags)
		if err != nil {
			tb.Fatal(err)
		}
		fds = append(fds, fd)
	}
	tb.Cleanup(func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	})
	return fds
}

// openFiles is openFDs with descriptors that can be told apart by name.
func openFiles(tb testing.TB, n int) []int {
	tb.Helper()
	var fds []int
	for i := range n {
		fd, err := unix.MemfdCreate("file"+strconv.Itoa(i), unix.MFD_CLOEXEC)
		if err != nil {
			tb.Fatal(err)
		}
		fds = append(fds, fd)
	}
	tb.Cleanup(func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	})
	return fds
}

func TestDescriptorsOfChild(t *testing.T) {
	nettest.Need(t, nettest.Tool("/bin/busybox"))
	reversed := func(fds []int) []int { fds = slices.Clone(fds); slices.Reverse(fds); return fds }
	for name, tc := range map[string]struct {
		others int // descriptors of ours that are not handed over
		flags  int
		files  int
		first  int
		order  func([]int) []int
	}{
		"no sockets":                    {files: 0, first: 3},
		"one socket":                    {files: 1, first: 3},
		"reversed":                      {files: 7, first: 3, order: reversed},
		"one on two and three":          {files: 1, first: 3, order: func(f []int) []int { return []int{f[0], f[0]} }},
		"stdio":                         {files: 1, first: 0, order: func(f []int) []int { return []int{f[0], f[0]} }},
		"more than slots":               {files: 20, first: 3, order: reversed},
		"many more than slots":          {files: 300, first: 3},
		"among 3000 close-on-exec":      {others: 3000, flags: unix.EFD_CLOEXEC, files: 2, first: 3},
		"among 3000 not close-on-exec":  {others: 3000, files: 2, first: 3},
		"more than slots, among others": {others: 1000, files: 40, first: 3, order: reversed},
	} {
		t.Run(name, func(t *testing.T) {
			for way, noClone3 := range bothClones() {
				t.Run(way, func(t *testing.T) {
					s := newSpawner(t)
					s.noClone3.Store(noClone3)
					openFDs(t, tc.others, tc.flags)
					fds := openFiles(t, tc.files)
					if tc.order != nil {
						fds = tc.order(fds)
					}
					r, w, err := os.Pipe()
					if err != nil {
						t.Fatal(err)
					}
					defer r.Close()
					want := map[string]string{"0": "/dev/null", "1": target(t, int(w.Fd())), "2": target(t, int(w.Fd()))}
					for i, fd := range fds {
						want[strconv.Itoa(tc.first+i)] = target(t, fd)
					}
					spec := &Spec{Exec: sh(listFDs), FDs: fds, First: tc.first, Stdout: int(w.Fd()), Stderr: int(w.Fd())}
					if tc.first == 0 { // its output is one of the sockets: a pipe here
						spec.FDs = []int{fds[0], int(w.Fd())}
						want["1"] = target(t, int(w.Fd()))
					}
					p, err := s.Start(spec)
					w.Close()
					if err != nil {
						t.Fatal(err)
					}
					b, err := io.ReadAll(r)
					if err != nil {
						t.Fatal(err)
					}
					mustWait(t, p)
					if diff := cmp.Diff(want, fdTable(string(b))); diff != "" {
						t.Errorf("descriptors of the child (-want +got):\n%s", diff)
					}
				})
			}
		})
	}
}

// Descriptors 0 to 2 may be closed in a supervisor started by a careless parent;
// slots must still be above all targets.
func TestSlotsAreAboveTargets(t *testing.T) {
	s := newSpawner(t)
	for _, set := range slotSets(s) {
		for i, fd := range set.fds {
			if fd <= i+2 {
				t.Errorf("slot %d is descriptor %d, want above %d", i, fd, i+2)
			}
		}
		if !slices.IsSorted(set.fds) {
			t.Errorf("got slots %v, want them ascending", set.fds)
		}
	}
}

func TestStdoutNull(t *testing.T) {
	s := newSpawner(t)
	fds := openFiles(t, 1)
	p, err := s.Start(&Spec{Exec: sh(`a=$(readlink /proc/$$/fd/1 /proc/$$/fd/2); echo "$a" >&3`), FDs: fds, First: 3, Stdout: -1, Stderr: -1})
	if err != nil {
		t.Fatal(err)
	}
	mustWait(t, p)
	b := make([]byte, 100)
	n, _ := unix.Pread(fds[0], b, 0)
	if got, want := string(b[:n]), "/dev/null\n/dev/null\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestPIDVariable(t *testing.T) {
	for way, noClone3 := range bothClones() {
		t.Run(way, func(t *testing.T) {
			s := newSpawner(t)
			s.noClone3.Store(noClone3)
			for range 20 {
				spec := &Spec{Exec: sh(`echo $LISTEN_PID $$ $A`), First: 3, PIDEnv: "LISTEN_PID", Env: []string{"A=b"}}
				out, _ := output(t, s, spec)
				f := strings.Fields(out)
				if len(f) != 3 || f[0] != f[1] || f[2] != "b" {
					t.Fatalf("got LISTEN_PID, pid and A %q, want twice the same and b", f)
				}
			}
			// Nothing else is in the environment.
			out, _ := output(t, s, &Spec{Exec: &Exec{Command: []string{"/usr/bin/env"}}, Env: []string{"A=b"}})
			if out != "A=b\n" {
				t.Errorf("got environment %q, want A=b alone", out)
			}
		})
	}
}

func TestContextOfChild(t *testing.T) {
	for way, noClone3 := range bothClones() {
		t.Run(way, func(t *testing.T) {
			s := newSpawner(t)
			s.noClone3.Store(noClone3)
			dir := t.TempDir()
			unix.Umask(0o077)
			defer unix.Umask(0o022)
			x := sh(`umask; pwd; echo "$0 $1"; cut -d' ' -f1,5,6 /proc/$$/stat; echo $$`, "arg")
			x.WorkingDirectory = dir
			spec := &Spec{Exec: x}
			out, status := output(t, s, spec)
			lines := strings.Split(strings.TrimSpace(out), "\n")
			if len(lines) != 5 || status != (ExitStatus{}) {
				t.Fatalf("got %q, %v", lines, status)
			}
			pid := lines[4]
			want := []string{"0022", dir, "sh arg", pid + " " + pid + " " + pid, pid}
			if diff := cmp.Diff(want, lines); diff != "" {
				t.Errorf("umask, directory, arguments, pid with group and session (-want +got):\n%s", diff)
			}
			out, _ = output(t, s, &Spec{Exec: &Exec{Command: []string{"/bin/sh", "-c", "tr '\\0' ' ' </proc/$$/cmdline; pwd"}, Argv0: "-other"}})
			if want := "-other -c tr '\\0' ' ' </proc/$$/cmdline; pwd /\n"; out != want {
				t.Errorf("argv0 and default directory: got %q, want %q", out, want)
			}
		})
	}
}

// A supervisor that was started with a low soft limit (Go raises it), ignored
// signals, and signals that it handles hands none of it on.
func TestLimitAndSignalsOfGrandchild(t *testing.T) {
	s := newSpawner(t)
	var hard unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &hard); err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	out, status := output(t, s, &Spec{
		Exec: sh(`ulimit -Sn 512; trap '' HUP INT USR1; exec "$1"`, self),
		Env:  []string{helperEnv + "=supervisor", "PATH=" + defaultPath, "GOCOVERDIR=" + t.TempDir()},
	})
	none := "0000000000000000\n"
	want := fmt.Sprintf("512\n%d\nSigBlk:\t%sSigIgn:\t%sSigCgt:\t%s", hard.Max, none, none, none)
	if out != want || status != (ExitStatus{}) {
		t.Errorf("got %q, %v, want %q", out, status, want)
	}
}

func TestSignalsOfChild(t *testing.T) {
	signal.Ignore(unix.SIGUSR1)
	defer signal.Reset(unix.SIGUSR1)
	caught := make(chan os.Signal, 1)
	signal.Notify(caught, unix.SIGUSR2)
	defer signal.Stop(caught)
	for way, noClone3 := range bothClones() {
		t.Run(way, func(t *testing.T) {
			s := newSpawner(t)
			s.noClone3.Store(noClone3)
			out, _ := output(t, s, &Spec{Exec: sh(`exec /bin/busybox grep -E '^Sig(Blk|Ign|Cgt)' /proc/self/status`)})
			none := "0000000000000000\n"
			if want := "SigBlk:\t" + none + "SigIgn:\t" + none + "SigCgt:\t" + none; out != want {
				t.Errorf("got %q, want %q", out, want)
			}
		})
	}
}

func TestStartErrors(t *testing.T) {
	file := t.TempDir() + "/file"
	if err := os.WriteFile(file, []byte("no program"), 0o644); err != nil {
		t.Fatal(err)
	}
	noFormat := t.TempDir() + "/script"
	if err := os.WriteFile(noFormat, []byte("no program"), 0o755); err != nil {
		t.Fatal(err)
	}
	const closed = 9999
	tests := map[string]struct {
		spec Spec
		err  error
		text string
	}{
		"no program":     {Spec{Exec: &Exec{Command: []string{"/no/such/program"}}}, unix.ENOENT, "exec /no/such/program: no such file or directory"},
		"not executable": {Spec{Exec: &Exec{Command: []string{file}}}, unix.EACCES, "exec " + file + ": permission denied"},
		"no format":      {Spec{Exec: &Exec{Command: []string{noFormat}}}, unix.ENOEXEC, "exec " + noFormat + ": exec format error"},
		"no directory":   {Spec{Exec: &Exec{Command: []string{"/bin/true"}, WorkingDirectory: "/no/dir"}}, unix.ENOENT, "chdir /no/dir: no such file or directory"},
		"bad descriptor": {Spec{Exec: &Exec{Command: []string{"/bin/true"}}, FDs: []int{1, closed}, First: 3}, unix.EBADF, fmt.Sprintf("dup: descriptor %d: bad file descriptor", closed)},
		"NUL":            {Spec{Exec: &Exec{Command: []string{"/bin/true", "a\x00b"}}}, unix.EINVAL, "exec /bin/true: invalid argument"},
		"too large":      {Spec{Exec: &Exec{Command: []string{"/bin/true", strings.Repeat("x", 1<<20)}}}, unix.E2BIG, "exec /bin/true: argument list too long"},
	}
	if os.Geteuid() != 0 {
		tests["no privilege"] = struct {
			spec Spec
			err  error
			text string
		}{Spec{Exec: &Exec{Command: []string{"/bin/true"}}, Identity: &Identity{Groups: []uint32{12345}}}, unix.EPERM, "setgroups: operation not permitted"}
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			for way, noClone3 := range bothClones() {
				t.Run(way, func(t *testing.T) {
					s := newSpawner(t)
					s.noClone3.Store(noClone3)
					_, err := s.Start(&tc.spec)
					var startErr *StartError
					if !errors.Is(err, tc.err) || !errors.As(err, &startErr) || err.Error() != tc.text {
						t.Errorf("got %q, want %q", err, tc.text)
					}
				})
			}
		})
	}
}

func TestStartAfterClose(t *testing.T) {
	s := newSpawner(t)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	_, err := s.Start(&Spec{Exec: &Exec{Command: []string{"/bin/true"}}, Stdout: 1, Stderr: 2})
	if !errors.Is(err, os.ErrClosed) {
		t.Errorf("got %v, want %v", err, os.ErrClosed)
	}
}

// The supervisor closes its copy of a connection after the start; then the end
// of the process is the end of the connection.
func TestNoReferenceToConnectionIsKept(t *testing.T) {
	for way, noClone3 := range bothClones() {
		t.Run(way, func(t *testing.T) {
			s := newSpawner(t)
			s.noClone3.Store(noClone3)
			pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			client := os.NewFile(uintptr(pair[0]), "client")
			defer client.Close()
			p, err := s.Start(&Spec{Exec: sh("read x; echo got $x"), FDs: []int{pair[1], pair[1]}, First: 0, Stderr: 2})
			unix.Close(pair[1])
			if err != nil {
				t.Fatal(err)
			}
			if _, err := client.WriteString("hello\n"); err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(client)
			if string(got) != "got hello\n" || err != nil {
				t.Errorf("got %q, %v, want the answer and the end", got, err)
			}
			mustWait(t, p)
		})
	}
}

func TestExitStatus(t *testing.T) {
	s := newSpawner(t)
	for script, want := range map[string]string{
		"exit 0":         "exit status 0",
		"exit 3":         "exit status 3",
		"kill -TERM $$":  "killed by SIGTERM",
		"kill -KILL $$":  "killed by SIGKILL",
		"kill -34 $$":    "killed by signal 34",
		"kill -USR1 0":   "killed by SIGUSR1", // its own group only
		"exec /bin/true": "exit status 0",
	} {
		p, err := s.Start(&Spec{Exec: sh(script), Stdout: -1, Stderr: -1})
		if err != nil {
			t.Fatal(err)
		}
		if got := mustWait(t, p).String(); got != want {
			t.Errorf("%s: got %s, want %s", script, got, want)
		}
		if _, err := p.Reap(); !errors.Is(err, os.ErrProcessDone) {
			t.Errorf("second Reap: got %v, want %v", err, os.ErrProcessDone)
		}
		if err := p.Signal(unix.SIGTERM); err != nil {
			t.Errorf("Signal after Reap: %v", err)
		}
		if err := p.KillGroup(); err != nil {
			t.Errorf("KillGroup after Reap: %v", err)
		}
	}
	if got, want := (ExitStatus{Signal: unix.SIGSEGV, Core: true}).String(), "killed by SIGSEGV (core dumped)"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

// Signal reaches the process alone, KillGroup what is left of its group until Reap.
func TestSignalAndKillGroup(t *testing.T) {
	s := newSpawner(t)
	r, w := blockingPipe(t)
	p, err := s.Start(&Spec{Exec: sh(`sleep 1000 & wait`), Stdout: int(w.Fd()), Stderr: 2})
	if err != nil {
		t.Fatal(err)
	}
	endWithTest(t, p)
	if _, err := p.Reap(); err == nil || err.Error() != fmt.Sprintf("reap process %d: still running", p.PID()) {
		t.Errorf("Reap of a running process: got %v", err)
	}
	var straggler int
	nettest.Eventually(t, func() error {
		tree := treeOf(p)
		if len(tree) != 2 {
			return fmt.Errorf("got tree %v, want the shell and sleep", tree)
		}
		straggler = tree[1]
		return nil
	})
	if err := p.Signal(unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Poll([]unix.PollFd{{Fd: int32(p.PIDFD()), Events: unix.POLLIN}}, -1); err != nil {
		t.Fatal(err)
	}
	if m, _, _ := inspect(straggler); m.dead {
		t.Error("Signal killed another process of the group")
	}
	if err := p.KillGroup(); err != nil {
		t.Fatal(err)
	}
	if got := mustWait(t, p); got.Signal != unix.SIGKILL {
		t.Errorf("got %v", got)
	}
	w.Close()
	if _, err := io.ReadAll(r); err != nil { // ends when sleep, which holds the other end, does
		t.Error(err)
	}
	nettest.Eventually(t, func() error {
		if m, _, _ := inspect(straggler); !m.dead {
			return fmt.Errorf("process %d lives", straggler)
		}
		return nil
	})
}
