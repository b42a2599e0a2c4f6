package main

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"hibergate/activation/nettest"
	"hibergate/supervisor/activity"
)

// longTest has tests take the time that people would, too.
func longTest() bool { return os.Getenv("HIBERGATED_TEST_LONG") != "" }

// A service with idle_timeout = "2s" is told to stop between 2 and 3 seconds after the last of
// what counts. These bounds are promises to the user; the log says when it was.
func TestIdleTimeout(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces, nettest.Tool("nft"), nettest.Tool("conntrack"))
	var config strings.Builder
	service := func(name, listen, more string) {
		fmt.Fprintf(&config, "[service.%s]\nlisten = [%q]\ncommand = [\"ECHO-SERVER\"]\nidle.stop_after = \"2s\"\n%s\n", name, listen, more)
	}
	service("short", "tcp://127.0.0.1:0", "")
	service("long", "tcp://127.0.0.1:0", "")
	service("silent", "tcp://127.0.0.1:0", "")
	service("traffic", "tcp://127.0.0.1:0", `idle.when = "no-traffic"`)
	service("traffic6", "tcp://[::1]:0", `idle.when = "no-traffic"`)
	service("datagrams", "udp://127.0.0.1:0", "")
	service("forwarded", "tcp://127.0.0.1:0", "")
	service("unix", "unix:@"+t.Name(), "")
	service("sockdiag", "tcp://127.0.0.1:0", `accounting = "sock-diag"`)
	d := startHibergated(t, config.String())
	foreignTraffic(t)

	// in time says that a service was told to stop 2 to 3 seconds after quiet began, some time between two moments.
	inTime := func(t *testing.T, service string, before, after time.Time) {
		t.Helper()
		stop := d.stopped(t, service, 1, patience)
		t.Logf("told to stop %v after", stop.Sub(after).Round(time.Millisecond))
		if stop.Sub(before) < 2*time.Second || stop.Sub(after) > 3*time.Second {
			t.Errorf("told to stop %v to %v after, want 2s to 3s", stop.Sub(after), stop.Sub(before))
		}
		d.sleeps(t, service)
	}
	// All at once, however many processors there are: what they do is wait.
	var all sync.WaitGroup
	defer all.Wait()
	long := 5 * time.Second
	if longTest() {
		long = 30 * time.Second
	}
	for service, open := range map[string]time.Duration{
		"short": 100 * time.Millisecond, "long": long, "silent": 5 * time.Second, "unix": 3 * time.Second, "sockdiag": 3 * time.Second,
	} {
		all.Go(func() {
			t.Run("closed/"+service, func(t *testing.T) {
				c := mustHold(t, d, service, 0)
				time.Sleep(open) // this is what is tested, not waited for
				if st := d.status(service); st.State != "running" || st.Starts != 1 || st.Sockets[0].Open != 1 {
					t.Errorf("while its connection is open: %+v", st)
				}
				before := time.Now()
				c.Close()
				inTime(t, service, before, time.Now())
			})
		})
	}
	for _, service := range []string{"traffic", "traffic6"} {
		all.Go(func() {
			t.Run("silent/"+service, func(t *testing.T) {
				c := mustHold(t, d, service, 0)
				for range 10 { // as long as something comes it stays, whatever the age of the connection
					time.Sleep(300 * time.Millisecond)
					mustAsk(t, c, "again\n")
				}
				if st := d.status(service); st.Starts != 1 || st.State != "running" {
					t.Errorf("with traffic: %+v", st)
				}
				before := time.Now()
				mustAsk(t, c, "the last\n")
				inTime(t, service, before, time.Now())
				if n, err := io.Copy(io.Discard, c); n != 0 {
					t.Errorf("after the stop: %d bytes, %v", n, err)
				}
			})
		})
	}
	all.Go(func() {
		t.Run("datagrams", func(t *testing.T) {
			c := mustDial(t, d, "datagrams", 0)
			var before time.Time
			for range 10 {
				time.Sleep(300 * time.Millisecond)
				before = time.Now()
				mustAsk(t, c, "hello\n")
			}
			after := time.Now()
			if st := d.status("datagrams"); st.Starts != 1 || st.Sockets[0].In.Packets != 10 || st.Sockets[0].Out.Packets != 10 {
				t.Errorf("after 10 datagrams: %+v", st)
			}
			inTime(t, "datagrams", before, after)
		})
	})
	all.Go(func() {
		t.Run("forwarded", func(t *testing.T) {
			_, to := d.address("forwarded", 0)
			local := netip.MustParseAddrPort(to)
			mustRun(t, "nft", "add table ip story; add chain ip story out { type nat hook output priority -100 ; }; "+
				fmt.Sprintf("add rule ip story out ip daddr 127.0.0.5 tcp dport 8081 redirect to :%d", local.Port()))
			defer mustRun(t, "nft", "delete table ip story")
			c, err := net.Dial("tcp", "127.0.0.5:8081")
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			mustAsk(t, c, "hello\n")
			time.Sleep(3 * time.Second) // longer than the timeout
			st := d.status("forwarded")
			if len(st.Sockets[0].Flows) != 1 || st.State != "running" {
				t.Fatalf("with a connection through a redirect: %+v", st)
			}
			flow := st.Sockets[0].Flows[0]
			want := activity.Flow{
				Protocol: "tcp", Peer: netip.MustParseAddrPort(c.LocalAddr().String()), Original: netip.MustParseAddrPort("127.0.0.5:8081"), Local: local,
				State: "ESTABLISHED", Counted: true, PID: st.PIDs[0], Process: "echo-server", In: flow.In, Out: flow.Out,
			}
			if diff := cmp.Diff(want, flow, compareAddrPort()); diff != "" {
				t.Error(diff)
			}
			if flow.In.Packets < 3 || flow.Out.Packets < 2 || st.Sockets[0].In != flow.In || st.Sockets[0].Out != flow.Out {
				t.Errorf("the socket counts %+v and %+v, its only flow %+v", st.Sockets[0].In, st.Sockets[0].Out, flow)
			}
			before := time.Now()
			c.Close()
			inTime(t, "forwarded", before, time.Now())
		})
	})
}

// foreignTraffic has packets on other ports for as long as the test goes on; no service may be kept awake by them.
func foreignTraffic(tb testing.TB) {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	client, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		tb.Fatal(err)
	}
	server, err := l.Accept()
	if err != nil {
		tb.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			if _, err := server.Write([]byte("x")); err != nil {
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
	}()
	go io.Copy(io.Discard, client)
	tb.Cleanup(func() {
		server.Close()
		<-done
		client.Close()
		l.Close()
	})
}
