package gate

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"hibergate/activation"
	"hibergate/activation/nettest"
)

// What is above the limit waits in the queue of the kernel until a connection ends.
func TestLimitWaits(t *testing.T) {
	t.Parallel()
	r, b := newRig(t, &Spec{MaxConnections: 2}), backend(t, "tcp")
	r.to(b)
	first, one := r.through(b)
	_, _ = r.through(b)
	third := r.client()
	mustWrite(t, third, "third")
	r.eventually(2, 1)
	first.Close()
	wantEnd(t, one, "")
	r.eventually(2, 1) // the other side goes on
	one.Close()
	mustRead(t, mustAccept(t, b), "third")
	r.eventually(2, 0)
}

// Or it is closed.
func TestLimitCloses(t *testing.T) {
	t.Parallel()
	r, b := newRig(t, &Spec{MaxConnections: 1, CloseExcess: true}), backend(t, "tcp")
	r.to(b)
	first, one := r.through(b)
	for range 3 {
		wantEnd(t, r.client(), "")
	}
	if n := r.status().Excess; n != 3 {
		t.Errorf("%d closed", n)
	}
	first.Close()
	one.Close()
	r.eventually(0, 0)
	client, server := r.through(b)
	mustWrite(t, client, "x")
	mustRead(t, server, "x")
}

// Those who waited while the destination woke are let in as the limit permits, in order.
func TestLimitPending(t *testing.T) {
	t.Parallel()
	r, b := newCollecting(t, &Spec{MaxConnections: 1}), backend(t, "tcp")
	var clients []stream
	for i := range 5 {
		c := r.client()
		mustWrite(t, c, fmt.Sprint(i))
		clients = append(clients, c)
	}
	r.untilPending(5)
	r.to(b)
	for i, c := range clients {
		s := mustAccept(t, b)
		mustRead(t, s, fmt.Sprint(i))
		if n := r.pending(); n != 4-i {
			t.Errorf("%d pending", n)
		}
		s.Close()
		c.Close()
	}
	r.eventually(0, 0)
}

// Sources that may not use the socket are turned away, also where the kernel let them through.
func TestStreamAccess(t *testing.T) {
	t.Parallel()
	r, b := newRig(t, &Spec{}, "tcp://:0"), backend(t, "tcp")
	r.sources[0].access = &activation.Access{Deny: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}}
	r.to(b)
	wantEnd(t, r.client(), "")
	if n := r.status().Denied; n != 1 {
		t.Errorf("%d denied", n)
	}
}

// The header of the PROXY protocol comes first, also where the server speaks first and the client never.
func TestStreamProxyHeader(t *testing.T) {
	t.Parallel()
	for _, network := range []string{"tcp", "unix"} {
		r, b := newRig(t, &Spec{ProxyProtocol: ProxyV1}), backend(t, network)
		r.to(b)
		client, server := r.through(b)
		from, to := client.LocalAddr().(*net.TCPAddr), client.RemoteAddr().(*net.TCPAddr)
		mustRead(t, server, fmt.Sprintf("PROXY TCP4 127.0.0.1 127.0.0.1 %d %d\r\n", from.Port, to.Port))
		mustWrite(t, server, "hello")
		mustRead(t, client, "hello")
		mustWrite(t, client, "x")
		mustRead(t, server, "x")
		nettest.Eventually(t, func() error { // it is counted once it was written
			if sum := r.counted(); sum.In.Bytes != 1 {
				return fmt.Errorf("got %+v, want the header not counted", sum)
			}
			return nil
		})
	}
}

// The destination sees the client's own address, where it is of the same family.
func TestStreamTransparent(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	for to, want := range map[string]string{"tcp4": "127.0.0.9", "tcp6": "::1"} {
		r := newRig(t, &Spec{Transparent: true}, "tcp://127.0.0.1:0")
		b, err := net.Listen(to, ":0")
		if err != nil {
			t.Fatal(err)
		}
		defer b.Close()
		at := addressOf(b.Addr())
		at.IP = netip.MustParseAddr("127.0.0.1")
		if to == "tcp6" {
			at.IP = netip.IPv6Loopback()
		}
		r.toAddress(at)
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 9)}}
		c, err := d.Dial("tcp", portOf(r.sock, "127.0.0.1").String())
		if err != nil {
			t.Fatal(err)
		}
		client, server := guard(t, c), mustAccept(t, b)
		if from := server.RemoteAddr().(*net.TCPAddr).IP.String(); from != want {
			t.Errorf("%s: from %s, want %s", to, from, want)
		}
		mustWrite(t, client, "x")
		mustRead(t, server, "x")
		r.mu.Lock()
		if r.plain != (to == "tcp6") {
			t.Errorf("%s: said that it cannot: %v", to, r.plain)
		}
		r.mu.Unlock()
	}
}

// Without descriptors clients wait, in order, and nothing is half-open; each that ends makes room for another.
func TestStreamDescriptors(t *testing.T) {
	const role = "HIBERGATED_TEST_ROLE"
	if os.Getenv(role) == "" { // the limit is that of a process
		cmd := exec.Command("/proc/self/exe", "-test.run=^TestStreamDescriptors$", "-test.v")
		cmd.Env = append(os.Environ(), role+"=descriptors")
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS") {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	r, b := newRig(t, &Spec{}), backend(t, "tcp")
	var clients []stream
	for i := range 6 {
		c := r.client()
		mustWrite(t, c, fmt.Sprint(i))
		clients = append(clients, c)
	}
	highest := 0
	for _, s := range sockets() {
		var n int
		if _, err := fmt.Sscan(s, &n); err != nil {
			t.Fatal(err)
		}
		highest = max(highest, n)
	}
	var spares []int // below the highest there may be holes
	for fd := 0; fd < highest; {
		var err error
		if fd, err = unix.Dup(0); err != nil {
			t.Fatal(err)
		}
		spares, highest = append(spares, fd), max(highest, fd)
	}
	var usual unix.Rlimit
	limit := func(n int) {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(n), Max: usual.Max}); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &usual); err != nil {
		t.Fatal(err)
	}
	address := addressOf(b.Addr())
	limit(highest + 2)
	if err := r.admit([]Target{{Address: address, FD: -1}}); err == nil {
		t.Fatal("a loop has begun without descriptors")
	}
	limit(highest + 1 + 2 + 3) // a loop, a pair, and a client
	r.toAddress(address)
	r.eventually(1, 2) // one that waits with us, and all others
	r.mu.Lock()
	short := r.short
	r.mu.Unlock()
	if !short {
		t.Error("nothing was said")
	}
	limit(highest + 1 + 2 + 6) // for the connection at the backend too
	first := mustAccept(t, b)
	mustRead(t, first, "0")
	clients[0].Close()
	wantEnd(t, first, "")
	first.Close()
	limit(int(usual.Cur))
	for i := range 5 {
		mustRead(t, mustAccept(t, b), fmt.Sprint(i+1))
	}
	r.eventually(5, 0)
	for _, fd := range spares {
		unix.Close(fd)
	}
}
