package activation

import (
	"errors"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Peer is the other end of an accepted connection.
type Peer struct {
	// Remote and Local are the two ends of a TCP connection, IPv4 as IPv4
	// on dual-stack sockets too. They are invalid for Unix sockets.
	Remote, Local netip.AddrPort

	// Unix sockets: the path or "@name" that the client has bound, which is rare, and
	// the credentials that it had when it connected. PID is 0 for a process in
	// another pid namespace.
	Path     string
	UID, GID uint32
	PID      int32
	Known    bool // UID, GID and PID are the client's
}

// Accept takes one connection from the queue. The descriptor is close-on-exec and
// blocking, which is what most programs expect of their standard input, and
// belongs to the caller. What cannot be found out about a client that has
// already left stays empty. [KindOfAcceptError] says what to do about an error.
func (s *Socket) Accept() (fd int, peer Peer, err error) {
	if !s.addr.Network.Connections() {
		return -1, Peer{}, errors.New("accept on " + s.addr.String() + ": it has no connections")
	}
	for {
		var remote unix.Sockaddr
		fd, remote, err = unix.Accept4(s.fd, unix.SOCK_CLOEXEC)
		switch {
		case err == nil:
			return fd, s.peer(fd, remote), nil
		case !errors.Is(err, unix.EINTR):
			return -1, Peer{}, s.failure("accept on", err)
		}
	}
}

// peer asks who is at the other end. It never fails: what a client that has left
// takes with it stays empty.
func (s *Socket) peer(fd int, remote unix.Sockaddr) Peer {
	if s.addr.Network == TCP {
		p := Peer{Remote: addrPortZone(fd, remote)}
		if ip := s.addr.IP; ip.IsValid() && !ip.IsUnspecified() && !s.spec.Options.Transparent {
			p.Local = netip.AddrPortFrom(s.addr.IP, s.addr.Port) // bound to it, so no need to ask
		} else if local, err := unix.Getsockname(fd); err == nil {
			p.Local = addrPortZone(fd, local)
		}
		return p
	}
	p := Peer{Path: unixPath(remote)}
	if cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
		p.UID, p.GID, p.PID, p.Known = cred.Uid, cred.Gid, cred.Pid, true
	}
	return p
}

// AcceptErrorKind says what to do after an error of [Socket.Accept].
type AcceptErrorKind uint8

// The kinds of errors.
const (
	AcceptFailed   AcceptErrorKind = iota // nothing helps: not a listening socket, or not open
	AcceptEmpty                           // the queue is empty: wait
	AcceptSkip                            // this connection was lost: accept the next one
	AcceptPause                           // descriptors or memory ran out: try again later, and keep the socket
	AcceptShutDown                        // a process shut the TCP socket down: call Revive. A Unix socket says that it is empty; Pending tells
)

// KindOfAcceptError sorts the errors of Accept, after accept(2).
func KindOfAcceptError(err error) AcceptErrorKind {
	var errno unix.Errno
	if !errors.As(err, &errno) {
		return AcceptFailed
	}
	switch errno { //nolint:exhaustive // accept(2) returns these
	case unix.EAGAIN:
		return AcceptEmpty
	case unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM:
		return AcceptPause
	case unix.EINVAL:
		return AcceptShutDown
	// Errors of the new connection that Linux reports here, and EPERM of a firewall.
	case unix.ECONNABORTED, unix.ECONNRESET, unix.EPROTO, unix.ENOPROTOOPT, unix.EPERM, unix.ETIMEDOUT,
		unix.ENETDOWN, unix.ENETUNREACH, unix.EHOSTDOWN, unix.EHOSTUNREACH, unix.ENONET, unix.EOPNOTSUPP:
		return AcceptSkip
	}
	return AcceptFailed
}
