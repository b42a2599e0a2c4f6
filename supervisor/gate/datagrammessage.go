package gate

import (
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxDatagram is enough for every datagram: 65507 bytes over IPv4, 65527 over IPv6.
const maxDatagram = 64 << 10

// datagramPath says between which addresses a datagram of a listening socket went.
type datagramPath struct {
	client netip.AddrPort // IPv4 as IPv4, without a zone
	local  netip.Addr     // that the client has sent to; invalid where the kernel did not tell
	scope  uint32         // the number of the interface where an IPv6 address is link-local; else 0
	six    bool           // the socket is of IPv6
}

// datagramMessage is what recvmsg(2) and sendmsg(2) take, to be used again and again: those of package unix allocate
// for each datagram. It has to be on the heap, as it points at itself.
type datagramMessage struct {
	header  unix.Msghdr
	vector  unix.Iovec
	name    unix.RawSockaddrInet6
	control [16]uint64 // aligned as a unix.Cmsghdr; what does not fit into it is left out by the kernel
}

// prepare points the header at b and at what else there is room for.
func (m *datagramMessage) prepare(b []byte, name, control int) {
	m.header = unix.Msghdr{Iov: &m.vector}
	m.header.SetIovlen(1)
	m.vector = unix.Iovec{Base: unsafe.SliceData(b)}
	m.vector.SetLen(len(b))
	if name > 0 {
		m.header.Name = (*byte)(unsafe.Pointer(&m.name))
		m.header.Namelen = uint32(name)
	}
	if control > 0 {
		m.header.Control = (*byte)(unsafe.Pointer(&m.control))
		m.header.SetControllen(control)
	}
}

// receive takes one datagram without waiting, and returns its length. The error is a unix.Errno.
func (m *datagramMessage) receive(fd int, b []byte) (int, error) {
	m.prepare(b, unix.SizeofSockaddrInet6, int(unsafe.Sizeof(m.control)))
	return m.call(unix.SYS_RECVMSG, fd)
}

// send sends one datagram on a socket that is connected, without waiting. The error is a unix.Errno.
func (m *datagramMessage) send(fd int, b []byte) error {
	m.prepare(b, 0, 0)
	_, err := m.call(unix.SYS_SENDMSG, fd)
	return err
}

// answer sends one datagram back to where another one came from, with the address that it went to
// as its source. The error is a unix.Errno.
func (m *datagramMessage) answer(fd int, b []byte, p *datagramPath) error {
	name, control := m.setName(p), 0
	if p.local.IsValid() {
		control = m.setSource(p)
	}
	m.prepare(b, name, control)
	_, err := m.call(unix.SYS_SENDMSG, fd)
	return err
}

func (m *datagramMessage) call(trap uintptr, fd int) (int, error) {
	for {
		n, _, errno := unix.Syscall(trap, uintptr(fd), uintptr(unsafe.Pointer(&m.header)), unix.MSG_DONTWAIT)
		switch errno { //nolint:exhaustive // it is for the caller to tell the others apart
		case 0:
			return int(n), nil
		case unix.EINTR:
		default:
			return 0, errno
		}
	}
}

// datagramPort turns a port between the orders of network and machine.
func datagramPort(p uint16) uint16 {
	b := (*[2]byte)(unsafe.Pointer(&p))
	return uint16(b[0])<<8 | uint16(b[1])
}

// setName makes the client the one who gets the datagram, and returns the size of the name.
func (m *datagramMessage) setName(p *datagramPath) int {
	port := datagramPort(p.client.Port())
	if !p.six {
		*(*unix.RawSockaddrInet4)(unsafe.Pointer(&m.name)) = unix.RawSockaddrInet4{Family: unix.AF_INET, Port: port, Addr: p.client.Addr().As4()}
		return unix.SizeofSockaddrInet4
	}
	m.name = unix.RawSockaddrInet6{Family: unix.AF_INET6, Port: port, Addr: p.client.Addr().As16()}
	if p.client.Addr().IsLinkLocalUnicast() {
		m.name.Scope_id = p.scope
	}
	return unix.SizeofSockaddrInet6
}

// setSource makes p.local the source (IP_PKTINFO of ip(7), IPV6_PKTINFO of ipv6(7)), and returns the size of the control
// message. Through which interface the datagram leaves is for the routes to say, unless an address means
// nothing without one: the way back need not be the way that the client's datagram took.
func (m *datagramMessage) setSource(p *datagramPath) int {
	h := (*unix.Cmsghdr)(unsafe.Pointer(&m.control))
	data := unsafe.Add(unsafe.Pointer(&m.control), unix.CmsgLen(0))
	if p.local.Is4() {
		*h = unix.Cmsghdr{Level: unix.IPPROTO_IP, Type: unix.IP_PKTINFO}
		h.SetLen(unix.CmsgLen(unix.SizeofInet4Pktinfo))
		*(*unix.Inet4Pktinfo)(data) = unix.Inet4Pktinfo{Spec_dst: p.local.As4()}
		return unix.CmsgSpace(unix.SizeofInet4Pktinfo)
	}
	*h = unix.Cmsghdr{Level: unix.IPPROTO_IPV6, Type: unix.IPV6_PKTINFO}
	h.SetLen(unix.CmsgLen(unix.SizeofInet6Pktinfo))
	*(*unix.Inet6Pktinfo)(data) = unix.Inet6Pktinfo{Addr: p.local.As16(), Ifindex: p.scope}
	return unix.CmsgSpace(unix.SizeofInet6Pktinfo)
}

// path returns where the datagram came from that was received at last.
func (m *datagramMessage) path() datagramPath {
	if m.name.Family != unix.AF_INET6 {
		sa := (*unix.RawSockaddrInet4)(unsafe.Pointer(&m.name))
		p := datagramPath{client: netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), datagramPort(sa.Port))}
		m.readSource(&p)
		return p
	}
	ip := netip.AddrFrom16(m.name.Addr).Unmap()
	p := datagramPath{client: netip.AddrPortFrom(ip, datagramPort(m.name.Port)), six: true}
	if ip.IsLinkLocalUnicast() {
		p.scope = m.name.Scope_id
	}
	m.readSource(&p)
	return p
}

