package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
)

func TestGateNeverReady(t *testing.T) {
	t.Parallel()
	for _, answer := range []string{"close", "reset", "sorry, asleep\n"} {
		t.Run(strings.Fields(answer)[0], func(t *testing.T) {
			t.Parallel()
			b := newBackend(t, "-after 1h")
			rest := "start.timeout = \"300ms\"\nrestart.delay = \"1h\"\nrestart.max_delay = \"1h\""
			d := startHibergated(t, b.service("web", "", rest, fmt.Sprintf("pending_timeout = \"100ms\"\non_timeout = %q", answer)))
			c := mustDial(t, d, "web", 0)
			text, err := io.ReadAll(c)
			want := ""
			if strings.HasSuffix(answer, "\n") {
				want = answer
			}
			if reset := errors.Is(err, unix.ECONNRESET); string(text) != want || reset != (answer == "reset") || err != nil && !reset {
				t.Errorf("got %q, %v", text, err)
			}
			st := d.is(t, "web", "backoff")
			if b.launches() != 1 || b.stops() != 1 || !strings.Contains(st.Error, "refused") || !strings.Contains(st.Error, "start.timeout") {
				t.Errorf("launched %d, stopped %d times: %q", b.launches(), b.stops(), st.Error)
			}
		})
	}
}

func TestGateSlow(t *testing.T) {
	t.Parallel()
	b := newBackend(t, "-after 20s")
	d := startHibergated(t, b.service("web", "1h", "", ""))
	network, address := d.address("web", 0)
	var clients sync.WaitGroup
	for range 10 {
		clients.Go(func() {
			c, err := net.DialTimeout(network, address, patience)
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			if err := c.SetDeadline(time.Now().Add(20*time.Second + patience)); err != nil {
				t.Error(err)
			}
			line := make([]byte, 3)
			if _, err := io.ReadFull(c, line); err != nil || string(line) != "pid" {
				t.Errorf("%q, %v", line, err)
			}
		})
	}
	nettest.Eventually(t, func() error {
		if st := d.status("web"); st.State != "starting" || !strings.Contains(st.WaitsFor, "refused") {
			return fmt.Errorf("status: %s, waits for %q", st.State, st.WaitsFor)
		}
		return nil
	})
	clients.Wait()
}

