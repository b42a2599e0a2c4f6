package main

import (
	"fmt"
	"net"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
)

// What handoff = "gate" costs beside what the destination takes anyway.

// BenchmarkGateWake measures how long after the destination listens its first client has its first byte. The destination takes a
// tenth of a second to begin.
//
//	go test ./cmd/hibergated -run '^$' -bench GateWake -benchtime 50x
func BenchmarkGateWake(b *testing.B) {
	for _, forward := range []string{"relay", "kernel"} {
		b.Run(forward, func(b *testing.B) {
			back := newBackend(b, "-after 100ms")
			d := startHibergated(b, back.service("web", "", "", fmt.Sprintf("forward = %q", forward)))
			var late []float64
			for range max(b.N, 10) {
				if _, err := d.client.Sleep(b.Context(), "web"); err != nil {
					b.Fatal(err)
				}
				c := mustDial(b, d, "web", 0)
				answer := mustAsk(b, c, "")
				var now unix.Timespec
				if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
					b.Fatal(err)
				}
				var pid, number int
				var since int64
				if _, err := fmt.Sscanf(answer, "pid %d, connection %d, since %d", &pid, &number, &since); err != nil {
					b.Fatalf("%q: %v", answer, err)
				}
				late = append(late, float64(now.Nano()-since)/1e6)
				c.Close()
			}
			slices.Sort(late)
			b.ReportMetric(median(late), "median-ms")
			b.ReportMetric(late[len(late)*99/100], "p99-ms")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// BenchmarkGateIdle measures the memory of hibergated for each connection through the relay on which nothing happens.
//
//	go test ./cmd/hibergated -run '^$' -bench GateIdle -benchtime 9800x
func BenchmarkGateIdle(b *testing.B) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil || limit.Max < 2*uint64(b.N)+300 {
		b.Skipf("each connection needs two descriptors, and there are %d: %v", limit.Max, err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	nettest.Need(b, nettest.Namespaces)
	d := startHibergated(b, fmt.Sprintf(`
[service.web]
listen = "tcp://127.0.0.1:0"
handoff = "gate"
gate.destination = "tcp://%s"
`, l.Addr()))
	network, address := d.address("web", 0)
	connect := func() {
		c, err := net.Dial(network, address)
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { c.Close() })
		if _, err := c.Write([]byte("x")); err != nil {
			b.Fatal(err)
		}
		for one := make([]byte, 1); one[0] != 'x'; { // a probe says nothing
			far, err := l.Accept()
			if err != nil {
				b.Fatal(err)
			}
			b.Cleanup(func() { far.Close() })
			_, _ = far.Read(one)
		}
	}
	for range 100 {
		connect() // what is made once
	}
	before, fds := resident(b, d.pid), descriptors(b, d.pid)
	for range b.N {
		connect()
	}
	if st := d.status("web"); st.Sockets[0].Open != b.N+100 {
		b.Fatalf("%d connections are open", st.Sockets[0].Open)
	}
	b.ReportMetric(float64(resident(b, d.pid)-before)*1024/float64(b.N), "B/conn")
	b.ReportMetric(float64(descriptors(b, d.pid)-fds)/float64(b.N), "fds/conn")
	b.ReportMetric(0, "ns/op")
	began := time.Now()
	if _, err := d.client.Status(b.Context(), "web", false); err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(float64(time.Since(began).Microseconds()), "status-µs")
}

// BenchmarkGateThroughput measures requests per second of nginx by the ways to it, against nginx itself: through the relay, led by the
// kernel, and through systemd-socket-proxyd. The ratios are the medians of those of the rounds.
//
//	go test ./cmd/hibergated -run '^$' -bench GateThroughput -benchtime 20x
func BenchmarkGateThroughput(b *testing.B) {
	nettest.Need(b, nettest.Namespaces)
	proxy, activate := programPath("systemd-socket-proxyd"), programPath("systemd-socket-activate")
	installed(b, proxy, activate)
	for _, load := range []struct {
		name string
		rate func(*testing.B, *adoptProgram) float64
	}{
		{"keep-alive", webRate()},
		{"close", webRate("-H", "Connection: close")},
	} {
		b.Run(load.name, func(b *testing.B) {
			own := placed(b, adoptNamed("nginx"))
			_, end := own.begin(b, 0)
			defer end()
			way := func(name string) *adoptProgram {
				return &adoptProgram{name: name, at: []string{"tcp://127.0.0.1:" + nextPort()}, client: own.client}
			}
			relay, kernel, proxied := way("relay"), way("kernel"), way("proxied")
			var services strings.Builder
			for _, p := range []*adoptProgram{relay, kernel} {
				fmt.Fprintf(&services, "[service.%s]\nlisten = %q\nhandoff = \"gate\"\n[service.%[1]s.gate]\nforward = %[1]q\ndestination = %[3]q\n", p.name, p.at[0], own.at[0])
			}
			startHibergated(b, services.String())
			host := strings.TrimPrefix(own.at[0], "tcp://")
			cmd := exec.Command(activate, "-l", strings.TrimPrefix(proxied.at[0], "tcp://"), proxy, "-c", "10000", host)
			if err := cmd.Start(); err != nil {
				b.Fatal(err)
			}
			defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
			nettest.Eventually(b, func() error { _, err := proxied.visit(0); return err })
			compareRates(b, load.rate, own, []*adoptProgram{relay, kernel, proxied}, []string{"relay", "kernel", "socket-proxyd"})
		})
	}
}
