package storm

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// limit executes a program with a limit of open files: storm limit N PROGRAM ARGUMENT...
func limit(args []string) error {
	if len(args) < 2 {
		return errors.New("arguments: N PROGRAM ARGUMENT")
	}
	n, err := strconv.ParseUint(args[0], 10, 64)
	if err != nil {
		return err
	}
	// By package syscall: it then leaves the limit as it is at the exec.
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: n, Max: n}); err != nil {
		return err
	}
	return unix.Exec(args[1], args[1:], os.Environ())
}

// burn keeps all processors busy until it is killed.
func burn() {
	spin := func() {
		for n := uint32(1); ; n *= 3 {
			runtime.KeepAlive(n)
		}
	}
	for range runtime.GOMAXPROCS(0) - 1 {
		go spin()
	}
	spin()
}

// hog writes to so many megabytes until it is killed.
func hog(args []string) error {
	if len(args) != 1 {
		return errors.New("arguments: MEGABYTES")
	}
	mb, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	memory := make([]byte, mb<<20)
	for n := byte(1); ; n++ {
		for i := 0; i < len(memory); i += os.Getpagesize() {
			memory[i] = n
		}
	}
}

// press starts the helpers that the options ask for; end ends them.
func press(ctx context.Context, o *options, d *daemon) (end func() error, err error) {
	var ends []func() error
	end = func() error {
		var err error
		for _, f := range ends {
			err = errors.Join(err, f())
		}
		return err
	}
	start := func(args ...string) {
		if err != nil {
			return
		}
		cmd := again(context.WithoutCancel(ctx), args...)
		cmd.Stderr = os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
		if err = cmd.Start(); err == nil {
			ends = append(ends, func() error {
				err := cmd.Process.Kill()
				cmd.Wait() //nolint:errcheck // it was killed
				return err
			})
		}
	}
	if o.cpu {
		start("burn")
	}
	if o.memory > 0 {
		start("hog", strconv.Itoa(o.memory))
	}
	if o.pids > 0 && err == nil {
		var g *pidsGroup
		if g, err = newPidsGroup(d.pid()); err == nil {
			ctx, cancel := context.WithCancel(ctx)
			done := make(chan error, 1)
			go func() { done <- g.toggle(ctx, o.pids) }()
			ends = append(ends, func() error {
				cancel()
				return <-done
			})
			d.group = g
		}
	}
	if err != nil {
		return nil, errors.Join(err, end())
	}
	return end, nil
}

// pidsGroup is a cgroup in which the number of tasks can be limited.
type pidsGroup struct{ dir string }

// newPidsGroup makes one beneath our own, and moves a process and its future children there.
func newPidsGroup(pid int) (*pidsGroup, error) {
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(own)) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3) // cgroups(7)
		if len(parts) != 3 || parts[1] != "pids" && parts[1] != "" {
			continue
		}
		root := "/sys/fs/cgroup"
		if parts[1] == "pids" {
			root += "/pids"
		}
		g := &pidsGroup{filepath.Join(root, parts[2], fmt.Sprintf("storm-%d", os.Getpid()))}
		if err = os.Mkdir(g.dir, 0o755); err != nil {
			continue
		}
		if err = g.set("pids.max", "max"); err == nil {
			err = g.set("cgroup.procs", strconv.Itoa(pid))
		}
		if err == nil {
			return g, nil
		}
		err = errors.Join(err, os.Remove(g.dir))
	}
	return nil, fmt.Errorf("make a pids cgroup: %w", errors.Join(err, errors.ErrUnsupported))
}

func (g *pidsGroup) set(file, text string) error {
	return os.WriteFile(filepath.Join(g.dir, file), []byte(text), 0)
}

// toggle lets forks fail for a while, again and again.
func (g *pidsGroup) toggle(ctx context.Context, limit int) error {
	for {
		err := g.set("pids.max", "max")
		if err != nil || !pause(ctx, 500*time.Millisecond+rand.N(1500*time.Millisecond)) {
			return err
		}
		if err := g.set("pids.max", strconv.Itoa(limit)); err != nil {
			return err
		}
		pause(ctx, 100*time.Millisecond+rand.N(900*time.Millisecond))
	}
}

// remove removes the cgroup, whose processes have ended.
func (g *pidsGroup) remove(ctx context.Context) error {
	var err error
	until(ctx, 2*time.Second, func() bool {
		err = os.Remove(g.dir)
		return err == nil
	})
	return err
}
