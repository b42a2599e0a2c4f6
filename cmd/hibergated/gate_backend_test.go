package main

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
)

// gateBackend is a server that knows nothing of hibergated: it greets with its pid, the number of the connection and the time
// since which it listens, and sends back what it gets until the client has said all.
//
//	gate-backend [-after DURATION] [-pid FILE] [-network NETWORK] [-mptcp] ADDRESS
func gateBackend() {
	after := flag.Duration("after", 0, "how long it takes to begin")
	pid := flag.String("pid", "", "the file for its pid")
	multipath := flag.Bool("mptcp", false, "listen with MPTCP, as programs in Go do by themselves")
	network := flag.String("network", "tcp", "tcp, udp or unix")
	flag.Parse()
	for _, sig := range []unix.Signal{unix.SIGTERM, unix.SIGHUP, unix.SIGINT} {
		if err := defaultAction(sig); err != nil {
			fail(err)
		}
	}
	if *pid != "" {
		if err := os.WriteFile(*pid, fmt.Appendln(nil, os.Getpid()), 0o666); err != nil {
			fail(err)
		}
	}
	time.Sleep(*after)
	if *network == "udp" {
		p, err := net.ListenPacket("udp", flag.Arg(0))
		if err != nil {
			fail(err)
		}
		echoDatagrams(p)
	}
	var lc net.ListenConfig
	lc.SetMultipathTCP(*multipath)
	l, err := lc.Listen(context.Background(), *network, flag.Arg(0))
	if err != nil {
		fail(err)
	}
	var since unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &since); err != nil {
		fail(err)
	}
	for n := 0; ; n++ {
		c, err := l.Accept()
		if err != nil {
			fail(err)
		}
		go func() {
			fmt.Fprintf(c, "pid %d, connection %d, since %d\n", os.Getpid(), n, since.Nano())
			io.Copy(c, c)
			c.Close()
		}()
	}
}

// gatePorts are for destinations, below net.ipv4.ip_local_port_range.
var gatePorts atomic.Int32

// A backend is a destination of a gate: a server of its own that a command launches and another one stops.
type backend struct {
	dir     string // of its own
	network string
	address string // where it serves
	flags   string
}

func newBackend(tb testing.TB, flags ...string) *backend {
	tb.Helper()
	nettest.Need(tb, nettest.Namespaces)
	b := &backend{dir: tb.TempDir(), network: "tcp", address: fmt.Sprintf("127.0.0.1:%d", 19000+gatePorts.Add(1)), flags: strings.Join(flags, " ")}
	tb.Cleanup(b.kill)
	return b
}

// launch is a command that starts the server in the background and ends.
func (b *backend) launch() string {
	return fmt.Sprintf("echo launch >>%s/log; env >%s/env; %s -network %s -pid %s %s %s </dev/null >/dev/null 2>&1 &",
		b.dir, b.dir, programPath("gate-backend"), b.network, b.pidFile(), b.flags, b.address)
}

// stop is a command that ends it.
func (b *backend) stop() string {
	return fmt.Sprintf("echo stop >>%s/log; env >%s/stop-env; kill $(cat %s)", b.dir, b.dir, b.pidFile())
}

func (b *backend) pidFile() string { return filepath.Join(b.dir, "pid") }

func (b *backend) pid() int {
	text, _ := os.ReadFile(b.pidFile())
	n, _ := strconv.Atoi(strings.TrimSpace(string(text)))
	return n
}

// kill ends the server, if there is one, and removes the cgroup in which an ended hibergated has left it.
func (b *backend) kill() {
	pid := b.pid()
	if !isGateBackend(pid) {
		return
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	groups, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
	_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(patience.Milliseconds()))
	for line := range strings.Lines(string(groups)) {
		path, unified := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "0::")
		if own := filepath.Dir(path); unified && strings.HasPrefix(filepath.Base(own), "hibergated-") {
			for _, mount := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
				_ = os.Remove(mount + path)
				_ = os.Remove(mount + own) // it fails while somebody needs it
			}
		}
	}
}

// isGateBackend says whether a process is such a server, which hibergated leaves as it is when it ends.
func isGateBackend(pid int) bool {
	name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	return strings.TrimSpace(string(name)) == "gate-backend"
}

// launches counts how often it was launched, and stops how often it was stopped.
func (b *backend) launches() int { return b.count("launch") }
func (b *backend) stops() int    { return b.count("stop") }

func (b *backend) count(what string) int {
	text, _ := os.ReadFile(filepath.Join(b.dir, "log"))
	return strings.Count(string(text), what+"\n")
}

// variable is what a command was told.
func (b *backend) variable(file, name string) string {
	text, _ := os.ReadFile(filepath.Join(b.dir, file))
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), name+"="); ok {
			return value
		}
	}
	return ""
}

// service is the table of a gate that leads there. What is in gate comes into its table, the rest before it.
func (b *backend) service(name, idle, rest, gate string) string {
	if idle != "" {
		idle = fmt.Sprintf("idle_timeout = %q", idle)
	}
	scheme := b.network + "://"
	return fmt.Sprintf(`
[service.%[1]s]
listen = ["%[2]s"]
handoff = "gate"
%[3]s
%[4]s
[service.%[1]s.gate]
destination = %[5]q
launch = %[6]q
stop = %[7]q
%[8]s
`, name, map[string]string{"tcp": "tcp://127.0.0.1:0", "unix": "tcp://127.0.0.1:0", "udp": "udp://127.0.0.1:0"}[b.network],
		idle, rest, scheme+b.address, b.launch(), b.stop(), gate)
}

// greeting asks a server for its number and the connection's, and leaves it open.
func greeting(c net.Conn) (pid, number int, err error) {
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return 0, 0, err
	}
	line, err := bufio.NewReaderSize(c, 64).ReadString('\n')
	if err != nil {
		return 0, 0, err
	}
	_, err = fmt.Sscanf(line, "pid %d, connection %d", &pid, &number)
	return pid, number, err
}
