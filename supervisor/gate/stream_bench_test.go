package gate

import (
	"io"
	"net"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// echo answers every connection with what it sends.
func echo(b net.Listener) {
	for {
		c, err := b.Accept()
		if err != nil {
			return
		}
		go func() {
			_, _ = io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c})
			c.Close()
		}()
	}
}

// BenchmarkStreamRoundTrip sends 100 bytes to and fro, through the relay and without it.
func BenchmarkStreamRoundTrip(b *testing.B) {
	r, to := newRig(b, &Spec{}), backend(b, "tcp")
	r.to(to)
	go echo(to)
	for name, at := range map[string]string{"relay": portOf(r.sock, "127.0.0.1").String(), "direct": to.Addr().String()} {
		b.Run(name, func(b *testing.B) {
			c, buf := mustDial(b, "tcp", at), make([]byte, 100)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := c.Write(buf); err != nil {
					b.Fatal(err)
				}
				if _, err := io.ReadFull(c, buf); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkStreamConnection makes a connection for each 100 bytes.
func BenchmarkStreamConnection(b *testing.B) {
	r, to := newRig(b, &Spec{}), backend(b, "tcp")
	r.to(to)
	go echo(to)
	for name, at := range map[string]string{"relay": portOf(r.sock, "127.0.0.1").String(), "direct": to.Addr().String()} {
		b.Run(name, func(b *testing.B) {
			buf := make([]byte, 100)
			for b.Loop() {
				c, err := net.Dial("tcp", at)
				if err != nil {
					b.Fatal(err)
				}
				if _, err := c.Write(buf); err != nil {
					b.Fatal(err)
				}
				if _, err := io.ReadFull(c, buf); err != nil {
					b.Fatal(err)
				}
				c.Close()
			}
		})
	}
}

// BenchmarkStreamBulk moves pieces of 1 MiB one way: with pipes, copied, and without the relay.
func BenchmarkStreamBulk(b *testing.B) {
	for _, name := range []string{"spliced", "copied", "direct"} {
		b.Run(name, func(b *testing.B) {
			r, to := newRig(b, &Spec{}), backend(b, "tcp")
			r.to(to)
			at := portOf(r.sock, "127.0.0.1").String()
			if name == "direct" {
				at = to.Addr().String()
			}
			client := mustDial(b, "tcp", at)
			server := mustAccept(b, to)
			if name == "copied" {
				r.ask(0, func(l *loop) { l.lent = maxPipes })
				defer r.ask(0, func(l *loop) { l.lent = 0 })
			}
			piece, into := noise(1, 1<<20), make([]byte, 1<<20)
			b.SetBytes(int64(len(piece)))
			go func() {
				for {
					if _, err := client.Write(piece); err != nil {
						return
					}
				}
			}()
			for b.Loop() {
				if _, err := io.ReadFull(server, into); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkStreamIdle has 10,000 connections open (fewer where the limit of descriptors is lower), each of which has
// carried a message, and reports what of this process' memory each takes.
func BenchmarkStreamIdle(b *testing.B) {
	r, to := newRig(b, &Spec{}), backend(b, "tcp")
	raw, err := to.(*net.TCPListener).File()
	if err != nil {
		b.Fatal(err)
	}
	defer raw.Close()
	r.to(to)
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		b.Fatal(err)
	}
	n := min(10_000, (int(limit.Cur)-100)/4)
	for b.Loop() {
		before := heap()
		var ends []int
		for range n {
			client, server := idle(b, r, int(raw.Fd()))
			ends = append(ends, client, server)
		}
		r.settled()
		b.ReportMetric(float64(heap()-before-uint64(8*cap(ends)))/float64(n), "B/connection")
		b.ReportMetric(float64(n), "connections")
		for _, fd := range ends {
			unix.Close(fd)
		}
		r.eventually(0, 0)
	}
}

func heap() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// idle opens a connection whose ends take no memory of this process, and sends something through it.
func idle(b *testing.B, r *rig, backend int) (client, server int) {
	b.Helper()
	client, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		b.Fatal(err)
	}
	if err := unix.Connect(client, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: int(r.sock.Address().Port)}); err != nil {
		b.Fatal(err)
	}
	if _, err := unix.Write(client, []byte("hello")); err != nil {
		b.Fatal(err)
	}
	if _, err := unix.Poll([]unix.PollFd{{Fd: int32(backend), Events: unix.POLLIN}}, -1); err != nil {
		b.Fatal(err)
	}
	if server, _, err = unix.Accept4(backend, unix.SOCK_CLOEXEC); err != nil {
		b.Fatal(err)
	}
	if _, err := unix.Read(server, make([]byte, 5)); err != nil {
		b.Fatal(err)
	}
	return client, server
}
