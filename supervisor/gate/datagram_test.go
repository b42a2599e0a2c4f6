package gate

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation"
	"hibergate/activation/nettest"
	"hibergate/supervisor/activity"
)

func TestDatagramsReachTheirClients(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct{ listen, to, backend string }{
		"IPv4":                     {"udp://127.0.0.1:0", "127.0.0.1", "127.0.0.1:0"},
		"IPv6":                     {"udp://[::1]:0", "::1", "[::1]:0"},
		"IPv4 on a wildcard":       {"udp://0.0.0.0:0", "127.0.0.2", "127.0.0.1:0"},
		"IPv4 on dual stack":       {"udp://:0", "127.0.0.2", "127.0.0.1:0"},
		"IPv6 on dual stack":       {"udp://:0", "::1", "[::1]:0"},
		"IPv6 to IPv4":             {"udp://[::1]:0", "::1", "127.0.0.1:0"},
		"IPv4 to IPv6":             {"udp://127.0.0.1:0", "127.0.0.1", "[::1]:0"},
		"IPv4, the kernel chooses": {"udp://:0", "127.0.0.1", "127.0.0.1:0"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			nettest.Need(t, nettest.Namespaces)
			r := newDatagramRig(t, &Spec{}, tt.listen)
			r.mustAdmit(t, startUDP(t, "a", tt.backend))
			var wg sync.WaitGroup
			for i := range 20 {
				c := dialUDP(t, portOf(r.socket, tt.to))
				wg.Go(func() {
					for j := range 10 {
						text := fmt.Sprint(i, " ", j)
						if got := c.ask(text); got != "a "+text {
							t.Errorf("got %q for %q", got, text)
						}
					}
				})
			}
			wg.Wait()
			if st := r.status(); st.Sessions != 20 || st.Destinations[0].Sessions != 20 || st.Totals != (datagramTotals{}) {
				t.Errorf("status %+v", st)
			}
		})
	}
}

// A client sends from one socket to two addresses of ours, and is answered from each.
func TestDatagramsAreAnsweredFromWhereTheyWent(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	r := newDatagramRig(t, &Spec{}, "udp://:0")
	r.mustAdmit(t, startUDP(t, "", "127.0.0.1:0"))
	client, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(client) })
	port := int(r.socket.Address().Port)
	for _, ip := range [][4]byte{{127, 0, 0, 2}, {127, 0, 0, 1}, {127, 0, 0, 3}} {
		if err := unix.Sendto(client, []byte{ip[3]}, 0, &unix.SockaddrInet4{Addr: ip, Port: port}); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 10)
		n, from, err := unix.Recvfrom(client, b, 0)
		if err != nil {
			t.Fatal(err)
		}
		if sa := from.(*unix.SockaddrInet4); n != 1 || b[0] != ip[3] || sa.Addr != ip || sa.Port != port {
			t.Errorf("asked %v, got %v from %v", ip, b[:n], sa)
		}
	}
	flows := r.flows(0, 2)
	if len(flows) != 2 || flows[0].Local != portOf(r.socket, "127.0.0.3") || flows[1].Local != portOf(r.socket, "127.0.0.1") {
		t.Errorf("flows %+v", flows)
	}
}

func TestDatagramsOfAllSizes(t *testing.T) {
	t.Parallel()
	r := newDatagramRig(t, &Spec{}, "udp://127.0.0.1:0")
	r.mustAdmit(t, startUDP(t, "", "127.0.0.1:0"))
	c := dialUDP(t, portOf(r.socket, "127.0.0.1"))
	var bytes uint64
	sizes := []int{0, 1, 1472, 1473, 65507, 0, 65507}
	for _, size := range sizes {
		text := strings.Repeat("x", size)
		if got := c.ask(text); got != text {
			t.Errorf("got %d bytes, want %d", len(got), size)
		}
		bytes += uint64(size)
	}
	want := activity.Counters{Packets: uint64(len(sizes)), Bytes: bytes}
	f := r.flows(0, 10)
	if len(f) != 1 || f[0].In != want || f[0].Out != want || f[0].State != "REPLIED" || f[0].Peer.String() != c.LocalAddr().String() {
		t.Errorf("flows %+v", f)
	}
	sums := make([]activity.Summary, 1)
	r.sums(sums)
	if sums[0] != (activity.Summary{Known: true, Exact: true, Last: r.now(), LastPayload: r.now(), In: want, Out: want}) {
		t.Errorf("sums %+v", sums[0])
	}
}

