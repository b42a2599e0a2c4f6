package lookup_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"hibergate/activation/nettest"
	"hibergate/supervisor/activity"
	"hibergate/supervisor/gate/lookup"
)

func cycles() int {
	if n, err := strconv.Atoi(os.Getenv("HIBERGATED_CYCLES")); err == nil {
		return n
	}
	return 20
}

// mustTrack watches the listening socket of a gate as the supervisor does, by sock_diag alone.
func mustTrack(tb testing.TB, gate *server) *activity.Tracker {
	tb.Helper()
	raw, err := gate.Listener.(*net.TCPListener).SyscallConn()
	if err != nil {
		tb.Fatal(err)
	}
	s := activity.Socket{Key: 1, Address: gate.address(), Accounting: activity.SockDiag, HandedOver: true}
	if err := raw.Control(func(fd uintptr) { s.FD = int(fd) }); err != nil {
		tb.Fatal(err)
	}
	tracker := activity.New(activity.Options{Logger: slog.New(slog.DiscardHandler), Table: "unused"}, []activity.Socket{s})
	tb.Cleanup(func() { tracker.Close() })
	return tracker
}

func look(tb testing.TB, tracker *activity.Tracker) activity.Summary {
	tb.Helper()
	s := tracker.Look(tb.Context(), time.Now(), []uint32{1})[0]
	if !s.Known {
		tb.Fatalf("got %+v", s)
	}
	return s
}

func expectAccount(tb testing.TB, tracker *activity.Tracker, open, queued int) {
	tb.Helper()
	nettest.Eventually(tb, func() error { // the kernel closes on its own time
		if s := look(tb, tracker); s.Open != open || s.Queued != queued {
			return fmt.Errorf("got %d open, %d queued, want %d and %d", s.Open, s.Queued, open, queued)
		}
		return nil
	})
}

// The account of our listening socket has what was handed over: open, in the queue of the destination, and half done. All that
// has begun before Remove is there after it, and goes on.
func TestAccount(t *testing.T) {
	t.Parallel()
	for _, gateAddress := range []string{"", "[::]:0", "0.0.0.0:0"} {
		for _, address := range []string{"127.0.0.1:0", "[::1]:0", "[::]:0"} {
			host, _, _ := net.SplitHostPort(address)
			network := "tcp"
			switch {
			case gateAddress == "0.0.0.0:0" && host == "::1":
				continue
			case gateAddress == "0.0.0.0:0":
				network, host = "tcp4", "127.0.0.1"
			case host == "::":
				host = "127.0.0.1" // of the one list, while the socket is in the other
			}
			t.Run(gateAddress+" to "+address, func(t *testing.T) {
				t.Parallel()
				table := mustOpen(t)
				at := gateAddress
				if at == "" {
					at = net.JoinHostPort(host, "0")
				}
				gate := mustGate(t, network, at)
				mustAdd := func(t *testing.T, table *lookup.Table, key uint32, gate *server, to netip.AddrPort) {
					t.Helper()
					mustAdd(t, table, key, gate, netip.AddrPortFrom(netip.MustParseAddr(host), to.Port()))
				}
				tracker := mustTrack(t, gate)
				expectAccount(t, tracker, 0, 0)

				destination := mustStart(t, "tcp", address)
				mustAdd(t, table, 1, gate, destination.to)
				c := dial(t, gate.at(host))
				expectOn(t, c, "destination")
				if s := look(t, tracker); s.Open != 1 || s.Queued != 0 {
					t.Errorf("got %+v, want 1 open", s)
				}
				direct := dial(t, netip.AddrPortFrom(netip.MustParseAddr(host), destination.to.Port()).String())
				expectOn(t, direct, "destination")
				mustRemove(t, table, 1)
				if s := look(t, tracker); s.Open != 1 || s.Queued != 0 {
					t.Errorf("after Remove: got %+v, want 1 open", s)
				}
				c.Close()
				expectAccount(t, tracker, 0, 0)
				destination.stop()

				idle := mustStart(t, "idle", "tcp", address)
				mustAdd(t, table, 1, gate, idle.to)
				c = dial(t, gate.at(host))
				mustRemove(t, table, 1)
				if s := look(t, tracker); s.Open != 0 || s.Queued != 1 {
					t.Errorf("in the queue: got %+v, want 1 queued", s)
				}
				c.Close()
				idle.stop()
				expectAccount(t, tracker, 0, 0)

				half := mustStart(t, "defer", "tcp", address) // its handshakes end with the first data
				mustAdd(t, table, 1, gate, half.to)
				c = dial(t, gate.at(host))
				mustRemove(t, table, 1)
				if s := look(t, tracker); s.Open != 0 || s.Queued != 1 {
					t.Errorf("half done: got %+v, want 1 queued", s)
				}
				expectOn(t, c, "destination")
				if s := look(t, tracker); s.Open != 1 || s.Queued != 0 {
					t.Errorf("done: got %+v, want 1 open", s)
				}
				expect(t, gate.at(host), "gate")
				c.Close()
				expectAccount(t, tracker, 0, 0)
			})
		}
	}
}

