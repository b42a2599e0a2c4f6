package gate

import (
	"encoding/binary"
	"net/netip"
	"strconv"
)

// maxProxyHeader is how long the longest header of the PROXY protocol is: a line of version 1 about IPv6.
const maxProxyHeader = len("PROXY TCP6 ") + 2*(len("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff")+1) + len("65535 65535\r\n")

// The parts of a header of version 2, after section 2.2 of the PROXY protocol.
const (
	proxySignature = "\r\n\r\n\x00\r\nQUIT\n"
	proxyLocal     = 0x20 // version 2, LOCAL: about nobody
	proxyRelayed   = 0x21 // version 2, PROXY
	proxyUnspec    = 0x00
	proxyTCP4      = 0x11
	proxyTCP6      = 0x21
)

// appendProxyHeader appends the header that tells a destination who its client is, and which address
// the client asked for. It allocates nothing where b has room for maxProxyHeader bytes more. Where an address is
// invalid, as those of Unix sockets are, the header says that nothing is known (UNKNOWN, LOCAL), and the
// destination takes the connection as one of the gate's own. Zones are left out: the protocol has no place for them.
func appendProxyHeader(b []byte, version ProxyProtocol, client, server netip.AddrPort) []byte {
	from, to := client.Addr().Unmap().WithZone(""), server.Addr().Unmap().WithZone("")
	known := from.IsValid() && to.IsValid()
	four := from.Is4() && to.Is4()
	switch version {
	case NoProxyProtocol:
	case ProxyV1:
		if !known {
			return append(b, "PROXY UNKNOWN\r\n"...)
		}
		b = append(b, "PROXY TCP6 "...)
		if four {
			b[len(b)-2] = '4'
		}
		b = append(appendProxyAddr(b, from, four), ' ')
		b = append(appendProxyAddr(b, to, four), ' ')
		b = append(strconv.AppendUint(b, uint64(client.Port()), 10), ' ')
		b = append(strconv.AppendUint(b, uint64(server.Port()), 10), "\r\n"...)
	case ProxyV2:
		b = append(b, proxySignature...)
		if !known {
			return append(b, proxyLocal, proxyUnspec, 0, 0)
		}
		if four {
			b = append(b, proxyRelayed, proxyTCP4, 0, 4+4+2+2)
			source, destination := from.As4(), to.As4()
			b = append(append(b, source[:]...), destination[:]...)
		} else {
			b = append(b, proxyRelayed, proxyTCP6, 0, 16+16+2+2)
			source, destination := from.As16(), to.As16() // IPv4 as IPv4-mapped
			b = append(append(b, source[:]...), destination[:]...)
		}
		b = binary.BigEndian.AppendUint16(b, client.Port())
		b = binary.BigEndian.AppendUint16(b, server.Port())
	}
	return b
}

// appendProxyAddr appends an address as version 1 wants it. Beside an IPv6 address an IPv4 one is written as
// IPv4-mapped, and in hexadecimal: the protocol knows no dots in an IPv6 address.
func appendProxyAddr(b []byte, a netip.Addr, four bool) []byte {
	if four || a.Is6() {
		return a.AppendTo(b)
	}
	ip := a.As4()
	b = append(b, "::ffff:"...)
	b = append(strconv.AppendUint(b, uint64(binary.BigEndian.Uint16(ip[:2])), 16), ':')
	return strconv.AppendUint(b, uint64(binary.BigEndian.Uint16(ip[2:])), 16)
}
