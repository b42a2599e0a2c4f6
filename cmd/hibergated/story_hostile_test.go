package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
)

// hostile is a service that does what a service should not. Its arguments are done one after another:
//
//	note       write our pid as a line to $NOTES, where those of its children are, too
//	ignore     ignore every signal that can be, here and in children
//	child ARGUMENTS --
//	           start another one, in a session of its own, that does the arguments
//	daemon     the same, for all arguments that follow, and exit
//	exit N     exit
//	deaf       stay, and take nothing
//	once       take one connection or datagram, and answer with our pid; crash on a datagram "poison" before it is taken
//	serve      the same for ever
//	shutdown, backlog, unlink, async
//	           to the socket: shut it down, listen with a backlog of 1, remove its path, ask for SIGIO
//	calm       fail if the socket does not block, or sends SIGIO
//	bomb       fork without an end, and so do the children
//	run        fork and exit without an end, so that there is always one, with another pid each time
//
// The socket is descriptor 3, whoever it was meant for.
func hostile() {
	const socket = 3
	args := os.Args[1:]
	for len(args) > 0 {
		what := args[0]
		args = args[1:]
		var err error
		switch what {
		case "note":
			err = note(os.Getpid())
		case "ignore":
			signal.Ignore(unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGQUIT, unix.SIGUSR1, unix.SIGUSR2, unix.SIGIO)
		case "child":
			end := slices.Index(args, "--")
			err = another(socket, args[:end])
			args = args[end+1:]
		case "daemon":
			if err = another(socket, args); err == nil {
				os.Exit(0)
			}
		case "exit":
			n, _ := strconv.Atoi(args[0])
			os.Exit(n)
		case "deaf":
			for {
				time.Sleep(time.Hour) // select would be a deadlock, and die of it
			}
		case "once":
			err = answer(socket)
		case "serve":
			for err == nil {
				err = answer(socket)
			}
		case "shutdown":
			err = unix.Shutdown(socket, unix.SHUT_RDWR)
		case "backlog":
			err = unix.Listen(socket, 1)
		case "unlink":
			var name unix.Sockaddr
			if name, err = unix.Getsockname(socket); err == nil {
				err = os.Remove(name.(*unix.SockaddrUnix).Name)
			}
		case "async":
			_, err = unix.FcntlInt(socket, unix.F_SETOWN, os.Getpid())
			if err == nil {
				_, err = unix.FcntlInt(socket, unix.F_SETFL, unix.O_ASYNC|unix.O_NONBLOCK)
			}
		case "calm":
			var flags int
			flags, err = unix.FcntlInt(socket, unix.F_GETFL, 0)
			if err == nil && flags&(unix.O_ASYNC|unix.O_NONBLOCK) != 0 {
				err = fmt.Errorf("flags %#x", flags)
			}
		case "bomb", "run":
			fork(what == "run")
		default:
			err = errors.New("nothing of that name")
		}
		if err != nil {
			fail(fmt.Errorf("%s: %w", what, err))
		}
	}
}

func note(pid int) error {
	f, err := os.OpenFile(os.Getenv("NOTES"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o666)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(f, pid)
	return errors.Join(err, f.Close())
}

// another starts this program once more, in a session of its own, with the same socket. It has no stderr, as it
// may be left behind, and whoever reads the log waits for its end.
func another(socket int, args []string) error {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Args[0] = "hostile"
	cmd.ExtraFiles = []*os.File{os.NewFile(uintptr(socket), "socket")}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil || os.Getenv("NOTES") == "" {
		return err
	}
	return note(cmd.Process.Pid)
}

// answer takes what comes next and says our pid.
func answer(socket int) error {
	poll := []unix.PollFd{{Fd: int32(socket), Events: unix.POLLIN}}
	if _, err := unix.Poll(poll, -1); err != nil && !errors.Is(err, unix.EINTR) {
		return err
	}
	pid := fmt.Appendf(nil, "%d\n", os.Getpid())
	c, _, err := unix.Accept4(socket, unix.SOCK_CLOEXEC)
	switch {
	case err == nil:
		_, err = unix.Write(c, pid)
		return errors.Join(err, unix.Close(c))
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR):
		return nil
	case !errors.Is(err, unix.EOPNOTSUPP):
		return err
	}
	buf := make([]byte, 1024)
	n, from, err := unix.Recvfrom(socket, buf, unix.MSG_PEEK)
	if err == nil && strings.HasPrefix(string(buf[:n]), "poison") {
		err = errors.New("poison") // it is still in the queue
	}
	if err == nil {
		_, _, err = unix.Recvfrom(socket, buf, 0)
	}
	if err == nil {
		err = unix.Sendto(socket, pid, 0, from)
	}
	return err
}

// fork forks for ever. The children are no Go programs any more: they do nothing but system calls.
func fork(exit bool) {
	for {
		pid, _, errno := unix.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
		if exit && errno == 0 && pid != 0 {
			unix.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
		}
	}
}

