package activity_test

import (
	"cmp"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"hibergate/activation"
	"hibergate/activation/nettest"
	"hibergate/supervisor/activity"
)

// waiting returns the clients that wait, with ports in order, and checks that Queued knows the same ones.
func waiting(tb testing.TB, tracker *activity.Tracker, key uint32) []activity.Client {
	tb.Helper()
	clients, err := tracker.Waiting(tb.Context(), key)
	if err != nil {
		tb.Fatal(err)
	}
	slices.SortFunc(clients, func(a, b activity.Client) int { return cmp.Compare(a.Remote.Port(), b.Remote.Port()) })
	ids, err := tracker.Queued(tb.Context(), []uint32{key})
	if err != nil {
		tb.Fatal(err)
	}
	for _, c := range clients {
		if !slices.Contains(ids, c.ID) {
			tb.Errorf("client %+v is not among the queued %x", c, ids)
		}
	}
	if len(ids) != len(clients) {
		tb.Errorf("got %d clients, but %d queued", len(clients), len(ids))
	}
	return clients
}

// Waiting tells what each client in the queue has sent, and whether it is still there.
func TestWaiting(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	for name, c := range map[string]struct{ network, listen, dial string }{
		"v4":                {"tcp4", "127.0.0.1:0", "127.0.0.1"},
		"v6":                {"tcp6", "[::1]:0", "::1"},
		"dual stack, by v4": {"tcp", ":0", "127.0.0.1"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := mustListen(t, 1, c.network, c.listen)
			other := mustListen(t, 2, c.network, c.listen)
			tracker := mustTrack(t, l.Socket)
			address := func(l *listener) string { return net.JoinHostPort(c.dial, strconv.Itoa(int(l.Address.Port))) }
			mustDial(t, "tcp", address(other))
			want := map[netip.AddrPort]activity.Client{}
			for _, client := range []activity.Client{{}, {Bytes: 5}, {Left: true}, {Bytes: 3, Left: true}} {
				conn := mustDial(t, "tcp", address(l)).(*net.TCPConn)
				mustWrite(t, conn, "hello"[:client.Bytes])
				if client.Left {
					if err := conn.CloseWrite(); err != nil {
						t.Fatal(err)
					}
				}
				client.Remote = conn.LocalAddr().(*net.TCPAddr).AddrPort()
				want[client.Remote] = client
			}
			gone := mustDial(t, "tcp", address(l)).(*net.TCPConn)
			if err := gone.SetLinger(0); err != nil { // a reset
				t.Fatal(err)
			}
			gone.Close()
			got := waiting(t, tracker, 1)
			if len(got) != len(want) {
				t.Errorf("got %+v, want %+v", got, want)
			}
			for _, client := range got {
				client.ID = 0
				if client != want[client.Remote] {
					t.Errorf("got %+v, want %+v", client, want[client.Remote])
				}
			}
			l.mustAccept(t)
			if got := waiting(t, tracker, 1); len(got) != len(want)-1 {
				t.Errorf("after one was accepted: got %+v", got)
			}
		})
	}
}

// Of sockets that are no TCP ones, not known or not known any more nothing is told, but an error.
func TestWaitingRefuses(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	l := mustListen(t, 1, "udp4", "127.0.0.1:0")
	l.Accounting = activity.SockDiag
	tracker := mustTrack(t, l.Socket)
	for _, key := range []uint32{1, 2} {
		if got, err := tracker.Waiting(t.Context(), key); err == nil {
			t.Errorf("socket %d: got %v, want an error", key, got)
		}
	}
	if got, err := tracker.Queued(t.Context(), []uint32{2}); err == nil {
		t.Errorf("got %v queued on an unknown socket, want an error", got)
	}
	if err := tracker.Close(); err != nil {
		t.Fatal(err)
	}
	if got, err := tracker.Queued(t.Context(), []uint32{1}); err == nil {
		t.Errorf("got %v queued after Close, want an error", got)
	}
}

// holdHandshakes drops the last packet of each handshake with a port, until the returned function is called.
func holdHandshakes(t *testing.T, port uint16) (release func()) {
	t.Helper()
	table := fmt.Sprintf("inet hold%d", port)
	nft(t, fmt.Sprintf("add table %s\nadd chain %[1]s out { type filter hook output priority 0; }\n"+
		"add rule %[1]s out tcp dport %d tcp flags & (syn|ack) == ack drop", table, port))
	held := true
	release = func() {
		if held {
			nft(t, "delete table "+table)
		}
		held = false
	}
	t.Cleanup(release)
	return release
}

