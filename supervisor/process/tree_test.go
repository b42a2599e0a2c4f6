package process

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
)

// cgroupV2 is the Feature of being allowed to make cgroups.

// bothModes makes a tree that is a cgroup, and one that is found in /proc.

func bothModes() map[string]func(t *testing.T) (*Spawner, *Tree) {
	return map[string]func(t *testing.T) (*Spawner, *Tree){
		"cgroup": func(t *testing.T) (*Spawner, *Tree) {
			t.Helper()
			nettest.Need(t, nettest.RealRoot, cgroupV2)
			s := newSpawner(t)
			return s, newTree(t, s)
		},
		"process tree": func(t *testing.T) (*Spawner, *Tree) {
			t.Helper()
			s := newSpawner(t)
			s.giveUp(errors.New("the test wants it"))
			return s, newTree(t, s)
		},
	}
}

// newTree returns a tree that is emptied and closed after the test.

func newTree(t *testing.T, s *Spawner) *Tree {
	t.Helper()
	tree := s.NewTree("web")
	t.Cleanup(func() {
		if empty, err := tree.Empty(); !empty || err != nil {
			endTree(t, tree)
		}
		if err := tree.Close(); err != nil {
			t.Error(err)
		}
	})
	return tree
}

func pathEnv() []string { return []string{"PATH=" + defaultPath} }

// start starts a shell script in a tree.

func start(t *testing.T, s *Spawner, tree *Tree, script string) *Process {
	t.Helper()
	p, err := s.Start(&Spec{Tree: tree, Exec: sh(script), Env: pathEnv(), First: 3, Stdout: -1, Stderr: -1})
	if err != nil {
		t.Fatal(err)
	}
	endWithTest(t, p)
	return p
}

// wantPIDs waits until n processes are in the tree, and returns them.

func wantPIDs(t *testing.T, tree *Tree, n int) (pids []int) {
	t.Helper()
	nettest.Eventually(t, func() (err error) {
		if pids, err = tree.PIDs(); err == nil && len(pids) != n {
			err = fmt.Errorf("got processes %v, want %d", pids, n)
		}
		return err
	})
	return pids
}

// waitEmpty waits as the supervisor does, without looking in between.

func waitEmpty(t *testing.T, tree *Tree) {
	t.Helper()
	for {
		fd, err := tree.Ended()
		if err != nil {
			t.Fatal(err)
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 10000)
		unix.Close(fd)
		if n == 0 {
			t.Fatalf("nothing ended within 10s: %v", err)
		}
		empty, err := tree.Empty()
		if err != nil {
			t.Fatal(err)
		}
		if empty {
			return
		}
	}
}

// endTree kills what is in a tree, and waits for it.

func endTree(t *testing.T, tree *Tree, mains ...*Process) {
	t.Helper()
	if err := tree.Kill(); err != nil {
		t.Error(err)
	}
	for _, p := range mains {
		mustWait(t, p)
	}
	waitEmpty(t, tree)
}

// What a service may do to be overlooked. Each script goes on as "$tail".

func escapes() map[string]string {
	return map[string]string{
		"child":               `sleep 1000 & `,
		"session of its own":  `setsid sleep 1000 & `,
		"orphan":              `(sleep 1000 &) ; `,
		"orphan in a session": `(setsid sleep 1000 &) ; `,
		"fork, setsid, fork":  `setsid sh -c '(sleep 1000 &) ; exit' ; `,
		"without environment": `(env -i /bin/sleep 1000 &) ; `,
		"orphan with a child": `(setsid sh -c 'sleep 1000; :' &) ; `,
	}
}

