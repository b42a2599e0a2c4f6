package supervisor

import (
	"log/slog"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation"
	"hibergate/supervisor/gate"
)

// newTestDoor makes a door with one socket, for which the kernel does nothing.
func newTestDoor(t *testing.T, spec *gate.Spec) *door {
	t.Helper()
	sock, err := activation.Open(activation.Spec{Address: activation.Address{Network: activation.TCP, IP: netip.MustParseAddr("127.0.0.1")}})
	if err != nil {
		t.Fatal(err)
	}
	d := &door{spec: spec, sockets: []*activation.Socket{sock}}
	none := &tables{log: slog.New(slog.DiscardHandler), lookupErr: unix.EPERM, forwardErr: unix.EPERM}
	d.ways = []bypass{
		&handover{tables: none, all: d.sockets, keys: []uint32{0}},
		&translation{tables: none, all: d.sockets, keys: []uint32{0}, begun: make([]atomic.Uint64, 1)},
	}
	d.gate = gate.New(spec, d.sockets, gate.Hooks{Logger: slog.New(slog.DiscardHandler), Lost: func(error, bool) {}})
	t.Cleanup(func() {
		d.gate.Close()
		if err := sock.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

// A destination that was never ready and whose stop failed is admitted to without any address.
func TestBypassNowhere(t *testing.T) {
	t.Parallel()
	d := newTestDoor(t, &gate.Spec{Forward: gate.Kernel, Destinations: make([]gate.Destination, 1)})
	if way, _ := d.beginBypass(nil); way != nil {
		t.Errorf("%s: to nowhere", way)
	}
	if err := d.endBypass(); err != nil {
		t.Error(err)
	}
}

// Where there is no table the connections that are relayed can be told of.
func TestBypassBlind(t *testing.T) {
	t.Parallel()
	d := newTestDoor(t, &gate.Spec{Forward: gate.Kernel, Destinations: make([]gate.Destination, 1)})
	to := activation.Address{Network: activation.TCP, IP: netip.MustParseAddr("127.0.0.1"), Port: 1}
	if way, err := d.beginBypass([]gate.Target{{Address: to, FD: -1}}); way != nil || err == nil {
		t.Errorf("%v without a table: %v", way, err)
	}
	if err := d.endBypass(); err != nil {
		t.Error(err)
	}
	if sum := d.sums(t.Context(), time.Now(), true)[0]; !sum.Known || !sum.Exact {
		t.Errorf("got %+v, want the exact account of the relay", sum)
	}
	if flows, why := d.flows(t.Context(), 0); len(flows) != 0 || why != "" {
		t.Errorf("got %v, %q", flows, why)
	}
}

// What the kernel forwards is only seen by looking, so that the first look must not wait for the whole idle time.
func TestGatedFirstLook(t *testing.T) {
	t.Parallel()
	const idle = time.Hour
	for _, c := range []struct {
		spec gate.Spec
		want time.Duration
	}{
		{gate.Spec{}, idle},
		{gate.Spec{Forward: gate.Kernel}, idle * 9 / 100},
		{gate.Spec{WatchDestination: true}, idle * 9 / 100},
	} {
		now := time.Unix(0, 0)
		m := newGated(&Service{Gate: &c.spec, Idle: Idle{StopAfter: idle}}, now)
		m.step(now, upAlready{})
		if got := m.deadline.Sub(now); m.state != Running || got != c.want {
			t.Errorf("%+v: in %s the next look is in %v, want %v", c.spec, m.state, got, c.want)
		}
	}
}
