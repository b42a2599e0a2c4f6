package main

import (
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
	"hibergate/supervisor/control"
)

// Without hibergated, a program that runs goes on with the socket that it has. What it would have to ask about fails.
func TestAdoptKilled(t *testing.T) {
	p := storyProgram(t, "binder")
	p.settle(t)
	// Not by startHibergated, which wants a good end.
	config := filepath.Join(p.dir, "hg.toml")
	c := control.Client{Path: filepath.Join(p.dir, "c.sock")}
	text := fmt.Sprintf("hibergated.control = %q\n%s%s", c.Path, p.state(), p.service())
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(filepath.Join(p.dir, "log")) // a file, as the program has it open after hibergated's end
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(programPath("hibergated"), "run", "-c", config)
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := 0
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if pid > 0 {
			unix.Kill(pid, unix.SIGKILL)
		}
		if t.Failed() {
			text, _ := os.ReadFile(log.Name())
			t.Logf("log:\n%s", text)
		}
	})
	nettest.Eventually(t, func() error {
		_, err := c.Status(t.Context(), p.name, false)
		return err
	})
	if answer := p.told(t, "bind"); answer != "bound" {
		t.Errorf("before: %s", answer)
	}
	nettest.Eventually(t, func() error { // it may answer before hibergated has heard of its start
		list, err := c.Status(t.Context(), p.name, true)
		if err == nil && len(list[0].PIDs) != 1 {
			err = fmt.Errorf("processes %v", list[0].PIDs)
		}
		if err == nil {
			pid = list[0].PIDs[0]
		}
		return err
	})
	cmd.Process.Kill()
	cmd.Wait()
	p.lives(t)
	if answer := p.told(t, "bind"); answer != "ENOSYS" {
		t.Errorf("after: got %s, want ENOSYS", answer)
	}
	p.lives(t)
	// When the program has ended, the next hibergated serves in its place, and takes away what the first one left.
	unix.Kill(pid, unix.SIGKILL)
	next := exec.Command(programPath("hibergated"), "run", "-c", config)
	next.Stderr = log
	if err := next.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		next.Process.Signal(unix.SIGTERM)
		if err := next.Wait(); err != nil {
			t.Error("the next hibergated:", err)
		}
	}()
	nettest.Eventually(t, func() error {
		_, err := c.Status(t.Context(), p.name, false)
		return err
	})
	p.lives(t)
}

// A program that binds without an end takes no more than its share: others are served as ever.
func TestAdoptBindStorm(t *testing.T) {
	nettest.Need(t, nettest.Namespaces)
	nothingLeft(t)
	p := &adoptProgram{
		name: "storm", command: []string{programPath("bind-storm"), "127.0.0.1:${PORT}"},
		client: func(c net.Conn) error {
			if greeting, err := ask(c, ""); err != nil {
				return fmt.Errorf("greeting %q: %w", greeting, err)
			}
			return echoHello(c)
		},
	}
	p.settle(t)
	d := p.start(t, "[service.calm]\nlisten = [\"tcp://127.0.0.1:0\"]\ncommand = [\"ECHO-SERVER\"]\nidle_timeout = \"50ms\"\n")
	network, address := d.address("calm", 0)
	held, err := p.dial(0) // keeps it awake
	if err != nil {
		t.Fatal(err)
	}
	mustAsk(t, held, "")
	// A program may ask for a while as often as it likes, and then so many times a second.
	for _, at := range []string{"at first", "later"} {
		const window = 3 * time.Second
		var calm, own waits
		before := cpuUsed(t, d.pid)
		for end := time.Now().Add(window); time.Now().Before(end); time.Sleep(rand.N(150 * time.Millisecond)) {
			began := time.Now()
			if err := client(network, address); err != nil {
				t.Fatal("the calm one:", err)
			}
			calm = append(calm, time.Since(began))
			took, err := p.visit(0)
			if err != nil {
				t.Fatal("the storm:", err)
			}
			own = append(own, took)
		}
		used := cpuUsed(t, d.pid) - before
		t.Logf("%s: hibergated used %v of CPU in %v; a client of the calm service, which slept %d times, waited %v, one of the storm %v",
			at, used, window, d.status("calm").Starts, calm, own)
		if slowest := slices.Max(calm); slowest > time.Second {
			t.Errorf("%s a client of the calm service waited %v", at, slowest)
		}
		if at == "later" && used > window/2 {
			t.Errorf("%s hibergated used %v of CPU in %v", at, used, window)
		}
	}
	held.Close()
	d.sleeps(t, "calm")
	d.sleeps(t, p.name)
}

// cpuUsed is the CPU time of a process.
func cpuUsed(t *testing.T, pid int) time.Duration {
	t.Helper()
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|2), &ts); err != nil {
		t.Fatal(err)
	}
	return time.Duration(ts.Nano())
}

// What a program binds by io_uring makes no system call that could be asked about. By default that fails, and is
// told; a program for which there is no io_uring binds as others do.
func TestAdoptIOUring(t *testing.T) {
	nettest.Need(t, nettest.Namespaces)
	nothingLeft(t)
	p := &adoptProgram{
		name: "ring", prepare: buildBinder("", "io_uring"), client: echoHello,
		command: []string{"${DIR}/binder", "-by", "io_uring", "127.0.0.1:${PORT}"},
	}
	p.settle(t)
	t.Run("default", func(t *testing.T) {
		d := p.start(t, "")
		c, err := p.dial(0)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		p.is(t, d, "backoff", "failed")
		if text := mustRun(t, programPath("hibergated"), "status", "--control", d.client.Path, p.name); !strings.Contains(text, "io_uring") {
			t.Errorf("status does not speak of io_uring:\n%s", text)
		}
	})
	t.Run("refuse", func(t *testing.T) {
		p.toml = "adopt.io_uring = \"refuse\"\n"
		p.cycles(t, nil)
	})
}

// bindStorm serves on the address that is its argument. Beside that, four threads bind it again, and others, as fast as they can.
func bindStorm() {
	l, err := net.Listen("tcp4", os.Args[1])
	if err != nil {
		fail(err)
	}
	at := netip.MustParseAddrPort(os.Args[1])
	for range 4 {
		go func() {
			runtime.LockOSThread()
			for port := int(at.Port()); ; port ^= int(at.Port()) { // it, and 0, by turns
				fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
				if err != nil {
					fail(err)
				}
				_ = unix.Bind(fd, &unix.SockaddrInet4{Addr: at.Addr().As4(), Port: port})
				unix.Close(fd)
			}
		}()
	}
	echoConnections(l)
}
