package gate

import (
	"errors"
	"io"
	"math/rand/v2"
	"net/netip"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"hibergate/supervisor/activity"
)

// networks are all ways from a socket to a destination.
func networks(t *testing.T, f func(t *testing.T, listen, to string)) {
	t.Helper()
	for _, c := range []struct{ name, listen, to string }{
		{"tcp to tcp", "tcp://127.0.0.1:0", "tcp"},
		{"tcp to unix", "tcp://127.0.0.1:0", "unix"},
		{"unix to tcp", "unix", "tcp"},
		{"unix to unix", "unix", "unix"},
		{"dual stack to tcp", "tcp://:0", "tcp"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			if c.listen == "unix" {
				c.listen = "unix://" + tempPath(t, "s")
			}
			f(t, c.listen, c.to)
		})
	}
}

// Big transfers both ways at once, in pieces of any size, arrive as they were sent, and are counted.
func TestStreamIntegrity(t *testing.T) {
	t.Parallel()
	networks(t, func(t *testing.T, listen, to string) {
		t.Helper()
		r, b := newRig(t, &Spec{}, listen), backend(t, to)
		r.spread(2)
		r.to(b)
		const size = 5 << 20
		up, down := noise(1, size), noise(2, size)
		client, server := r.through(b)
		var all sync.WaitGroup
		for _, x := range []struct {
			c         stream
			out, want []byte
		}{{client, up, down}, {server, down, up}} {
			all.Go(func() {
				rnd := rand.New(rand.NewPCG(3, uint64(len(x.out))))
				for rest := x.out; len(rest) > 0; {
					n := min(1+rnd.IntN(1<<(1+rnd.IntN(18))), len(rest))
					if _, err := x.c.Write(rest[:n]); err != nil {
						t.Error(err)
						return
					}
					rest = rest[n:]
				}
				if err := x.c.CloseWrite(); err != nil {
					t.Error(err)
				}
			})
			all.Go(func() {
				got, err := io.ReadAll(x.c)
				if err != nil {
					t.Error(err)
				}
				if string(got) != string(x.want) {
					t.Errorf("got %d bytes, want %d, or they differ", len(got), len(x.want))
				}
			})
		}
		all.Wait()
		r.eventually(0, 0)
		if sum := r.counted(); sum.In.Bytes != size || sum.Out.Bytes != size {
			t.Errorf("got %+v, want %d bytes each way", sum, size)
		}
	})
}

// The end of one direction is passed on, and the other goes on.
func TestStreamHalfClose(t *testing.T) {
	t.Parallel()
	networks(t, func(t *testing.T, listen, to string) {
		t.Helper()
		r, b := newRig(t, &Spec{}, listen), backend(t, to)
		r.to(b)
		client, server := r.through(b)
		mustWrite(t, client, "question")
		client.CloseWrite()
		wantEnd(t, server, "question")
		mustWrite(t, server, "answer")
		mustRead(t, client, "answer")
		mustWrite(t, server, "more")
		server.CloseWrite()
		wantEnd(t, client, "more")
		r.eventually(0, 0)

		client, server = r.through(b)
		mustWrite(t, server, "banner")
		server.CloseWrite()
		wantEnd(t, client, "banner")
		mustWrite(t, client, "thanks")
		mustRead(t, server, "thanks")
		client.Close()
		wantEnd(t, server, "")
		r.eventually(0, 0)
	})
}

// A reset of one side is a reset at the other, after what was sent before.
func TestStreamReset(t *testing.T) {
	t.Parallel()
	r, b := newRig(t, &Spec{}), backend(t, "tcp")
	r.to(b)
	client, server := r.through(b)
	mustWrite(t, client, "x")
	mustRead(t, server, "x")
	reset(t, client)
	wantReset(t, server)
	r.eventually(0, 0)

	client, server = r.through(b)
	mustWrite(t, server, "y")
	mustRead(t, client, "y")
	reset(t, server)
	wantReset(t, client)
	r.eventually(0, 0)
}

