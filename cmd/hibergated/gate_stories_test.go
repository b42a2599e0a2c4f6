package main

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
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

// A destination may take its time.
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

// 1,000 clients that come while the destination wakes are served in the order in which they came.
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
func TestGateCycles(t *testing.T) {
	t.Parallel()
	for _, way := range []string{"relay", "lookup", "nftables"} {
		t.Run(way, func(t *testing.T) {
			t.Parallel()
			by, forward := "relay", "relay"
			var flags []string
			switch way {
			case "lookup":
				nettest.Need(t, nettest.RealRoot)
				by, forward = "kernel (sk_lookup)", "kernel"
			case "nftables":
				by, forward = "kernel (nftables)", "kernel"
				flags = []string{"-mptcp"} // which cannot be handed over
			}
			b := newBackend(t, flags...)
			const idle = 60 * time.Millisecond
			around := 20 * time.Millisecond
			if forward == "kernel" { // which is looked at more rarely, and takes longer to be left
				around = 150 * time.Millisecond
			}
			d := startHibergated(t, b.service("web", idle.String(), "", fmt.Sprintf("forward = %q", forward)))
			network, address := d.address("web", 0)
			var visits, lost atomic.Int32
			come := func(clients *sync.WaitGroup, after time.Duration) {
				clients.Go(func() {
					time.Sleep(after)
					visits.Add(1)
					if err := client(network, address); err != nil {
						lost.Add(1)
						t.Errorf("client %d: %v", visits.Load(), err)
					}
				})
			}
			cycles := cyclesWanted(20)
			for round := 0; round < cycles && !t.Failed(); round++ {
				d.sleeps(t, "web")
				var clients sync.WaitGroup
				come(&clients, 0)
				come(&clients, rand.N(2*time.Millisecond))
				clients.Wait()
				for range 2 { // at the moment of the stop, and into it
					come(&clients, idle-5*time.Millisecond+rand.N(around))
				}
				clients.Wait()
			}
			d.sleeps(t, "web")
			st := d.status("web")
			if st.Failures != 0 || b.stops() < cycles || st.Gate.Forward != by {
				t.Errorf("status: %+v, %+v", st, st.Gate)
			}
			busy := 0
			for _, c := range d.log.changes(t) {
				if c.Reason == string(supervisor.ReasonBusy) {
					busy++
				}
			}
			t.Logf("%d clients, %d lost, %d launches, %d stops; the last look found a client %d times", visits.Load(), lost.Load(), b.launches(), b.stops(), busy)
		})
	}
}

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

// When the service is given up, those who were accepted are turned away as those are who come.
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

// A client that is being connected when the gate is shut, and refused after the stop, has the destination launched again.
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

// Where it is the traffic that counts, a connection that the kernel forwards keeps the destination awake for as long as it has some.
func TestGateKernelTraffic(t *testing.T) {
	t.Parallel()
	for _, flags := range []string{"", "-mptcp"} { // which can be handed over where we may do that, and which cannot
		t.Run(flags, func(t *testing.T) {
			t.Parallel()
			keepsAwake(t, newBackend(t, flags))
		})
	}
}

func keepsAwake(t *testing.T, b *backend) {
	t.Helper()
	d := startHibergated(t, b.service("web", "", `idle = { stop_after = "500ms", when = "no-traffic" }`, `forward = "kernel"`))
	mustVisit(t, d, "web")
	nettest.Eventually(t, func() error {
		if st := d.status("web"); st.State != "running" || !strings.HasPrefix(st.Gate.Forward, "kernel") {
			return fmt.Errorf("status: %s, %+v", st.State, st.Gate)
		}
		return nil
	})
	c := mustDial(t, d, "web", 0)
	defer c.Close()
	if _, _, err := greeting(c); err != nil {
		t.Fatal(err)
	}
	for range 20 {
		time.Sleep(100 * time.Millisecond)
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	if st := d.status("web"); b.stops() > 0 || st.Gate.Destinations[0].Open > 0 {
		t.Errorf("stopped %d times, %d connections are relayed", b.stops(), st.Gate.Destinations[0].Open)
	}
	d.sleeps(t, "web") // with the connection open
}

// A destination that the kernel forwards to is asked once in each interval whether it is there, however often the gate was opened, and
// a question without an answer holds up no shutdown.
func TestGateKernelChecks(t *testing.T) {
	t.Parallel()
	b := newBackend(t, "-mptcp") // of which the kernel does not tell that it has died
	nettest.Need(t, nettest.Tool("nft"))
	ready := fmt.Sprintf("ready = { command = \"echo check >>%[1]s/log; test ! -e %[1]s/hang || exec sleep 600\", timeout = \"10m\" }", b.dir)
	services := strings.Replace(b.service("web", "1h", "", "forward = \"kernel\"\ncheck_interval = \"100ms\"\n"+ready), fmt.Sprintf("stop = %q", b.stop()), `stop = "exit 1"`, 1)
	d := startHibergated(t, services)
	mustVisit(t, d, "web")
	for range 8 {
		if _, err := d.client.Sleep(t.Context(), "web"); err == nil {
			t.Fatal("stopped")
		}
	}
	before := b.count("check")
	time.Sleep(time.Second)
	if n := b.count("check") - before; n > 25 {
		t.Errorf("asked %d times in about a second", n)
	}
	if err := os.WriteFile(filepath.Join(b.dir, "hang"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	asked := b.count("check")
	nettest.Eventually(t, func() error {
		if b.count("check") <= asked {
			return errors.New("not asked any more")
		}
		return nil
	})
}

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