func TestDatagramsOfSeveralSockets(t *testing.T) {
	t.Parallel()
	sockets := []*activation.Socket{mustOpenUDP(t, "udp://127.0.0.1:0"), mustOpenUDP(t, "udp://127.0.0.1:0")}
	d := newDatagrams(&Spec{SessionTimeout: time.Minute}, sockets, datagramHooks{
		ignore: func(a netip.Addr) bool { return a == netip.MustParseAddr("127.0.0.1") },
	})
	t.Cleanup(d.close)
	if err := d.admit([]Target{startUDP(t, "a", "127.0.0.1:0").target(0)}); err != nil {
		t.Fatal(err)
	}
	for i, s := range sockets {
		if got := dialUDP(t, portOf(s, "127.0.0.1")).ask("x"); got != "a x" {
			t.Errorf("socket %d: %q", i, got)
		}
	}
	sums := make([]activity.Summary, 2)
	d.sums(sums)
	for i, s := range sums {
		if !s.Known || s.In.Packets != 1 || s.Out.Packets != 1 || len(d.flows(i, 10)) != 1 {
			t.Errorf("socket %d: %+v", i, s)
		}
		if !s.Last.IsZero() || !s.LastPayload.IsZero() {
			t.Errorf("socket %d: one who is ignored was active %s", i, s.Last)
		}
	}
}

func TestDatagramSessionsExpire(t *testing.T) {
	t.Parallel()
	r := newDatagramRig(t, &Spec{SessionTimeout: time.Minute}, "udp://127.0.0.1:0")
	r.mustAdmit(t, startUDP(t, "a", "127.0.0.1:0"))
	first, second := dialUDP(t, portOf(r.socket, "127.0.0.1")), dialUDP(t, portOf(r.socket, "127.0.0.1"))
	first.ask("x")
	r.later(30 * time.Second)
	second.ask("x")
	r.later(30 * time.Second)
	r.awaitSessions(t, 1)
	if f := r.flows(0, 10); len(f) != 1 || f[0].Peer.String() != second.LocalAddr().String() {
		t.Errorf("left over: %+v", f)
	}
	second.ask("y")
	r.later(59 * time.Second)
	first.ask("y")
	if st := r.status(); st.Sessions != 2 {
		t.Errorf("status %+v", st)
	}
	r.hold()
	r.later(time.Minute)
	nettest.Eventually(t, func() error {
		if !r.ended() {
			return errors.New("the goroutine runs")
		}
		return nil
	})
	r.mustAdmit(t, startUDP(t, "b", "127.0.0.1:0"))
	if got := first.ask("z"); got != "b z" {
		t.Errorf("after the next admission: %q", got)
	}
}

func (r *datagramRig) awaitSessions(tb testing.TB, n int) {
	tb.Helper()
	nettest.Eventually(tb, func() error {
		if st := r.status(); st.Sessions != n {
			return fmt.Errorf("status %+v", st)
		}
		return nil
	})
}

func TestDatagramSessionsAreBounded(t *testing.T) {
	t.Parallel()
	r := newDatagramRig(t, &Spec{MaxConnections: 2}, "udp://127.0.0.1:0")
	r.mustAdmit(t, startUDP(t, "a", "127.0.0.1:0"))
	var clients []*udpClient
	for range 3 {
		clients = append(clients, dialUDP(t, portOf(r.socket, "127.0.0.1")))
	}
	clients[0].ask("x")
	clients[1].ask("x")
	for range 5 {
		clients[2].send("dropped")
	}
	clients[0].ask("after them")
	if st := r.status(); st.Sessions != 2 || st.Totals.Dropped != 5 {
		t.Errorf("status %+v", st)
	}
	r.later(evictAfter)
	clients[0].ask("still there")
	if got := clients[2].ask("now"); got != "a now" {
		t.Errorf("got %q", got)
	}
	f := r.flows(0, 10)
	if len(f) != 2 || f[0].Peer.String() != clients[2].LocalAddr().String() || f[1].Peer.String() != clients[0].LocalAddr().String() {
		t.Errorf("flows %+v", f)
	}
}

