package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
)

// BenchmarkActivation measures from connect to the first byte of a reply that
// a new process gives, one connection each 20 ms, for us and for a program that
// does nothing but accept and fork. Compare the two medians.
func BenchmarkActivation(b *testing.B) {
	nettest.Need(b, nettest.Namespaces, nettest.Tool("cat"))
	cat, err := exec.LookPath("cat")
	if err != nil {
		b.Fatal(err)
	}
	b.Run("floor", func(b *testing.B) {
		cmd := exec.Command("/proc/self/exe", cat)
		cmd.Args[0] = "accept-and-fork"
		cmd.Env = []string{"PATH=/usr/bin:/bin"}
		cmd.Stderr = os.Stderr
		listens, err := cmd.StdoutPipe()
		if err != nil {
			b.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			b.Fatal(err)
		}
		defer func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}()
		if _, err := listens.Read(make([]byte, 1)); err != nil {
			b.Fatal(err)
		}
		activate(b, "127.0.0.1:7998")
	})
	b.Run("hibergated", func(b *testing.B) {
		start(b, fmt.Sprintf("[service.cat]\nlisten = [%q]\naccept = true\nhandoff = \"stdio\"\ncommand = [%q]\n", "tcp://127.0.0.1:7999", cat))
		activate(b, "127.0.0.1:7999")
	})
}

// acceptAndFork is a program that does the least that is to be done: accept, and start the program
// of its argument on the connection. It writes a byte when it listens.
func acceptAndFork() {
	l, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	address := &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: 7998}
	err = errors.Join(err, unix.SetsockoptInt(l, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1), unix.Bind(l, address), unix.Listen(l, 4096))
	if err != nil {
		fmt.Fprintln(os.Stderr, "accept-and-fork:", err)
		os.Exit(1)
	}
	os.Stdout.Write([]byte{'.'})
	for {
		c, _, err := unix.Accept4(l, unix.SOCK_CLOEXEC)
		if err != nil {
			continue
		}
		pid, err := syscall.ForkExec(os.Args[1], os.Args[1:], &syscall.ProcAttr{Files: []uintptr{uintptr(c), uintptr(c), 2}, Env: os.Environ()})
		unix.Close(c)
		if err == nil {
			go func() { _, _ = syscall.Wait4(pid, nil, 0, nil) }()
		}
	}
}

func activate(b *testing.B, address string) {
	b.Helper()
	var took []time.Duration
	for range max(b.N, 20) {
		time.Sleep(20 * time.Millisecond)
		begin := time.Now()
		c, err := net.Dial("tcp", address)
		if err != nil {
			b.Fatal(err)
		}
		var reply [5]byte
		if _, err := c.Write([]byte("ping\n")); err != nil {
			b.Fatal(err)
		}
		if _, err := c.Read(reply[:]); err != nil || string(reply[:]) != "ping\n" {
			b.Fatalf("got %q, %v", reply, err)
		}
		took = append(took, time.Since(begin))
		c.Close()
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-µs")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-µs")
	b.ReportMetric(0, "ns/op")
}

// BenchmarkHold measures 5,000 sleeping services: until all listen, memory, and
// what happens in five seconds in which nobody wants anything.
func BenchmarkHold(b *testing.B) {
	nettest.Need(b, nettest.Namespaces)
	const services = 5000
	var config strings.Builder
	for i := range services {
		fmt.Fprintf(&config, "[service.s%d]\nlisten = [\"tcp://127.0.0.1:%d\"]\ncommand = [\"/bin/true\"]\n", i, 10000+i)
	}
	pid := start(b, config.String())
	b.ReportMetric(float64(b.Elapsed().Milliseconds()), "ms-until-listening")
	time.Sleep(2 * time.Second)
	before := switches(b, pid)
	time.Sleep(5 * time.Second)
	b.ReportMetric(float64(switches(b, pid)-before), "switches-in-5s")
	rollup, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		b.Fatal(err)
	}
	for line := range strings.Lines(string(rollup)) {
		if f := strings.Fields(line); f[0] == "Pss:" {
			kB, _ := strconv.ParseFloat(f[1], 64)
			b.ReportMetric(kB, "PSS-kB")
		}
	}
	b.ReportMetric(0, "ns/op")
}

// start runs the built program until the benchmark ends, and returns once it listens.
func start(b *testing.B, config string) (pid int) {
	b.Helper()
	dir := b.TempDir()
	program := filepath.Join(dir, "hibergated")
	build := exec.Command("go", "build", "-trimpath", "-o", program, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		b.Fatalf("%v: %s", err, out)
	}
	file := filepath.Join(dir, "hg.toml")
	config = fmt.Sprintf("[hibergated]\ncontrol = %q\n", filepath.Join(dir, "c.sock")) + config
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		b.Fatal(err)
	}
	b.ResetTimer()
	cmd := exec.Command(program, "run", "--config", file)
	// Services get our LANG, and would spend their time on reading what belongs to it.
	cmd.Env = slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "LANG=") })
	stderr, err := cmd.StderrPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	lines, started := bufio.NewReader(stderr), ""
	for !strings.Contains(started, "hibergated started") {
		if started, err = lines.ReadString('\n'); err != nil {
			b.Fatalf("%v after %q", err, started)
		}
	}
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		_, _ = io.Copy(io.Discard, lines)
	}()
	b.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		<-drained
		if err := cmd.Wait(); err != nil {
			b.Error(err)
		}
	})
	return cmd.Process.Pid
}

// switches counts the context switches of all threads of a process.
func switches(b *testing.B, pid int) (n int) {
	b.Helper()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil || len(tasks) == 0 {
		b.Fatalf("no threads: %v", err)
	}
	for _, task := range tasks {
		status, _ := os.ReadFile(task)
		for line := range strings.Lines(string(status)) {
			if k, v, _ := strings.Cut(line, ":"); strings.HasSuffix(k, "voluntary_ctxt_switches") {
				i, _ := strconv.Atoi(strings.TrimSpace(v))
				n += i
			}
		}
	}
	return n
}
