package gate

import (
	"net/netip"

	"hibergate/activation"
	"hibergate/supervisor/activity"
)

// datagramTotals counts datagrams since newDatagrams.
type datagramTotals struct {
	Dropped uint64 // not passed on: no room for another session, no descriptor, a full queue, too large
	Denied  uint64 // from sources that may not use the socket and came past its filter
	Refused uint64 // by a destination; those that were sent again later included
}

// datagramStatus is what the relay was doing at one moment: a copy.
type datagramStatus struct {
	Admitted     bool
	Sessions     int
	Destinations []datagramDestinationStatus // of the last admission, in its order
	Totals       datagramTotals
}

// datagramDestinationStatus is one destination of the last admission.
type datagramDestinationStatus struct {
	Index    int // in Spec.Destinations
	Address  activation.Address
	Healthy  bool // it has not refused lately
	Sessions int  // that lead to it
}

// status returns what the relay does.
func (d *datagrams) status() datagramStatus {
	d.mu.Lock()
	defer d.mu.Unlock()
	st := datagramStatus{Admitted: d.reading, Sessions: len(d.sessions), Totals: d.totals}
	now := d.now()
	for _, t := range d.destinations {
		st.Destinations = append(st.Destinations, datagramDestinationStatus{
			Index: t.index, Address: t.address, Healthy: t.healthy(now), Sessions: t.sessions,
		})
	}
	return st
}

// waiting says whether a datagram is kept that was refused, and goes to the destination of the next admission.
func (d *datagrams) waiting() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	for s := d.order.first; s != nil; s = s.next {
		if s.again && d.kept.holds(s.kept) {
			return true
		}
	}
	return false
}

// sums sets what is known about each socket, in their order; into has room for all. As for every UDP socket, what counts
// is the last datagram: a session that is silent is no open connection. Bytes are of payload.
func (d *datagrams) sums(into []activity.Summary) {
	for i, s := range d.sockets {
		into[i] = activity.Summary{}
		pending, err := s.Pending()
		if err != nil {
			into[i].Why = err.Error()
			continue
		}
		into[i].Known, into[i].Exact = true, true
		if pending {
			into[i].Queued = 1
		}
	}
	// After the queues: what leaves one between the two looks is seen as traffic.
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := range d.accounts {
		a := &d.accounts[i]
		into[i].Last, into[i].LastPayload, into[i].In, into[i].Out = a.last, a.last, a.in, a.out
	}
}

// flows returns the sessions of one socket, at most limit of them, the one that was used last first. Bytes are of payload.
func (d *datagrams) flows(socket, limit int) []activity.Flow {
	d.mu.Lock()
	defer d.mu.Unlock()
	var list []activity.Flow
	for s := d.order.last; s != nil && len(list) < limit; s = s.prev {
		if s.key.socket != socket {
			continue
		}
		a := d.sockets[socket].Address()
		local := netip.AddrPortFrom(a.IP, a.Port)
		if s.key.local.IsValid() {
			local = netip.AddrPortFrom(s.key.local, a.Port)
		}
		f := activity.Flow{Protocol: "udp", Peer: s.key.client, Original: local, Local: local, State: "UNREPLIED", In: s.in, Out: s.out, Counted: true}
		if s.replied {
			f.State = "REPLIED"
		}
		list = append(list, f)
	}
	return list
}
