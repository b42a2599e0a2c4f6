package process

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
)

// fuse is the Feature of file systems of our own, such as one that never answers.
func fuse() error {
	_, err := os.Stat("/dev/fuse")
	return err
}

// hangingDirectory is a directory that nobody can enter: whoever tries waits until he is killed.
func hangingDirectory(t *testing.T) string {
	t.Helper()
	nettest.Need(t, nettest.Namespaces, nettest.RealRoot, fuse)
	dir := t.TempDir()
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil { // for other users
		t.Fatal(err)
	}
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	// Nobody reads what the kernel asks of fd.
	if err := unix.Mount("hang", dir, "fuse", 0, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other", fd)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		unix.Close(fd) // ends every wait
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// A child that is held up before its exec holds up nobody else: other programs start, as many as
// there are, memory is collected, and it is killed in the end.
func TestHangBeforeExec(t *testing.T) {
	dir := hangingDirectory(t)
	s := newSpawner(t)
	s.timeout = 500 * time.Millisecond
	const stuck = 4 // more than there are processors and kept sets of slots
	type started struct {
		p   *Process
		err error
	}
	results := make(chan started, stuck)
	for range stuck {
		go func() {
			p, err := s.Start(&Spec{
				Exec: &Exec{Command: []string{"/bin/true"}, WorkingDirectory: dir}, Identity: &Identity{UID: 65534, GID: 65534},
				First: 3, Stdout: -1, Stderr: -1,
			})
			results <- started{p, err}
		}()
	}
	nettest.Eventually(t, func() error {
		if n := len(nettest.Children(os.Getpid())); n < stuck {
			return fmt.Errorf("%d children", n)
		}
		return nil
	})
	runtime.GC()
	if out, _ := output(t, s, &Spec{Exec: sh("echo hello"), First: 3, Stdout: -1, Stderr: -1}); out != "hello\n" {
		t.Errorf("got %q of another program meanwhile", out)
	}
	for range stuck {
		r := <-results
		if r.err != nil {
			t.Error(r.err)
			continue
		}
		if status := mustWait(t, r.p); status.Signal != syscall.SIGKILL {
			t.Errorf("got %s, want it killed", status)
		}
	}
}

// Abort ends a start that hangs, whoever it runs as. A burst of starts leaves only the slots behind
// that were made early.
func TestAbort(t *testing.T) {
	dir := hangingDirectory(t)
	s := newSpawner(t)
	const stuck = 3
	results := make(chan ExitStatus, stuck)
	for range stuck {
		go func() {
			p, err := s.Start(&Spec{Exec: &Exec{Command: []string{"/bin/true"}, WorkingDirectory: dir}, First: 3, Stdout: -1, Stderr: -1})
			if err != nil {
				t.Error(err)
				results <- ExitStatus{}
				return
			}
			results <- mustWait(t, p)
		}()
	}
	nettest.Eventually(t, func() error {
		if n := len(nettest.Children(os.Getpid())); n < stuck {
			return fmt.Errorf("%d children", n)
		}
		return nil
	})
	s.Abort()
	for range stuck {
		if status := <-results; status.Signal != syscall.SIGKILL {
			t.Errorf("got %s, want it killed", status)
		}
	}
	if sets := slotSets(s); len(sets) != keptSets || !sets[0].kept || !sets[1].kept {
		t.Errorf("got %d sets of slots, want the %d that were made early", len(sets), keptSets)
	}
}

// The timer that ends a child before its exec does not outlive the exec.
func TestExecEndsTimer(t *testing.T) {
	nettest.Need(t, nettest.RealRoot)
	s := newSpawner(t)
	s.timeout = 100 * time.Millisecond
	out, status := output(t, s, &Spec{
		Exec: sh("cat /proc/$$/timers; sleep 0.3; echo alive"), Identity: &Identity{UID: 65534, GID: 65534},
		First: 3, Stdout: -1, Stderr: -1,
	})
	if out != "alive\n" {
		t.Errorf("got %q and %s, want it alive and without timers", out, status)
	}
}

// A variable of the name of PIDEnv in the environment gives way.
func TestPIDVariableOnce(t *testing.T) {
	s := newSpawner(t)
	out, _ := output(t, s, &Spec{
		Exec: sh("env | grep -c ^LISTEN_PID=; echo $LISTEN_PID $$"), First: 3, Stdout: -1, Stderr: -1,
		Env: []string{"PATH=/usr/bin:/bin", "LISTEN_PID=1"}, PIDEnv: "LISTEN_PID",
	})
	var n, value, pid int
	if _, err := fmt.Sscan(out, &n, &value, &pid); err != nil || n != 1 || value != pid {
		t.Errorf("got %q (%v), want one LISTEN_PID, and it the pid %s", out, err, strconv.Itoa(pid))
	}
}
