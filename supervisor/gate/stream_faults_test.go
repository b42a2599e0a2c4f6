package gate

import (
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation"
	"hibergate/activation/nettest"
)

func (r *rig) toAddress(a activation.Address) {
	r.t.Helper()
	if err := r.admit([]Target{{Address: a, FD: -1}}); err != nil {
		r.t.Fatal(err)
	}
}

// untilConnecting waits until a client is being connected.
func (r *rig) untilConnecting() {
	r.t.Helper()
	nettest.Eventually(r.t, func() error {
		if f := r.flows(0, 1); len(f) != 1 || f[0].State != "connecting" {
			return fmt.Errorf("got %+v", f)
		}
		return nil
	})
}

// Each fault has an end that is defined, at which nothing is left.
func TestFaults(t *testing.T) {
	bulk := string(noise(5, 3<<20))
	talk := func(tb testing.TB, client, server stream) { // a conversation that has begun
		tb.Helper()
		mustWrite(tb, client, "hello")
		mustRead(tb, server, "hello")
		mustWrite(tb, server, "welcome")
		mustRead(tb, client, "welcome")
	}
	for _, c := range []struct {
		name string
		run  func(r *rig, b net.Listener)
		unix bool // the backend
	}{
		{"backend is not there", func(r *rig, b net.Listener) {
			b.Close()
			client := r.client()
			mustWrite(r.t, client, "x")
			r.wantLost(false)
			r.eventually(0, 1)
			again := backend(r.t, "tcp")
			r.to(again)
			server := mustAccept(r.t, again)
			talk2(r.t, client, server, "x")
		}, false},
		{"backend's socket file is not there", func(r *rig, b net.Listener) {
			b.Close()
			client := r.client()
			r.wantLost(false)
			r.eventually(0, 1)
			again := backend(r.t, "unix")
			r.to(again)
			talk(r.t, client, mustAccept(r.t, again))
		}, true},
		{"backend does not answer", func(r *rig, _ net.Listener) {
			a, answer := deaf(r.t)
			r.toAddress(a)
			client := r.client()
			mustWrite(r.t, client, "x")
			r.untilConnecting()
			r.age(r.spec.ConnectTimeout)
			r.wantLost(false)
			r.eventually(0, 1)
			again := answer()
			r.to(again)
			talk2(r.t, client, mustAccept(r.t, again), "x")
		}, false},
		{"backend's queue is full", func(r *rig, _ net.Listener) {
			path := tempPath(r.t, "q")
			fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				r.t.Fatal(err)
			}
			defer unix.Close(fd)
			if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
				r.t.Fatal(err)
			}
			if err := unix.Listen(fd, 0); err != nil {
				r.t.Fatal(err)
			}
			mustDial(r.t, "unix", path)
			r.toAddress(activation.Address{Network: activation.Unix, Path: path})
			client := r.client()
			mustWrite(r.t, client, "x")
			nettest.Eventually(r.t, func() error {
				if f := r.flows(0, 1); len(f) != 1 || f[0].State != "pending" {
					return fmt.Errorf("got %+v", f)
				}
				return nil
			})
			first, _, err := unix.Accept(fd)
			if err != nil {
				r.t.Fatal(err)
			}
			unix.Close(first)
			second, _, err := unix.Accept(fd)
			if err != nil {
				r.t.Fatal(err)
			}
			unix.Close(second)
			wantReset(r.t, client) // the request was not read
		}, false},
		{"backend takes the connection and closes it", func(r *rig, b net.Listener) {
			client, server := r.through(b)
			server.Close()
			wantEnd(r.t, client, "")
		}, false},
		{"backend takes the connection and resets it", func(r *rig, b net.Listener) {
			client, server := r.through(b)
			reset(r.t, server)
			wantReset(r.t, client)
		}, false},
		{"backend resets in the middle of the request", func(r *rig, b net.Listener) {
			client, server := r.through(b)
			r.jam(client)
			reset(r.t, server)
			wantReset(r.t, client)
		}, false},
		{"backend closes in the middle of the request", func(r *rig, b net.Listener) {
			client, server := r.through(b)
			r.jam(client)
			server.Close() // with unread input, so that it is a reset
			wantReset(r.t, client)
		}, false},
		{"backend closes a unix connection in the middle of the request", func(r *rig, b net.Listener) {
			client, server := r.through(b)
			r.jam(client)
			server.Close()
			wantReset(r.t, client)
		}, true},
		{"backend closes in the middle of the response", func(r *rig, b net.Listener) {
			client, server := r.through(b)
			talk(r.t, client, server)
			go func() {
				_, _ = io.WriteString(server, bulk)
				server.Close()
			}()
			wantEnd(r.t, client, bulk)
		}, false},
		{"backend resets in the middle of the response", func(r *rig, b net.Listener) {
			client, server := r.through(b)
			talk(r.t, client, server)
			mustWrite(r.t, server, "half of the")
			mustRead(r.t, client, "half of the")
			reset(r.t, server)
			wantReset(r.t, client)
		}, false},
		{"backend answers after the half-close and closes", func(r *rig, b net.Listener) {
			client, server := r.through(b)
			mustWrite(r.t, client, "request")
			client.CloseWrite()
			wantEnd(r.t, server, "request")
			go func() {
				_, _ = io.WriteString(server, bulk)
				server.Close()
			}()
			wantEnd(r.t, client, bulk)
		}, false},
		{"backend resets after the half-close", func(r *rig, b net.Listener) {
			client, server := r.through(b)
			client.CloseWrite()
			wantEnd(r.t, server, "")
			reset(r.t, server)
			wantReset(r.t, client)
		}, false},
		{"backend ends its side and the client goes on", func(r *rig, b net.Listener) {
			client, server := r.through(b)
			server.CloseWrite()
			wantEnd(r.t, client, "")
			go func() {
				_, _ = io.WriteString(client, bulk)
				client.Close()
			}()
			wantEnd(r.t, server, bulk)
		}, false},
		{"backend ends its side and the client falls silent", func(r *rig, b net.Listener) {
			client, server := r.through(b)
			server.CloseWrite()
			wantEnd(r.t, client, "")
			mustWrite(r.t, client, "last words")
			mustRead(r.t, server, "last words")
			r.age(halfTime) // in which it did say something
			r.eventually(1, 0)
			r.age(halfTime)
			wantEnd(r.t, server, "")
		}, false},
		{"backend is gone and the client stays", func(r *rig, b net.Listener) {
			client, server := r.through(b)
			mustWrite(r.t, server, "bye")
			server.Close()
			wantEnd(r.t, client, "bye")
			r.eventually(0, 0)
		}, true},
		{"backend is gone and the client goes on", func(r *rig, b net.Listener) {
			client, server := r.through(b)
			server.Close()
			wantEnd(r.t, client, "")
			nettest.Eventually(r.t, func() error { // the first is answered by a reset
				_, err := io.WriteString(client, "anybody there?")
				if err == nil {
					return fmt.Errorf("it is taken")
				}
				return nil
			})
		}, false},
		{"client resets while it waits", func(r *rig, _ net.Listener) {
			r.hold()
			if err := r.collect(); err != nil {
				r.t.Fatal(err)
			}
			client := r.client()
			mustWrite(r.t, client, "x")
			r.untilPending(1)
			reset(r.t, client)
			r.untilPending(0)
		}, false},
		{"client resets in the queue of the kernel", func(r *rig, b net.Listener) {
			r.hold()
			reset(r.t, r.client())
			r.to(b)
			server := mustAccept(r.t, b)
			wantReset(r.t, server)
		}, false},
		{"client resets while it is being connected", func(r *rig, _ net.Listener) {
			a, _ := deaf(r.t)
			r.toAddress(a)
			client := r.client()
			r.untilConnecting()
			reset(r.t, client)
		}, false},
		{"client half-closes while it is being connected", func(r *rig, _ net.Listener) {
			a, answer := deaf(r.t)
			r.toAddress(a)
			client := r.client()
			mustWrite(r.t, client, "request")
			client.CloseWrite()
			r.untilConnecting()
			r.age(r.spec.ConnectTimeout)
			r.wantLost(false)
			again := answer()
			r.to(again)
			server := mustAccept(r.t, again)
			wantEnd(r.t, server, "request")
			mustWrite(r.t, server, "response")
			server.Close()
			wantEnd(r.t, client, "response")
		}, false},
		{"client resets in the middle of the request", func(r *rig, b net.Listener) {
			client, server := r.through(b)
			mustWrite(r.t, client, "half a req")
			mustRead(r.t, server, "half a req")
			reset(r.t, client)
			wantReset(r.t, server)
		}, false},
		{"client resets in the middle of the response", func(r *rig, b net.Listener) {
			client, server := r.through(b)
			r.jam(server)
			reset(r.t, client)
			wantReset(r.t, server)
		}, false},
		{"client closes in the middle of the response", func(r *rig, b net.Listener) {
			client, server := r.through(b)
			r.jam(server)
			client.Close()
			wantReset(r.t, server)
		}, false},
		{"client half-closes at once", func(r *rig, b net.Listener) {
			client := r.client()
			client.CloseWrite()
			server := mustAccept(r.t, b)
			wantEnd(r.t, server, "")
			mustWrite(r.t, server, "well")
			server.Close()
			wantEnd(r.t, client, "well")
		}, false},
		{"client reads slowly", func(r *rig, b net.Listener) {
			client, server := r.through(b)
			sent := r.jam(server)
			server.Close()
			wantEnd(r.t, client, string(sent))
		}, false},
		{"backend reads slowly", func(r *rig, b net.Listener) {
			client, server := r.through(b)
			sent := r.jam(client)
			client.Close()
			wantEnd(r.t, server, string(sent))
		}, false},
		{"client does not read and the backend is gone", func(r *rig, b net.Listener) {
			client, server := r.through(b)
			r.jam(server)
			reset(r.t, server)
			r.eventually(1, 0)
			r.untilBroken()
			r.age(brokenTime)
			r.eventually(0, 0)
			wantReset(r.t, client)
		}, false},
		{"backend does not read and the client is gone", func(r *rig, b net.Listener) {
			client, server := r.through(b)
			r.jam(client)
			reset(r.t, client)
			r.untilBroken()
			r.age(brokenTime)
			r.eventually(0, 0)
			if _, err := io.Copy(io.Discard, server); err != nil { // Unix sockets have no reset
				r.t.Error(err)
			}
		}, true},
		{"both are slow and the gate is closed", func(r *rig, b net.Listener) {
			client, server := r.through(b)
			r.jam(client)
			r.jam(server)
			r.close()
			_, err := io.Copy(io.Discard, client)
			_, other := io.Copy(io.Discard, server)
			r.t.Log(err, other) // a reset, since there was unread input
		}, false},
	} {
		for loops := range 2 {
			t.Run(fmt.Sprintf("%s, %d loops", c.name, 1+2*loops), func(t *testing.T) {
				noLeak(t)
				network := "tcp"
				if c.unix {
					network = "unix"
				}
				r, b := newRig(t, &Spec{PendingTimeout: time.Hour}), backend(t, network)
				r.spread(1 + 2*loops)
				r.to(b)
				t.Cleanup(func() { r.eventually(0, 0) }) // before anything is closed
				c.run(r, b)
			})
		}
	}
}

// talk2 is a conversation that the client has begun already.
func talk2(tb testing.TB, client, server stream, said string) {
	tb.Helper()
	mustRead(tb, server, said)
	mustWrite(tb, server, "welcome")
	mustRead(tb, client, "welcome")
	client.Close()
	wantEnd(tb, server, "")
	server.Close()
}

// untilBroken waits until one side is known to be gone.
func (r *rig) untilBroken() {
	r.t.Helper()
	nettest.Eventually(r.t, func() error {
		found := false
		for i := range r.loops {
			r.ask(i, func(l *loop) { found = found || l.lists[stageBroken].first != nil })
		}
		if !found {
			return fmt.Errorf("it is not known")
		}
		return nil
	})
}
