package activity

import (
	"errors"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"hibergate/supervisor/activity/sockdiag"
)

// boundDevice returns the index of the network device that a socket is bound to; 0: none. It is asked once: what
// came before a program changed it belongs to the socket, too.
func boundDevice(fd int) (uint32, error) {
	index, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX)
	if errors.Is(err, unix.ENOPROTOOPT) { // before Linux 5.0: as if none, which takes what others get, too
		return 0, nil
	}
	return uint32(index), err
}

// rank says how closely a socket is bound to a local address and a device: that of a connection is the one
// that its listener is bound to. Of several sockets it belongs to the one of the highest rank; an address
// counts for more than a device. Zero: it is not of this socket.
func (w *watched) rank(local netip.AddrPort, device uint32) int {
	ip, rank := local.Addr(), 1
	switch {
	case local.Port() != w.port, w.device != 0 && w.device != device:
		return 0
	case w.ip.IsValid() && w.ip.IsUnspecified(): // ::ffff:0.0.0.0
		if !ip.Is4() {
			return 0
		}
	case w.ip.IsValid():
		if w.ip != ip {
			return 0
		}
		rank += 2
	case w.only6 && ip.Is4():
		return 0
	}
	if w.device != 0 {
		rank++
	}
	return rank
}

// owners returns those of the candidates to which a connection, or a datagram socket, with this local address and
// device belongs. It reorders the candidates.
func owners(candidates []*watched, local netip.AddrPort, device uint32) []*watched {
	best, n := 1, 0
	for i, w := range candidates {
		rank := w.rank(local, device)
		if rank < best {
			continue
		}
		if rank > best {
			best, n = rank, 0
		}
		candidates[n], candidates[i] = candidates[i], candidates[n]
		n++
	}
	return candidates[:n]
}

// candidates returns all watched sockets of a protocol that have one of the ports, and connections in the list of one of the domains, by port.
func (t *Tracker) candidates(protocol uint8, domains []uint8, ports []uint16) map[uint16][]*watched {
	byPort := make(map[uint16][]*watched, len(ports))
	for _, port := range ports {
		byPort[port] = nil
	}
	for _, w := range t.sockets {
		if w.protocol != protocol || !slices.ContainsFunc(domains, w.isIn) {
			continue
		}
		if some, wanted := byPort[w.port]; wanted {
			byPort[w.port] = append(some, w)
		}
	}
	return byPort
}

// eachConnection calls each for every connection of a TCP socket in one of the states; begin and each
// as for sockdiag.Conn.Inet.
func (t *Tracker) eachConnection(w *watched, states []sockdiag.State, begin func(), each func(*sockdiag.Inet)) error {
	q := sockdiag.Query{Family: w.domain, Protocol: w.protocol, Ports: []uint16{w.port}, States: states}
	if !w.HandedOver {
		return t.eachOfFamily(w, q, begin, each)
	}
	var rows []sockdiag.Inet // of both lists, each of which may begin anew
	for _, q.Family = range []uint8{unix.AF_INET, unix.AF_INET6} {
		n := len(rows)
		err := t.eachOfFamily(w, q, func() { rows = rows[:n] }, func(row *sockdiag.Inet) { rows = append(rows, *row) })
		if err != nil {
			return err
		}
	}
	if begin != nil {
		begin()
	}
	for i := range rows {
		each(&rows[i])
	}
	return nil
}

func (t *Tracker) eachOfFamily(w *watched, q sockdiag.Query, begin func(), each func(*sockdiag.Inet)) error {
	candidates := t.candidates(q.Protocol, []uint8{q.Family}, q.Ports)[w.port]
	return t.sockdiag.Inet(q, begin, func(row *sockdiag.Inet) {
		if slices.Contains(owners(candidates, row.Local, row.Device), w) {
			each(row)
		}
	})
}
