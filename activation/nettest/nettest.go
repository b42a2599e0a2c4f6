// Package nettest lets tests meet the real kernel without touching the host:
// it runs a whole test binary in namespaces of its own. It is for tests only.
package nettest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const inside = "HIBERGATED_NETTEST" // set in the environment of the test binary that runs inside

// Main runs the tests of a package in a network and mount namespace of their
// own (for an ordinary user in a user namespace too), with the loopback
// interface up. Children and goroutines inherit it, so no test has to lock a
// thread. Afterwards it fails the run when a child process or a file descriptor
// was left behind. Call it from TestMain and pass its result to os.Exit.
func Main(m *testing.M) int {
	if os.Getenv(inside) == "" {
		return reexec()
	}
	if os.Getenv(inside) == "none" {
		return m.Run() // no namespaces here: Need skips or fails each test that wants them
	}
	// What a test mounts stays here.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		fmt.Fprintln(os.Stderr, "nettest: make mounts private:", err)
		return 1
	}
	if err := loopbackUp(); err != nil {
		fmt.Fprintln(os.Stderr, "nettest: bring up loopback:", err)
		return 1
	}
	before := OpenFDs()
	code := m.Run()
	if left := Children(os.Getpid()); len(left) > 0 {
		fmt.Fprintln(os.Stderr, "nettest: processes left behind:", left)
		code = max(code, 1)
	}
	if after := OpenFDs(); len(after) > len(before)+8 { // the runtime's own epoll, eventfd and caches
		fmt.Fprintln(os.Stderr, "nettest: descriptors left open:", after)
		code = max(code, 1)
	}
	return code
}

func reexec() int {
	run := func(env string, attr *syscall.SysProcAttr) (int, error) {
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Args[0] = os.Args[0] // testscript dispatches on it
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		cmd.Env = append(os.Environ(), inside+"="+env)
		cmd.SysProcAttr = attr
		if err := cmd.Start(); err != nil {
			return 1, err
		}
		if err := cmd.Wait(); err != nil {
			return max(cmd.ProcessState.ExitCode(), 1), nil
		}
		return 0, nil
	}
	runtime.LockOSThread() // Pdeathsig is tied to the thread
	attr := &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if os.Geteuid() != 0 {
		attr.Cloneflags |= unix.CLONE_NEWUSER
		attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	code, err := run("own", attr)
	if err != nil {
		fmt.Fprintln(os.Stderr, "nettest: no namespaces of our own:", err)
		code, err = run("none", &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL})
		if err != nil {
			fmt.Fprintln(os.Stderr, "nettest:", err)
		}
	}
	return code
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd) //nolint:errcheck // it was only asked with
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr)
}

// Feature is something a test needs of the machine. It returns nil where it is there.
type Feature func() error

// Namespaces is the feature that the test runs in namespaces of its own.
func Namespaces() error {
	if os.Getenv(inside) != "own" {
		return errors.New("no network namespace of its own")
	}
	return nil
}

// RealRoot is the feature that the test runs as root of the machine, so that it may
// take other users' identities. An ordinary user cannot have it, so it is never required of one.
func RealRoot() error {
	b, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		return err
	}
	f := strings.Fields(string(b))
	if os.Geteuid() != 0 || len(f) < 3 || f[2] == "1" {
		return errNotRoot
	}
	return nil
}

var errNotRoot = errors.New("not root of the machine")

// Tool returns the Feature of having a program in $PATH.
func Tool(name string) Feature {
	return func() error {
		_, err := exec.LookPath(name)
		return err
	}
}

// Need skips the test when a feature is missing, with the reason. With
// HIBERGATED_TEST_REQUIRE=all it fails the test instead, except for RealRoot.
func Need(tb testing.TB, features ...Feature) {
	tb.Helper()
	for _, f := range features {
		err := f()
		if err == nil {
			continue
		}
		if os.Getenv("HIBERGATED_TEST_REQUIRE") == "all" && !errors.Is(err, errNotRoot) {
			tb.Fatalf("required: %v", err)
		}
		tb.Skipf("needs what is not here: %v", err)
	}
}

// Eventually waits until cond returns nil, and fails the test with its last
// error after half a minute: machines that build and test other things beside are slow.
func Eventually(tb testing.TB, cond func() error) {
	tb.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		err := cond()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			tb.Fatalf("still not so after 30s: %v", err)
		}
		time.Sleep(time.Millisecond)
	}
}

// OpenFDs lists what the open descriptors of this process refer to.
func OpenFDs() []string {
	entries, _ := os.ReadDir("/proc/self/fd")
	var out []string
	for _, e := range entries {
		if to, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil {
			out = append(out, e.Name()+" "+to)
		}
	}
	return out
}

// Children lists the children of a process, zombies included.
func Children(pid int) []int {
	var out []int
	files, _ := filepath.Glob("/proc/" + strconv.Itoa(pid) + "/task/*/children")
	for _, f := range files {
		b, _ := os.ReadFile(f)
		for w := range strings.FieldsSeq(string(b)) {
			if n, err := strconv.Atoi(w); err == nil {
				out = append(out, n)
			}
		}
	}
	return out
}