// A client whose last packet of the handshake is on its way is about to be queued: Look counts it, but it does
// not wait yet.
func TestHandshake(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces, nettest.Tool("nft"))
	for name, c := range map[string]struct{ network, listen, dial string }{
		"v4":                {"tcp4", "127.0.0.1:0", "127.0.0.1"},
		"v6":                {"tcp6", "[::1]:0", "::1"},
		"dual stack, by v4": {"tcp", ":0", "127.0.0.1"},
		"dual stack, by v6": {"tcp", ":0", "::1"},
	} {
		for _, accounting := range []activity.Accounting{activity.Auto, activity.SockDiag} {
			t.Run(name+", "+accounting.String(), func(t *testing.T) {
				t.Parallel()
				l := mustListen(t, 1, c.network, c.listen)
				l.Accounting = accounting
				tracker := mustTrack(t, l.Socket)
				release := holdHandshakes(t, l.Address.Port)
				client := mustDial(t, "tcp", net.JoinHostPort(c.dial, strconv.Itoa(int(l.Address.Port))))
				if s := look(t, tracker, 1); !s.Known || s.Open != 0 || s.Queued != 1 || s.Peers != 0 {
					t.Errorf("on its way: got %+v, want one queued", s)
				}
				if got := waiting(t, tracker, 1); len(got) != 0 {
					t.Errorf("on its way: got %+v waiting", got)
				}
				ids, err := tracker.Handshakes(t.Context(), 1)
				if again, _ := tracker.Handshakes(t.Context(), 1); len(ids) != 1 || err != nil || !slices.Equal(ids, again) {
					t.Errorf("on its way: got handshakes %v, then %v, %v", ids, again, err)
				}
				if flows, _ := tracker.Flows(t.Context(), 1, nil); len(flows) != 0 {
					t.Errorf("on its way: got flows %+v", flows)
				}
				release()
				mustWrite(t, client, "x") // carries the acknowledgement, too
				if s := look(t, tracker, 1); !s.Known || s.Queued != 1 {
					t.Errorf("arrived: got %+v, want one queued", s)
				}
				if got := waiting(t, tracker, 1); len(got) != 1 || got[0].Bytes != 1 {
					t.Errorf("arrived: got %+v waiting, want one with one byte", got)
				}
				if ids, err := tracker.Handshakes(t.Context(), 1); ids != nil || err != nil {
					t.Errorf("arrived: got handshakes %v, %v", ids, err)
				}
				client.Close()
			})
		}
	}
}

// A client of TCP Fast Open is in the queue with its data before its handshake is done, and may be accepted so.
func TestFastOpen(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces, nettest.Tool("nft"))
	// Client and server, both without cookies. It is this namespace's own.
	if err := os.WriteFile("/proc/sys/net/ipv4/tcp_fastopen", []byte("519\n"), 0); err != nil {
		t.Skip(err)
	}
	l := mustListen(t, 1, "tcp4", "127.0.0.1:0")
	if err := unix.SetsockoptInt(l.FD, unix.IPPROTO_TCP, unix.TCP_FASTOPEN, 5); err != nil {
		t.Fatal(err)
	}
	tracker := mustTrack(t, l.Socket)
	holdHandshakes(t, l.Address.Port)
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	to := &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: int(l.Address.Port)}
	if err := unix.Sendto(fd, []byte("hello"), unix.MSG_FASTOPEN, to); err != nil {
		t.Fatal(err)
	}
	if s := look(t, tracker, 1); s.Queued != 1 || s.Open != 0 {
		t.Errorf("got %+v, want one queued", s)
	}
	if got := waiting(t, tracker, 1); len(got) != 1 || got[0].Bytes != 5 {
		t.Errorf("got %+v waiting, want one with 5 bytes", got)
	}
	l.mustAccept(t)
	if s := look(t, tracker, 1); s.Queued != 0 || s.Open != 1 {
		t.Errorf("accepted: got %+v, want one open", s)
	}
}

// While a service stops, a second socket shares the address: what waits on either of them counts.
func TestTwoListeners(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	for _, text := range []string{"tcp://127.0.0.1:0", "tcp://[::1]:0", "tcp://:0"} {
		t.Run(text, func(t *testing.T) {
			t.Parallel()
			address, err := activation.ParseAddress(text)
			if err != nil {
				t.Fatal(err)
			}
			var fds []int
			for range 2 {
				s, err := activation.Open(activation.Spec{Address: address, Options: activation.Options{ReusePort: true}})
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { s.Close() })
				fds, address = append(fds, s.FD()), s.Address()
			}
			tracker := mustTrack(t, activity.Socket{Key: 1, Address: address, FD: fds[0]})
			host := "127.0.0.1"
			if address.IP.IsValid() {
				host = address.IP.String()
			}
			const clients = 32 // the kernel spreads them: each socket gets some but once in 2^31 times
			for range clients {
				mustDial(t, "tcp", net.JoinHostPort(host, strconv.Itoa(int(address.Port))))
			}
			if got := waiting(t, tracker, 1); len(got) != clients {
				t.Errorf("got %d clients waiting, want %d", len(got), clients)
			}
			for i, fd := range fds {
				accepted, _, err := unix.Accept4(fd, unix.SOCK_CLOEXEC)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { unix.Close(accepted) })
				if s := look(t, tracker, 1); !s.Known || !s.Exact || s.Open != i+1 || s.Queued != clients-1-i || s.In.Packets < 2*clients {
					t.Errorf("%d accepted: got %+v", i+1, s)
				}
			}
			if flows, why := tracker.Flows(t.Context(), 1, []int{os.Getpid()}); len(flows) != clients || why != "" {
				t.Errorf("got %d flows (%s), want %d", len(flows), why, clients)
			}
		})
	}
}