// A byte that is urgent does not end the stream, nor does it stop it.
func TestStreamUrgent(t *testing.T) {
	t.Parallel()
	r, b := newRig(t, &Spec{}), backend(t, "tcp")
	r.to(b)
	client, server := r.through(b)
	raw, err := client.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct {
		text string
		flag int
	}{{"before", 0}, {"!", unix.MSG_OOB}, {"after", 0}} {
		if err := raw.Control(func(fd uintptr) { err = unix.Send(int(fd), []byte(x.text), x.flag) }); err != nil {
			t.Fatal(err)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	client.CloseWrite()
	wantEnd(t, server, "beforeafter")
}

// A sender is blocked when the reader does not read, whichever way, and nothing is lost; nothing but a remainder is kept.
func TestStreamBackPressure(t *testing.T) {
	t.Parallel()
	networks(t, func(t *testing.T, listen, to string) {
		t.Helper()
		r, b := newRig(t, &Spec{}, listen), backend(t, to)
		r.to(b)
		client, server := r.through(b)
		for _, x := range []struct{ from, to stream }{{client, server}, {server, client}} {
			sent := r.jam(x.from)
			r.ask(0, func(l *loop) {
				l.each(func(p *pair) bool {
					if n := cap(p.client.rest) + cap(p.server.rest); n > firstRead {
						t.Errorf("%d bytes are kept", n)
					}
					return true
				})
			})
			got := make([]byte, len(sent))
			if _, err := io.ReadFull(x.to, got); err != nil {
				t.Fatal(err)
			}
			equal(t, got, sent)
		}
		client.Close()
		wantEnd(t, server, "")
		server.Close()
		r.eventually(0, 0)
	})
}

// Without pipes bulk transfers are copied, and nothing is kept for a reader that is slow.
func TestStreamWithoutPipes(t *testing.T) {
	t.Parallel()
	r, b := newRig(t, &Spec{}), backend(t, "tcp")
	r.to(b)
	client, server := r.through(b)
	r.ask(0, func(l *loop) { l.lent = maxPipes })
	sent := r.jam(client)
	for range 3 {
		got := make([]byte, len(sent))
		if _, err := io.ReadFull(server, got); err != nil {
			t.Fatal(err)
		}
		equal(t, got, sent)
		sent = r.jam(client)
	}
	r.ask(0, func(l *loop) {
		l.each(func(p *pair) bool {
			if len(p.server.rest) > 0 || !p.server.has(slow) {
				t.Errorf("%d bytes are kept for a side that is known to be slow", len(p.server.rest))
			}
			return true
		})
		l.lent = 0
	})
	client.CloseWrite()
	wantEnd(t, server, string(sent))
}

// Above a limit nothing is kept for anybody, also of small messages.
func TestStreamKeepsLittle(t *testing.T) {
	t.Parallel()
	networks(t, func(t *testing.T, listen, to string) {
		t.Helper()
		r, b := newRig(t, &Spec{}, listen), backend(t, to)
		r.kept.Store(maxKept)
		r.to(b)
		client, server := r.through(b)
		sent := r.jam(client)
		if n := r.kept.Load(); n != maxKept {
			t.Errorf("something is kept for %d sides", n-maxKept)
		}
		client.CloseWrite()
		wantEnd(t, server, string(sent))
		server.Close()
		r.eventually(0, 0)
		r.kept.Store(0)
	})
}

// What is known of a socket is exact at any moment.
func TestStreamSums(t *testing.T) {
	t.Parallel()
	began := time.Now()
	r, b := newRig(t, &Spec{}), backend(t, "tcp")
	if sum := r.sum(); sum != (activity.Summary{Known: true, Exact: true}) {
		t.Errorf("at first: got %+v", sum)
	}
	client := r.client()
	if sum := r.sum(); sum.Queued != 1 || sum.Open != 0 {
		t.Errorf("in the queue: got %+v", sum)
	}
	r.to(b)
	server := mustAccept(t, b)
	sum := r.sum()
	if sum.Open != 1 || sum.Queued != 0 || sum.Peers == 0 || sum.Last.Before(began) || !sum.LastPayload.IsZero() {
		t.Errorf("open: got %+v", sum)
	}
	mustWrite(t, client, "12345")
	mustRead(t, server, "12345")
	mustWrite(t, server, "123")
	mustRead(t, client, "123")
	sum = r.counted()
	if sum.In.Bytes != 5 || sum.Out.Bytes != 3 || sum.LastPayload.Before(began) || sum.LastPayload.After(time.Now()) || sum.Last.Before(sum.LastPayload) {
		t.Errorf("after payload: got %+v", sum)
	}
	flows := r.flows(0, 10)
	if len(flows) != 1 || flows[0].Peer.String() != client.LocalAddr().String() || flows[0].Local.String() != client.RemoteAddr().String() ||
		flows[0].In.Bytes != 5 || flows[0].Out.Bytes != 3 || flows[0].State != "ESTABLISHED" || !flows[0].Counted {
		t.Errorf("got %+v", flows)
	}
	if len(r.flows(1, 10)) != 0 || len(r.flows(0, 0)) > 1 {
		t.Error("flows of another socket, or too many")
	}
	second, _ := r.through(b)
	both := r.sum()
	if both.Open != 2 || both.Peers == sum.Peers {
		t.Errorf("two open: got %+v after %+v", both, sum)
	}
	client.Close()
	wantEnd(t, server, "")
	server.Close()
	r.eventually(1, 0)
	if one := r.sum(); one.Peers == sum.Peers || one.Peers == both.Peers || !one.Last.After(both.Last) {
		t.Errorf("another one open: got %+v after %+v", one, both)
	}
	if d := r.status().Destinations[0]; d.Open != 1 || d.Total != 2 || !d.Healthy {
		t.Errorf("got %+v", d)
	}
	second.Close()
}

// Connections of sources that are ignored are relayed and counted, and are no activity.
func TestStreamIgnored(t *testing.T) {
	t.Parallel()
	r, b := newRig(t, &Spec{}), backend(t, "tcp")
	r.hooks.ignore = netip.Addr.IsLoopback
	r.to(b)
	client, server := r.through(b)
	mustWrite(t, client, "x")
	mustRead(t, server, "x")
	if sum := r.counted(); sum.Open != 0 || sum.Peers != 0 || !sum.Last.IsZero() || sum.In.Bytes != 1 {
		t.Errorf("got %+v", sum)
	}
	if len(r.flows(0, 10)) != 1 {
		t.Error("its flow is not listed")
	}
}

// A gate that is held and empty has neither goroutine nor descriptor, and goes on later; one that is closed never does.
func TestStreamSleeps(t *testing.T) {
	noLeak(t)
	r, b := newRig(t, &Spec{PendingTimeout: time.Hour}), backend(t, "tcp")
	before := len(sockets())
	for range 3 {
		r.to(b)
		client, server := r.through(b)
		mustWrite(t, client, "x")
		mustRead(t, server, "x")
		r.hold()
		mustWrite(t, server, "y") // those that are open go on
		mustRead(t, client, "y")
		client.Close()
		wantEnd(t, server, "")
		server.Close()
		r.running.Wait()
		if after := len(sockets()); after > before {
			t.Fatalf("%d descriptors, before %d: %v", after, before, sockets())
		}
	}
	r.close()
	if err := r.admit(nil); !errors.Is(err, errStreamsClosed) {
		t.Errorf("admit after close: got %v", err)
	}
	if err := r.collect(); !errors.Is(err, errStreamsClosed) {
		t.Errorf("collect after close: got %v", err)
	}
	r.hold()
	r.close()
}

// A pair is small.
func TestStreamPairSize(t *testing.T) {
	t.Parallel()
	if n := unsafe.Sizeof(pair{}); n > 256 {
		t.Errorf("a pair has %d bytes", n)
	}
}
