package gate

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"testing"
	"time"

	"hibergate/activation"
	"hibergate/activation/nettest"
	"hibergate/supervisor/activity"
)

// patience is how long a test waits for what must come, before it fails.
const patience = 30 * time.Second

// rig is a relay of one test, with one listening socket.
type rig struct {
	*streams
	t    testing.TB
	sock *activation.Socket
	lost chan loss
}

type loss struct {
	err    error
	served bool
}

// newRig makes a relay that is held. Its socket is TCP on the loopback interface, or what listen says.
func newRig(tb testing.TB, spec *Spec, listen ...string) *rig {
	tb.Helper()
	if spec.ConnectTimeout == 0 {
		spec.ConnectTimeout = 4 * patience
	}
	if spec.MaxPending == 0 {
		spec.MaxPending = 1000
	}
	if spec.Destinations == nil {
		spec.Destinations = make([]Destination, 8)
	}
	address := "tcp://127.0.0.1:0"
	if len(listen) > 0 {
		address = listen[0]
	}
	parsed, err := activation.ParseAddress(address)
	if err != nil {
		tb.Fatal(err)
	}
	sock, err := activation.Open(activation.Spec{Address: parsed, Options: activation.Options{RemoveOnStop: true}})
	if err != nil {
		tb.Fatal(err)
	}
	r := &rig{t: tb, sock: sock, lost: make(chan loss, 100)}
	r.streams = newStreams(spec, []*activation.Socket{sock}, streamHooks{
		lost: func(err error, served bool) { r.lost <- loss{err, served} },
		log:  slog.New(slog.DiscardHandler),
	})
	r.loops = make([]*loop, 1)
	tb.Cleanup(func() {
		r.close()
		for i, l := range r.loops {
			if l != nil {
				tb.Errorf("loop %d runs after close", i)
			}
		}
		if sum := r.sum(); sum.Open != 0 || sum.Queued != 0 && !r.queued() || sum.Peers != 0 {
			tb.Errorf("after close: got %+v, want nothing open", sum)
		}
		if r.active != 0 || r.waiting != 0 || r.left != 0 {
			tb.Errorf("after close: %d active, %d waiting, %d left", r.active, r.waiting, r.left)
		}
		if n := r.kept.Load(); n != 0 {
			tb.Errorf("after close: something is kept for %d sides", n)
		}
		if err := sock.Close(); err != nil {
			tb.Error(err)
		}
	})
	return r
}

func (r *rig) queued() bool {
	pending, err := r.sock.Pending()
	return pending && err == nil
}

// counted waits until what was moved is counted, which is after it was written.
func (r *rig) counted() activity.Summary {
	for i := range r.loops {
		r.ask(i, func(*loop) {}) // between two turns
	}
	return r.sum()
}

func (r *rig) sum() activity.Summary {
	var into [1]activity.Summary
	r.sums(time.Now(), into[:])
	return into[0]
}

// spread has the pairs shared between loops.
func (r *rig) spread(loops int) { r.loops = make([]*loop, loops) }

// to admits to the addresses that listeners have.
func (r *rig) to(backends ...net.Listener) {
	r.t.Helper()
	var targets []Target
	for i, b := range backends {
		targets = append(targets, Target{Index: i, Address: addressOf(b.Addr()), FD: -1})
	}
	if err := r.admit(targets); err != nil {
		r.t.Fatal(err)
	}
}

func addressOf(a net.Addr) activation.Address {
	switch a := a.(type) {
	case *net.TCPAddr:
		ap := a.AddrPort()
		return activation.Address{Network: activation.TCP, IP: ap.Addr().Unmap(), Port: ap.Port()}
	case *net.UnixAddr:
		return activation.Address{Network: activation.Unix, Path: a.Name}
	}
	panic("no such network")
}

// client connects to the socket of the relay.
func (r *rig) client() stream {
	r.t.Helper()
	a := r.sock.Address()
	if a.Network == activation.Unix {
		return mustDial(r.t, "unix", a.Path)
	}
	return mustDial(r.t, "tcp", netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), a.Port).String())
}

// through returns a client and its connection at the backend.
func (r *rig) through(b net.Listener) (client, server stream) {
	r.t.Helper()
	client = r.client()
	return client, mustAccept(r.t, b)
}

func (r *rig) wantLost(served bool) {
	r.t.Helper()
	select {
	case l := <-r.lost:
		if l.served != served || l.err == nil {
			r.t.Fatalf("got lost %v, served %v, want %v", l.err, l.served, served)
		}
	case <-time.After(patience):
		r.t.Fatal("the loss was not told")
	}
}

// eventually waits until so many connections are open and so many wait, at most those in the queue of the kernel included.
func (r *rig) eventually(open, queued int) {
	r.t.Helper()
	nettest.Eventually(r.t, func() error {
		if sum := r.sum(); sum.Open != open || sum.Queued != queued {
			return fmt.Errorf("got %d open, %d queued, want %d and %d", sum.Open, sum.Queued, open, queued)
		}
		return nil
	})
}

// age makes all that is there older.
func (r *rig) age(by time.Duration) {
	for i := range r.loops {
		r.ask(i, func(l *loop) {
			l.each(func(p *pair) bool {
				p.since -= int64(by)
				p.accepted -= int64(by)
				return true
			})
		})
	}
}

// jam writes until what is behind takes nothing more, and returns what was written. What is in flight gets time to
// move, as long as anything does.
func (r *rig) jam(c stream) []byte {
	r.t.Helper()
	all := fill(r.t, c)
	nettest.Eventually(r.t, func() error {
		before := r.sum()
		r.settled() // whatever was due is done
		more := fill(r.t, c)
		all = append(all, more...)
		if after := r.sum(); len(more) > 0 || before.In != after.In || before.Out != after.Out || !r.stuck() {
			return errors.New("bytes go on moving")
		}
		return nil
	})
	return all
}

// settled waits until every loop has done what was due.
func (r *rig) settled() {
	for i := range r.loops {
		r.ask(i, func(*loop) {})
	}
}

// stuck says whether some side does not take what there is for it.
func (r *rig) stuck() bool {
	found := false
	for i := range r.loops {
		r.ask(i, func(l *loop) {
			l.each(func(p *pair) bool {
				found = found || p.client.has(blocked) || p.server.has(blocked)
				return true
			})
		})
	}
	return found
}
