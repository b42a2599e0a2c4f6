package forward

import (
	"fmt"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"

	"hibergate/supervisor/activity/sockdiag"
)

// isAlone returns ErrShared where another socket listens that the kernel would prefer for some of the packets which the rule
// takes. The caller holds mu.
func (t *Table) isAlone(r *rule) error {
	bound := uint32(0)
	if r.device != "" {
		i, err := net.InterfaceByName(r.device)
		if err != nil {
			return fmt.Errorf("network interface %s: %w", r.device, err)
		}
		bound = uint32(i.Index)
	}
	families := []uint8{unix.AF_INET6} // sockets of both versions are among these
	if r.version == v4 {
		families = append(families, unix.AF_INET)
	}
	var shared error
	for _, family := range families {
		q := sockdiag.Query{Family: family, Protocol: unix.IPPROTO_TCP, States: []sockdiag.State{sockdiag.Listen}, Ports: []uint16{r.port}}
		err := t.sockets.Inet(q, nil, func(s *sockdiag.Inet) {
			other := bare(s.Local.Addr())
			if s.Local.Port() != r.port || other.IsValid() && versionOf(other) != r.version {
				return
			}
			if prefers(other, s.Device, r.ip, bound) {
				shared = fmt.Errorf("%w: %v", ErrShared, s.Local)
			}
		})
		if err != nil {
			return err
		}
	}
	return shared
}

// prefers says whether some packets for a socket at one address, bound to one device, would go to the other socket that there is.
func prefers(other netip.Addr, otherDevice uint32, ours netip.Addr, ourDevice uint32) bool {
	switch {
	case other.IsValid() && ours.IsValid() && other != ours, otherDevice != 0 && ourDevice != 0 && otherDevice != ourDevice:
		return false // they have no packets in common
	case other.IsValid() != ours.IsValid():
		return other.IsValid() // an address comes first
	}
	return otherDevice != 0 && ourDevice == 0
}
