package gate

import (
	"errors"
	"log/slog"
	"net/netip"
	"time"

	"hibergate/activation"
	"hibergate/supervisor/activity"
)

// Gate moves what comes to the sockets of one service to its destinations. It is shut until Admit. A gate that is shut and
// has no connections costs no descriptor and no goroutine. Its methods may be called from several goroutines, but for those that say
// otherwise.
type Gate struct {
	spec      *Spec
	sockets   []*activation.Socket
	streams   *streams   // nil: no socket has connections
	datagrams *datagrams // nil: no socket has datagrams
	places    []place    // by socket
}

// place says who has a socket, and as which number.
type place struct {
	datagrams bool
	number    int
}

// Hooks are what a gate tells its owner. They are called from its goroutines, and must not block.
type Hooks struct {
	// Lost says that every destination refuses connections, once after each Admit. The gate has shut itself; who was accepted already
	// waits for the next Admit. served: since the last Admit at least one connection had come about.
	Lost func(err error, served bool)
	// Waits says that a client whose connection was being made when the gate was shut was refused, and waits; nil: nobody wants
	// to know. A client that is refused with the last destination of an admission is told of by Lost alone.
	Waits func()
	// Ignore names sources that may use the service and do not keep it awake; nil: none.
	Ignore func(netip.Addr) bool
	Logger *slog.Logger // never nil
}

// New makes a gate for sockets, which stay the caller's and may be opened later.
func New(spec *Spec, sockets []*activation.Socket, hooks Hooks) *Gate {
	g := &Gate{spec: spec, sockets: sockets, places: make([]place, len(sockets))}
	var streamed, sent []*activation.Socket
	for i, sock := range sockets {
		if sock.Spec().Address.Network == activation.UDP {
			g.places[i] = place{datagrams: true, number: len(sent)}
			sent = append(sent, sock)
			continue
		}
		g.places[i] = place{number: len(streamed)}
		streamed = append(streamed, sock)
	}
	if len(streamed) > 0 {
		g.streams = newStreams(spec, streamed, streamHooks{lost: hooks.Lost, waits: hooks.Waits, ignore: hooks.Ignore, log: hooks.Logger})
	}
	if len(sent) > 0 {
		g.datagrams = newDatagrams(spec, sent, datagramHooks{lost: hooks.Lost, ignore: hooks.Ignore, log: hooks.Logger})
	}
	return g
}

// Admit leads to the targets who waits and who comes, in this order. The connections of the targets become the gate's.
func (g *Gate) Admit(targets []Target) error {
	var streamed, sent []Target
	for _, t := range targets {
		if t.Address.Network == activation.UDP {
			sent = append(sent, t)
		} else {
			streamed = append(streamed, t)
		}
	}
	var err error
	if g.streams != nil {
		err = g.streams.admit(streamed)
	} else {
		Abandon(streamed)
	}
	if g.datagrams != nil {
		err = errors.Join(err, g.datagrams.admit(sent))
	}
	return err
}

// Abandon closes the connections of targets that nobody is led to.
func Abandon(targets []Target) {
	for i := range targets {
		if t := &targets[i]; t.FD >= 0 {
			letGo(t.FD)
			t.FD = -1
		}
	}
}

// Collect accepts who comes to a gate that is shut, where [Spec.PendingTimeout] bounds how long they wait. With an error they
// stay in the queue of the kernel.
func (g *Gate) Collect() error {
	if g.streams != nil && g.spec.PendingTimeout > 0 {
		return g.streams.collect()
	}
	return nil
}

// Shut lets nobody through any more: who comes waits in the queue of the socket. When it returns, Sums knows of everybody
// who was let through. Who was let through goes on.
func (g *Gate) Shut() {
	if g.streams != nil {
		g.streams.hold()
	}
	if g.datagrams != nil {
		g.datagrams.hold()
	}
}

// Pending says how many clients were accepted, have not left, and wait for a destination.
func (g *Gate) Pending() int {
	if g.streams == nil {
		return 0
	}
	return g.streams.pending()
}

// Waiting says whether somebody waits for the next Admit whom no socket tells of: a client of Pending, or a datagram that was refused.
func (g *Gate) Waiting() bool { return g.Pending() > 0 || g.datagrams != nil && g.datagrams.waiting() }

// Dismiss closes the connections of those who wait for a destination, and says how many there were. It is for a gate that is shut.
func (g *Gate) Dismiss() int {
	if g.streams == nil {
		return 0
	}
	return g.streams.dismiss()
}

// Sums returns the account of each socket, which is exact: what goes through a gate is counted there.
func (g *Gate) Sums(now time.Time) []activity.Summary {
	sums := make([]activity.Summary, len(g.sockets))
	var streamed, sent []activity.Summary
	if g.streams != nil {
		streamed = make([]activity.Summary, len(g.sockets))
		g.streams.sums(now, streamed)
	}
	if g.datagrams != nil {
		sent = make([]activity.Summary, len(g.sockets))
		g.datagrams.sums(sent)
	}
	for i, p := range g.places {
		if p.datagrams {
			sums[i] = sent[p.number]
		} else {
			sums[i] = streamed[p.number]
		}
	}
	return sums
}

// Flows returns the connections and exchanges of one socket, at most so many.
func (g *Gate) Flows(socket, most int) []activity.Flow {
	if p := g.places[socket]; p.datagrams {
		return g.datagrams.flows(p.number, most)
	}
	return g.streams.flows(g.places[socket].number, most)
}

// Status is what a gate was doing at one moment: a copy.
type Status struct {
	Destinations []DestinationStatus // by their number in [Spec.Destinations]
	Pending      int                 // as [Gate.Pending]

	// What clients did not get since the gate was made.
	Denied   uint64 // connections and datagrams from sources that may not use the socket
	Excess   uint64 // connections above [Spec.MaxConnections], closed
	TimedOut uint64 // connections that have waited for [Spec.PendingTimeout]
	Dropped  uint64 // datagrams for which there was no room, or that were refused
}

// Status returns what the gate is doing.
func (g *Gate) Status() Status {
	var st Status
	if g.streams != nil {
		of := g.streams.status()
		st = Status{Destinations: of.Destinations, Pending: of.Pending, Denied: of.Denied, Excess: of.Excess, TimedOut: of.TimedOut}
	} else {
		for _, d := range g.spec.Destinations {
			st.Destinations = append(st.Destinations, DestinationStatus{Destination: d.String(), Healthy: true})
		}
	}
	if g.datagrams != nil {
		of := g.datagrams.status()
		st.Denied += of.Totals.Denied
		st.Dropped += of.Totals.Dropped + of.Totals.Refused
		for _, d := range of.Destinations {
			to := &st.Destinations[d.Index]
			to.Healthy = to.Healthy && d.Healthy
			to.Open += d.Sessions
		}
	}
	return st
}

// Close cuts all connections, and returns when nothing of the gate is left. The sockets stay open.
func (g *Gate) Close() {
	if g.streams != nil {
		g.streams.close()
	}
	if g.datagrams != nil {
		g.datagrams.close()
	}
}
