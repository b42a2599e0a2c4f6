package activation

import (
	"fmt"
	"net/netip"
	"strconv"

	"golang.org/x/sys/unix"
)

// sockaddr returns what bind(2) takes for s.addr. Paths are not its business.
func (s *Socket) sockaddr(domain int) (unix.Sockaddr, error) {
	a := s.addr
	switch domain {
	case unix.AF_UNIX:
		return &unix.SockaddrUnix{Name: a.Path}, nil // a leading "@" makes it abstract
	case unix.AF_INET:
		sa := &unix.SockaddrInet4{Port: int(a.Port)}
		if a.IP.IsValid() {
			sa.Addr = a.IP.As4()
		}
		return sa, nil
	}
	sa := &unix.SockaddrInet6{Port: int(a.Port)}
	if a.IP.IsValid() {
		sa.Addr = a.IP.As16()
	}
	zone, err := zoneIndex(s.fd, a.IP.Zone())
	sa.ZoneId = zone
	return sa, err
}

// zoneIndex turns the name of a network interface, or its number, into its number.
// fd is any socket of the same network namespace.
func zoneIndex(fd int, zone string) (uint32, error) {
	if zone == "" {
		return 0, nil
	}
	if n, err := strconv.ParseUint(zone, 10, 32); err == nil {
		return uint32(n), nil
	}
	ifr, err := unix.NewIfreq(zone)
	if err == nil {
		err = unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, ifr)
	}
	if err != nil {
		return 0, fmt.Errorf("interface %s: %w", zone, err)
	}
	return ifr.Uint32(), nil
}

// zoneName is the reverse of zoneIndex: the name, or the number of an interface
// that is gone.
func zoneName(fd int, index uint32) string {
	if index == 0 {
		return ""
	}
	if ifr, err := unix.NewIfreq(""); err == nil {
		ifr.SetUint32(index)
		if unix.IoctlIfreq(fd, unix.SIOCGIFNAME, ifr) == nil {
			return ifr.Name()
		}
	}
	return strconv.FormatUint(uint64(index), 10)
}

// addrPort returns the IP address and port in sa without its zone, IPv4 in IPv6
// form as IPv4, and the zero AddrPort for what has none.
func addrPort(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port))
	}
	return netip.AddrPort{}
}

// addrPortZone is addrPort with the zone, by its name.
func addrPortZone(fd int, sa unix.Sockaddr) netip.AddrPort {
	ap := addrPort(sa)
	if sa6, ok := sa.(*unix.SockaddrInet6); ok && sa6.ZoneId != 0 && ap.Addr().Is6() {
		ap = netip.AddrPortFrom(ap.Addr().WithZone(zoneName(fd, sa6.ZoneId)), ap.Port())
	}
	return ap
}

// unixPath returns the path or "@name" in sa; empty for an unnamed socket and for
// what is no Unix socket.
func unixPath(sa unix.Sockaddr) string {
	if sa, ok := sa.(*unix.SockaddrUnix); ok && sa.Name != "@" { // x/sys says "@" for unnamed ones
		return sa.Name
	}
	return ""
}