func TestGateThousand(t *testing.T) {
	t.Parallel()
	for _, held := range []string{"", `pending_timeout = "1h"`} {
		t.Run(held, func(t *testing.T) {
			t.Parallel()
			b := newBackend(t)
			launch := fmt.Sprintf("until [ -e %s/go ]; do sleep 0.01; done; %s", b.dir, b.launch())
			services := strings.Replace(b.service("web", "1h", "", held), fmt.Sprintf("launch = %q", b.launch()), fmt.Sprintf("launch = %q", launch), 1)
			d := startHibergated(t, services)
			network, address := d.address("web", 0)
			clients := make([]net.Conn, 1000)
			for i := range clients {
				var err error
				if clients[i], err = net.DialTimeout(network, address, patience); err != nil {
					t.Fatal(err)
				}
				defer clients[i].Close()
			}
			if err := os.WriteFile(filepath.Join(b.dir, "go"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			numbers := make([]int, len(clients))
			for i, c := range clients {
				var err error
				if _, numbers[i], err = greeting(c); err != nil {
					t.Fatalf("client %d: %v", i, err)
				}
			}
			// The ready probe may have made connections before, and where the relay has more than one loop, neighbours may change places.
			for i, n := range numbers {
				if off := n - numbers[0] - i; off < -64 || off > 64 {
					t.Fatalf("client %d has connection %d", i, n)
				}
			}
		})
	}
}

func TestGatePendingAgain(t *testing.T) {
	t.Parallel()
	b := newBackend(t)
	tries := filepath.Join(b.dir, "tries")
	launch := fmt.Sprintf("echo try >>%[1]s; [ $(grep -c try %[1]s) -ge 3 ] || { sleep 0.1; exit 3; }; %[2]s", tries, b.launch())
	services := strings.Replace(b.service("web", "1h", `restart = { delay = "50ms" }`, `pending_timeout = "1h"`), fmt.Sprintf("launch = %q", b.launch()), fmt.Sprintf("launch = %q", launch), 1)
	d := startHibergated(t, services)
	c := mustDial(t, d, "web", 0)
	defer c.Close()
	if _, _, err := greeting(c); err != nil {
		t.Error(err)
	}
	if got, want := b.variable("env", "HIBERGATED_CLIENT"), c.LocalAddr().String(); got != want {
		t.Errorf("the launch command was told the client %q, want %s", got, want)
	}
	if st := d.status("web"); st.Failures != 2 || b.launches() != 1 {
		t.Errorf("launched %d times, %+v", b.launches(), st)
	}
}

func TestGatePendingRejected(t *testing.T) {
	t.Parallel()
	b := newBackend(t)
	rest := "restart = { burst = 1, failed_delay = \"1h\", on_failure = \"reject\" }"
	services := strings.Replace(b.service("web", "1h", rest, `pending_timeout = "1h"`), fmt.Sprintf("launch = %q", b.launch()), `launch = "sleep 0.2; exit 3"`, 1)
	d := startHibergated(t, services)
	for range 2 {
		c := mustDial(t, d, "web", 0)
		if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		if text, err := io.ReadAll(c); err != nil || len(text) > 0 {
			t.Errorf("got %q, %v", text, err)
		}
	}
	nettest.Eventually(t, func() error { // they are counted when they are gone
		if st := d.status("web"); st.State != "failed" || st.Refused.Failed != 2 {
			return fmt.Errorf("status: %+v", st)
		}
		return nil
	})
}

func TestGateRefusedAsleep(t *testing.T) {
	t.Parallel()
	b := newBackend(t)
	// Its queue is full, so that connections get no answer.
	deaf := exec.Command("python3", "-c", `
import socket, sys, time
s = socket.socket(); s.bind(("127.0.0.1", int(sys.argv[1]))); s.listen(0)
c = socket.create_connection(s.getsockname()); print("deaf", flush=True); time.sleep(600)`, b.address[strings.LastIndex(b.address, ":")+1:])
	nettest.Need(t, nettest.Tool("python3"))
	out, err := deaf.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := deaf.Start(); err != nil {
		t.Fatal(err)
	}
	over := sync.OnceFunc(func() { deaf.Process.Kill(); deaf.Wait() })
	t.Cleanup(over)
	if _, err := io.ReadFull(out, make([]byte, 5)); err != nil {
		t.Fatal(err)
	}
	services := b.service("web", "1h", "", "ready = \"launched\"\nconnect_timeout = \"3s\"")
	services = strings.Replace(services, fmt.Sprintf("launch = %q", b.launch()), fmt.Sprintf("launch = \"echo launch >>%s/log\"", b.dir), 1)
	services = strings.Replace(services, fmt.Sprintf("stop = %q", b.stop()), `stop = ":"`, 1)
	d := startHibergated(t, services)
	c := mustDial(t, d, "web", 0)
	defer c.Close()
	nettest.Eventually(t, func() error {
		if st := d.status("web"); st.State != "running" || st.Sockets[0].Open != 1 {
			return fmt.Errorf("status: %+v", st)
		}
		return nil
	})
	if st, err := d.client.Sleep(t.Context(), "web"); err != nil || b.launches() != 1 {
		t.Fatalf("launched %d times, %v, status %+v", b.launches(), err, st)
	}
	nettest.Eventually(t, func() error {
		if b.launches() < 2 {
			return errors.New("the client waits for ever")
		}
		return nil
	})
}

func TestGateLaunchTimeout(t *testing.T) {
	t.Parallel()
	b := newBackend(t)
	rest := "restart = { delay = \"1h\", max_delay = \"1h\" }"
	services := strings.Replace(b.service("web", "1h", rest, "launch_timeout = \"100ms\""), fmt.Sprintf("launch = %q", b.launch()), `launch = "exec sleep 600"`, 1)
	d := startHibergated(t, services)
	c := mustDial(t, d, "web", 0)
	defer c.Close()
	if st := d.is(t, "web", "backoff"); b.stops() != 1 || !strings.Contains(st.Error, "launch_timeout") {
		t.Errorf("stopped %d times: %q", b.stops(), st.Error)
	}
}

func TestGateReadyWaits(t *testing.T) {
	t.Parallel()
	b := newBackend(t)
	ready := fmt.Sprintf(`ready = { command = "until test -e %s; do sleep 0.01; done", timeout = "10m" }`, b.pidFile())
	d := startHibergated(t, b.service("web", "1h", "", ready))
	mustVisit(t, d, "web")
	if b.launches() != 1 {
		t.Errorf("launched %d times", b.launches())
	}
}
