package gate

import (
	"net/netip"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation"
	"hibergate/supervisor/activity"
)

// source is one listening socket, and what is known of its connections.
type source struct {
	socket *activation.Socket
	access *activation.Access
	number int
	unix   bool

	// Guarded by the lock of streams. Connections that do not count as activity are in none of them.
	open   int
	queued int
	peers  uint64
	failed bool // accept(2) says that it does not listen; until the next admission

	in, out     atomic.Uint64 // bytes of payload, ever
	last        atomic.Int64  // when something opened, closed or carried data; 0: never
	lastPayload atomic.Int64
}

// destinationTotal counts the connections to one destination.
type destinationTotal struct {
	open  int
	total uint64
}

// DestinationStatus is how one destination of a gate is doing.
type DestinationStatus struct {
	Destination string `json:"destination"`
	Healthy     bool   `json:"healthy"` // it has not refused the last connection, or that was long enough ago
	Open        int    `json:"open"`    // connections, those that are being made included
	Total       uint64 `json:"total"`   // connections that were established, ever
}

// StreamStatus is how the relay of TCP and Unix connections is doing.
type StreamStatus struct {
	Destinations []DestinationStatus `json:"destinations"`
	Pending      int                 `json:"pending"`  // accepted, without a destination yet
	Denied       uint64              `json:"denied"`   // closed: their sources may not use the socket
	Excess       uint64              `json:"excess"`   // closed: there were too many
	TimedOut     uint64              `json:"timedout"` // waited too long for a destination
}

// status returns how each destination is doing, and what clients did not get.
func (s *streams) status() StreamStatus {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := StreamStatus{Pending: s.waiting, Denied: s.denied, Excess: s.excess, TimedOut: s.expired}
	now := s.clock()
	for i, d := range s.spec.Destinations {
		out.Destinations = append(out.Destinations, DestinationStatus{
			Destination: d.String(), Healthy: s.healthy(i, now), Open: s.totals[i].open, Total: s.totals[i].total,
		})
	}
	return out
}

// healthy says whether a destination has a target that is to be tried, or none at all. It is called with the lock held.
func (s *streams) healthy(destination int, now int64) bool {
	known := false
	for _, t := range s.targets {
		if t.Index == destination {
			if t.shunned <= now {
				return true
			}
			known = true
		}
	}
	return !known
}

// pending returns how many clients are accepted, wait for a destination and have not left.
func (s *streams) pending() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.waiting
}

// sums writes what is known of each socket into the elements of into, by their order in newStreams. Open counts clients
// with a destination, Queued those that wait for one, and one more where the queue of the kernel is not empty. In and
// Out are payload, and are not packets.
func (s *streams) sums(_ time.Time, into []activity.Summary) {
	for i := range min(len(into), len(s.sources)) {
		src := s.sources[i]
		kernel := 0
		if pending, err := src.socket.Pending(); pending && err == nil {
			kernel = 1
		}
		s.mu.Lock()
		sum := activity.Summary{Known: true, Exact: true, Open: src.open, Queued: src.queued + kernel, Peers: src.peers, Last: s.at(src.last.Load())}
		if sum.Open > 0 {
			sum.LastPayload = s.at(src.lastPayload.Load())
		}
		s.mu.Unlock()
		sum.In.Bytes, sum.Out.Bytes = src.in.Load(), src.out.Load()
		into[i] = sum
	}
}

// at turns what clock returned into a Time; 0 into the zero Time.
func (s *streams) at(clock int64) time.Time {
	if clock == 0 {
		return time.Time{}
	}
	return s.began.Add(time.Duration(clock))
}

// flows returns at most so many of the connections of a socket, those that wait for a destination included. It asks the
// loops, one after the other.
func (s *streams) flows(socket, most int) []activity.Flow {
	var out []activity.Flow
	for i := range s.loops {
		s.ask(i, func(l *loop) {
			l.each(func(p *pair) bool {
				if p.source.number == socket && p.stage != stageParting {
					out = append(out, p.flow())
				}
				return len(out) < most
			})
		})
	}
	return out
}

// ask has a loop call f, and waits until it did. It does nothing where the loop does not run.
func (s *streams) ask(number int, f func(l *loop)) {
	done := make(chan struct{})
	s.mu.Lock()
	l := s.loops[number]
	if l == nil {
		s.mu.Unlock()
		return
	}
	l.questions = append(l.questions, func() {
		f(l)
		close(done)
	})
	l.ring()
	s.mu.Unlock()
	<-done
}

// Pending is the state of a flow that waits for a destination.
const Pending = "pending"

// flow describes a pair for people.
func (p *pair) flow() activity.Flow {
	f := activity.Flow{Protocol: "unix", Peer: p.peer, State: "ESTABLISHED", Counted: true}
	switch p.stage { //nolint:exhaustive // the others are established
	case stageWaiting:
		f.State = Pending
	case stageConnecting:
		f.State = "connecting"
	}
	f.In.Bytes, f.Out.Bytes = p.in.Load(), p.out.Load()
	if !p.source.unix {
		f.Protocol = "tcp"
		f.Local = localOf(p.client.fd)
		f.Original = f.Local
	}
	return f
}

// localOf returns the address of our end of a TCP connection; invalid where it cannot be told.
func localOf(fd int32) netip.AddrPort {
	sa, err := unix.Getsockname(int(fd))
	if err != nil {
		return netip.AddrPort{}
	}
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port))
	}
	return netip.AddrPort{}
}
