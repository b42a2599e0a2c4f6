package activation

import "net/netip"

// Conflicts says whether the two sockets cannot both be opened: the same port and
// network with IPs that overlap, or the same path. It knows that
// sockets of different IP versions or devices, and sockets that both have
// ReusePort, do not disturb each other.
func (s Spec) Conflicts(o Spec) bool {
	a, b := s.Options, o.Options
	if s.Address.Network.IP() && (a.ReusePort && b.ReusePort || a.Device != "" && b.Device != "" && a.Device != b.Device) {
		return false
	}
	return s.overlaps(o)
}

// overlaps compares addresses and families.
func (s Spec) overlaps(o Spec) bool {
	a, b := s.Address, o.Address
	switch {
	case a.Network.Path() && b.Network.Path():
		// The file system knows paths and no types; abstract names are apart for each type (unix(7)).
		return a.Path == b.Path && (!a.Abstract() || a.Network == b.Network)
	// The kernel chooses a free port for each socket with port 0.
	case !a.Network.IP() || a.Network != b.Network || a.Port != b.Port || a.Port == 0:
		return false
	}
	x, y := reachOf(a.IP, s.Options.Family), reachOf(b.IP, o.Options.Family)
	versions := x.v4 && y.v4 || x.v6 && y.v6
	return versions && (x.all || y.all || a.IP == b.IP)
}

// reach is what a bound IP address receives.
type reach struct {
	v4, v6 bool
	all    bool // every address of these versions
}

// reachOf takes an IPv6 wildcard of the default family for dual stack, which it is
// unless bindv6only is set.
func reachOf(ip netip.Addr, f Family) reach {
	switch {
	case ip.Is4():
		return reach{v4: true, all: ip.IsUnspecified()}
	case ip.IsValid() && !ip.IsUnspecified():
		return reach{v6: true}
	}
	return reach{v4: f != FamilyIPv6, v6: f != FamilyIPv4, all: true}
}
