package gate

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation"
	"hibergate/activation/nettest"
)

// What the last destination refuses comes to it when it is back.
func TestDatagramsOutliveTheirDestination(t *testing.T) {
	t.Parallel()
	r := newDatagramRig(t, &Spec{}, "udp://127.0.0.1:0")
	a := startUDP(t, "a", "127.0.0.1:0")
	r.mustAdmit(t, a)
	var clients []*udpClient
	for range 10 {
		clients = append(clients, dialUDP(t, portOf(r.socket, "127.0.0.1")))
	}
	for round := range 5 {
		for i, c := range clients {
			if got := c.ask("before"); got != "a before" {
				t.Fatalf("client %d: %q", i, got)
			}
		}
		a.stop()
		for i, c := range clients {
			c.send(fmt.Sprint(round, i))
		}
		if !r.awaitLost(t) {
			t.Error("nothing was served")
		}
		if st := r.status(); st.Admitted || st.Destinations[0].Healthy {
			t.Errorf("status %+v", st)
		}
		a.start(t)
		r.mustAdmit(t, a)
		for i, c := range clients {
			if got, want := c.receive(), fmt.Sprint("a ", fmt.Sprint(round, i)); got != want {
				t.Errorf("client %d: got %q, want %q", i, got, want)
			}
		}
	}
	if n := len(r.lost); n != 0 {
		t.Errorf("lost %d times more", n)
	}
}

// A destination that was never there is told once in each admission, and so that it is known that it never answered.
func TestDatagramsAreLostOnce(t *testing.T) {
	t.Parallel()
	r := newDatagramRig(t, &Spec{}, "udp://127.0.0.1:0")
	a, b := startUDP(t, "a", "127.0.0.1:0"), startUDP(t, "b", "127.0.0.1:0")
	a.stop()
	b.stop()
	c := dialUDP(t, portOf(r.socket, "127.0.0.1"))
	for range 3 {
		r.mustAdmit(t, a, b)
		c.send("first")
		if r.awaitLost(t) {
			t.Error("something was served")
		}
		c.send("second") // it waits
		if len(r.lost) != 0 {
			t.Error("lost twice")
		}
	}
	b.start(t)
	r.mustAdmit(t, a, b)
	if got := c.receive(); got != "b first" && got != "b second" {
		t.Errorf("got %q", got)
	}
}

func TestDatagramsAvoidWhoRefuses(t *testing.T) {
	t.Parallel()
	r := newDatagramRig(t, &Spec{}, "udp://127.0.0.1:0")
	a, b := startUDP(t, "a", "127.0.0.1:0"), startUDP(t, "b", "127.0.0.1:0")
	r.mustAdmit(t, a, b)
	first := dialUDP(t, portOf(r.socket, "127.0.0.1"))
	if got := first.ask("1"); got != "a 1" {
		t.Errorf("got %q", got)
	}
	a.stop()
	if got := first.ask("2"); got != "b 2" { // it was refused, and sent again
		t.Errorf("got %q", got)
	}
	for range 4 {
		if got := dialUDP(t, portOf(r.socket, "127.0.0.1")).ask("3"); got != "b 3" {
			t.Errorf("got %q", got)
		}
	}
	if st := r.status(); st.Destinations[0].Healthy || !st.Destinations[1].Healthy || st.Totals.Refused != 1 {
		t.Errorf("status %+v", st)
	}
	a.start(t)
	r.later(retryMin)
	answers := map[string]int{}
	for range 4 {
		answers[dialUDP(t, portOf(r.socket, "127.0.0.1")).ask("4")]++
	}
	if answers["a 4"] != 2 || answers["b 4"] != 2 {
		t.Errorf("answers %v", answers)
	}
	if len(r.lost) != 0 {
		t.Error("lost")
	}
}

func TestDatagramDestinationIsLeftAloneForLonger(t *testing.T) {
	t.Parallel()
	now := time.Unix(1e9, 0)
	var to datagramDestination
	for i, want := range []time.Duration{1, 2, 4, 8, 16, 30, 30} {
		if !to.healthy(now) {
			t.Fatalf("refusal %d: not asked", i)
		}
		to.refused(now)
		to.refused(now)
		if to.healthy(now.Add(want*time.Second - 1)) {
			t.Errorf("refusal %d: asked within %ds", i, want)
		}
		now = now.Add(want * time.Second)
	}
	to.refused(now)
	to.answered()
	if !to.healthy(now) {
		t.Error("it has answered")
	}
	if to.refused(now); !to.healthy(now.Add(time.Second)) {
		t.Error("it begins again with a second")
	}
}

