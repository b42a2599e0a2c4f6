package main

import (
	"bufio"
	"cmp"
	"encoding/csv"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
	"hibergate/supervisor/control"
)

// What handoff = "adopt" costs. All that is compared runs in one network namespace, in which connection tracking
// is on for everybody, and is measured by turns.

// BenchmarkAdoptSyscall measures system calls of a program that is alone, and of one with the filter: one that the filter lets pass, and
// the making, binding and closing of a socket with an address that is not ours, with one of ours, and with one of ours that the
// process had before, which is looked for among its descriptors.
//
//	go test ./cmd/hibergated -run '^$' -bench AdoptSyscall -benchtime 200x
func BenchmarkAdoptSyscall(b *testing.B) {
	nettest.Need(b, nettest.Namespaces)
	for _, call := range []string{"getppid", "bind-elsewhere", "bind-ours", "bind-again"} {
		b.Run(call, func(b *testing.B) {
			ask := func(c net.Conn) (float64, error) {
				answer, err := ask(c, call+"\n")
				if err != nil {
					return 0, err
				}
				return strconv.ParseFloat(strings.TrimSpace(answer), 64)
			}
			program := func() *adoptProgram {
				return &adoptProgram{
					name: "call-meter", command: []string{programPath("call-meter"), "127.0.0.1:${PORT}", "127.0.0.1:${PORT2}"},
					at:     []string{"tcp://127.0.0.1:${PORT}", "tcp://127.0.0.1:${PORT2}"},
					client: func(c net.Conn) error { _, err := ask(c); return err },
				}
			}
			alone, adopted := placed(b, program()), placed(b, program())
			benchHibergated(b, adopted.benched())
			_, end := alone.begin(b, 0)
			defer end()
			took := map[*adoptProgram][]float64{}
			for round := range max(b.N, 20) {
				for _, p := range turns(round, alone, adopted) {
					c, err := p.dial(0)
					if err != nil {
						b.Fatal(err)
					}
					ns, err := ask(c)
					if err != nil {
						b.Fatal(err)
					}
					c.Close()
					took[p] = append(took[p], ns)
				}
				time.Sleep(50 * time.Millisecond) // else a Session makes those wait who ask again and again
			}
			b.ReportMetric(median(took[alone]), "alone-ns")
			b.ReportMetric(median(took[adopted]), "adopted-ns")
			b.ReportMetric(median(took[adopted])-median(took[alone]), "more-ns")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// callMeter is a program that listens on two addresses, and then on the first alone. Each line that it reads there is the
// name of a call; it answers how many nanoseconds that takes.
func callMeter() {
	l, err := net.Listen("tcp4", os.Args[1])
	if err != nil {
		fail(err)
	}
	other, err := net.Listen("tcp4", os.Args[2])
	if err != nil {
		fail(err)
	}
	other.Close()
	runtime.LockOSThread()
	ours := netip.MustParseAddrPort(os.Args[2])
	bind := func(port uint16, option int) func() {
		return func() {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				fail(err)
			}
			if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, option, 1); err != nil {
				fail(err)
			}
			if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: ours.Addr().As4(), Port: int(port)}); err != nil {
				fail(err)
			}
			unix.Close(fd)
		}
	}
	meters := map[string]struct {
		times int
		call  func()
	}{
		"getppid":        {100_000, func() { unix.Getppid() }},
		"bind-elsewhere": {20, bind(ours.Port()+10000, unix.SO_REUSEADDR)}, // see nextPort
		"bind-ours":      {20, bind(ours.Port(), unix.SO_REUSEPORT)},       // nobody asks whether the process has it
		"bind-again":     {20, bind(ours.Port(), unix.SO_REUSEADDR)},
	}
	for {
		c, err := l.Accept()
		if err != nil {
			fail(err)
		}
		for lines := bufio.NewScanner(c); lines.Scan(); {
			m := meters[lines.Text()]
			began := time.Now()
			for range m.times {
				m.call()
			}
			fmt.Fprintf(c, "%.1f\n", float64(time.Since(began).Nanoseconds())/float64(m.times))
		}
		c.Close()
	}
}