func TestTreeHoldsEverybody(t *testing.T) {
	nettest.Need(t, nettest.Tool("setsid"))
	for mode, newTree := range bothModes() {
		t.Run(mode, func(t *testing.T) {
			s, tree := newTree(t)
			for name, script := range escapes() {
				others := 1
				if name == "orphan with a child" {
					others = 2
				}
				// Signal while the main process lives; then after its end; then Kill.
				for _, tail := range []string{"exec sleep 1000", "exit 7"} {
					for how, end := range map[string]func() error{
						"TERM": func() error { return tree.Signal(unix.SIGTERM) },
						"kill": tree.Kill,
						"kill frozen": func() error {
							// The shell may be in the middle of a vfork, see TestFreezeGivesUp.
							nettest.Eventually(t, func() error { return tree.Freeze(t.Context()) })
							return tree.Kill()
						},
					} {
						t.Run(name+", "+tail+", "+how, func(t *testing.T) {
							p := start(t, s, tree, script+tail)
							n := others + 1
							if tail == "exit 7" {
								n = others
								if got := mustWait(t, p); got.Code != 7 {
									t.Errorf("got %v, want the status of the main process", got)
								}
							}
							wantPIDs(t, tree, n)
							if empty, err := tree.Empty(); empty || err != nil {
								t.Errorf("Empty: got %v, %v of a tree with %d processes", empty, err, n)
							}
							if err := tree.Close(); !errors.Is(err, unix.EBUSY) {
								t.Errorf("Close: got %v, want it refused", err)
							}
							if err := end(); err != nil {
								t.Error(err)
							}
							waitEmpty(t, tree)
							if tail != "exit 7" {
								mustWait(t, p)
							}
						})
					}
				}
			}
		})
	}
}

// Who ignores SIGTERM is not reached by it, and by Kill is.

func TestTreeIgnoresTerm(t *testing.T) {
	for mode, newTree := range bothModes() {
		t.Run(mode, func(t *testing.T) {
			s, tree := newTree(t)
			r, w := blockingPipe(t)
			p, err := s.Start(&Spec{Tree: tree, Exec: sh(`trap '' TERM; (while :; do sleep 1000; done) & echo up >&3; while :; do sleep 1000; done`), Env: pathEnv(), FDs: []int{int(w.Fd())}, First: 3, Stdout: -1, Stderr: -1})
			if err != nil {
				t.Fatal(err)
			}
			endWithTest(t, p)
			if _, err := r.Read(make([]byte, 3)); err != nil {
				t.Fatal(err)
			}
			wantPIDs(t, tree, 4)
			if err := tree.Signal(unix.SIGTERM); err != nil {
				t.Error(err)
			}
			wantPIDs(t, tree, 4) // an ignored signal is inherited
			endTree(t, tree, p)
		})
	}
}

// A tree may be closed and used again, and costs nothing before its first use.

