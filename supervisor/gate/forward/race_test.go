package forward_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"testing"

	"hibergate/activation/nettest"
	"hibergate/supervisor/gate/forward"
)

func cycles() int {
	if n, err := strconv.Atoi(os.Getenv("HIBERGATED_CYCLES")); err == nil {
		return n
	}
	return 20
}

// drained waits until nothing is open that leads to a destination, as before its stop.
func drained(t *testing.T, table *forward.Table, gate *server, to netip.AddrPort) {
	t.Helper()
	nettest.Eventually(t, func() error {
		a, err := table.Drain(t.Context(), gate.address(), to)
		if err != nil {
			t.Fatal(err)
		}
		if a.Open > 0 {
			return fmt.Errorf("still open: %+v", a.List)
		}
		return nil
	})
}

// Of the clients that connect all the time while a destination wakes and stops none is lost.
func TestCycles(t *testing.T) {
	t.Parallel()
	mustForward(t)
	far := mustBoot(t, "cycles0", []string{"10.77.0.1/24", "fd77::1/64"}, []string{"10.77.0.2/24", "fd77::2/64"})
	backend := mustBoot(t, "cycles1", []string{"10.78.0.1/24", "fd78::1/64"}, []string{"10.78.0.2/24", "fd78::2/64"})
	for _, c := range []struct {
		name, gate, destination string
		remote                  bool
	}{
		{"loopback", "127.0.0.1:0", "127.0.0.1:0", false},
		{"loopback of IPv6", "[::1]:0", "[::1]:0", false},
		{"this machine", "10.77.0.1:0", "10.77.0.1:0", false},
		{"another machine", "10.77.0.1:0", "10.78.0.2:0", true},
		{"another machine by IPv6", "[fd77::1]:0", "[fd78::2]:0", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			table := mustOpen(t)
			gate := mustServe(t, "gate", c.gate)
			wake := func() *server {
				if c.remote {
					return backend.serve(t, "destination", c.destination)
				}
				return mustServe(t, "destination", c.destination)
			}
			destination := wake() // to get a port
			c.destination = destination.Addr().String()
			to := destination.addrPort()
			destination.stop()

			ctx, cancel := context.WithCancel(t.Context())
			var clients sync.WaitGroup
			served := map[string]int{}
			var mu sync.Mutex
			listen := gate.addrPort()
			client := func(dial func() (net.Conn, error), end string) {
				for ctx.Err() == nil {
					name, err := oneVisit(dial, end)
					mu.Lock()
					served[name]++
					mu.Unlock()
					if err != nil {
						t.Errorf("a client that ends with %s was lost: %v", end, err)
						return
					}
				}
			}
			here := func() (net.Conn, error) { return net.Dial("tcp", listen.String()) }
			there := func() (conn net.Conn, err error) {
				far.do(func() { conn, err = dialHere(listen, netip.AddrPort{}, false) })
				return conn, err
			}
			clients.Go(func() { client(here, "close") })
			clients.Go(func() { client(here, "bye") })
			clients.Go(func() { client(here, "reset") })
			if !listen.Addr().IsLoopback() {
				clients.Go(func() { client(there, "close") })
				clients.Go(func() { client(there, "bye") })
			}
			for range cycles() {
				if t.Failed() {
					break
				}
				destination := wake()
				mustAdd(t, table, 1, gate, to)
				nettest.Eventually(t, func() error {
					if destination.clients.Load() < 10 && !t.Failed() {
						return fmt.Errorf("got %d clients", destination.clients.Load())
					}
					return nil
				})
				mustRemove(t, table, 1)
				drained(t, table, gate, to)
				before := destination.clients.Load()
				n := gate.clients.Load()
				nettest.Eventually(t, func() error {
					if gate.clients.Load() < n+10 && !t.Failed() {
						return fmt.Errorf("got %d clients", gate.clients.Load())
					}
					return nil
				})
				if after := destination.clients.Load(); after != before {
					t.Errorf("%d clients came to the destination after it was drained", after-before)
				}
				destination.stop()
			}
			cancel()
			clients.Wait()
			if served["gate"] == 0 || served["destination"] == 0 || served[""] > 0 {
				t.Errorf("got clients served %v, want some by each", served)
			}
			t.Logf("%v", served)
		})
	}
}

// oneVisit is one client. It returns who served it.
func oneVisit(dial func() (net.Conn, error), end string) (string, error) {
	conn, err := dial()
	if err != nil {
		return "", err
	}
	defer conn.Close()
	name, err := ask(conn)
	if err != nil {
		return "", err
	}
	switch end {
	case "bye":
		if _, err := say(conn, "bye\n"); err != nil {
			return "", err
		}
		if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			return "", fmt.Errorf("got no EOF, but %w", err)
		}
	case "reset":
		conn.(*net.TCPConn).SetLinger(0)
	}
	return name, nil
}

// A client that comes from the port of a connection which was forwarded and has ended is served by who is there, however that ended.
func TestPortIsUsedAgain(t *testing.T) {
	t.Parallel()
	far := mustBoot(t, "again0", []string{"10.79.0.1/24"}, []string{"10.79.0.2/24"})
	far.do(func() { // the ports of what the client has closed are free at once
		if err := os.WriteFile("/proc/sys/net/ipv4/tcp_max_tw_buckets", []byte("0\n"), 0); err != nil {
			t.Error(err)
		}
	})
	for i, end := range []string{"close", "bye", "reset", "server resets"} {
		t.Run(end, func(t *testing.T) {
			t.Parallel()
			table := mustOpen(t)
			gate := mustServe(t, "gate", "10.79.0.1:0")
			from := netip.AddrPortFrom(netip.MustParseAddr("10.79.0.2"), uint16(5000+i))
			dial := func() (conn net.Conn, err error) {
				far.do(func() { conn, err = dialHere(gate.addrPort(), from, false) })
				return conn, err
			}
			serve := func(want, end string) {
				t.Helper()
				if end == "server resets" {
					conn, err := dial()
					if err != nil {
						t.Fatal(err)
					}
					defer conn.Close()
					if got, err := say(conn, "reset\n"); err != nil || got != want {
						t.Errorf("got served by %q, %v, want %s", got, err, want)
					}
					conn.Read(make([]byte, 1))
					return
				}
				if got, err := oneVisit(dial, end); err != nil || got != want {
					t.Errorf("got served by %q, %v, want %s", got, err, want)
				}
			}
			destination := mustServe(t, "destination", "10.79.0.1:0")
			to := destination.addrPort()
			mustAdd(t, table, 1, gate, to)
			serve("destination", end)
			mustRemove(t, table, 1)
			drained(t, table, gate, to)
			destination.stop()
			serve("gate", end)
		})
	}
}

// What is left of a destination that has died does not keep its clients from coming back.
func TestSever(t *testing.T) {
	t.Parallel()
	table := mustOpen(t)
	gate, destination := mustServe(t, "gate", "127.0.0.1:0"), mustServe(t, "destination", "127.0.0.1:0")
	to := destination.addrPort()
	mustAdd(t, table, 1, gate, to)
	c := dial(t, gate.Addr().String())
	expectOn(t, c, "destination")
	mustRemove(t, table, 1)
	if err := table.Sever(t.Context(), gate.address(), to); err != nil {
		t.Fatal(err)
	}
	if a := mustFlows(t, table, gate, to); a.Open != 0 {
		t.Errorf("got %+v, want nothing", a)
	}
	if !isReset(c) {
		t.Error("the client was not reset")
	}
	expect(t, gate.Addr().String(), "gate")
}