// BenchmarkAdoptThroughput measures requests per second of a program that was adopted against one that has bound its port itself. That
// of a second one that has says how much of it is noise. The ratios are the medians of those of the rounds.
//
//	go test ./cmd/hibergated -run '^$' -bench AdoptThroughput -benchtime 20x
func BenchmarkAdoptThroughput(b *testing.B) {
	nettest.Need(b, nettest.Namespaces)
	for _, load := range []struct {
		name, program string
		rate          func(*testing.B, *adoptProgram) float64
	}{
		{"redis-get", "redis", redisRate("get")},
		{"redis-set", "redis", redisRate("set")},
		{"nginx-keep-alive", "nginx", webRate()},
		{"nginx-close", "nginx", webRate("-H", "Connection: close")},
	} {
		b.Run(load.name, func(b *testing.B) {
			adopted, own, same := placed(b, adoptNamed(load.program)), placed(b, adoptNamed(load.program)), placed(b, adoptNamed(load.program))
			benchHibergated(b, adopted.benched())
			for _, p := range []*adoptProgram{own, same} {
				_, end := p.begin(b, 0)
				defer end()
			}
			compareRates(b, load.rate, own, []*adoptProgram{adopted, same}, []string{"adopted", "same"})
		})
	}
}

// compareRates reports the requests per second of one program, and those of others as ratios.
func compareRates(b *testing.B, rate func(*testing.B, *adoptProgram) float64, base *adoptProgram, others []*adoptProgram, names []string) {
	b.Helper()
	all := append([]*adoptProgram{base}, others...)
	for _, p := range all {
		if _, err := p.visit(0); err != nil {
			b.Fatal(err)
		}
	}
	rates := map[*adoptProgram][]float64{}
	for round := 0; b.Loop(); round++ {
		for _, p := range turns(round, all...) {
			rates[p] = append(rates[p], rate(b, p))
		}
	}
	b.ReportMetric(median(rates[base]), "req/s")
	for i, p := range others {
		ratios := make([]float64, len(rates[p]))
		for round := range ratios {
			ratios[round] = rates[p][round] / rates[base][round]
		}
		b.ReportMetric(median(ratios), names[i]+"-ratio")
	}
	b.ReportMetric(0, "ns/op")
}

func redisRate(test string) func(*testing.B, *adoptProgram) float64 {
	return func(b *testing.B, p *adoptProgram) float64 {
		b.Helper()
		installed(b, programPath("redis-benchmark"))
		_, port, _ := net.SplitHostPort(strings.TrimPrefix(p.at[0], "tcp://"))
		out := mustRun(b, programPath("redis-benchmark"), "-p", port, "-t", test, "-n", "100000", "-P", "1", "-c", "50", "--csv")
		table, err := csv.NewReader(strings.NewReader(out)).ReadAll()
		if err != nil || len(table) != 2 {
			b.Fatalf("%v in %q", err, out)
		}
		rate, err := strconv.ParseFloat(table[1][1], 64)
		if err != nil {
			b.Fatal(err)
		}
		return rate
	}
}

func webRate(args ...string) func(*testing.B, *adoptProgram) float64 {
	return func(b *testing.B, p *adoptProgram) float64 {
		b.Helper()
		installed(b, programPath("wrk"))
		out := mustRun(b, programPath("wrk"), append(args, "-t1", "-c32", "-d1s", "http"+strings.TrimPrefix(p.at[0], "tcp"))...)
		for line := range strings.Lines(out) {
			if strings.Contains(line, "Socket errors") || strings.Contains(line, "Non-2xx") {
				b.Error(p.name, line)
			}
			var rate float64
			if _, err := fmt.Sscanf(line, "Requests/sec: %f", &rate); err == nil {
				return rate
			}
		}
		b.Fatalf("no rate in %q", out)
		return 0
	}
}

