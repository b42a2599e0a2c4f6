package gate

import (
	"fmt"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation"
	"hibergate/activation/nettest"
)

// order connects n clients, one after the other, and says which backend got which.
func order(r *rig, n int, backends ...net.Listener) (got []int, clients, servers []stream) {
	r.t.Helper()
	accepted := make(chan stream)
	which := make(chan int)
	for i, b := range backends {
		go func() {
			for {
				c, err := b.Accept()
				if err != nil {
					return
				}
				which <- i
				accepted <- c.(stream)
			}
		}()
	}
	for range n {
		clients = append(clients, r.client())
		got = append(got, <-which)
		servers = append(servers, guard(r.t, <-accepted))
	}
	for _, b := range backends {
		b.Close()
	}
	return got, clients, servers
}

// Destinations take turns.
func TestBalanceRoundRobin(t *testing.T) {
	t.Parallel()
	r := newRig(t, &Spec{})
	a, b, c := backend(t, "tcp"), backend(t, "unix"), backend(t, "tcp")
	r.to(a, b, c)
	if got, _, _ := order(r, 7, a, b, c); fmt.Sprint(got) != "[0 1 2 0 1 2 0]" {
		t.Errorf("got %v", got)
	}
}

// The destination with the fewest connections gets the next one.
func TestBalanceLeast(t *testing.T) {
	t.Parallel()
	r := newRig(t, &Spec{Balance: LeastConnections})
	a, b := backend(t, "tcp"), backend(t, "tcp")
	r.to(a)
	for range 3 {
		r.through(a)
	}
	r.to(a, b) // those that are open are still known
	if got, _, _ := order(r, 5, a, b); fmt.Sprint(got) != "[1 1 1 0 1]" {
		t.Errorf("got %v", got)
	}
}

// A destination that refuses is left alone for a while, and its clients go to the others.
func TestBalanceUnhealthy(t *testing.T) {
	t.Parallel()
	for _, network := range []string{"tcp", "unix"} {
		t.Run(network, func(t *testing.T) {
			t.Parallel()
			r := newRig(t, &Spec{})
			dead, live := backend(t, network), backend(t, network)
			dead.Close()
			r.to(dead, live)
			got, _, _ := order(r, 4, live)
			if d := r.status().Destinations; fmt.Sprint(got) != "[0 0 0 0]" || d[0].Healthy || !d[1].Healthy || d[1].Open != 4 || d[0].Open != 0 {
				t.Errorf("got %v, %+v", got, d)
			}
			r.mu.Lock()
			x := r.targets[0]
			if x.interval != firstShun {
				t.Errorf("left alone for %v", x.interval)
			}
			for _, want := range []time.Duration{2, 4, 8, 16, 30, 30} {
				x.shunned = 0
				if r.shun(x, unix.ECONNREFUSED); x.interval != want*time.Second {
					t.Errorf("left alone for %v, want %d s", x.interval, want)
				}
			}
			r.mu.Unlock()
		})
	}
}

// When all destinations refuse, that is told once, and nobody is lost: those who had been accepted are served first, by
// the next admission.
func TestLost(t *testing.T) {
	t.Parallel()
	for loops, network := range []string{"tcp", "unix", "tcp", "unix"} {
		t.Run(fmt.Sprintf("%s, %d loops", network, loops+1), func(t *testing.T) {
			t.Parallel()
			r := newRig(t, &Spec{})
			r.spread(loops + 1)
			b := backend(t, network)
			r.to(b)
			kept, server := r.through(b)
			mustWrite(t, kept, "x")
			mustRead(t, server, "x")
			address := b.Addr()
			b.Close()
			var clients []stream
			for i := range 40 {
				c := r.client()
				mustWrite(t, c, fmt.Sprintf("%02d", i))
				clients = append(clients, c)
			}
			r.wantLost(true)
			r.to(refusing{address})
			r.wantLost(false)
			if len(r.lost) > 0 {
				t.Errorf("told again: %v", <-r.lost)
			}
			nettest.Eventually(t, func() error {
				if sum := r.sum(); sum.Queued == 0 || sum.Open != 1 {
					return fmt.Errorf("got %+v", sum)
				}
				return nil
			})
			again := backend(t, network)
			r.to(again)
			for i, c := range clients {
				s := mustAccept(t, again)
				mustRead(t, s, fmt.Sprintf("%02d", i))
				mustWrite(t, s, "ok")
				mustRead(t, c, "ok")
			}
			mustWrite(t, kept, "still there")
			mustRead(t, server, "still there")
			r.eventually(41, 0)
		})
	}
}

