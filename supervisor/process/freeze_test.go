package process

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"github.com/google/go-cmp/cmp"
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

// threads is how many threads each counting process has.
const threads = 2

// count is the helper that adds to cells of a shared memory, descriptor 3, in busy threads.
func count(slot string) int {
	n, err := strconv.Atoi(slot)
	if err != nil {
		return 2
	}
	b, err := unix.Mmap(3, 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return 1
	}
	for i := range threads {
		cell := (*uint64)(unsafe.Pointer(&b[8*(threads*n+i)]))
		go func() {
			runtime.LockOSThread()
			for {
				atomic.AddUint64(cell, 1)
			}
		}()
	}
	select {}
}

// After Freeze not one instruction is run by any thread of any process, wherever it is.
func TestFreezeStandsStill(t *testing.T) {
	nettest.Need(t, nettest.Tool("setsid"))
	const processes = 4
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for mode, newTree := range bothModes() {
		t.Run(mode, func(t *testing.T) {
			s, tree := newTree(t)
			fd, err := unix.MemfdCreate("cells", unix.MFD_CLOEXEC)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(fd)
			if err := unix.Ftruncate(fd, int64(os.Getpagesize())); err != nil {
				t.Fatal(err)
			}
			shared, err := unix.Mmap(fd, 0, os.Getpagesize(), unix.PROT_READ, unix.MAP_SHARED)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Munmap(shared)
			read := func() []uint64 {
				out := make([]uint64, processes*threads)
				for i := range out {
					out[i] = atomic.LoadUint64((*uint64)(unsafe.Pointer(&shared[8*i])))
				}
				return out
			}
			allCounted := func(since []uint64) func() error {
				return func() error {
					now := read()
					for i := range now {
						if now[i] == since[i] {
							return fmt.Errorf("thread %d of process %d has not run", i%threads, i/threads)
						}
					}
					return nil
				}
			}
			p, err := s.Start(&Spec{
				Tree: tree, Exec: sh(`"$1" 0 & ("$1" 1 &) ; setsid "$1" 2 & (setsid "$1" 3 &) ; wait`, self),
				Env: append(pathEnv(), helperEnv+"=count"), FDs: []int{fd}, First: 3, Stdout: -1, Stderr: 2,
			})
			if err != nil {
				t.Fatal(err)
			}
			endWithTest(t, p)
			nettest.Eventually(t, allCounted(read()))
			for range 10 {
				if err := tree.freeze(t.Context()); err != nil {
					t.Fatal(err)
				}
				before := read()
				// Give the processor to them, if they would take it.
				for range 100 {
					_, _, _ = unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
				}
				if diff := cmp.Diff(before, read()); diff != "" {
					t.Errorf("ran while frozen:\n%s", diff)
				}
				if err := tree.Thaw(); err != nil {
					t.Fatal(err)
				}
				nettest.Eventually(t, allCounted(before))
			}
			endTree(t, tree, p)
		})
	}
}

// A signal that arrives while frozen acts before the program goes on.
func TestTermWhileFrozen(t *testing.T) {
	for mode, newTree := range bothModes() {
		t.Run(mode, func(t *testing.T) {
			s, tree := newTree(t)
			r, w := blockingPipe(t)
			p, out := counter(t, s, &Spec{Tree: tree, Exec: sh(`echo up; read x <&3; echo ran on`), FDs: []int{int(r.Fd())}, First: 3})
			lines := bufio.NewReader(out)
			if _, err := lines.ReadString('\n'); err != nil {
				t.Fatal(err)
			}
			if err := tree.freeze(t.Context()); err != nil {
				t.Fatal(err)
			}
			if _, err := w.WriteString("go\n"); err != nil { // what it waits for is there
				t.Fatal(err)
			}
			if err := tree.Signal(unix.SIGTERM); err != nil {
				t.Fatal(err)
			}
			if err := tree.Thaw(); err != nil {
				t.Fatal(err)
			}
			if got := mustWait(t, p); got.Signal != unix.SIGTERM {
				t.Errorf("got %v, want it killed by SIGTERM", got)
			}
			if line, err := lines.ReadString('\n'); err == nil {
				t.Errorf("it went on and wrote %q", line)
			}
		})
	}
}

// A tree in which nobody is left can be frozen, and then be started in.
func TestFreezeOfTheDead(t *testing.T) {
	for mode, newTree := range bothModes() {
		t.Run(mode, func(t *testing.T) {
			s, tree := newTree(t)
			if err := tree.Freeze(t.Context()); err != nil {
				t.Errorf("a tree never used: %v", err)
			}
			for range 2 {
				p, err := s.Start(&Spec{Tree: tree, Exec: sh("exit 1"), Stdout: -1, Stderr: -1})
				if err != nil {
					t.Fatal(err)
				}
				if _, err := unix.Poll([]unix.PollFd{{Fd: int32(p.PIDFD()), Events: unix.POLLIN}}, 10000); err != nil {
					t.Fatal(err)
				}
				if err := tree.freeze(t.Context()); err != nil {
					t.Error(err)
				}
				wantPIDs(t, tree, 0)
				mustWait(t, p)
			}
		})
	}
}

// The parent of a vfork cannot be stopped by a signal while the child is: Freeze gives up,
// in time, and undoes what it did. The freezer of cgroups can do it.
func TestFreezeGivesUp(t *testing.T) {
	nettest.Need(t, nettest.Tool("python3"))
	for mode, newTree := range bothModes() {
		t.Run(mode, func(t *testing.T) {
			s, tree := newTree(t)
			p, out := counter(t, s, &Spec{Tree: tree, Exec: &Exec{Command: []string{"/usr/bin/python3", "-c", `
import ctypes
libc = ctypes.CDLL(None)
print("up", flush=True)
if libc.syscall(` + strconv.Itoa(unix.SYS_CLONE) + `, 0x4011, 0, 0, 0, 0) == 0:
    libc.pause()
`}}})
			if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
				t.Fatal(err)
			}
			wantPIDs(t, tree, 2)
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			err := tree.Freeze(ctx)
			if tree.group != nil {
				if err != nil {
					t.Error(err)
				}
				endTree(t, tree, p)
				return
			}
			if !errors.Is(err, context.DeadlineExceeded) || ctx.Err() != nil {
				t.Errorf("got %v, want it to give up by itself", err)
			}
			nettest.Eventually(t, func() error {
				for _, pid := range wantPIDs(t, tree, 2) {
					if m, _, _ := inspect(pid); m.stopped {
						return fmt.Errorf("process %d is still stopped", pid)
					}
				}
				return nil
			})
			endTree(t, tree, p)
		})
	}
}