// Sessions stay with a destination that comes back at the same address, and move where it does not.
func TestDatagramSessionsMove(t *testing.T) {
	t.Parallel()
	r := newDatagramRig(t, &Spec{}, "udp://127.0.0.1:0")
	a, b := mustListen(t), mustListen(t)
	c := dialUDP(t, portOf(r.socket, "127.0.0.1"))
	buf := make([]byte, 10)
	var seen []netip.AddrPort
	for _, backend := range []*udpBackend{a, a, b} {
		r.hold()
		r.mustAdmit(t, backend)
		if len(seen) < 2 {
			c.send("x") // it is sent to b by itself, as it has no answer
		}
		n, from, err := backend.conn.ReadFromUDPAddrPort(buf)
		if err != nil || string(buf[:n]) != "x" {
			t.Fatalf("%q from %s: %v", buf[:n], from, err)
		}
		seen = append(seen, from)
	}
	if seen[0] != seen[1] {
		t.Errorf("seen as %v", seen)
	}
	b.conn.WriteToUDPAddrPort([]byte("answer"), seen[2])
	if got := c.receive(); got != "answer" {
		t.Errorf("got %q", got)
	}
	r.hold()
	r.mustAdmit(t, a)
	if st := r.status(); st.Sessions != 0 {
		t.Errorf("status %+v", st)
	}
}

func TestDatagramsRefuseWrongTargets(t *testing.T) {
	t.Parallel()
	r := newDatagramRig(t, &Spec{}, "udp://127.0.0.1:0")
	here := netip.MustParseAddr("127.0.0.1")
	for name, a := range map[string]activation.Address{
		"TCP":       {Network: activation.TCP, IP: here, Port: 1},
		"no IP":     {Network: activation.UDP, Port: 1},
		"no port":   {Network: activation.UDP, IP: here},
		"no device": {Network: activation.UDP, IP: netip.MustParseAddr("fe80::1%nosuchdevice"), Port: 1},
	} {
		f, err := os.Open("/dev/null")
		if err != nil {
			t.Fatal(err)
		}
		fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		if err := r.admit([]Target{{Address: a, FD: fd}}); err == nil || !r.ended() || r.status().Admitted {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := r.admit(nil); err == nil || !r.ended() {
		t.Errorf("no target: %v", err)
	}
	r.close()
	if err := r.admit([]Target{startUDP(t, "a", "127.0.0.1:0").target(0)}); err == nil || !r.ended() {
		t.Errorf("closed: %v", err)
	}
	if err := newDatagrams(&Spec{}, nil, datagramHooks{}).admit(nil); err != nil {
		t.Errorf("no socket: %v", err)
	}
}

// Without descriptors datagrams are dropped, and the relay goes on.
func TestDatagramsWithoutDescriptors(t *testing.T) { //nolint:paralleltest // the limit is for the whole process
	nettest.Need(t, nettest.Namespaces)
	r := newDatagramRig(t, &Spec{}, "udp://127.0.0.1:0")
	r.mustAdmit(t, startUDP(t, "a", "127.0.0.1:0"))
	first, second := dialUDP(t, portOf(r.socket, "127.0.0.1")), dialUDP(t, portOf(r.socket, "127.0.0.1"))
	first.ask("x")
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	none := limit
	none.Cur = 0
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &none); err != nil {
		t.Fatal(err)
	}
	second.send("dropped")
	answer := first.ask("y")
	st := r.status()
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if answer != "a y" || st.Sessions != 1 || st.Totals.Dropped != 1 {
		t.Errorf("answer %q, status %+v", answer, st)
	}
	if got := second.ask("z"); got != "a z" {
		t.Errorf("got %q", got)
	}
}

// Nothing is left open, whichever way it ends.
func TestDatagramsLeaveNothing(t *testing.T) { //nolint:paralleltest // it counts the descriptors of the process
	a := startUDP(t, "a", "127.0.0.1:0")
	r := newDatagramRig(t, &Spec{}, "udp://127.0.0.1:0")
	c := dialUDP(t, portOf(r.socket, "127.0.0.1"))
	before := len(nettest.OpenFDs())
	r.mustAdmit(t, a)
	c.ask("x")
	r.hold()
	r.later(time.Hour)
	r.wg.Wait()
	if after := nettest.OpenFDs(); len(after) != before {
		t.Errorf("held: %d descriptors before, now %v", before, after)
	}
	r.mustAdmit(t, a)
	c.ask("x")
	r.close()
	if after := nettest.OpenFDs(); len(after) != before || !r.ended() {
		t.Errorf("closed: %d descriptors before, now %v", before, after)
	}
	r.hold()
	r.close()
}

func FuzzKeptDatagrams(f *testing.F) {
	f.Add([]byte{1, 2, 3})
	f.Add([]byte{255, 255, 0, 255, 3, 255})
	f.Fuzz(func(t *testing.T, sizes []byte) {
		var k keptDatagrams
		type sent struct {
			keptDatagram
			b []byte
		}
		var all []sent
		buf := make([]byte, maxDatagram)
		for i, size := range sizes {
			b := make([]byte, int(size)*257) // up to 65535
			for j := range b {
				b[j] = byte(i + j)
			}
			all = append(all, sent{k.put(b, time.Time{}), b})
			room := keptBytes
			for j, d := range slices.Backward(all) {
				room -= len(d.b)
				if k.holds(d.keptDatagram) != (room >= 0) {
					t.Fatalf("datagram %d of %v: held %v", j, sizes, room < 0)
				}
				if room >= 0 && string(k.read(d.keptDatagram, buf)) != string(d.b) {
					t.Fatalf("datagram %d of %v is another one", j, sizes)
				}
			}
		}
		if k.holds(keptDatagram{}) {
			t.Error("no datagram is held")
		}
	})
}
