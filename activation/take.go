package activation

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Take makes a Socket of a descriptor whose socket a program has made and bound, and which both share from now on. It
// need not listen yet. Of the Spec, the name and the options are used, as for an inherited socket ([Inherited.Take]); the address and
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
	if in.addr.Network == 0 || in.addr.Network.IP() && in.addr.Port == 0 {
		return nil, &SocketError{Op: "take over", Address: spec.Address, Err: unix.EADDRNOTAVAIL}
	}
	if in.domain == unix.AF_INET6 && in.addr.IP.IsUnspecified() {
		// Both versions on one socket look like IPv4 to addrPort where the address is mapped; this one is not.
		spec.Options.Family = FamilyDual
		if in.v6only {
			spec.Options.Family = FamilyIPv6
		}
	}
	s := &Socket{spec: &spec, addr: spec.Address, fd: fd, inode: in.inode, inherited: true}
	if in.addr.Network == TCP {
		// Sockets of two users cannot share an address, not even for the time that one of them is parked.
		_ = unix.Fchown(fd, os.Geteuid(), -1) // where it is not permitted, Park says that another user has bound it
	}
	if err := s.adopt(&in); err != nil {
		return nil, err
	}
	return s, nil
}

// Reopen returns the Spec by which Open makes a socket like this one, which may be inherited or taken. The error says
// why it cannot be known.
func (s *Socket) Reopen() (Spec, error) {
	spec := *s.spec
	spec.Address = s.addr
	o := &spec.Options
	switch {
	case s.addr.Network.IP():
		o.Device = s.device
		domain, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
		if err != nil {
			return Spec{}, s.failure("read address family of", err)
		}
		free := option{unix.IPPROTO_IP, unix.IP_FREEBIND}
		if domain == unix.AF_INET6 {
			free = option{unix.IPPROTO_IPV6, unix.IPV6_FREEBIND}
		}
		if on, err := unix.GetsockoptInt(s.fd, free.level, free.name); err == nil && on != 0 {
			o.FreeBind = true
		}
	case s.addr.Network.Path() && !s.addr.Abstract():
		var st unix.Stat_t
		if err := unix.Lstat(s.addr.Path, &st); err != nil {
			return Spec{}, s.failure("stat", err)
		}
		if st.Mode&unix.S_IFMT != unix.S_IFSOCK {
			return Spec{}, s.failure("stat", fmt.Errorf("%w: it is not a socket", unix.EEXIST))
		}
		look := fileLook{mode: st.Mode & 0o777, uid: st.Uid, gid: st.Gid}
		o.Mode, o.Owner, o.Group = 0, "", ""
		look.fill(o)
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
