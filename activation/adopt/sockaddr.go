package adopt

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"strconv"

	"golang.org/x/sys/unix"
)

// sockaddr is what bind(2) was told, as far as it is of a family that we have sockets of.
type sockaddr struct {
	family uint16 // AF_INET, AF_INET6 or AF_UNIX
	ip     netip.Addr
	port   uint16
	path   string // AF_UNIX: as given; an abstract name begins with a NUL
}

// parseSockaddr reads a struct sockaddr_in, sockaddr_in6 or sockaddr_un. ok is false for all that is
// not ours to judge, be it of another family or wrong: the kernel knows what to say.
func parseSockaddr(b []byte) (a sockaddr, ok bool) {
	if len(b) < 2 {
		return a, false
	}
	a.family = binary.NativeEndian.Uint16(b)
	switch {
	case a.family == unix.AF_INET && len(b) >= lenInet4:
		a.port = binary.BigEndian.Uint16(b[2:])
		a.ip = netip.AddrFrom4([4]byte(b[4:8]))
		return a, true
	case a.family == unix.AF_INET6 && len(b) >= lenInet6Old:
		a.port = binary.BigEndian.Uint16(b[2:])
		a.ip = netip.AddrFrom16([16]byte(b[8:24]))
		if len(b) >= lenInet6 && (a.ip.IsLinkLocalUnicast() || a.ip.IsLinkLocalMulticast() || a.ip.IsInterfaceLocalMulticast()) {
			if scope := binary.NativeEndian.Uint32(b[24:]); scope != 0 {
				a.ip = a.ip.WithZone(strconv.FormatUint(uint64(scope), 10))
			}
		}
		return a, true
	case a.family == unix.AF_UNIX && len(b) > 2 && len(b) <= lenUnix:
		path := b[2:]
		if path[0] != 0 {
			path, _, _ = bytes.Cut(path, []byte{0})
		}
		a.path = string(path)
		return a, true
	}
	return a, false
}

// parseSocketAddress is parseSockaddr of what package unix has read.
func parseSocketAddress(sa unix.Sockaddr) (a sockaddr, ok bool) {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return sockaddr{family: unix.AF_INET, ip: netip.AddrFrom4(sa.Addr), port: uint16(sa.Port)}, true
	case *unix.SockaddrInet6:
		ip := netip.AddrFrom16(sa.Addr)
		if sa.ZoneId != 0 {
			ip = ip.WithZone(strconv.FormatUint(uint64(sa.ZoneId), 10))
		}
		return sockaddr{family: unix.AF_INET6, ip: ip, port: uint16(sa.Port)}, true
	}
	return sockaddr{}, false
}
