package main

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
)

// BenchmarkDenied measures what 100,000 attempts to connect from 65,536 sources that may not
// connect cost a sleeping service and the supervisor: processes that were started (must be 0), and
// the CPU time of the supervisor. Run it with -benchtime 1x.
func BenchmarkDenied(b *testing.B) {
	nettest.Need(b, nettest.Namespaces)
	for _, kind := range []string{"one-process", "each-connection"} {
		b.Run(kind, func(b *testing.B) {
			accept := ""
			if kind != "one-process" {
				accept = "accept = true\n"
			}
			d := startHibergated(b, fmt.Sprintf("[service.web]\nlisten = \"tcp://127.0.0.1:0\"\ncommand = [\"ECHO-SERVER\"]\n%saccess.deny = [\"127.128.0.0/9\"]\n", accept))
			_, address := d.address("web", 0)
			to := netip.MustParseAddrPort(address)
			const attempts = 100_000
			for b.Loop() {
				before, dropped := threadTime(b, d.pid), d.status("web").Sockets[0].Dropped
				for i := range attempts {
					attempt(b, netip.AddrFrom4([4]byte{127, 128 + byte(i>>16&0x3f), byte(i >> 8), byte(i)}), to)
				}
				st := d.status("web")
				b.ReportMetric(float64((threadTime(b, d.pid)-before).Microseconds())/1000, "supervisor-cpu-ms")
				b.ReportMetric(float64(st.Starts), "starts")
				b.ReportMetric(float64(st.Sockets[0].Dropped-dropped), "dropped")
				if st.Starts != 0 || st.State != "listening" {
					b.Errorf("somebody got through: %+v", st)
				}
			}
		})
	}
}

// attempt sends one SYN.
func attempt(b *testing.B, from netip.Addr, to netip.AddrPort) {
	b.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		b.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1); err != nil {
		b.Fatal(err)
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: from.As4()}); err != nil {
		b.Fatal(err)
	}
	if err := unix.Connect(fd, &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}); err != unix.EINPROGRESS {
		b.Fatal("connect:", err)
	}
}

// threadTime returns the CPU time that the threads of a process have had, to the nanosecond; see
// the kernel's Documentation/scheduler/sched-stats.rst.
func threadTime(b *testing.B, pid int) (sum time.Duration) {
	b.Helper()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	if err != nil || len(tasks) == 0 {
		b.Fatalf("no threads: %v", err)
	}
	for _, task := range tasks {
		var ns time.Duration
		text, _ := os.ReadFile(task)
		if _, err := fmt.Sscan(string(text), &ns); err != nil {
			b.Fatal(err)
		}
		sum += ns
	}
	return sum
}

// BenchmarkAllowed measures connections per second, each with one line from the service, of clients that
// may connect to services with long lists of who may, against those of one without, in turn: the medians of the
// ratios. The ratio of two services without lists says how much of it is noise.
func BenchmarkAllowed(b *testing.B) {
	nettest.Need(b, nettest.Namespaces)
	var prefixes []string
	for i := range 256 {
		prefixes = append(prefixes, fmt.Sprintf("%q", fmt.Sprintf("10.%d.0.0/16", i)))
	}
	long := strings.Join(prefixes, ", ")
	var config strings.Builder
	for name, access := range map[string]string{
		"none": "", "same": "",
		"short": "access.deny = [\"192.0.2.0/24\"]\n",
		"long":  "access.allow = [\"127.0.0.0/8\", " + long + "]\n",
	} {
		fmt.Fprintf(&config, "[service.%s]\nlisten = \"tcp://127.0.0.1:0\"\ncommand = [\"ECHO-SERVER\"]\n%s", name, access)
	}
	d := startHibergated(b, config.String())
	names := []string{"none", "same", "short", "long"}
	address := map[string]string{}
	for _, name := range names {
		_, address[name] = d.address(name, 0)
		greetings(b, address[name], 100) // it runs
	}
	ratios := map[string][]float64{}
	rate := 0.0
	for n := range max(b.N, 40) {
		took := map[string]float64{}
		for i := range names { // another one first each time
			name := names[(i+n)%len(names)]
			took[name] = greetings(b, address[name], 500).Seconds()
		}
		rate = max(rate, 500/took["none"])
		for _, name := range names[1:] {
			ratios[name] = append(ratios[name], took["none"]/took[name])
		}
	}
	for _, name := range names[1:] {
		slices.Sort(ratios[name])
		b.ReportMetric(ratios[name][len(ratios[name])/2], name+"/none")
	}
	b.ReportMetric(rate, "best-conn/s")
	b.ReportMetric(0, "ns/op")
}

// greetings connects so many times, reads the greeting and resets the connection, which leaves no port in TIME_WAIT.
func greetings(b *testing.B, address string, times int) time.Duration {
	b.Helper()
	begin := time.Now()
	for range times {
		c, err := net.Dial("tcp", address)
		if err != nil {
			b.Fatal(err)
		}
		if err := c.(*net.TCPConn).SetLinger(0); err != nil {
			b.Fatal(err)
		}
		if _, err := c.Read(make([]byte, 64)); err != nil {
			b.Fatal(err)
		}
		c.Close()
	}
	return time.Since(begin)
}
