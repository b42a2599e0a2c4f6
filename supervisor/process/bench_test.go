package process

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// tinyProgram builds a static program that does nothing, where there is a C
// compiler; /bin/true else, whose dynamic linker costs more than the start.
func tinyProgram(b *testing.B) string {
	b.Helper()
	dir := b.TempDir()
	source, out := filepath.Join(dir, "tiny.c"), filepath.Join(dir, "tiny")
	text := `#include <sys/syscall.h>
#include <unistd.h>
int main(void) { return 0; }
`
	if err := os.WriteFile(source, []byte(text), 0o600); err != nil {
		b.Fatal(err)
	}
	if err := exec.CommandContext(b.Context(), "gcc", "-static", "-O2", "-o", out, source).Run(); err != nil {
		b.Logf("gcc: %v; using /bin/true", err)
		return "/bin/true"
	}
	return out
}

// BenchmarkStart measures from the call until the process, which does nothing,
// is dead and reaped ("done") and until the call returned, which is when the new
// program has replaced the old one.
func BenchmarkStart(b *testing.B) {
	program := tinyProgram(b)
	null, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		b.Fatal(err)
	}
	defer unix.Close(null)
	spec := &Spec{Exec: &Exec{Command: []string{program}}, FDs: []int{null}, First: 3, PIDEnv: "LISTEN_PID", Stdout: 1, Stderr: 2}
	start := func(old bool) func(s *Spawner) (*Process, error) {
		return func(s *Spawner) (*Process, error) {
			s.noClone3.Store(old)
			return s.Start(spec)
		}
	}
	for _, sockets := range []int{10, 5000} {
		b.Run("sockets="+strconv.Itoa(sockets), func(b *testing.B) {
			s := newSpawner(b)
			for range sockets {
				fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
				if err != nil {
					b.Fatal(err)
				}
				b.Cleanup(func() { unix.Close(fd) })
			}
			b.Run("clone3", func(b *testing.B) { measureStarts(b, s, start(false)) })
			b.Run("clone", func(b *testing.B) { measureStarts(b, s, start(true)) })
			b.Run("ForkExec", func(b *testing.B) {
				measureStarts(b, s, func(*Spawner) (*Process, error) { return forkExec(program, uintptr(null), 1, 2, uintptr(null)) })
			})
		})
	}
}

func measureStarts(b *testing.B, s *Spawner, start func(*Spawner) (*Process, error)) {
	b.Helper()
	var returned, done []time.Duration
	b.ReportAllocs()
	for b.Loop() {
		before := time.Now()
		p, err := start(s)
		returned = append(returned, time.Since(before))
		if err != nil {
			b.Fatal(err)
		}
		mustWait(b, p)
		done = append(done, time.Since(before))
	}
	slices.Sort(returned)
	slices.Sort(done)
	b.ReportMetric(float64(returned[len(returned)/2].Microseconds()), "p50-us")
	b.ReportMetric(float64(done[len(done)/2].Microseconds()), "p50-done-us")
	b.ReportMetric(float64(done[len(done)*99/100].Microseconds()), "p99-done-us")
}

// BenchmarkStartInTree measures what a tree costs: with a cgroup that is there, with one that
// must be made, and with what a process tree in /proc takes.
func BenchmarkStartInTree(b *testing.B) {
	program := tinyProgram(b)
	spec := func(t *Tree) *Spec {
		return &Spec{Tree: t, Exec: &Exec{Command: []string{program}}, First: 3, PIDEnv: "LISTEN_PID", Stdout: 1, Stderr: 2}
	}
	s := newSpawner(b)
	tree := s.NewTree("bench")
	start := func(prepare func()) func(*Spawner) (*Process, error) {
		return func(s *Spawner) (*Process, error) {
			prepare()
			return s.Start(spec(tree))
		}
	}
	closeTree := func() {
		if err := tree.Close(); err != nil {
			b.Error(err)
		}
	}
	b.Run("no tree", func(b *testing.B) {
		measureStarts(b, s, func(s *Spawner) (*Process, error) { return s.Start(spec(nil)) })
	})
	if s.Tracking() == "cgroup" {
		b.Run("cgroup", func(b *testing.B) { measureStarts(b, s, start(func() {})) })
		// The time of Close is in these: compare with the next.
		b.Run("close, make, cgroup", func(b *testing.B) { measureStarts(b, s, start(closeTree)) })
		b.Run("close, prepare, cgroup", func(b *testing.B) { measureStarts(b, s, start(func() { closeTree(); tree.Prepare() })) })
		b.Run("Prepare and Close", func(b *testing.B) {
			for b.Loop() {
				tree.Prepare()
				closeTree()
			}
		})
		b.Run("Freeze and Thaw", func(b *testing.B) { benchFreeze(b, s, tree) })
		closeTree()
		s.giveUp(errors.New("the benchmark wants it"))
	}
	b.Run("process tree", func(b *testing.B) { measureStarts(b, s, start(func() {})) })
	b.Run("process tree, Freeze and Thaw", func(b *testing.B) { benchFreeze(b, s, tree) })
	closeTree()
}

func benchFreeze(b *testing.B, s *Spawner, tree *Tree) {
	b.Helper()
	p, err := s.Start(&Spec{Tree: tree, Exec: &Exec{Command: []string{"/bin/sleep", "1000"}}, Stdout: -1, Stderr: -1})
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if err := errors.Join(tree.Freeze(b.Context()), tree.Thaw()); err != nil {
			b.Fatal(err)
		}
	}
	if err := tree.Kill(); err != nil {
		b.Error(err)
	}
	mustWait(b, p)
}

// BenchmarkStartParallel starts from 16 goroutines, each of which waits for the end.
func BenchmarkStartParallel(b *testing.B) {
	program := tinyProgram(b)
	s := newSpawner(b)
	spec := &Spec{Exec: &Exec{Command: []string{program}}, First: 3, PIDEnv: "LISTEN_PID", Stdout: 1, Stderr: 2}
	measure := func(b *testing.B, start func() (*Process, error)) {
		b.Helper()
		b.SetParallelism(max(1, 16/runtime.GOMAXPROCS(0)))
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				p, err := start()
				if err != nil {
					b.Error(err)
					return
				}
				if _, err := p.collect(); err != nil { // waits in the kernel, in a thread of its own
					b.Error(err)
				}
			}
		})
	}
	b.Run("clone3", func(b *testing.B) {
		measure(b, func() (*Process, error) { return s.Start(spec) })
	})
	b.Run("ForkExec", func(b *testing.B) {
		measure(b, func() (*Process, error) { return forkExec(program, 1, 1, 2) })
	})
}

// forkExec is the way of package syscall.
func forkExec(program string, fds ...uintptr) (*Process, error) {
	pidfd := -1
	pid, err := syscall.ForkExec(program, []string{program}, &syscall.ProcAttr{
		Dir:   "/",
		Files: fds,
		Sys:   &syscall.SysProcAttr{Setsid: true, PidFD: &pidfd},
	})
	return &Process{pid: pid, pidfd: pidfd}, err
}