func TestDatagramsWaitWhileHeld(t *testing.T) {
	t.Parallel()
	r := newDatagramRig(t, &Spec{}, "udp://127.0.0.1:0")
	c := dialUDP(t, portOf(r.socket, "127.0.0.1"))
	c.send("before")
	a := startUDP(t, "a", "127.0.0.1:0")
	r.mustAdmit(t, a)
	if got := c.receive(); got != "a before" {
		t.Errorf("got %q", got)
	}
	for i := range 100 {
		r.hold()
		served := a.served.Load()
		c.send(fmt.Sprint(i))
		sums := make([]activity.Summary, 1)
		r.sums(sums)
		if sums[0].Queued != 1 || a.served.Load() != served || r.status().Admitted {
			t.Fatalf("held: sums %+v, status %+v", sums[0], r.status())
		}
		r.mustAdmit(t, a)
		if got, want := c.receive(), fmt.Sprint("a ", i); got != want {
			t.Fatalf("got %q, want %q", got, want)
		}
	}
	if st := r.status(); st.Sessions != 1 || st.Totals != (datagramTotals{}) {
		t.Errorf("status %+v", st)
	}
}

// What a destination sends late still reaches the client.
func TestDatagramRepliesComeWhileHeld(t *testing.T) {
	t.Parallel()
	r := newDatagramRig(t, &Spec{}, "udp://127.0.0.1:0")
	backend := mustListen(t)
	if err := r.admit([]Target{backend.target(0)}); err != nil {
		t.Fatal(err)
	}
	c := dialUDP(t, portOf(r.socket, "127.0.0.1"))
	c.send("x")
	b := make([]byte, 10)
	_, session, err := backend.conn.ReadFromUDPAddrPort(b)
	if err != nil {
		t.Fatal(err)
	}
	r.hold()
	backend.conn.WriteToUDPAddrPort([]byte("late"), session)
	if got := c.receive(); got != "late" {
		t.Errorf("got %q", got)
	}
}

// mustListen returns a backend that answers nothing by itself.
func mustListen(tb testing.TB) *udpBackend {
	tb.Helper()
	conn := listenUDP(tb, "127.0.0.1:0")
	conn.SetReadDeadline(time.Now().Add(30 * time.Second))
	return &udpBackend{conn: conn, at: conn.LocalAddr().(*net.UDPAddr).AddrPort()}
}

func TestDatagramsTakeTurns(t *testing.T) {
	t.Parallel()
	r := newDatagramRig(t, &Spec{Balance: RoundRobin}, "udp://127.0.0.1:0")
	r.mustAdmit(t, startUDP(t, "a", "127.0.0.1:0"), startUDP(t, "b", "127.0.0.1:0"), startUDP(t, "c", "127.0.0.1:0"))
	var got []string
	for range 6 {
		c := dialUDP(t, portOf(r.socket, "127.0.0.1"))
		first := c.ask("")
		if again := c.ask(""); again != first {
			t.Errorf("a client went from %q to %q", first, again)
		}
		got = append(got, strings.TrimSpace(first))
	}
	if s := strings.Join(got, ""); s != "abcabc" {
		t.Errorf("clients went to %s", s)
	}
}

func TestDatagramsGoToTheLeastBusy(t *testing.T) {
	t.Parallel()
	r := newDatagramRig(t, &Spec{Balance: LeastConnections, SessionTimeout: time.Minute}, "udp://127.0.0.1:0")
	a, b := startUDP(t, "a", "127.0.0.1:0"), startUDP(t, "b", "127.0.0.1:0")
	r.mustAdmit(t, a, b)
	for range 4 {
		dialUDP(t, portOf(r.socket, "127.0.0.1")).ask("")
	}
	if st := r.status(); st.Destinations[0].Sessions != 2 || st.Destinations[1].Sessions != 2 {
		t.Fatalf("status %+v", st)
	}
	r.mustAdmit(t, b) // those of a have had their answers, and are forgotten
	r.mustAdmit(t, a, b)
	if st := r.status(); st.Destinations[0].Sessions != 0 || st.Destinations[1].Sessions != 2 {
		t.Fatalf("status %+v", st)
	}
	for range 2 {
		if got := dialUDP(t, portOf(r.socket, "127.0.0.1")).ask(""); got != "a " {
			t.Errorf("got %q", got)
		}
	}
}
