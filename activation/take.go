package activation

import (
	"golang.org/x/sys/unix"
)

// Take makes a Socket of a descriptor whose TCP or UDP socket, or Unix socket with an abstract name, a program has made and
// bound, and which both share from now on. It need not listen yet. (To open a path again that a program chose takes more care than
// the program deserves: what is behind it may be another directory by then.) Of the Spec, the name and the options are used, as for an inherited socket ([Inherited.Take]); the address and
// what belongs to it are read back from the kernel. The Socket owns the descriptor unless there is an
// error; the error is a *SocketError.
func Take(spec Spec, fd int) (*Socket, error) {
	in := inherited{fd: fd}
	if err := in.ask(); err != nil {
		return nil, &SocketError{Op: "take over", Address: spec.Address, Err: err}
	}
	spec.Address = in.addr
	if in.zone != 0 {
		spec.Address.IP = in.addr.IP.WithZone(zoneName(fd, in.zone))
	}
	a := in.addr
	if !a.Network.IP() && !a.Abstract() || a.Network.IP() && a.Port == 0 {
		return nil, &SocketError{Op: "take over", Address: spec.Address, Err: unix.EADDRNOTAVAIL}
	}
	if in.addr.IP.Is6() && in.addr.IP.IsUnspecified() {
		spec.Options.Family = FamilyDual
		if in.v6only {
			spec.Options.Family = FamilyIPv6
		}
	}
	s := &Socket{spec: &spec, addr: spec.Address, fd: fd, inode: in.inode, inherited: true, taken: true}
	if in.addr.Network == TCP {
		// As ours have it: without it, connections that the program has accepted would keep it from being parked.
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
			return nil, s.failure("set SO_REUSEADDR of", err)
		}
	}
	if err := s.adopt(&in); err != nil {
		return nil, err
	}
	return s, nil
}

// Reopen returns the Spec by which Open makes a socket like this one, which may be inherited or taken. The error says
// why it cannot be known. It may be called while the socket is closed.
func (s *Socket) Reopen() (Spec, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fd < 0 {
		return Spec{}, s.failure("describe", unix.EBADF)
	}
	spec := *s.spec
	spec.Address = s.addr
	o := &spec.Options
	if s.addr.Network.IP() {
		o.Device = s.device
		domain, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
		if err != nil {
			return Spec{}, s.failure("read address family of", err)
		}
		level, free, transparent := unix.IPPROTO_IP, unix.IP_FREEBIND, unix.IP_TRANSPARENT
		if domain == unix.AF_INET6 {
			level, free, transparent = unix.IPPROTO_IPV6, unix.IPV6_FREEBIND, unix.IPV6_TRANSPARENT
		}
		if on, err := unix.GetsockoptInt(s.fd, level, free); err == nil && on != 0 {
			o.FreeBind = true
		}
		if on, err := unix.GetsockoptInt(s.fd, level, transparent); err == nil && on != 0 {
			o.Transparent = true
		}
	}
	return spec, nil
}

// Cookie returns the number by which the kernel tells the socket from all others since the machine was
// started (SO_COOKIE, socket(7)); 0 where it cannot be had.
func (s *Socket) Cookie() uint64 { return Cookie(s.fd) }

// Cookie is [Socket.Cookie] of any descriptor.
func Cookie(fd int) uint64 {
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
	if err != nil {
		return 0
	}
	return cookie
}
