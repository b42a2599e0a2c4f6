package config

import (
	"fmt"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"
)

// many is a configuration of n services.
func many(n int) string {
	var b strings.Builder
	b.WriteString("[hibergated]\ncontrol = \"/run/x/control.sock\"\n\n")
	for i := range n {
		fmt.Fprintf(&b, "[service.service%d]\nlisten = [\"tcp://127.0.0.1:%d\"]\naccept = true\nhandoff = \"stdio\"\ncommand = [\"/usr/bin/echo1\"]\n\n", i, 10000+i)
	}
	return b.String()
}

func BenchmarkLoad(b *testing.B) {
	for _, n := range []int{500, 5000, 20000} {
		name := write(b, b.TempDir(), "x.toml", many(n))
		b.Run(fmt.Sprintf("services=%d", n), func(b *testing.B) {
			b.ReportAllocs()
			before := cpu(b)
			for b.Loop() {
				if _, err := Load(name); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64((cpu(b)-before).Microseconds())/float64(b.N)/1000, "cpu-ms/op")
		})
	}
}

// cpu is what the process has used so far, the garbage collector included.
func cpu(b *testing.B) time.Duration {
	b.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// What stays in memory for each service once the configuration is loaded.
func BenchmarkKept(b *testing.B) {
	const n = 5000
	name := write(b, b.TempDir(), "x.toml", many(n))
	var before, after runtime.MemStats
	for b.Loop() {
		runtime.GC()
		runtime.ReadMemStats(&before)
		c, err := Load(name)
		if err != nil {
			b.Fatal(err)
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		runtime.KeepAlive(c)
	}
	b.ReportMetric(float64(int64(after.HeapAlloc)-int64(before.HeapAlloc))/n, "B/service")
}

// One problem in each service, so that the line of each has to be found.
func BenchmarkProblems(b *testing.B) {
	name := write(b, b.TempDir(), "x.toml", strings.ReplaceAll(many(5000), "accept = true", "acept = true"))
	for b.Loop() {
		if _, err := Load(name); err == nil {
			b.Fatal("no error")
		}
	}
}

// Every service on the same port: of different addresses, and shared by reuse_port.
func BenchmarkSamePort(b *testing.B) {
	for name, listen := range map[string]string{
		"addresses":  `'tcp://10.%d.%d.1:80'`,
		"reuse_port": `[{ address = 'tcp://:80', reuse_port = true, backlog = 1%d%d }]`,
	} {
		var text strings.Builder
		for i := range 5000 {
			fmt.Fprintf(&text, "[service.s%d]\nlisten = "+listen+"\ncommand = ['/x']\n", i, i/250, i%250)
		}
		file := write(b, b.TempDir(), "x.toml", text.String())
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if _, err := Load(file); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
