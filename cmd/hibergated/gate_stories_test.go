package main

import (
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
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
	"hibergate/supervisor"
)

// is waits until a service is in one of these states.
func (d *hibergated) is(tb testing.TB, service string, states ...string) supervisor.Status {
	tb.Helper()
	var st supervisor.Status
	nettest.Eventually(tb, func() error {
		if st = d.status(service); !slices.Contains(states, st.State) {
			return fmt.Errorf("%s is %s: %s %s", service, st.State, st.Error, st.Idle.Busy)
		}
		return nil
	})
	return st
}

// mustVisit is a client that accepts no excuse.
func mustVisit(tb testing.TB, d *hibergated, service string) {
	tb.Helper()
	network, address := d.address(service, 0)
	if err := client(network, address); err != nil {
		tb.Errorf("client of %s: %v", service, err)
	}
}

// A server in the background of a shell is launched by the first client, and stopped when the last one has left; the commands
// are told why, and for whom.
func TestGateShell(t *testing.T) {
	t.Parallel()
	for _, network := range []string{"tcp", "unix"} {
		t.Run(network, func(t *testing.T) {
			t.Parallel()
			b := newBackend(t)
			if b.network = network; network == "unix" {
				b.address = filepath.Join(b.dir, "s")
				b.flags = "-pid " + b.pidFile() // a socket that was left behind is in the way
			}
			launch := ""
			if network == "unix" {
				launch = `environment = { "RM" = "1" }`
			}
			d := startHibergated(t, strings.ReplaceAll(b.service("web", "100ms", launch, ""), "echo launch", "rm -f "+b.dir+"/s; echo launch"))
			for round := 1; round <= 3; round++ {
				c := mustDial(t, d, "web", 0)
				pid, n, err := greeting(c)
				if err != nil || pid != b.pid() || n != 0 {
					t.Fatalf("greeting of %d, connection %d: %v; the backend is %d", pid, n, err, b.pid())
				}
				if round == 1 {
					for name, want := range map[string]string{
						"HIBERGATED_SERVICE": "web", "HIBERGATED_REASON": "traffic",
						"HIBERGATED_SOCKET": d.status("web").Sockets[0].Address, "HIBERGATED_CLIENT": c.LocalAddr().String(),
					} {
						if got := b.variable("env", name); got != want {
							t.Errorf("the launch command was told %s=%s, want %s", name, got, want)
						}
					}
				}
				c.Close()
				d.sleeps(t, "web")
				if b.launches() != round || b.stops() != round {
					t.Fatalf("after %d rounds: launched %d, stopped %d times", round, b.launches(), b.stops())
				}
			}
			if got := b.variable("stop-env", "HIBERGATED_REASON"); got != "idle" {
				t.Errorf("the stop command was told the reason %q", got)
			}
			if st := d.status("web"); st.Starts != 3 || st.Failures != 0 {
				t.Errorf("status: %+v", st)
			}
		})
	}
}

// A server that is up before hibergated is led to at once, and is put to sleep as well.
func TestGateUpAlready(t *testing.T) {
	t.Parallel()
	b := newBackend(t)
	mustRun(t, "/bin/sh", "-c", b.launch())
	nettest.Eventually(t, func() error {
		c, err := net.Dial(b.network, b.address)
		if err == nil {
			c.Close()
		}
		return err
	})
	d := startHibergated(t, b.service("web", "200ms", "", ""))
	if st := d.is(t, "web", "running", "confirming", "stopping", "listening"); st.State == "running" && st.Reason != string(supervisor.ReasonUp) {
		t.Errorf("status: %+v", st)
	}
	d.sleeps(t, "web")
	if b.launches() != 1 || b.stops() != 1 { // the launch was ours
		t.Errorf("launched %d, stopped %d times", b.launches(), b.stops())
	}
	mustVisit(t, d, "web")
	if b.launches() != 2 {
		t.Errorf("launched %d times", b.launches())
	}
}