// BenchmarkHostile measures what all hostile services at once, with a client waiting on each, cost the supervisor: its
// CPU as a percentage of a core, and how often they are started. One round takes a minute, HIBERGATED_WINDOW says how long instead:
//
//	go test ./cmd/hibergated -run '^$' -bench Hostile -benchtime 1x
func BenchmarkHostile(b *testing.B) {
	nettest.Need(b, nettest.Namespaces, nettest.Tool("unshare"), nettest.Tool("prlimit"))
	for _, bench := range []struct{ name, restart string }{
		{"default", ""},
		{"eager", `restart = { delay = "100ms", max_delay = "1s", burst = 0 }`},
	} {
		b.Run(bench.name, func(b *testing.B) {
			window := time.Minute
			if text := os.Getenv("HIBERGATED_WINDOW"); text != "" {
				var err error
				if window, err = time.ParseDuration(text); err != nil {
					b.Fatal(err)
				}
			}
			d, services := startHostile(b, bench.restart)
			before := cpuTime(b, d.pid)
			for b.Loop() {
				time.Sleep(window)
			}
			cpu := cpuTime(b, d.pid) - before
			b.ReportMetric(100*float64(cpu)/float64(b.Elapsed()), "%-of-a-core")
			b.ReportMetric(0, "ns/op")
			var starts uint64
			for _, name := range services {
				st := d.status(name)
				starts += st.Starts
				b.Logf("%-10s %-9s %4d starts  %s", name, st.State, st.Starts, st.Reason)
			}
			b.ReportMetric(float64(starts), "starts")
			for _, name := range services {
				if _, err := d.client.Sleep(b.Context(), name); err != nil {
					b.Error(err)
				}
			}
		})
	}
}

// startHostile runs hibergated with hostile services, each of which has a client that waits.
func startHostile(b *testing.B, restart string) (d *hibergated, names []string) {
	b.Helper()
	const stream, dgram = "tcp://127.0.0.1:0", "udp://127.0.0.1:0"
	// The user of the bombs has no other processes in its namespace.
	if err := openToOthers(b.TempDir()); err != nil {
		b.Fatal(err)
	}
	limited := []string{"/bin/sh", "-c", `as="setpriv --reuid=65534 --regid=65534 --clear-groups"; $as true || as=; exec $as unshare --user prlimit --nproc=30 "$@"`, "sh", programPath("hostile")}
	plain := []string{programPath("hostile")}
	services := []struct {
		name, listen string
		command      []string
		with         string
	}{
		{"crash", stream, append(plain, "exit", "1"), ""},
		{"leaves", stream, append(plain, "exit", "0"), ""},
		{"missing", stream, []string{"/missing"}, ""},
		{"deaf", stream, append(plain, "deaf"), `start.timeout = "300ms"`},
		{"stubborn", stream, append(plain, "ignore", "deaf"), "start.timeout = \"300ms\"\nstop.timeout = \"100ms\""},
		{"shutdown", stream, append(plain, "shutdown", "exit", "0"), ""},
		{"daemon", stream, append(plain, "ignore", "daemon", "daemon", "serve"), "stop.timeout = \"100ms\"\nidle_timeout = \"100ms\""},
		{"family", stream, append(plain, "child", "ignore", "deaf", "--", "child", "deaf", "--", "serve"), `stop.timeout = "100ms"`},
		{"bomb", stream, append(limited, "bomb"), `stop.timeout = "100ms"`},
		{"runner", stream, append(limited, "run"), `stop.timeout = "100ms"`},
		{"leavesudp", dgram, append(plain, "exit", "0"), ""},
		{"poison", dgram, append(plain, "serve"), ""},
		{"deafudp", dgram, append(plain, "deaf"), `start.timeout = "300ms"`},
	}
	var config strings.Builder
	for _, s := range services {
		names = append(names, s.name)
		fmt.Fprintf(&config, "[service.%s]\nlisten = %q\ncommand = [", s.name, s.listen)
		for _, word := range s.command {
			fmt.Fprintf(&config, "%q, ", word)
		}
		fmt.Fprintf(&config, "]\n%s\n%s\n", s.with, restart)
	}
	d = startHibergated(b, config.String())
	for _, s := range services {
		network, address := d.address(s.name, 0)
		c, err := net.Dial(network, address)
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { c.Close() })
		if _, err := c.Write([]byte("poison\n")); err != nil {
			b.Fatal(err)
		}
	}
	return d, names
}

// cpuTime returns the CPU time of all threads of a process; see clock_getcpuclockid(3).
func cpuTime(b *testing.B, pid int) time.Duration {
	b.Helper()
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|2), &ts); err != nil {
		b.Fatal(err)
	}
	return time.Duration(ts.Nano())
}
