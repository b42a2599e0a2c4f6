package activity_test

import (
	"log/slog"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
	"hibergate/supervisor/activity"
)

// BenchmarkAccounting measures what the account costs a service on loopback: the CPU time of both ends
// and of the kernel between them, per exchange of 100 bytes each way on an open
// connection and per connection with one exchange. The turns of "off" and
// "on" alternate, and the ratio is that of the medians.
func BenchmarkAccounting(b *testing.B) {
	nettest.Need(b, nettest.Namespaces)
	l := mustListen(b, 1, "tcp", "127.0.0.1:0")
	address, err := unix.Getsockname(l.FD)
	if err != nil {
		b.Fatal(err)
	}
	for name, work := range map[string]func(exchange func(client, server int)){
		"exchange": func(exchange func(client, server int)) {
			client, server := mustConnect(b, l.FD, address)
			for range 2000 {
				exchange(client, server)
			}
			unix.Close(client)
			unix.Close(server)
		},
		"connection": func(exchange func(client, server int)) {
			for range 500 {
				client, server := mustConnect(b, l.FD, address)
				exchange(client, server)
				unix.Close(client)
				unix.Close(server)
			}
		},
	} {
		b.Run(name, func(b *testing.B) {
			var took [2][]time.Duration
			for range max(b.N, 20) {
				for on := range took {
					var tr *activity.Tracker
					if on == 1 {
						tr = activity.New(activity.Options{Logger: slog.New(slog.DiscardHandler), Table: "hibergated-cost"}, []activity.Socket{l.Socket})
					}
					begin := cpu(b)
					work(func(client, server int) {
						var buffer [100]byte
						for _, ends := range [][2]int{{client, server}, {server, client}} {
							if _, err := unix.Write(ends[0], buffer[:]); err != nil {
								b.Fatal(err)
							}
							if _, err := unix.Read(ends[1], buffer[:]); err != nil {
								b.Fatal(err)
							}
						}
					})
					took[on] = append(took[on], cpu(b)-begin)
					if tr != nil {
						if err := tr.Close(); err != nil {
							b.Fatal(err)
						}
					}
				}
			}
			median := func(d []time.Duration) float64 { slices.Sort(d); return float64(d[len(d)/2]) }
			b.ReportMetric(median(took[1])/median(took[0]), "CPU-on/off")
			b.ReportMetric(0, "ns/op")
		})
	}
}

func mustConnect(b *testing.B, listener int, address unix.Sockaddr) (client, server int) {
	b.Helper()
	client, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		b.Fatal(err)
	}
	// Closed by a reset, so that the ports do not run out.
	if err := unix.SetsockoptLinger(client, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
		b.Fatal(err)
	}
	if err := unix.Connect(client, address); err != nil {
		b.Fatal(err)
	}
	if server, _, err = unix.Accept4(listener, unix.SOCK_CLOEXEC); err != nil {
		b.Fatal(err)
	}
	return client, server
}