// BenchmarkAdoptWake measures from the connect of the client that wakes a program to the first byte of its answer, against the start of
// the program alone, up to the first byte to the same client. That tries to connect all the time, once three quarters of the shortest start
// have passed: to try earlier takes 3 ms more from a start of 30 ms.
//
//	go test ./cmd/hibergated -run '^$' -bench AdoptWake -benchtime 200x
func BenchmarkAdoptWake(b *testing.B) {
	nettest.Need(b, nettest.Namespaces)
	for _, name := range []string{"nginx", "redis", "python", "node", "go"} {
		b.Run(name, func(b *testing.B) {
			alone, adopted := placed(b, adoptNamed(name)), placed(b, adoptNamed(name))
			d := benchHibergated(b, adopted.benched())
			took := map[*adoptProgram]waits{}
			for round := range max(b.N, 20) {
				for _, p := range turns(round, alone, adopted) {
					time.Sleep(20 * time.Millisecond)
					if p == adopted {
						took[p] = append(took[p], d.wakes(b, p))
						continue
					}
					var quiet time.Duration
					if len(took[p]) > 0 {
						quiet = slices.Min(took[p]) * 3 / 4
					}
					wait, end := p.begin(b, quiet)
					end()
					took[p] = append(took[p], wait)
				}
			}
			b.ReportMetric(milliseconds(took[alone]), "alone-ms")
			b.ReportMetric(milliseconds(took[adopted]), "adopted-ms")
			b.ReportMetric(milliseconds(took[adopted])-milliseconds(took[alone]), "more-ms")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// BenchmarkAdoptProxy measures what is done without adopt: a script, which has the sockets, starts the program on another port, tries
// whether it accepts each 10 or 100 ms, and becomes a proxy.
//
//	go test ./cmd/hibergated -run '^$' -bench AdoptProxy/wake -benchtime 100x
//	go test ./cmd/hibergated -run '^$' -bench 'AdoptProxy/(keep-alive|close)' -benchtime 20x
func BenchmarkAdoptProxy(b *testing.B) {
	nettest.Need(b, nettest.Namespaces)
	b.Run("wake", func(b *testing.B) {
		all := []*adoptProgram{placed(b, adoptNamed("nginx")), proxied(b, "10"), proxied(b, "100")}
		d := benchHibergated(b, all[0].benched()+all[1].benched()+all[2].benched())
		took := map[*adoptProgram]waits{}
		for round := range max(b.N, 20) {
			for _, p := range turns(round, all...) {
				time.Sleep(20 * time.Millisecond)
				took[p] = append(took[p], d.wakes(b, p))
			}
		}
		for i, name := range []string{"adopted-ms", "proxy-10-ms", "proxy-100-ms"} {
			b.ReportMetric(milliseconds(took[all[i]]), name)
		}
		b.ReportMetric(0, "ns/op")
	})
	for name, args := range map[string][]string{"keep-alive": nil, "close": {"-H", "Connection: close"}} {
		b.Run(name, func(b *testing.B) {
			adopted, proxy := placed(b, adoptNamed("nginx")), proxied(b, "10")
			benchHibergated(b, adopted.benched()+proxy.benched())
			compareRates(b, webRate(args...), adopted, []*adoptProgram{proxy}, []string{"proxy"})
		})
	}
}

// proxied is nginx behind a proxy that starts it, and tries to connect to it each so many milliseconds.
func proxied(b *testing.B, each string) *adoptProgram {
	b.Helper()
	server, proxy := placed(b, adoptNamed("nginx")), programPath("systemd-socket-proxyd")
	installed(b, proxy, programPath("bash"))
	host, port, _ := net.SplitHostPort(strings.TrimPrefix(server.at[0], "tcp://"))
	script := fmt.Sprintf(`%s 3<&- &
until : 2>/dev/null </dev/tcp/%s/%s; do sleep %se-3; done
exec %s %s:%s`, strings.Join(server.command, " "), host, port, each, proxy, host, port)
	return placed(b, &adoptProgram{name: "proxy-" + each, command: []string{programPath("bash"), "-c", script}, toml: "handoff = \"listen-fds\"\n", client: getHello})
}

// adoptNamed is a program of TestAdopt. It has one worker: how connections are spread over more of them differs from process to process.
func adoptNamed(name string) *adoptProgram {
	all := adoptPrograms()
	p := all[slices.IndexFunc(all, func(p *adoptProgram) bool { return p.name == name })]
	if p.with != nil {
		p.with["WORKERS"] = "1"
	}
	return p
}

// placed gives the program a place, as settle does for a test.
func placed(b *testing.B, p *adoptProgram) *adoptProgram {
	b.Helper()
	installed(b, p.command...)
	p.dir = b.TempDir()
	if p.at == nil {
		p.at = []string{"tcp://127.0.0.1:${PORT}"}
	}
	pairs := []string{"${DIR}", p.dir, "${PORT}", nextPort(), "${PORT2}", nextPort()}
	for name, value := range p.with {
		pairs = append(pairs, "${"+name+"}", strings.NewReplacer(pairs[:6]...).Replace(value))
	}
	all := strings.NewReplacer(pairs...)
	for _, texts := range [][]string{p.command, p.at} {
		for i := range texts {
			texts[i] = all.Replace(texts[i])
		}
	}
	p.listen = stringList(p.at)
	for _, name := range p.files {
		text, err := os.ReadFile(filepath.Join("..", "..", "testdata", "adopt", name))
		if err != nil {
			b.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(p.dir, name), []byte(all.Replace(string(text))), 0o644); err != nil {
			b.Fatal(err)
		}
	}
	return p
}

// benched is the program in a configuration. It does not sleep by itself.
func (p *adoptProgram) benched() string {
	return fmt.Sprintf("[service.%s]\nlisten = %s\ncommand = %s\nidle_timeout = \"1h\"\naccounting = \"conntrack\"\n%s",
		p.name, p.listen, stringList(p.command), cmp.Or(p.toml, "handoff = \"adopt\"\n"))
}

// begin starts the program without hibergated. It returns how long that took, up to the first byte to a client
// who tries to connect after a quiet time, and what ends the program.
func (p *adoptProgram) begin(b *testing.B, quiet time.Duration) (time.Duration, func()) {
	b.Helper()
	cmd := exec.Command(p.command[0], p.command[1:]...)
	cmd.Dir, cmd.Env = "/", []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin"} // as a service has it
	began := time.Now()
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	limit := unix.NsecToTimespec(quiet.Nanoseconds())
	_ = unix.Nanosleep(&limit, nil) // time.Sleep may take a millisecond more
	for {
		tried := time.Now()
		wait, err := p.visit(0)
		if err != nil && time.Since(began) < patience {
			continue
		}
		if err != nil {
			b.Error(p.name, err)
		}
		return tried.Sub(began) + wait, func() {
			_ = cmd.Process.Signal(unix.SIGTERM)
			_ = cmd.Wait()
		}
	}
}

// benchHibergated runs the built program until the benchmark ends.
func benchHibergated(b *testing.B, services string) *hibergated {
	b.Helper()
	nettest.Need(b, nettest.Tool("nft")) // where there is no nftables, nobody counts connections
	pid := start(b, fmt.Sprintf("state = %q\n", b.TempDir())+services)
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		b.Fatal(err)
	}
	config := strings.Split(string(line), "\x00")[3] // hibergated run --config FILE
	return &hibergated{tb: b, pid: pid, client: control.Client{Path: filepath.Join(filepath.Dir(config), "c.sock")}}
}

// wakes makes a client wake the service, and puts that to sleep again. It returns how long the first byte took.
func (d *hibergated) wakes(b *testing.B, p *adoptProgram) time.Duration {
	b.Helper()
	wait, err := p.visit(0)
	if err != nil {
		b.Fatal(p.name, err)
	}
	if _, err := d.client.Sleep(b.Context(), p.name); err != nil {
		b.Fatal(err)
	}
	return wait
}

// turns has another one first each time.
func turns[T any](round int, all ...T) []T {
	n := round % len(all)
	return append(slices.Clone(all[n:]), all[:n]...)
}

func median[T cmp.Ordered](of []T) T { return slices.Sorted(slices.Values(of))[len(of)/2] }

func milliseconds(w waits) float64 { return float64(median(w).Microseconds()) / 1000 }