func TestTreeAgain(t *testing.T) {
	for mode, newTree := range bothModes() {
		t.Run(mode, func(t *testing.T) {
			s, tree := newTree(t)
			for _, err := range []error{tree.Signal(unix.SIGTERM), tree.Kill(), tree.Thaw(), tree.Close()} {
				if err != nil {
					t.Errorf("a tree never used: %v", err)
				}
			}
			waitEmpty(t, tree)
			for range 3 {
				p := start(t, s, tree, "exit 3")
				if got := mustWait(t, p); got.Code != 3 {
					t.Errorf("got %v", got)
				}
				waitEmpty(t, tree)
				if err := tree.Close(); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// Starts race with Kill: nobody gets away, and no start hangs.

func TestStartsRaceKill(t *testing.T) {
	for mode, newTree := range bothModes() {
		t.Run(mode, func(t *testing.T) {
			s, tree := newTree(t)
			var starters, killer sync.WaitGroup
			stop := make(chan struct{})
			killer.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
					}
					// Without a cgroup it gives up after some rounds, as somebody always appears.
					if err := tree.Kill(); err != nil && mode == "cgroup" {
						t.Error(err)
					}
				}
			})
			for range 4 {
				starters.Go(func() {
					for range 25 {
						p, err := s.Start(&Spec{Tree: tree, Exec: sh("sleep 1000"), Env: pathEnv(), Stdout: -1, Stderr: -1})
						if err != nil {
							t.Error(err)
							return
						}
						if got := mustWait(t, p); got.Signal != unix.SIGKILL {
							t.Errorf("got %v", got)
						}
					}
				})
			}
			starters.Wait()
			close(stop)
			killer.Wait()
			endTree(t, tree)
		})
	}
}

// Those who do nothing but multiply do not get away.

func TestKillForkBomb(t *testing.T) {
	nettest.Need(t, nettest.Tool("python3"))
	const bounded = "import os, resource; resource.setrlimit(resource.RLIMIT_NPROC, (100, 100))\n"
	for name, tc := range map[string]struct {
		program string
		atLeast int
	}{
		"bomb": {bounded + `
while True:
    try: os.fork()
    except OSError: pass
`, 30},
		"sessions": {bounded + `
while True:
    try:
        if os.fork() == 0: os.setsid()
    except OSError: pass
`, 30},
		"hop": {`
import os
while True:
    if os.fork(): os._exit(0)
`, 1},
		"master": {`
import os, time
while True:
    if os.fork() == 0: time.sleep(1000)
    os.wait()
`, 2},
	} {
		t.Run(name, func(t *testing.T) {
			for mode, newTree := range bothModes() {
				t.Run(mode, func(t *testing.T) {
					s, tree := newTree(t)
					spec := &Spec{Tree: tree, Exec: &Exec{Command: []string{"/usr/bin/python3", "-c", tc.program}}, First: 3, Stdout: -1, Stderr: 2}
					if nettest.RealRoot() == nil { // root has no limit
						spec.Identity = &Identity{UID: 54321, GID: 54321}
					}
					p, err := s.Start(spec)
					if err != nil {
						t.Fatal(err)
					}
					endWithTest(t, p)
					if name == "hop" {
						mustWait(t, p)
					}
					nettest.Eventually(t, func() error {
						if pids, err := tree.PIDs(); err != nil || len(pids) < tc.atLeast {
							return errors.Join(fmt.Errorf("got %d processes", len(pids)), err)
						}
						return nil
					})
					if err := tree.Kill(); err != nil {
						t.Log(err) // bounded, so it may have to be called again
					}
					nettest.Eventually(t, func() error {
						empty, err := tree.Empty()
						if err == nil && !empty {
							err = errors.Join(errors.New("processes are left"), tree.Kill())
						}
						return err
					})
					if name != "hop" {
						mustWait(t, p)
					}
				})
			}
		})
	}
}

// Orphans that end are reaped, also while a dead main process stands before them and while a

// child of another part of this program does.

// The reaper takes nobody's status away, whatever else is being started, fails to start and ends.

// helperInit is process 1 of a container that runs a service with orphans.

// Where the kernel refuses clone3 there is no cgroup, and everything works.

// An ordinary user gets a process tree, and is told why.

// What an earlier supervisor left is used where nobody lives, and not mixed with where

// somebody does.

// A cgroup that somebody removes is made anew, with the directory of the supervisor.

// A service may make cgroups of its own inside.

// Sessions of services that ended long ago are not remembered.

// Who was seen once stays known, though neither its session nor its environment tell.
func TestSeenBefore(t *testing.T) {
	nettest.Need(t, nettest.Tool("setsid"))
	for mode, newTree := range bothModes() {
		t.Run(mode, func(t *testing.T) {
			s, tree := newTree(t)
			p := start(t, s, tree, `setsid env -i /bin/sleep 1000 & wait`)
			nettest.Eventually(t, func() error {
				for _, pid := range wantPIDs(t, tree, 2) {
					if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid)); err == nil && len(b) == 0 {
						return nil
					}
				}
				return errors.New("the environment is not cleared yet")
			})
			wantPIDs(t, tree, 2)
			if err := p.Signal(unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
			mustWait(t, p)
			wantPIDs(t, tree, 1)
			endTree(t, tree)
		})
	}
}

// A Start in a frozen cgroup waits, and holds up neither Thaw nor Kill.
func TestStartInFrozenTree(t *testing.T) {
	for name, end := range map[string]func(*Tree) error{"thaw": (*Tree).Thaw, "kill": (*Tree).Kill} {
		t.Run(name, func(t *testing.T) {
			s, tree := bothModes()["cgroup"](t)
			first := start(t, s, tree, "exec sleep 1000")
			if err := tree.Freeze(t.Context()); err != nil {
				t.Fatal(err)
			}
			type started struct {
				p   *Process
				err error
			}
			result := make(chan started, 1)
			go func() {
				p, err := s.Start(&Spec{Tree: tree, Exec: sh("exec sleep 1000"), Env: pathEnv(), Stdout: -1, Stderr: -1})
				result <- started{p, err}
			}()
			wantPIDs(t, tree, 2)
			if err := end(tree); err != nil {
				t.Error(err)
			}
			second := <-result
			if second.err != nil {
				t.Fatal(second.err)
			}
			endTree(t, tree, first, second.p)
		})
	}
}
