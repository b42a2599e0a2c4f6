package gate

import (
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
)

// newCollecting makes a relay that accepts clients while its destination wakes.
func newCollecting(t *testing.T, spec *Spec) *rig {
	t.Helper()
	if spec.PendingTimeout == 0 {
		spec.PendingTimeout = time.Hour
	}
	r := newRig(t, spec)
	if err := r.collect(); err != nil {
		t.Fatal(err)
	}
	return r
}

// Those who waited are served in the order in which they came, and before those who came later.
func TestPendingOrder(t *testing.T) {
	t.Parallel()
	const accepted, all = 300, 1000
	r, b := newRig(t, &Spec{MaxPending: accepted, PendingTimeout: time.Hour}), backend(t, "tcp")
	r.spread(3)
	if err := r.collect(); err != nil {
		t.Fatal(err)
	}
	var clients []stream
	for i := range all {
		c := r.client()
		mustWrite(t, c, fmt.Sprintf("%06d", i))
		clients = append(clients, c)
	}
	r.untilPending(accepted)
	if f := r.flows(0, 1); len(f) != 1 || f[0].State != "pending" {
		t.Errorf("got %+v", f)
	}
	if n := r.status().Pending; n != accepted {
		t.Errorf("status: %d pending", n)
	}
	r.to(b)
	for i := range all {
		c := mustAccept(t, b)
		mustRead(t, c, fmt.Sprintf("%06d", i))
		c.Close()
	}
	for _, c := range clients {
		wantEnd(t, c, "")
		c.Close()
	}
	r.eventually(0, 0)
}

// untilPending waits until so many clients are accepted and wait.
func (r *rig) untilPending(n int) {
	r.t.Helper()
	nettest.Eventually(r.t, func() error {
		if now := r.pending(); now != n {
			return fmt.Errorf("%d pending, want %d", now, n)
		}
		return nil
	})
}

// Without a PendingTimeout clients wait in the queue of the kernel.
func TestPendingNobody(t *testing.T) {
	t.Parallel()
	r := newRig(t, &Spec{})
	r.client()
	if err := r.collect(); err != nil || r.loops[0] != nil {
		t.Errorf("got %v, and a loop", err)
	}
	if sum := r.sum(); sum.Queued != 1 {
		t.Errorf("got %+v", sum)
	}
}

// Those who have waited for too long get what is configured.
func TestPendingTimeout(t *testing.T) {
	t.Parallel()
	banner := strings.Repeat("try again later\n", 100)
	for name, c := range map[string]struct {
		answer Answer
		want   func(t *testing.T, c net.Conn)
	}{
		"close":  {Answer{}, func(t *testing.T, c net.Conn) { t.Helper(); wantEnd(t, c, "") }},
		"reset":  {Answer{Reset: true}, func(t *testing.T, c net.Conn) { t.Helper(); wantReset(t, c) }},
		"banner": {Answer{Banner: banner}, func(t *testing.T, c net.Conn) { t.Helper(); wantEnd(t, c, banner) }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newCollecting(t, &Spec{PendingTimeout: time.Minute, OnTimeout: c.answer})
			first, second := r.client(), r.client()
			mustWrite(t, second, strings.Repeat("GET / HTTP/1.1\r\n", 1000)) // which nobody reads
			r.untilPending(2)
			r.age(59 * time.Second)
			third := r.client()
			r.untilPending(3)
			r.age(time.Second)
			c.want(t, first)
			c.want(t, second)
			r.untilPending(1)
			if n := r.status().TimedOut; n != 2 {
				t.Errorf("%d timed out", n)
			}
			first.Close()
			second.Close()
			b := backend(t, "tcp") // the third still has its time
			r.to(b)
			mustWrite(t, third, "x")
			mustRead(t, mustAccept(t, b), "x")
			r.age(time.Hour)
			mustWrite(t, third, "x")
		})
	}
}

// A client that was told that it has waited too long, and does not go, is cut.
func TestPendingParting(t *testing.T) {
	t.Parallel()
	r := newCollecting(t, &Spec{PendingTimeout: time.Minute, OnTimeout: Answer{Banner: "no"}})
	c := r.client()
	r.untilPending(1)
	r.age(time.Minute)
	wantEnd(t, c, "no")
	if n := len(r.flows(0, 10)); n != 0 || r.pending() != 0 {
		t.Errorf("%d flows", n)
	}
	r.age(partingTime)
	nettest.Eventually(t, func() error {
		if load := r.count(); load != 0 {
			return fmt.Errorf("%d pairs", load)
		}
		return nil
	})
}

// count returns how many pairs there are.
func (r *rig) count() (n int) {
	for i := range r.loops {
		r.ask(i, func(l *loop) {
			l.each(func(*pair) bool {
				n++
				return true
			})
		})
	}
	return n
}

// Clients that left do not count, and make room for others.
func TestPendingLeft(t *testing.T) {
	t.Parallel()
	r, b := newCollecting(t, &Spec{MaxPending: 2}), backend(t, "tcp")
	gone, closed := r.client(), r.client()
	r.untilPending(2)
	asked := r.client() // has sent something, so its FIN is half of a conversation
	mustWrite(t, asked, "question")
	asked.CloseWrite()
	last := r.client()
	r.eventually(0, 3) // one of them for the queue of the kernel
	reset(t, gone)
	closed.CloseWrite()
	nettest.Eventually(t, func() error {
		if n, all := r.pending(), r.count(); n != 2 || all != 3 {
			return fmt.Errorf("%d pending of %d", n, all)
		}
		return nil
	})
	r.to(b)
	first := mustAccept(t, b) // which has said nothing, and may want to hear something
	mustWrite(t, first, "hello")
	first.Close()
	wantEnd(t, closed, "hello")
	second := mustAccept(t, b)
	wantEnd(t, second, "question")
	mustWrite(t, second, "answer")
	second.Close()
	wantEnd(t, asked, "answer")
	mustWrite(t, last, "x")
	mustRead(t, mustAccept(t, b), "x")
}