// A launch that fails is tried again while its clients wait, and a destination that dies is launched again by the next client.
func TestGateCrashes(t *testing.T) {
	t.Parallel()
	b := newBackend(t)
	tries := filepath.Join(b.dir, "tries")
	launch := fmt.Sprintf("echo try >>%[1]s; [ $(grep -c try %[1]s) -ge 3 ] || exit 3; %[2]s", tries, b.launch())
	services := strings.Replace(b.service("web", "1h", `restart = { delay = "10ms" }`, ""), fmt.Sprintf("launch = %q", b.launch()), fmt.Sprintf("launch = %q", launch), 1)
	d := startHibergated(t, services)
	var clients sync.WaitGroup
	for range 20 {
		clients.Go(func() { mustVisit(t, d, "web") })
	}
	clients.Wait()
	if st := d.status("web"); st.Failures != 2 || b.launches() != 1 {
		t.Errorf("launched %d times, %+v", b.launches(), st)
	}
	for round := 2; round <= 4; round++ {
		killed := b.pid()
		if err := unix.Kill(killed, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		nettest.Eventually(t, func() error {
			if c, err := net.Dial("tcp", b.address); err == nil {
				c.Close()
				return errors.New("it is still there")
			}
			return nil
		})
		for range 5 {
			clients.Go(func() { mustVisit(t, d, "web") })
		}
		clients.Wait()
		if b.launches() != round {
			t.Errorf("launched %d times, want %d", b.launches(), round)
		}
	}
}

// A destination that is not ready in time is stopped again. Who has waited too long is told what the configuration says.
// A destination may take its time.
// 1,000 clients that come while the destination wakes are served in the order in which they came.
// The end of what one side says, and its reset, come to the other side as such.
func TestGateEnds(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	d := startHibergated(t, fmt.Sprintf(`
[service.web]
listen = "tcp://127.0.0.1:0"
handoff = "gate"
gate.destination = "tcp://%s"
`, l.Addr()))
	pair := func() (near, far *net.TCPConn) {
		near = mustDial(t, d, "web", 0).(*net.TCPConn)
		if _, err := near.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		var c net.Conn
		for said := make([]byte, 1); said[0] != 'x'; { // a probe says nothing
			var err error
			if c, err = l.Accept(); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close() })
			_, _ = c.Read(said)
		}
		for _, c := range []net.Conn{near, c} {
			if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
				t.Fatal(err)
			}
		}
		return near, c.(*net.TCPConn)
	}
	for _, turned := range []bool{false, true} {
		sides := func() (a, b *net.TCPConn) {
			if a, b = pair(); turned {
				return b, a
			}
			return a, b
		}
		a, b := sides()
		if err := a.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if _, err := b.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			t.Errorf("after a half close: %v", err)
		}
		if _, err := b.Write([]byte("still here")); err != nil {
			t.Error(err)
		}
		b.Close()
		if text, err := io.ReadAll(a); err != nil || string(text) != "still here" {
			t.Errorf("after a half close: %q, %v", text, err)
		}
		a, b = sides()
		if err := a.SetLinger(0); err != nil {
			t.Fatal(err)
		}
		a.Close()
		if _, err := b.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("after a reset: %v", err)
		}
	}
	nettest.Eventually(t, func() error {
		if st := d.status("web"); st.Sockets[0].Open != 0 || st.Gate.Destinations[0].Open != 0 {
			return fmt.Errorf("%d connections are left", st.Sockets[0].Open)
		}
		return nil
	})
}

// Datagrams go to and fro, and the destination sleeps when there have been none for a while.
func TestGateUDP(t *testing.T) {
	t.Parallel()
	b := newBackend(t)
	b.network = "udp"
	ready := fmt.Sprintf(`ready.command = "ss -Hlun | grep -q %s"`, b.address)
	nettest.Need(t, nettest.Tool("ss"))
	d := startHibergated(t, b.service("dns", "200ms", "", ready))
	for range 3 {
		var clients sync.WaitGroup
		for range 10 {
			clients.Go(func() { mustVisit(t, d, "dns") })
		}
		clients.Wait()
		d.sleeps(t, "dns")
	}
	if b.launches() < 3 || b.launches() != b.stops() {
		t.Errorf("launched %d, stopped %d times", b.launches(), b.stops())
	}
}

