// Package storm is the program of testdata/storm, as a package so that a test binary can be it too. It is
// everything at once: what starts hibergated and its services, the clients, and those of
// the services that are written in Go, for which it is executed again.
package storm

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// Main is the whole program, given its arguments with its name first, and returns its exit status: 0, 1 where a
// client was lost, something leaked or the storm could not be run to its end, 2 for wrong usage.
func Main(args []string, stdout, stderr io.Writer) int {
	runtime.LockOSThread() // what is started here gets a signal when the thread that started it ends
	if len(args) > 1 && !strings.HasPrefix(args[1], "-") {
		return child(args[1:], stderr)
	}
	o, err := parse(args[1:], stderr)
	if errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if err != nil {
		fmt.Fprintln(stderr, "storm:", err)
		return 2
	}
	ctx, cancel := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	defer cancel()
	code, err := start(ctx, o, args, stdout, stderr)
	if err != nil {
		fmt.Fprintln(stderr, "storm:", err)
		return 1
	}
	return code
}

// child is what this program is when it was executed again: storm WHAT ARGUMENT...
func child(args []string, stderr io.Writer) int {
	var err error
	switch args[0] {
	case "service":
		err = service(args[1:])
	case "limit":
		err = limit(args[1:])
	case "burn":
		burn()
	case "hog":
		err = hog(args[1:])
	default:
		fmt.Fprintf(stderr, "storm: unknown argument %q; storm -h lists the flags\n", args[0])
		return 2
	}
	if err != nil {
		fmt.Fprintf(stderr, "storm %s: %v\n", strings.Join(args, " "), err)
		return 1
	}
	return 0
}

// start builds hibergated where none was named, and runs the storm here or in namespaces of its own.
func start(ctx context.Context, o *options, args []string, stdout, stderr io.Writer) (code int, err error) {
	if o.configOnly {
		dir := filepath.Join(os.TempDir(), "storm")
		_, err := io.WriteString(stdout, o.config(o.plan(ctx, dir), dir))
		return 0, err
	}
	// Where there is no network the build could not fetch a module, so it comes first.
	if o.hibergated == "" {
		dir, err := os.MkdirTemp("", "storm-build-")
		if err != nil {
			return 1, err
		}
		defer os.RemoveAll(dir) //nolint:errcheck // a binary in the temporary directory
		o.hibergated = filepath.Join(dir, "hibergated")
		build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", o.hibergated, "hibergate/cmd/hibergated")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			return 1, fmt.Errorf("build hibergated (-hibergated names one that is built): %w\n%s", err, out)
		}
	}
	if os.Getenv(inside) == "" && o.netns {
		return inNamespaces(ctx, append(args, "-hibergated", o.hibergated), stdout, stderr)
	}
	if os.Getenv(inside) != "" {
		if err := loopbackUp(ctx); err != nil {
			return 1, fmt.Errorf("bring up loopback: %w", err)
		}
	}
	return here(ctx, o, stdout, stderr)
}

// here runs the storm in a new directory, which it removes, and writes its report.
func here(ctx context.Context, o *options, stdout, stderr io.Writer) (code int, err error) {
	dir, err := os.MkdirTemp("", "storm-")
	if err != nil {
		return 1, err
	}
	defer func() {
		if o.keep {
			fmt.Fprintln(stderr, "storm: kept", dir)
			return
		}
		err = errors.Join(err, os.RemoveAll(dir))
	}()
	r, err := run(ctx, o, dir, stderr)
	if err != nil {
		return 1, err
	}
	if err := r.write(stdout, o.json); err != nil {
		return 1, err
	}
	if r.Failed {
		return 1, nil
	}
	return 0, nil
}

// again returns this program with other arguments, and with the same name: a test binary goes by it.
func again(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", args...)
	cmd.Args[0] = os.Args[0]
	return cmd
}

// self returns the path by which others can execute this program under its own name.
func self() (string, error) {
	path, err := exec.LookPath(os.Args[0])
	if err != nil {
		return "", err
	}
	return filepath.Abs(path)
}
