package process

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
)

// counter starts a program in the background whose standard output the test reads.
func counter(t *testing.T, s *Spawner, spec *Spec) (*Process, *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	spec.Stdout, spec.Stderr = int(w.Fd()), 2
	p, err := s.Start(spec)
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	endWithTest(t, p)
	return p, r
}

func kill(t *testing.T, p *Process) {
	t.Helper()
	if err := p.Signal(unix.SIGKILL); err != nil {
		t.Error(err)
	}
	mustWait(t, p)
}

// cpu returns the ticks that a process has used.
func cpu(t *testing.T, pid int) string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/schedstat", pid))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestFreezeStandsStill(t *testing.T) {
	s := newSpawner(t)
	// Three processes, each of which counts.
	p, out := counter(t, s, &Spec{Exec: sh(`
		count() { i=0; while :; do i=$((i+1)); done; }
		count & (count & count & wait) & echo up; wait`), Env: []string{"PATH=" + defaultPath}})
	line := bufio.NewReader(out)
	if _, err := line.ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	nettest.Eventually(t, func() error {
		if tree := treeOf(p); len(tree) != 5 {
			return fmt.Errorf("got tree %v, want 5 processes", tree)
		}
		return nil
	})
	for range 20 {
		if err := p.freeze(t.Context()); err != nil {
			t.Fatal(err)
		}
		before := map[int]string{}
		for _, pid := range treeOf(p) {
			before[pid] = cpu(t, pid)
		}
		if len(before) != 5 {
			t.Fatalf("got %d processes, want 5", len(before))
		}
		// Give the processor to them, if they would take it.
		for range 100 {
			runtime.Gosched()
			_, _, _ = unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
		}
		for pid, was := range before {
			if now := cpu(t, pid); now != was {
				t.Errorf("process %d ran while frozen: %q, then %q", pid, was, now)
			}
		}
		if err := p.Thaw(); err != nil {
			t.Fatal(err)
		}
		nettest.Eventually(t, func() error {
			for pid, was := range before {
				if strings.Count(was, " ") == 2 && cpu(t, pid) != was {
					return nil
				}
			}
			return errors.New("nobody runs after Thaw")
		})
	}
	kill(t, p)
}

func TestFreezeStopsEveryThread(t *testing.T) {
	s := newSpawner(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p, out := counter(t, s, &Spec{Exec: &Exec{Command: []string{self}}, Env: []string{helperEnv + "=threads"}})
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	for range 10 {
		if err := p.freeze(t.Context()); err != nil {
			t.Fatal(err)
		}
		tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", p.PID()))
		if err != nil {
			t.Fatal(err)
		}
		for _, task := range tasks {
			stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/stat", p.PID(), task.Name()))
			if err != nil {
				t.Fatal(err)
			}
			if state, _, ok := parseStat(stat); !ok || state != 'T' {
				t.Errorf("thread %s of %d is in state %c", task.Name(), len(tasks), state)
			}
		}
		if err := p.Thaw(); err != nil {
			t.Fatal(err)
		}
	}
	kill(t, p)
}

// A signal that arrives while frozen acts before the program goes on.
func TestTermWhileFrozen(t *testing.T) {
	s := newSpawner(t)
	r, w := blockingPipe(t)
	p, out := counter(t, s, &Spec{Exec: sh(`echo up; read x <&3; echo ran on`), FDs: []int{int(r.Fd())}, First: 3})
	lines := bufio.NewReader(out)
	if _, err := lines.ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	if err := p.freeze(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := w.WriteString("go\n"); err != nil { // what it waits for is there
		t.Fatal(err)
	}
	if err := p.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := p.Thaw(); err != nil {
		t.Fatal(err)
	}
	if got := mustWait(t, p); got.Signal != unix.SIGTERM {
		t.Errorf("got %v, want it killed by SIGTERM", got)
	}
	if line, err := lines.ReadString('\n'); err == nil {
		t.Errorf("it went on and wrote %q", line)
	}
}

func TestFreezeOfTheDead(t *testing.T) {
	s := newSpawner(t)
	p, err := s.Start(&Spec{Exec: sh("exit 1"), Stdout: -1, Stderr: -1})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Poll([]unix.PollFd{{Fd: int32(p.PIDFD()), Events: unix.POLLIN}}, 10000); err != nil {
		t.Fatal(err)
	}
	if err := p.freeze(t.Context()); err != nil {
		t.Error(err)
	}
	if tree := treeOf(p); len(tree) != 0 {
		t.Errorf("got tree %v, want none alive", tree)
	}
	mustWait(t, p)
}

// The parent of a vfork cannot be stopped while the child is: Freeze gives up,
// in time, and undoes what it did.
func TestFreezeGivesUp(t *testing.T) {
	s := newSpawner(t)
	nettest.Need(t, nettest.Tool("python3"))
	p, out := counter(t, s, &Spec{Exec: &Exec{Command: []string{"/usr/bin/python3", "-c", `
import ctypes
libc = ctypes.CDLL(None)
print("up", flush=True)
if libc.syscall(` + strconv.Itoa(unix.SYS_CLONE) + `, 0x4011, 0, 0, 0, 0) == 0:
    libc.pause()
`}}})
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	nettest.Eventually(t, func() error {
		if tree := treeOf(p); len(tree) != 2 {
			return fmt.Errorf("got tree %v, want 2 processes", tree)
		}
		return nil
	})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	err := p.Freeze(ctx)
	if !errors.Is(err, context.DeadlineExceeded) || ctx.Err() != nil {
		t.Errorf("got %v, want it to give up by itself", err)
	}
	nettest.Eventually(t, func() error {
		for _, pid := range treeOf(p) {
			if m, _ := inspect(pid); m.stopped {
				return fmt.Errorf("process %d is still stopped", pid)
			}
		}
		return nil
	})
	kill(t, p)
}

func FuzzParseStat(f *testing.F) {
	f.Add([]byte("1 (a) S 0 1 1"))
	f.Add([]byte("1 (a) (b) S 0) T 1 7 1 0"))
	f.Fuzz(func(t *testing.T, b []byte) {
		state, group, ok := parseStat(b)
		if ok && !strings.Contains(string(b), fmt.Sprintf("%c", rune(state))) && state < 0x80 {
			t.Errorf("parseStat(%q) = %q, %d", b, state, group)
		}
	})
}

func TestParseStat(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"12 (sh) S 1 12 12 0":           "S 12 true",
		"12 (a) T 3 (b)) t 1 34 12 0":   "t 34 true",
		"12 (a\nb c) R 1 7":             "R 7 true",
		"12 (sh) S 1":                   "\x00 0 false",
		"12 sh S 1 12":                  "\x00 0 false",
		"":                              "\x00 0 false",
		"12 (sh) Sleeping 1 12 12 0":    "\x00 0 false",
		"12 (sh) S 1 twelve 12 0 0 0 0": "S 0 false",
	} {
		state, group, ok := parseStat([]byte(in))
		if got := fmt.Sprintf("%c %d %v", state, group, ok); got != want {
			t.Errorf("parseStat(%q): got %q, want %q", in, got, want)
		}
	}
}

// treeOf returns the pids of a process and its descendants that are alive, the
// process first. Descendants whose parent has died are no longer found.
func treeOf(p *Process) []int {
	var pids []int
	walk(p.pid, func(m member) {
		if !m.dead {
			pids = append(pids, m.pid)
		}
	})
	return pids
}
