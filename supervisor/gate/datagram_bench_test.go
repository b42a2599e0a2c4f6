package gate

import (
	"net/netip"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// benchUDP opens a blocking socket that is connected, so that what is measured is not package net.
func benchUDP(b *testing.B, to netip.AddrPort) int {
	b.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { unix.Close(fd) })
	if err := unix.Connect(fd, &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}); err != nil {
		b.Fatal(err)
	}
	return fd
}

// BenchmarkDatagrams is the time of one exchange of 100 bytes each way, from a client to a backend of this process, without
// the relay and through it; with a window of 16 datagrams under way too.
func BenchmarkDatagrams(b *testing.B) {
	backend := startUDP(b, "", "127.0.0.1:0")
	r := newDatagramRig(b, &Spec{}, "udp://127.0.0.1:0")
	r.mustAdmit(b, backend)
	for name, to := range map[string]netip.AddrPort{"direct": backend.at, "relayed": portOf(r.socket, "127.0.0.1")} {
		for window, suffix := range map[int]string{1: "", 16: "-16"} {
			b.Run(name+suffix, func(b *testing.B) {
				fd := benchUDP(b, to)
				buf, answer := make([]byte, 100), make([]byte, 200)
				exchange := func(read func(int, []byte) (int, error), p []byte) {
					if _, err := read(fd, p); err != nil {
						b.Fatal(err)
					}
				}
				for range window - 1 {
					exchange(unix.Write, buf)
				}
				b.ReportAllocs()
				for b.Loop() {
					exchange(unix.Write, buf)
					exchange(unix.Read, answer)
				}
			})
		}
	}
}

// BenchmarkDatagramSession is the time and memory of a new client: its session begins, and ends.
func BenchmarkDatagramSession(b *testing.B) {
	r := newDatagramRig(b, &Spec{}, "udp://127.0.0.1:0")
	r.mustAdmit(b, startUDP(b, "", "127.0.0.1:0"))
	r.mu.Lock()
	defer r.mu.Unlock()
	b.ReportAllocs()
	for b.Loop() {
		r.forward(datagramKey{datagramPath: datagramPath{client: netip.MustParseAddrPort("127.0.0.1:9")}}, nil, r.now())
		r.forget()
	}
}

// BenchmarkDatagramMemory is how much a session costs that does nothing, beside its socket in the kernel.
func BenchmarkDatagramMemory(b *testing.B) {
	const sessions = 500
	r := newDatagramRig(b, &Spec{}, "udp://127.0.0.1:0")
	r.mustAdmit(b, startUDP(b, "", "127.0.0.1:0"))
	r.mu.Lock()
	defer r.mu.Unlock()
	var before, after runtime.MemStats
	for b.Loop() {
		r.forget()
		runtime.GC()
		runtime.ReadMemStats(&before)
		for i := range sessions {
			client := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), uint16(i))
			r.forward(datagramKey{datagramPath: datagramPath{client: client}}, nil, r.now())
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
	}
	b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/sessions, "B/session")
}