// A stop command that fails stops nothing.
func TestGateStopFails(t *testing.T) {
	t.Parallel()
	b := newBackend(t)
	may := filepath.Join(b.dir, "may")
	stop := fmt.Sprintf("echo stop >>%s/log; test -e %s || exit 4; kill $(cat %s)", b.dir, may, b.pidFile())
	services := strings.Replace(b.service("web", "100ms", "", ""), fmt.Sprintf("stop = %q", b.stop()), fmt.Sprintf("stop = %q", stop), 1)
	d := startHibergated(t, services)
	mustVisit(t, d, "web")
	nettest.Eventually(t, func() error {
		if st := d.status("web"); !strings.Contains(st.Error, "exit status 4") {
			return fmt.Errorf("status %s: %q", st.State, st.Error)
		}
		return nil
	})
	mustVisit(t, d, "web")
	if _, err := d.client.Sleep(t.Context(), "web"); err == nil || !strings.Contains(err.Error(), "exit status 4") {
		t.Errorf("sleep: %v", err)
	}
	if _, err := d.client.Restart(t.Context(), "web"); err == nil || !strings.Contains(err.Error(), "exit status 4") {
		t.Errorf("restart: %v", err)
	}
	mustVisit(t, d, "web")
	if err := os.WriteFile(may, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := d.client.Sleep(t.Context(), "web"); err != nil {
		t.Errorf("sleep: %v", err)
	}
	if st := d.status("web"); st.State != "listening" || b.launches() != 1 {
		t.Errorf("launched %d times, status %+v", b.launches(), st)
	}
}

// What users ask, and the end of hibergated, which leaves the destination up for the next one.
func TestGateRequests(t *testing.T) {
	b := newBackend(t)
	services := b.service("web", "1h", "", "")
	t.Run("first", func(t *testing.T) {
		d := startHibergated(t, services)
		if st, err := d.client.Wake(t.Context(), "web"); err != nil || st.State != "running" || b.launches() != 1 {
			t.Errorf("wake: %v, %+v", err, st)
		}
		if st, err := d.client.Restart(t.Context(), "web"); err != nil || st.State != "running" || b.launches() != 2 || b.stops() != 1 {
			t.Errorf("restart: %v, %+v", err, st)
		}
		if _, err := d.client.Freeze(t.Context(), "web"); err == nil {
			t.Error("frozen")
		}
		mustVisit(t, d, "web")
	})
	t.Run("second", func(t *testing.T) {
		d := startHibergated(t, services)
		if st := d.is(t, "web", "running"); st.Reason != string(supervisor.ReasonUp) {
			t.Errorf("status: %+v", st)
		}
		mustVisit(t, d, "web")
		if b.launches() != 2 || b.stops() != 1 {
			t.Errorf("launched %d, stopped %d times", b.launches(), b.stops())
		}
	})
}

// Clients race launches and stops, and none is lost, whoever moves the bytes.
//
//	HIBERGATED_CYCLES=500 go test -run TestGateCycles ./cmd/hibergated
//
// The configuration of the original hibergate.
func TestGateOriginal(t *testing.T) {
	t.Parallel()
	b := newBackend(t)
	port := strconv.Itoa(18000 + int(gatePorts.Add(1)))
	cmd := exec.Command(programPath("hibergated"), "gate")
	log := &logBuffer{}
	cmd.Stderr, cmd.WaitDelay = log, patience
	cmd.Env = append(os.Environ(),
		"HIBERGATE_LISTENPORT="+port, "HIBERGATE_DESTINATION="+b.address, "HIBERGATE_LAUNCHCMD="+b.launch(),
		"HIBERGATE_STOPCMD="+b.stop(), "HIBERGATE_READINESSCMD=true", "HIBERGATE_IDLESECS=1", "STORY=told")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Signal(unix.SIGTERM)
		if err := cmd.Wait(); err != nil || t.Failed() {
			t.Errorf("hibergated gate: %v\n%s", err, log)
		}
	})
	nettest.Eventually(t, func() error {
		return client("tcp", "127.0.0.1:"+port)
	})
	if got := b.variable("env", "STORY"); got != "told" {
		t.Errorf("the launch command was not told what hibergated was: %q", got)
	}
	nettest.Eventually(t, func() error {
		if b.stops() != 1 {
			return errors.New("not stopped")
		}
		return nil
	})
	if err := client("tcp", "127.0.0.1:"+port); err != nil {
		t.Error(err)
	}
}

