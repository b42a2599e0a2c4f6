package activity

import (
	"log/slog"
	"net"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"hibergate/activation"
	"hibergate/activation/nettest"
)

// Of the sockets on one port everything that is asked about one tells of its own clients and of nobody else's.
func TestOwners(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces, nettest.Tool("ip"))
	if out, err := exec.Command("ip", "link", "add", "owners0", "type", "veth").CombinedOutput(); err != nil {
		t.Skipf("no other device: %s", out)
	}
	type socket struct{ host, device string }
	for name, c := range map[string]struct {
		first, second socket // the client belongs to the first
		dial          string
	}{
		"address before wildcard":    {socket{host: "127.0.0.1"}, socket{host: "0.0.0.0"}, "127.0.0.1"},
		"wildcard beside address":    {socket{host: "0.0.0.0"}, socket{host: "127.0.0.1"}, "127.0.0.2"},
		"v6":                         {socket{host: "[::1]"}, socket{}, "::1"},
		"two devices":                {socket{"127.0.0.1", "lo"}, socket{"127.0.0.1", "owners0"}, "127.0.0.1"},
		"two devices, dual stack":    {socket{"", "lo"}, socket{"", "owners0"}, "127.0.0.1"},
		"two devices, v6":            {socket{"[::]", "lo"}, socket{"[::]", "owners0"}, "::1"},
		"device before none":         {socket{"127.0.0.1", "lo"}, socket{host: "127.0.0.1"}, "127.0.0.1"},
		"none beside another device": {socket{host: "127.0.0.1"}, socket{"127.0.0.1", "owners0"}, "127.0.0.1"},
		"address before device":      {socket{host: "127.0.0.1"}, socket{"0.0.0.0", "lo"}, "127.0.0.1"},
	} {
		for _, network := range []activation.Network{activation.TCP, activation.UDP} {
			t.Run(name+", "+network.String(), func(t *testing.T) {
				t.Parallel()
				port := "0"
				var sockets []Socket
				// The first is opened last: with SO_REUSEPORT it may be that which decides between a device and none.
				for key, s := range []socket{c.second, c.first} {
					o := mustOpen(t, network.String()+"://"+s.host+":"+port, activation.Options{Device: s.device, ReusePort: true})
					port = strconv.Itoa(int(o.Address().Port))
					sockets = append(sockets, Socket{Key: uint32(key), Address: o.Address(), FD: o.FD()})
				}
				table := "owners-" + port + network.String()
				tr := New(Options{Logger: slog.New(slog.DiscardHandler), Table: table}, sockets)
				t.Cleanup(func() { tr.Close() })
				sent := time.Now()
				client, err := net.Dial(network.String(), net.JoinHostPort(c.dial, port))
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { client.Close() })
				if _, err := client.Write([]byte("x")); err != nil {
					t.Fatal(err)
				}
				for key, want := range []int{0, 1} {
					sum := tr.Look(t.Context(), time.Now(), []uint32{uint32(key)})[0]
					if !sum.Known || sum.Queued != want || want == 1 && sum.Last.Before(sent) {
						t.Errorf("socket %d: got %+v, want %d queued", key, sum, want)
					}
					if ids, err := tr.Queued(t.Context(), []uint32{uint32(key)}); len(ids) != want || err != nil {
						t.Errorf("socket %d: got %v queued, %v, want %d", key, ids, err, want)
					}
					if network != activation.TCP {
						continue
					}
					if clients, err := tr.Waiting(t.Context(), uint32(key)); len(clients) != want || err != nil {
						t.Errorf("socket %d: got %+v waiting, %v, want %d", key, clients, err, want)
					}
					if flows, why := tr.Flows(t.Context(), uint32(key), nil); len(flows) != want || why != "" {
						t.Errorf("socket %d: got flows %+v (%s), want %d", key, flows, why, want)
					}
				}
			})
		}
	}
}

// A client that is on its way belongs to the socket that is bound to its address.
func TestHandshakesOfOwner(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces, nettest.Tool("nft"))
	first := mustOpen(t, "tcp://127.0.0.1:0", activation.Options{ReusePort: true})
	port := strconv.Itoa(int(first.Address().Port))
	second := mustOpen(t, "tcp://0.0.0.0:"+port, activation.Options{ReusePort: true})
	tr := New(Options{Logger: slog.New(slog.DiscardHandler)}, []Socket{
		{Key: 1, Address: first.Address(), FD: first.FD(), Accounting: SockDiag},
		{Key: 2, Address: second.Address(), FD: second.FD(), Accounting: SockDiag},
	})
	t.Cleanup(func() { tr.Close() })
	nft := exec.Command("nft", "-f", "-")
	nft.Stdin = strings.NewReader("add table inet owner\nadd chain inet owner out { type filter hook output priority 0; }\n" +
		"add rule inet owner out tcp dport " + port + " tcp flags & (syn|ack) == ack drop\n")
	if out, err := nft.CombinedOutput(); err != nil {
		t.Fatalf("nft: %v\n%s", err, out)
	}
	t.Cleanup(func() { _ = exec.Command("nft", "delete table inet owner").Run() })
	client, err := net.Dial("tcp", "127.0.0.1:"+port)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	for key, want := range map[uint32]int{1: 1, 2: 0} {
		if ids, err := tr.Handshakes(t.Context(), key); len(ids) != want || err != nil {
			t.Errorf("socket %d: got handshakes %v, %v, want %d", key, ids, err, want)
		}
	}
}

// Of two sockets on different devices the ledger may count packets for one in the account of the other: they
// are activity of both.
func TestClockBesideDevice(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces, nettest.Tool("ip"))
	if out, err := exec.Command("ip", "link", "add", "clock0", "type", "veth").CombinedOutput(); err != nil {
		t.Skipf("no other device: %s", out)
	}
	bound := mustOpen(t, "udp://127.0.0.1:0", activation.Options{Device: "clock0", ReusePort: true})
	port := strconv.Itoa(int(bound.Address().Port))
	wild := mustOpen(t, "udp://:"+port, activation.Options{ReusePort: true})
	tr := New(Options{Logger: slog.New(slog.DiscardHandler), Table: t.Name()}, []Socket{
		{Key: 1, Address: bound.Address(), FD: bound.FD()}, {Key: 2, Address: wild.Address(), FD: wild.FD()},
	})
	t.Cleanup(func() { tr.Close() })
	client, err := net.Dial("udp", "127.0.0.1:"+port)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	sent := time.Now()
	if _, err := client.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if sum := tr.Look(t.Context(), time.Now(), []uint32{2})[0]; !sum.Known || sum.Queued != 1 || sum.Last.Before(sent) {
		t.Errorf("got %+v, want one queued and the last after %v", sum, sent)
	}
}
