package main

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"hibergate/activation/nettest"
	"hibergate/supervisor"
)

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