// Clients that were accepted have the launch tried again as others do, also where nobody else comes.
// When the service is given up, those who were accepted are turned away as those are who come.
// A client that is being connected when the gate is shut, and refused after the stop, has the destination launched again.
// Where it is the traffic that counts, a connection that the kernel forwards keeps the destination awake for as long as it has some.
// A destination that the kernel forwards to is asked once in each interval whether it is there, however often the gate was opened, and
// a question without an answer holds up no shutdown.
// launch_timeout bounds a launch, and not the life of a server that is its own launch command.
func TestGateForeground(t *testing.T) {
	t.Parallel()
	b := newBackend(t)
	foreground := strings.TrimSuffix(b.launch(), "&")
	services := strings.Replace(b.service("web", "1h", "", "launch_timeout = \"1s\""), fmt.Sprintf("launch = %q", b.launch()), fmt.Sprintf("launch = %q", foreground), 1)
	d := startHibergated(t, services)
	c := mustDial(t, d, "web", 0)
	defer c.Close()
	if _, _, err := greeting(c); err != nil {
		t.Fatal(err)
	}
	time.Sleep(1500 * time.Millisecond)
	mustVisit(t, d, "web")
	if b.launches() != 1 {
		t.Errorf("launched %d times", b.launches())
	}
}

// A launch command that was killed may have launched something: that is stopped.
// What is up already is found, however long it takes to find out of others that they are not.
func TestGateUpAmongMany(t *testing.T) {
	t.Parallel()
	b := newBackend(t)
	mustRun(t, "/bin/sh", "-c", b.launch())
	var services strings.Builder
	for i := range 64 { // as many as are asked at a time
		fmt.Fprintf(&services, `
[service.silent%d]
listen = "tcp://127.0.0.1:0"
handoff = "gate"
gate = { destination = "tcp://127.0.0.1:1", ready = { command = "exec sleep 600", timeout = "500ms" } }
`, i)
	}
	nettest.Eventually(t, func() error {
		c, err := net.Dial(b.network, b.address)
		if err == nil {
			c.Close()
		}
		return err
	})
	d := startHibergated(t, services.String()+b.service("web", "1h", "", `ready = { timeout = "200ms" }`))
	if st := d.is(t, "web", "running"); st.Reason != string(supervisor.ReasonUp) {
		t.Errorf("status: %+v", st)
	}
}

// A connection of ours that was made to find the destination ready, and for which no client is left, does not keep it awake.
func TestGateWatchSpare(t *testing.T) {
	t.Parallel()
	b := newBackend(t)
	nettest.Need(t, nettest.Tool("nft"))
	launch := fmt.Sprintf("echo begun >>%[1]s/log; until [ -e %[1]s/go ]; do sleep 0.01; done; %[2]s", b.dir, b.launch())
	services := strings.Replace(b.service("web", "300ms", "", "watch_destination = true\npending_timeout = \"1h\""), fmt.Sprintf("launch = %q", b.launch()), fmt.Sprintf("launch = %q", launch), 1)
	d := startHibergated(t, services)
	c := mustDial(t, d, "web", 0).(*net.TCPConn)
	nettest.Eventually(t, func() error {
		if b.count("begun") == 0 {
			return errors.New("not launched")
		}
		return nil
	})
	if err := c.SetLinger(0); err != nil {
		t.Fatal(err)
	}
	c.Close()
	if err := os.WriteFile(filepath.Join(b.dir, "go"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	nettest.Eventually(t, func() error {
		if b.stops() == 0 {
			st := d.status("web")
			return fmt.Errorf("%s: %s", st.State, st.Idle.Busy)
		}
		return nil
	})
}

// A ready command may wait until the destination is there, which it never is before the launch.
// A datagram that the destination refuses has it launched again, and gets there, though its client sends no other.
func TestGateUDPCrashes(t *testing.T) {
	t.Parallel()
	b := newBackend(t)
	b.network = "udp"
	ready := fmt.Sprintf(`ready.command = "ss -Hlun | grep -q %s"`, b.address)
	nettest.Need(t, nettest.Tool("ss"))
	d := startHibergated(t, b.service("dns", "1h", "", ready))
	mustVisit(t, d, "dns")
	if err := unix.Kill(b.pid(), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	nettest.Eventually(t, func() error {
		if out, err := exec.Command("ss", "-Hlun").Output(); err != nil || strings.Contains(string(out), b.address) {
			return errors.Join(err, errors.New("it is still there"))
		}
		return nil
	})
	network, address := d.address("dns", 0)
	c, err := net.Dial(network, address)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write([]byte("once")); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 100)); err != nil || b.launches() != 2 {
		t.Errorf("launched %d times: %v", b.launches(), err)
	}
}
