package process

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
)

func TestOrphansAreReaped(t *testing.T) {
	s := newSpawner(t)
	s.giveUp(errors.New("the test wants it"))
	tree := s.NewTree("web")
	other := exec.CommandContext(t.Context(), "/bin/sh", "-c", "exit 5")
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	nettest.Eventually(t, func() error {
		if m, _, _ := inspect(other.Process.Pid); !m.dead {
			return errors.New("it runs")
		}
		return nil
	})
	var mains []*Process
	for range 3 {
		p := start(t, s, tree, `(sleep 0.01 &); (exit 0 &); exit 7`)
		mains = append(mains, p)
	}
	for _, p := range mains {
		if got := mustWait(t, p); got.Code != 7 {
			t.Errorf("got %v, want exit status 7", got)
		}
	}
	nettest.Eventually(t, func() error {
		if left := nettest.Children(os.Getpid()); len(left) != 1 {
			return fmt.Errorf("got children %v, want only that of the other part", left)
		}
		return nil
	})
	if err := other.Wait(); other.ProcessState.ExitCode() != 5 {
		t.Errorf("got %v, want exit status 5", err)
	}
	waitEmpty(t, tree)
}

func TestReaperRacesStarts(t *testing.T) {
	for way, noClone3 := range bothClones() {
		t.Run(way, func(t *testing.T) {
			s := newSpawner(t)
			s.giveUp(errors.New("the test wants it"))
			s.noClone3.Store(noClone3)
			tree := newTree(t, s)
			var starters sync.WaitGroup
			for range 8 {
				starters.Go(func() {
					for i := range 25 {
						if i%5 == 0 {
							if _, err := s.Start(&Spec{Tree: tree, Exec: &Exec{Command: []string{"/no/such"}}, Stdout: -1, Stderr: -1}); !errors.Is(err, unix.ENOENT) {
								t.Errorf("got %v, want %v", err, unix.ENOENT)
							}
							continue
						}
						p, err := s.Start(&Spec{Tree: tree, Exec: sh("(exit 1 &) ; exit 7"), Stdout: -1, Stderr: -1})
						if err != nil {
							t.Error(err)
							return
						}
						if status, err := wait(p); err != nil || status.Code != 7 {
							t.Errorf("got %v, %v, want exit status 7", status, err)
						}
					}
				})
			}
			starters.Wait()
			nettest.Eventually(t, func() error {
				if left := nettest.Children(os.Getpid()); len(left) > 0 {
					return fmt.Errorf("children left: %v", left)
				}
				return nil
			})
		})
	}
}

func helperInit() int {
	s, err := NewSpawner(testName())
	if err != nil {
		fmt.Println(err)
		return 1
	}
	tree := s.NewTree("web")
	for range 3 {
		p, err := s.Start(&Spec{Tree: tree, Exec: sh("(sleep 0.01 &) ; exit 7"), Env: pathEnv(), Stdout: -1, Stderr: -1})
		if err != nil {
			fmt.Println(err)
			return 1
		}
		if status, err := wait(p); err != nil || status.Code != 7 {
			fmt.Println(status, err)
			return 1
		}
	}
	for len(nettest.Children(os.Getpid())) > 0 { // the test has a deadline
		_ = syscall.Getpid()
	}
	if err := errors.Join(tree.Close(), s.Close()); err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println("pid", os.Getpid())
	return 0
}

func TestProcessOne(t *testing.T) {
	nettest.Need(t, nettest.Namespaces, nettest.Tool("unshare"))
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "unshare", "--pid", "--fork", "--kill-child", "--mount-proc", self)
	cmd.Env = append(os.Environ(), helperEnv+"=init", "GOCOVERDIR="+t.TempDir())
	out, err := cmd.CombinedOutput()
	if err != nil || string(out) != "pid 1\n" {
		t.Errorf("got %q, %v", out, err)
	}
}

func TestInvocationID(t *testing.T) {
	s := newSpawner(t)
	tree := s.NewTree("web")
	defer tree.Close()
	seen := map[string]bool{}
	for range 3 {
		out, _ := output(t, s, &Spec{Tree: tree, Exec: &Exec{Command: []string{"/usr/bin/env"}}, Env: []string{"INVOCATION_ID=other", "A=b"}})
		id, rest, _ := strings.Cut(out, "\n")
		id, ok := strings.CutPrefix(id, "INVOCATION_ID=")
		if !ok || len(id) != 32 || strings.Trim(id, "0123456789abcdef") != "" || rest != "A=b\n" || seen[id] {
			t.Errorf("got environment %q, want a new INVOCATION_ID and A=b", out)
		}
		seen[id] = true
	}
}

func TestSessionsArePruned(t *testing.T) {
	s := newSpawner(t)
	s.giveUp(errors.New("the test wants it"))
	tree := s.NewTree("web")
	p := start(t, s, tree, "(sleep 1000 &) ; exit 0")
	mustWait(t, p)
	for range 3 {
		mustWait(t, start(t, s, tree, "exit 0"))
	}
	family.pruneSessions()
	family.mu.Lock()
	n, kept := len(family.sessions), family.sessions[p.PID()] == tree
	family.mu.Unlock()
	if n != 1 || !kept {
		t.Errorf("got %d sessions, want that of the orphan alone", n)
	}
	endTree(t, tree)
	if err := tree.Close(); err != nil {
		t.Error(err)
	}
	family.mu.Lock()
	defer family.mu.Unlock()
	if n := len(family.sessions); n != 0 {
		t.Errorf("got %d sessions after Close", n)
	}
}

func TestHasInvocation(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]bool{
		"INVOCATION_ID=abcd12\x00A=b\x00": true,
		"A=b\x00INVOCATION_ID=abcd12\x00": true,
		"XINVOCATION_ID=abcd12\x00":       false,
		"A=INVOCATION_ID=abcd\x00":        false,
		"INVOCATION_ID=bcd":               false,
		"":                                false,
	} {
		if got := hasInvocation([]byte(in), "abcd"); got != want {
			t.Errorf("%q: got %v", in, got)
		}
	}
}