// oneVisit is one client; end says who closes: "close" it, "bye" the server, "reset" it by a reset. It returns who served it.
func oneVisit(address, end string) (string, error) {
	c, err := net.Dial("tcp", address)
	if err != nil {
		return "", err
	}
	defer c.Close()
	name, _, err := say(c, "hello")
	if err != nil {
		return "", err
	}
	switch end {
	case "bye":
		if _, _, err := say(c, "bye"); err != nil {
			return "", err
		}
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			return "", fmt.Errorf("got no EOF, but %w", err)
		}
	case "reset":
		c.(*net.TCPConn).SetLinger(0)
	}
	return name, nil
}

// crowd is clients that come one after another until they are stopped. Each tells who served it.
type crowd struct {
	stop   context.CancelFunc
	wait   sync.WaitGroup
	gate   atomic.Int64
	others atomic.Int64
}

// mustCrowd starts it. lost is told of those who got no answer, and says whether that is an error.
func mustCrowd(t *testing.T, address string, lost func(began int64, err error) bool, clock *atomic.Int64) *crowd {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	c := &crowd{stop: cancel}
	for _, end := range []string{"close", "bye", "reset"} {
		c.wait.Go(func() {
			for ctx.Err() == nil {
				began := clock.Load()
				name, err := oneVisit(address, end)
				switch {
				case err == nil && name == "gate":
					c.gate.Add(1)
				case err == nil:
					c.others.Add(1)
				case lost(began, err):
					t.Errorf("a client that ends with %s was lost: %v", end, err)
					return
				}
			}
		})
	}
	t.Cleanup(c.end)
	return c
}

func (c *crowd) end() {
	c.stop()
	c.wait.Wait()
}

// more waits until so many more have been counted.
func more(t *testing.T, what string, counter *atomic.Int64) {
	t.Helper()
	before := counter.Load()
	nettest.Eventually(t, func() error {
		if n := counter.Load() - before; n < 10 && !t.Failed() {
			return fmt.Errorf("%s got %d clients", what, n)
		}
		return nil
	})
}

// Of the clients that connect all the time while a destination wakes and stops none is lost.
func TestCycles(t *testing.T) {
	t.Parallel()
	for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
		t.Run(address, func(t *testing.T) {
			t.Parallel()
			table := mustOpen(t)
			gate := mustGate(t, "tcp", address)
			tracker := mustTrack(t, gate)
			clients := mustCrowd(t, gate.Addr().String(), func(int64, error) bool { return true }, new(atomic.Int64))
			for range cycles() {
				if t.Failed() {
					break
				}
				destination := mustStart(t, "tcp", address)
				for range 3 { // it is woken and left again while it runs
					mustAdd(t, table, 1, gate, destination.to)
					more(t, "destination", &clients.others)
					mustRemove(t, table, 1)
				}
				// Those of the gate are in the account too; in the supervisor they wait.
				nettest.Eventually(t, func() error {
					return settled(t, tracker, gate)
				})
				served := clients.others.Load()
				more(t, "gate", &clients.gate)
				if n := clients.others.Load() - served; n > 3 { // the answer to each may be on its way to be counted
					t.Errorf("%d clients came to the destination after Remove", n)
				}
				destination.stop()
			}
			clients.end()
			t.Logf("gate %d, destination %d", clients.gate.Load(), clients.others.Load())
		})
	}
}

// settled says that all who are connected with the port of the gate are with the gate itself.
func settled(t *testing.T, tracker *activity.Tracker, gate *server) error {
	t.Helper()
	mine := func() map[string]bool {
		gate.mu.Lock()
		defer gate.mu.Unlock()
		peers := map[string]bool{}
		for c := range gate.open {
			peers[c.RemoteAddr().String()] = true
		}
		return peers
	}
	before := mine()
	flows, why := tracker.Flows(t.Context(), 1, nil)
	if why != "" {
		t.Fatal(why)
	}
	after := mine()
	for _, f := range flows {
		if peer := f.Peer.String(); !before[peer] && !after[peer] {
			return fmt.Errorf("%s is connected with somebody else", peer)
		}
	}
	return nil
}

// Nobody who comes after the death of a destination is lost.
func TestKill(t *testing.T) {
	t.Parallel()
	table := mustOpen(t)
	gate := mustGate(t, "tcp", "127.0.0.1:0")
	var dead atomic.Int64 // how many destinations have been killed; odd while one is being killed
	clients := mustCrowd(t, gate.Addr().String(), func(began int64, err error) bool {
		// The destination takes with it who was there, or has begun before its end.
		return began%2 == 0 && dead.Load() == began || !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, io.EOF) && !errors.Is(err, syscall.EPIPE)
	}, &dead)
	for range cycles() {
		if t.Failed() {
			break
		}
		destination := mustStart(t, "tcp", "127.0.0.1:0")
		mustAdd(t, table, 1, gate, destination.to)
		more(t, "destination", &clients.others)
		dead.Add(1)
		destination.kill()
		dead.Add(1)
		if table.Check(1) {
			t.Error("handed over to the dead")
		}
		expect(t, gate.Addr().String(), "gate")
		more(t, "gate", &clients.gate)
	}
	clients.end()
	t.Logf("gate %d, destination %d", clients.gate.Load(), clients.others.Load())
}
