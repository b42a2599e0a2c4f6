package process

import (
	"fmt"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// Many goroutines start processes while others make garbage, collect it, grow
// their stacks and are preempted: what would go wrong if the child's life in our
// memory were seen by the runtime.
func TestParallelStarts(t *testing.T) {
	for way, noClone3 := range bothClones() {
		t.Run(way, func(t *testing.T) {
			s := newSpawner(t)
			s.noClone3.Store(noClone3)
			stop := make(chan struct{})
			var noise, starters sync.WaitGroup
			noise.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
						runtime.GC()
					}
				}
			})
			noise.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
						_ = deep(500, strings.Repeat("x", 100))
					}
				}
			})
			for g := range 16 {
				starters.Go(func() {
					for i := range 25 {
						if err := startAndCheck(s, g*1000+i); err != nil {
							t.Error(err)
							return
						}
					}
				})
			}
			starters.Wait()
			close(stop)
			noise.Wait()
		})
	}
}

// deep uses much stack, so that it is grown and shrunk.
func deep(n int, s string) int {
	var a [64]byte
	copy(a[:], s)
	if n == 0 {
		return int(a[0])
	}
	return deep(n-1, s+string(a[:1])) + int(a[n%64])
}

// startAndCheck starts one program and looks whether it got its own descriptor
// and its own pid; every fifth fails to start.
func startAndCheck(s *Spawner, n int) error {
	fd, err := unix.MemfdCreate("out", unix.MFD_CLOEXEC)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	want := strconv.Itoa(n)
	x := sh(`echo $LISTEN_PID $$ $1 >&3; exit 7`, want)
	if n%5 == 0 {
		x = &Exec{Command: []string{"/no/such/" + want}}
	}
	p, err := s.Start(&Spec{Exec: x, FDs: []int{fd}, First: 3, PIDEnv: "LISTEN_PID", Stdout: -1, Stderr: 2})
	if n%5 == 0 {
		if got, want := fmt.Sprint(err), "exec /no/such/"+want+": no such file or directory"; got != want {
			return fmt.Errorf("got %s, want %s", got, want)
		}
		return nil
	}
	if err != nil {
		return err
	}
	status, err := wait(p)
	if err != nil || status != (ExitStatus{Code: 7}) {
		return fmt.Errorf("got %v, %w", status, err)
	}
	b := make([]byte, 100)
	k, err := unix.Pread(fd, b, 0)
	if got, want := string(b[:k]), fmt.Sprintf("%d %d %s\n", p.PID(), p.PID(), want); got != want || err != nil {
		return fmt.Errorf("got %q, %w, want %q", got, err, want)
	}
	return nil
}
