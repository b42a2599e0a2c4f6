package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation"
	"hibergate/activation/nettest"
	"hibergate/supervisor"
	"hibergate/supervisor/control"
)

// hibergated is one that runs for one test.
type hibergated struct {
	tb     testing.TB
	pid    int
	client control.Client
	log    *logBuffer
}

// startHibergated runs hibergated with these services, and when the test ends, ends it and
// checks that it went well and left nothing behind.
func startHibergated(tb testing.TB, services string) *hibergated {
	tb.Helper()
	dir := tb.TempDir()
	config := filepath.Join(dir, "hg.toml")
	d := &hibergated{tb: tb, client: control.Client{Path: filepath.Join(dir, "c.sock")}, log: &logBuffer{}}
	text := fmt.Sprintf("hibergated.control = %q\n%s", d.client.Path, strings.ReplaceAll(services, "ECHO-SERVER", programPath("echo-server")))
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		tb.Fatal(err)
	}
	cmd := exec.Command(programPath("hibergated"), "run", "-c", config, "--log-format", "json")
	cmd.Stderr = d.log
	cmd.WaitDelay = patience // a process left behind would hold stderr open for ever
	if err := cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	d.pid = cmd.Process.Pid
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	tb.Cleanup(func() {
		left := nettest.Children(d.pid)
		cmd.Process.Signal(unix.SIGTERM)
		select {
		case err := <-ended:
			if err != nil {
				tb.Error("hibergated:", err)
			}
		case <-time.After(patience):
			tb.Error("hibergated does not end")
			cmd.Process.Signal(unix.SIGTERM)
			<-ended
		}
		for _, pid := range left {
			if err := unix.Kill(pid, 0); err == nil && parent(pid) != os.Getpid() && !isGateBackend(pid) {
				tb.Errorf("process %d was left behind", pid)
			}
		}
		if _, err := os.Stat(d.client.Path); !errors.Is(err, os.ErrNotExist) {
			tb.Error("the control socket was left behind:", err)
		}
		if tb.Failed() {
			tb.Logf("log:\n%s", d.log)
		}
	})
	nettest.Eventually(tb, func() error {
		_, err := d.client.Status(tb.Context(), "", false)
		return err
	})
	return d
}

// parent returns the parent of a process, 0 where there is no such process.
func parent(pid int) int {
	var ppid int
	for line := range strings.Lines(procStatus(pid)) {
		if _, err := fmt.Sscanf(line, "PPid: %d", &ppid); err == nil {
			return ppid
		}
	}
	return 0
}

func procStatus(pid int) string {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	return string(text)
}

func (d *hibergated) status(service string) supervisor.Status {
	d.tb.Helper()
	ctx, stop := context.WithTimeout(context.Background(), patience)
	defer stop()
	list, err := d.client.Status(ctx, service, true)
	if err != nil {
		d.tb.Fatal(err)
	}
	return list[0]
}

// address returns where a socket of a service listens, as net.Dial takes it.
func (d *hibergated) address(service string, socket int) (network, address string) {
	d.tb.Helper()
	a, err := activation.ParseAddress(d.status(service).Sockets[socket].Address)
	if err != nil {
		d.tb.Fatal(err)
	}
	if a.Network.IP() {
		return a.Network.String(), netip.AddrPortFrom(a.IP, a.Port).String()
	}
	return a.Network.String(), a.Path
}

// sleeps waits until the service sleeps.
func (d *hibergated) sleeps(tb testing.TB, service string) {
	tb.Helper()
	nettest.Eventually(tb, func() error {
		if st := d.status(service); st.State != "listening" {
			return fmt.Errorf("%s is %s: %s", service, st.State, st.Idle.Busy)
		}
		return nil
	})
}

// mustDial connects to a socket of a service.
func mustDial(tb testing.TB, d *hibergated, service string, socket int) net.Conn {
	tb.Helper()
	network, address := d.address(service, socket)
	c, err := net.DialTimeout(network, address, patience)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { c.Close() })
	return c
}

// mustHold connects to a socket of an echo-server and takes its greeting, so that the service has accepted.
func mustHold(tb testing.TB, d *hibergated, service string, socket int) net.Conn {
	tb.Helper()
	c := mustDial(tb, d, service, socket)
	if answer := mustAsk(tb, c, ""); !strings.HasPrefix(answer, "pid ") {
		tb.Fatalf("the greeting is %q", answer)
	}
	nettest.Eventually(tb, func() error { // the service may be faster than hibergated is to hear of its start
		if st := d.status(service); len(st.PIDs) != 1 {
			return fmt.Errorf("%s has the processes %v", service, st.PIDs)
		}
		return nil
	})
	return c
}

func mustAsk(tb testing.TB, c net.Conn, text string) string {
	tb.Helper()
	answer, err := ask(c, text)
	if err != nil {
		tb.Fatal(err)
	}
	return answer
}

func mustRun(tb testing.TB, name string, args ...string) string {
	tb.Helper()
	cmd := exec.Command(name, args...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		tb.Fatalf("%s %q: %v\n%s", name, args, err, &stderr)
	}
	return string(out)
}

// change is a line of the log about a change of state.
type change struct {
	Time               time.Time
	Service            string
	From, To           string
	Reason, Level, Msg string
}

// stopped waits until a service is told to stop because it is idle, for the
// n-th time, and returns when that was.
func (d *hibergated) stopped(tb testing.TB, service string, n int, within time.Duration) time.Time {
	tb.Helper()
	for deadline := time.Now().Add(within); ; time.Sleep(10 * time.Millisecond) {
		seen := 0
		for _, c := range d.log.changes(tb) {
			if c.Service == service && c.To == "stopping" && c.Reason == "idle" {
				if seen++; seen == n {
					return c.Time
				}
			}
		}
		if time.Now().After(deadline) {
			tb.Fatalf("%s is not stopped within %v: %+v", service, within, d.status(service))
		}
	}
}

// logBuffer is the log of a hibergated, which one goroutine writes and others read.
type logBuffer struct {
	mu sync.Mutex // guards b
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (l *logBuffer) changes(tb testing.TB) []change {
	tb.Helper()
	var all []change
	for line := range strings.Lines(l.String()) {
		var c change
		if !strings.HasSuffix(line, "\n") || line[0] != '{' {
			continue // half a line, or something that a service said
		}
		if err := json.Unmarshal([]byte(line), &c); err != nil {
			tb.Fatalf("%s: %v", line, err)
		}
		if c.To != "" {
			all = append(all, c)
		}
	}
	return all
}