// Clients that left and do not count are bounded too.
func TestPendingLeftBounded(t *testing.T) {
	t.Parallel()
	r := newCollecting(t, &Spec{MaxPending: 3})
	for range 20 {
		r.client().CloseWrite()
	}
	nettest.Eventually(t, func() error {
		if n, all := r.pending(), r.count(); n != 0 || all != 3 || r.queued() {
			return fmt.Errorf("%d pending of %d", n, all)
		}
		return nil
	})
}

// Clients of a Unix socket that have left altogether and sent nothing are dropped; what others have sent is delivered.
func TestPendingLeftUnix(t *testing.T) {
	t.Parallel()
	r, b := newRig(t, &Spec{PendingTimeout: time.Hour}, "unix://"+tempPath(t, "s")), backend(t, "unix")
	if err := r.collect(); err != nil {
		t.Fatal(err)
	}
	silent, spoken := r.client(), r.client()
	mustWrite(t, spoken, "message")
	spoken.Close()
	silent.Close()
	nettest.Eventually(t, func() error {
		if n, all := r.pending(), r.count(); n != 1 || all != 1 || r.queued() {
			return fmt.Errorf("%d pending of %d", n, all)
		}
		return nil
	})
	r.to(b)
	wantEnd(t, mustAccept(t, b), "message")
}

// Held means held: what was accepted before is in the sums, and nothing is accepted after.
func TestHoldExact(t *testing.T) {
	t.Parallel()
	r, b := newRig(t, &Spec{}), backend(t, "tcp")
	r.spread(3)
	served := make(chan struct{})
	go func() {
		defer close(served)
		for {
			c, err := b.Accept()
			if err != nil {
				return
			}
			defer c.Close()
		}
	}()
	var clients sync.WaitGroup
	for range 50 {
		for range 4 {
			clients.Go(func() {
				for range 5 {
					c, err := net.Dial("tcp", portOf(r.sock, "127.0.0.1").String())
					if err != nil {
						t.Error(err)
						return
					}
					t.Cleanup(func() { c.Close() })
				}
			})
		}
		before := r.sum().Open
		r.to(b)
		nettest.Eventually(t, func() error {
			if r.sum().Open <= before {
				return errors.New("nobody was let in")
			}
			return nil
		})
		r.hold()
		open, last := r.sum().Open, r.accepted()
		if uint64(open) != last {
			t.Fatalf("%d open of %d accepted", open, last)
		}
		for range 3 {
			r.ask(0, func(*loop) {})
			if now := r.sum().Open; now != open || r.accepted() != last {
				t.Fatalf("%d open, %d when it was held", now, open)
			}
		}
		clients.Wait()
	}
	b.Close()
	<-served
}

// accepted returns the number of the last connection.
func (r *rig) accepted() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.serial
}

// Options that accepted connections inherit are set, but for those that the user has configured.
func TestStreamOptions(t *testing.T) {
	t.Parallel()
	r, b := newRig(t, &Spec{}), backend(t, "tcp")
	r.to(b)
	client, server := r.through(b)
	mustWrite(t, client, "x")
	mustRead(t, server, "x")
	mustWrite(t, client, "y")
	mustRead(t, server, "y")
	check := func(name string, fd int32, keep bool) {
		t.Helper()
		for _, o := range []struct{ level, name, want int }{
			{unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
			{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
			{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 60},
			{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 15},
			{unix.IPPROTO_TCP, unix.TCP_KEEPCNT, 4},
		} {
			got, err := unix.GetsockoptInt(int(fd), o.level, o.name)
			if err != nil || got != o.want && (keep || o.name == unix.TCP_NODELAY) {
				t.Errorf("%s: option %d is %d, %v, want %d", name, o.name, got, err, o.want)
			}
		}
	}
	sides := func(server bool) {
		r.ask(0, func(l *loop) {
			l.each(func(p *pair) bool {
				check("client", p.client.fd, true)
				check("server", p.server.fd, server)
				return true
			})
		})
	}
	sides(false)
	r.age(youth)
	r.ask(0, func(*loop) {})
	sides(true)
}

// A client that is refused when the gate is shut already, and nobody is told of a loss, is told of.
func TestPendingUnexpected(t *testing.T) {
	t.Parallel()
	r := newRig(t, &Spec{})
	waits := make(chan struct{}, 1)
	r.hooks.waits = func() { waits <- struct{}{} }
	at, _ := deaf(t)
	c := r.client()
	r.toAddress(at)
	r.untilConnecting()
	r.hold()
	r.age(5 * patience)
	select {
	case <-waits:
	case <-time.After(patience):
		t.Fatal("nobody was told")
	}
	if n := r.pending(); n != 1 {
		t.Errorf("%d pending", n)
	}
	if n := r.dismiss(); n != 1 {
		t.Errorf("%d dismissed", n)
	}
	wantEnd(t, c, "")
	r.eventually(0, 0)
}