// readSource finds the address in the control messages that an answer is to come from.
func (m *datagramMessage) readSource(p *datagramPath) {
	b := unsafe.Slice((*byte)(unsafe.Pointer(&m.control)), min(int(m.header.Controllen), int(unsafe.Sizeof(m.control))))
	for len(b) >= unix.CmsgLen(0) {
		h := (*unix.Cmsghdr)(unsafe.Pointer(unsafe.SliceData(b)))
		size := int(h.Len)
		if size < unix.CmsgLen(0) || size > len(b) {
			return
		}
		data := b[unix.CmsgLen(0):size]
		switch {
		case h.Level == unix.IPPROTO_IP && h.Type == unix.IP_PKTINFO && len(data) >= unix.SizeofInet4Pktinfo:
			p.readSource4((*unix.Inet4Pktinfo)(unsafe.Pointer(unsafe.SliceData(data))))
		case h.Level == unix.IPPROTO_IPV6 && h.Type == unix.IPV6_PKTINFO && len(data) >= unix.SizeofInet6Pktinfo:
			p.readSource6((*unix.Inet6Pktinfo)(unsafe.Pointer(unsafe.SliceData(data))))
		}
		b = b[min(unix.CmsgSpace(size-unix.CmsgLen(0)), len(b)):]
	}
}

// readSource4 takes the address of ours that the kernel would answer from. It is another one than the datagram
// went to where that was for many (broadcast, multicast).
func (p *datagramPath) readSource4(info *unix.Inet4Pktinfo) {
	if ip := netip.AddrFrom4(info.Spec_dst); !ip.IsUnspecified() {
		p.local = ip
	}
}

// readSource6 takes the address that the datagram went to. That of IPv4 is left to readSource4, but for
// sockets that have the option of IPv6 alone. Nobody can answer from a multicast address: the kernel chooses.
func (p *datagramPath) readSource6(info *unix.Inet6Pktinfo) {
	ip := netip.AddrFrom16(info.Addr).Unmap()
	if ip.Is4() && p.local.IsValid() || ip.IsMulticast() || ip.IsUnspecified() {
		return
	}
	p.local = ip
	if ip.IsLinkLocalUnicast() && ip.Is6() {
		p.scope = info.Ifindex
	}
}
