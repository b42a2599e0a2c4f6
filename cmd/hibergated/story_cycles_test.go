package main

import (
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"hibergate/activation/nettest"
)

// Services that sleep after 50 ms are raced by clients that come at random moments around the stop. Every
// client is served, whatever it meets; and after many cycles nothing has piled up.
// HIBERGATED_CYCLES says how many.
func TestRacedCycles(t *testing.T) {
	nettest.Need(t, nettest.Namespaces, nettest.Tool("nft")) // without nftables no UDP service sleeps
	cycles := 100
	if n, err := strconv.Atoi(os.Getenv("HIBERGATED_CYCLES")); err == nil {
		cycles = n
	}
	const services = 8
	var config strings.Builder
	for i := range services {
		fmt.Fprintf(&config, "[service.%s]\ncommand = [\"ECHO-SERVER\"]\nidle_timeout = \"50ms\"\n", service(i))
		switch i % 4 {
		case 0:
			config.WriteString("listen = [\"tcp://127.0.0.1:0\"]\n")
		case 1:
			config.WriteString("listen = [\"tcp://[::1]:0\"]\naccounting = \"sock-diag\"\n")
		case 2:
			fmt.Fprintf(&config, "listen = [\"unix:@%s-%d\"]\n", t.Name(), i)
		case 3:
			config.WriteString("listen = [\"udp://127.0.0.1:0\"]\n")
		}
	}
	d := startHibergated(t, config.String())
	var served, failed atomic.Int64
	// race runs clients until all services together have slept so many times.
	race := func(cycles int) {
		each := make([]uint64, services)
		for i := range each {
			each[i] = d.status(service(i)).Starts + uint64(cycles/services)
		}
		var all sync.WaitGroup
		for i := range services {
			network, address := d.address(service(i), 0)
			all.Go(func() {
				for n := 0; failed.Load() == 0; n++ {
					if n%16 == 0 && d.status(service(i)).Starts >= each[i] {
						return
					}
					// Every other time closer to the stop, which takes about a millisecond.
					phase := rand.N(120 * time.Millisecond)
					if n%2 == 1 {
						phase = 45*time.Millisecond + rand.N(20*time.Millisecond)
					}
					time.Sleep(phase)
					var clients sync.WaitGroup
					for range 1 + rand.N(3) {
						clients.Go(func() {
							time.Sleep(rand.N(2 * time.Millisecond))
							if err := client(network, address); err != nil {
								failed.Add(1)
								t.Errorf("%s at %s: client %d: %v", service(i), time.Now().Format(time.RFC3339Nano), served.Load(), err)
								return
							}
							served.Add(1)
						})
					}
					clients.Wait()
				}
			})
		}
		all.Wait()
		for i := range services {
			d.sleeps(t, service(i))
		}
	}
	race(max(cycles/10, 2*services)) // until buffers have the size that they keep
	before, fds, rss := served.Load(), descriptors(t, d.pid), resident(t, d.pid)
	race(cycles)
	starts, after := 0, resident(t, d.pid)
	for i := range services {
		st := d.status(service(i))
		starts += int(st.Starts)
		if st.Failures != 0 || st.Error != "" || len(st.PIDs) > 0 {
			t.Errorf("at the end: %+v", st)
		}
	}
	busy, during, unfrozen := races(d.log.changes(t))
	t.Logf("the last look found a client %d times; %d times one came during the stop; %d times there was no last look", busy, during, unfrozen)
	t.Logf("%d clients served, %d failed, %d starts; descriptors %d before and %d after, memory %d and %d KB",
		served.Load(), failed.Load(), starts, fds, descriptors(t, d.pid), rss, after)
	if served.Load() == before || starts < cycles {
		t.Errorf("%d starts, want %d", starts, cycles)
	}
	if left := nettest.Children(d.pid); len(left) > 0 {
		t.Errorf("processes left: %v", left)
	}
	nettest.Eventually(t, func() error { // the connection of the last question may still be open
		if n := descriptors(t, d.pid); n > fds {
			return fmt.Errorf("%d descriptors, %d before", n, fds)
		}
		return nil
	})
	if after > rss+rss/5 {
		t.Errorf("%d KB of memory, %d before", after, rss)
	}
	for line := range strings.Lines(d.log.String()) {
		// On a machine with too much to do a process may not come to a halt in time. Then it carries on, as it should.
		if !strings.Contains(line, `"level":"INFO"`) && !strings.Contains(line, `"cannot be frozen"`) {
			t.Error("in the log:", line)
		}
	}
}

// races counts the races that were run: thaws, starts right after a stop, and stops that were given up.
func races(changes []change) (busy, during, unfrozen int) {
	slept := map[string]time.Time{}
	for _, c := range changes {
		switch {
		case c.Reason == "busy after all":
			busy++
		case c.Reason == "cannot be frozen":
			unfrozen++
		case c.To == "listening":
			slept[c.Service] = c.Time
		case c.To == "starting" && c.Time.Sub(slept[c.Service]) < time.Millisecond:
			during++
		}
	}
	return busy, during, unfrozen
}

func service(i int) string { return fmt.Sprintf("s%d", i) }

// client asks a service that may be asleep, and accepts no excuse.
func client(network, address string) error {
	c, err := net.DialTimeout(network, address, patience)
	if err != nil {
		return err
	}
	defer c.Close()
	if network == "udp" {
		answer, err := ask(c, "hello")
		if err == nil && !strings.HasSuffix(answer, ": hello\n") {
			err = fmt.Errorf("answer %q", answer)
		}
		return err
	}
	greeting, err := ask(c, "")
	if err != nil {
		return fmt.Errorf("greeting %q: %w", greeting, err)
	}
	answer, err := ask(c, "hello\n")
	if err != nil || answer != "hello\n" {
		return fmt.Errorf("after %q: answer %q: %w", greeting, answer, err)
	}
	if err := c.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		return err
	}
	// The connection is open until both sides have closed it, so not even the end may be cut off.
	if rest, err := io.ReadAll(c); len(rest) > 0 || err != nil {
		return fmt.Errorf("at the end: %q, %w", rest, err)
	}
	return nil
}

func descriptors(tb testing.TB, pid int) int {
	tb.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		tb.Fatal(err)
	}
	return len(entries)
}

// resident returns the memory of a process in KB.
func resident(tb testing.TB, pid int) int {
	tb.Helper()
	var kb int
	for line := range strings.Lines(procStatus(pid)) {
		if _, err := fmt.Sscanf(line, "VmRSS: %d kB", &kb); err == nil {
			return kb
		}
	}
	tb.Fatal("no VmRSS")
	return 0
}