// refusing is a listener that has closed.
type refusing struct{ address net.Addr }

func (r refusing) Accept() (net.Conn, error) { return nil, net.ErrClosed }
func (r refusing) Close() error              { return nil }
func (r refusing) Addr() net.Addr            { return r.address }

// An admission without a target is a loss as well.
func TestLostNoTarget(t *testing.T) {
	t.Parallel()
	r := newRig(t, &Spec{})
	r.to()
	r.client()
	r.wantLost(false)
	if err := r.admit([]Target{{Index: 99, Address: activation.Address{Network: activation.Unix, Path: "/x"}, FD: -1}}); err == nil {
		t.Error("a destination that there is not was taken")
	}
	if err := r.admit([]Target{{Address: addressOf(&net.TCPAddr{IP: net.ParseIP("fe80::1"), Zone: "nosuchlink"}), FD: -1}}); err == nil {
		t.Error("a zone that there is not was taken")
	}
}

// spare connects to a backend, as a readiness probe does.
func spare(t *testing.T, b net.Listener) Target {
	t.Helper()
	c := mustDial(t, b.Addr().Network(), b.Addr().String())
	defer c.Close()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	own := -1
	if err := raw.Control(func(fd uintptr) { own, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 3) }); err != nil {
		t.Fatal(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return Target{Address: addressOf(b.Addr()), FD: own}
}

// The first client gets the connection of the probe.
func TestSpareUsed(t *testing.T) {
	noLeak(t)
	for _, network := range []string{"tcp", "unix"} {
		r, b := newRig(t, &Spec{}), backend(t, network)
		target := spare(t, b)
		server := mustAccept(t, b)
		client := r.client() // it is kept for who waits
		if err := r.admit([]Target{target}); err != nil {
			t.Fatal(err)
		}
		mustWrite(t, client, "first")
		mustRead(t, server, "first")
		_, server = r.through(b)
		nettest.Eventually(t, func() error {
			if d := r.status().Destinations[0]; d.Total != 2 || d.Open != 2 {
				return fmt.Errorf("got %+v", d)
			}
			return nil
		})
		r.close()
		b.Close()
		server.Close()
	}
}

// One whose other end has left is not used, nor is any where the client's address is to be kept, nor after hold.
func TestSpareUnused(t *testing.T) {
	noLeak(t)
	for name, spec := range map[string]*Spec{"gone": {}, "transparent": {Transparent: true}, "held": {}, "closed": {}, "replaced": {}} {
		r, b := newRig(t, spec), backend(t, "tcp")
		target := spare(t, b)
		probe := mustAccept(t, b)
		if name == "gone" {
			probe.Close()
			nettest.Eventually(t, func() error {
				var buf [1]byte
				if n, _, err := unix.Recvfrom(target.FD, buf[:], unix.MSG_PEEK|unix.MSG_DONTWAIT); n != 0 || err != nil {
					return fmt.Errorf("still there: %w", err)
				}
				return nil
			})
		}
		if name == "closed" {
			r.close()
		}
		if err := r.admit([]Target{target}); (err != nil) != (name == "closed") {
			t.Fatal(err)
		}
		switch name {
		case "held":
			r.hold()
			wantEnd(t, probe, "")
			r.to(b)
		case "replaced":
			r.to(b)
			wantEnd(t, probe, "")
		}
		if name == "closed" {
			wantEnd(t, probe, "")
			continue
		}
		client, server := r.through(b)
		mustWrite(t, client, "x")
		mustRead(t, server, "x")
		if name == "transparent" {
			wantEnd(t, probe, "")
		}
		r.close()
	}
}
