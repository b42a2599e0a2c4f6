package activation

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// twin is a second TCP socket like one that is bound. It is asked of the kernel what that one is like, so
// that it also holds for what another program has set, one that handed it over or one that shares it.
type twin struct {
	fd int
	to unix.Sockaddr // what the first one is bound to
}

// twin makes a socket that is not bound yet. The caller closes it.
func (s *Socket) twin() (twin, error) {
	domain, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	if err != nil {
		return twin{}, err
	}
	t := twin{}
	if t.to, err = s.sockaddr(domain); err != nil {
		return twin{}, err
	}
	t.fd, err = unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return twin{}, err
	}
	if err := sameOwner(t.fd, s.fd); err != nil {
		return twin{}, errors.Join(err, unix.Close(t.fd))
	}
	for _, o := range likeness() {
		if domain == unix.AF_INET && o.level == unix.IPPROTO_IPV6 {
			continue
		}
		if err := o.copy(t.fd, s.fd); err != nil {
			return twin{}, errors.Join(err, unix.Close(t.fd))
		}
	}
	if err := errors.Join(copyBuffers(t.fd, s.fd), copyCongestion(t.fd, s.fd)); err != nil {
		return twin{}, errors.Join(err, unix.Close(t.fd))
	}
	return t, nil
}

// sameOwner has a socket belong to the user to whom another one belongs: only sockets of one user can share an address. The
// kernel keeps that user in the inode (fchown(2)).
func sameOwner(fd, as int) error {
	var ours, theirs unix.Stat_t
	if err := errors.Join(unix.Fstat(fd, &ours), unix.Fstat(as, &theirs)); err != nil || ours.Uid == theirs.Uid {
		return err
	}
	if err := unix.Fchown(fd, int(theirs.Uid), -1); err != nil {
		return fmt.Errorf("%w: another user has bound it: give socket to user %d: %w", ErrNotParkable, theirs.Uid, err)
	}
	return nil
}

// bind binds it to the address that the first one has, which has to agree ([Socket.letJoin]).
func (t twin) bind() error {
	if err := unix.SetsockoptInt(t.fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1); err != nil {
		return fmt.Errorf("share address: %w", err)
	}
	return unix.Bind(t.fd, t.to)
}

// letJoin lets other sockets of the same user be bound to the address. It is only asked now: with a
// socket that shared its address from the beginning, Open would not find out that it is taken.
func (s *Socket) letJoin() error {
	if err := unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1); err != nil {
		return fmt.Errorf("share address: %w", err)
	}
	return nil
}

// letNobodyJoin takes letJoin back.
func (s *Socket) letNobodyJoin() {
	_ = unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 0) // does not fail where 1 did not
	// The kernel remembers that the port was shared last, and by whom, and does not look at the sockets
	// again (fastreuseport in inet_csk_get_port). It forgets that when a socket is bound that does not
	// share. Only TCP_REPAIR lets it be bound now, which takes CAP_NET_ADMIN: without that, a program of
	// the same user that asks to share is not refused any more.
	t, err := s.twin()
	if err != nil {
		return
	}
	if unix.SetsockoptInt(t.fd, unix.IPPROTO_TCP, unix.TCP_REPAIR, 1) == nil {
		_ = unix.Bind(t.fd, t.to) // nothing else is to be had
	}
	_ = unix.Close(t.fd) // it never received anything
}

// option is a socket option that is an integer.
type option struct{ level, name int }

// likeness are the options that decide what bind(2) binds to, and those that accepted sockets inherit: all that
// Options can ask for, and what a program may set in their place.
func likeness() []option {
	return []option{
		{unix.SOL_SOCKET, unix.SO_REUSEADDR},
		{unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX},
		{unix.IPPROTO_IP, unix.IP_FREEBIND},
		{unix.IPPROTO_IP, unix.IP_TRANSPARENT},
		{unix.IPPROTO_IPV6, unix.IPV6_V6ONLY},
		{unix.IPPROTO_IPV6, unix.IPV6_FREEBIND},
		{unix.IPPROTO_IPV6, unix.IPV6_TRANSPARENT},

		{unix.SOL_SOCKET, unix.SO_KEEPALIVE},
		{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE},
		{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL},
		{unix.IPPROTO_TCP, unix.TCP_KEEPCNT},
		{unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT},
		{unix.IPPROTO_TCP, unix.TCP_NODELAY},
		{unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT},
		{unix.SOL_SOCKET, unix.SO_RCVLOWAT},
		{unix.SOL_SOCKET, unix.SO_MARK},
		{unix.IPPROTO_IP, unix.IP_TOS},
		{unix.IPPROTO_IP, unix.IP_TTL},
		{unix.IPPROTO_IPV6, unix.IPV6_TCLASS},
		{unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS},
		{unix.SOL_SOCKET, unix.SO_PRIORITY}, // after IP_TOS, which sets one of its own (socket(7))
	}
}

// copy gives the option of one socket to another.
func (o option) copy(to, from int) error {
	want, err := unix.GetsockoptInt(from, o.level, o.name)
	if errors.Is(err, unix.ENOPROTOOPT) {
		return nil // the kernel does not have it
	}
	got, e := unix.GetsockoptInt(to, o.level, o.name)
	if err = errors.Join(err, e); err == nil && got != want {
		err = unix.SetsockoptInt(to, o.level, o.name, want) // some take privilege, so only where it matters
	}
	if err != nil {
		return fmt.Errorf("copy socket option %d of level %d: %w", o.name, o.level, err)
	}
	return nil
}

// SOCK_SNDBUF_LOCK and SOCK_RCVBUF_LOCK of SO_BUF_LOCK (socket(7), Linux 5.14).
const lockedSend, lockedReceive = 1, 2

// copyBuffers copies the sizes of buffers that somebody has set; the others are for the kernel to adapt.
func copyBuffers(to, from int) error {
	set, err := unix.GetsockoptInt(from, unix.SOL_SOCKET, unix.SO_BUF_LOCK)
	if err == nil && set&lockedSend != 0 {
		err = copyBuffer(to, from, unix.SO_SNDBUF, unix.SO_SNDBUFFORCE)
	}
	if err == nil && set&lockedReceive != 0 {
		err = copyBuffer(to, from, unix.SO_RCVBUF, unix.SO_RCVBUFFORCE)
	}
	if err != nil {
		return fmt.Errorf("copy buffer sizes: %w", err)
	}
	return nil
}

func copyBuffer(to, from, option, force int) error {
	size, err := unix.GetsockoptInt(from, unix.SOL_SOCKET, option)
	if err != nil {
		return err
	}
	return setBuffer(to, size, option, force)
}

// setBuffer sets a size as the kernel tells it, which is twice what it is to be told.
func setBuffer(fd, size, option, force int) error {
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, force, size/2) == nil {
		return nil
	}
	return unix.SetsockoptInt(fd, unix.SOL_SOCKET, option, size/2)
}

// copyCongestion copies the congestion control.
func copyCongestion(to, from int) error {
	want, err := unix.GetsockoptString(from, unix.IPPROTO_TCP, unix.TCP_CONGESTION)
	got, e := unix.GetsockoptString(to, unix.IPPROTO_TCP, unix.TCP_CONGESTION)
	if err = errors.Join(err, e); err == nil && got != want {
		err = unix.SetsockoptString(to, unix.IPPROTO_TCP, unix.TCP_CONGESTION, want)
	}
	if err != nil {
		return fmt.Errorf("copy congestion control: %w", err)
	}
	return nil
}
