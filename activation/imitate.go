package activation

import (
	"errors"
	"fmt"
	"math"

	"golang.org/x/sys/unix"
)

// imitated are the options that a program may set on a socket before it binds it, beside those of which
// [Socket.Imitate] speaks itself. That some are not of this kind of socket, or of this kernel, is no error.
func imitated() []option {
	return []option{
		{unix.SOL_SOCKET, unix.SO_KEEPALIVE},
		{unix.SOL_SOCKET, unix.SO_OOBINLINE},
		{unix.SOL_SOCKET, unix.SO_BROADCAST},
		{unix.SOL_SOCKET, unix.SO_DONTROUTE},
		{unix.SOL_SOCKET, unix.SO_RCVLOWAT},
		{unix.SOL_SOCKET, unix.SO_MARK},
		{unix.SOL_SOCKET, unix.SO_NO_CHECK},
		{unix.SOL_SOCKET, unix.SO_PASSCRED},
		{unix.SOL_SOCKET, unix.SO_PASSSEC},
		{unix.SOL_SOCKET, unix.SO_RXQ_OVFL},
		{unix.SOL_SOCKET, unix.SO_TIMESTAMP},
		{unix.SOL_SOCKET, unix.SO_TIMESTAMPNS},
		{unix.SOL_SOCKET, unix.SO_TIMESTAMPING},
		{unix.SOL_SOCKET, unix.SO_BUSY_POLL},
		{unix.SOL_SOCKET, unix.SO_PREFER_BUSY_POLL},
		{unix.SOL_SOCKET, unix.SO_ZEROCOPY},
		{unix.SOL_SOCKET, unix.SO_MAX_PACING_RATE},

		{unix.IPPROTO_TCP, unix.TCP_NODELAY},
		{unix.IPPROTO_TCP, unix.TCP_CORK},
		{unix.IPPROTO_TCP, unix.TCP_MAXSEG},
		{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE},
		{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL},
		{unix.IPPROTO_TCP, unix.TCP_KEEPCNT},
		{unix.IPPROTO_TCP, unix.TCP_SYNCNT},
		{unix.IPPROTO_TCP, unix.TCP_LINGER2},
		{unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT},
		{unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT},
		{unix.IPPROTO_TCP, unix.TCP_FASTOPEN},
		{unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT},
		{unix.IPPROTO_TCP, unix.TCP_SAVE_SYN},
		{unix.IPPROTO_TCP, unix.TCP_THIN_LINEAR_TIMEOUTS},
		{unix.IPPROTO_TCP, unix.TCP_INQ},

		{unix.IPPROTO_UDP, unix.UDP_CORK},
		{unix.IPPROTO_UDP, unix.UDP_ENCAP},
		{unix.IPPROTO_UDP, unix.UDP_SEGMENT},
		{unix.IPPROTO_UDP, unix.UDP_GRO},
		{unix.IPPROTO_UDP, unix.UDP_NO_CHECK6_TX},
		{unix.IPPROTO_UDP, unix.UDP_NO_CHECK6_RX},

		{unix.IPPROTO_IP, unix.IP_TOS},
		{unix.IPPROTO_IP, unix.IP_TTL},
		{unix.IPPROTO_IP, unix.IP_MINTTL},
		{unix.IPPROTO_IP, unix.IP_MTU_DISCOVER},
		{unix.IPPROTO_IP, unix.IP_RECVERR},
		{unix.IPPROTO_IP, unix.IP_RECVERR_RFC4884},
		{unix.IPPROTO_IP, unix.IP_PKTINFO},
		{unix.IPPROTO_IP, unix.IP_RECVOPTS},
		{unix.IPPROTO_IP, unix.IP_RETOPTS},
		{unix.IPPROTO_IP, unix.IP_RECVTOS},
		{unix.IPPROTO_IP, unix.IP_RECVTTL},
		{unix.IPPROTO_IP, unix.IP_RECVORIGDSTADDR},
		{unix.IPPROTO_IP, unix.IP_RECVFRAGSIZE},
		{unix.IPPROTO_IP, unix.IP_FREEBIND},
		{unix.IPPROTO_IP, unix.IP_TRANSPARENT},
		{unix.IPPROTO_IP, unix.IP_MULTICAST_TTL},
		{unix.IPPROTO_IP, unix.IP_MULTICAST_LOOP},
		{unix.IPPROTO_IP, unix.IP_MULTICAST_ALL},
		{unix.IPPROTO_IP, unix.IP_CHECKSUM},

		{unix.IPPROTO_IPV6, unix.IPV6_TCLASS},
		{unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS},
		{unix.IPPROTO_IPV6, unix.IPV6_MINHOPCOUNT},
		{unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER},
		{unix.IPPROTO_IPV6, unix.IPV6_DONTFRAG},
		{unix.IPPROTO_IPV6, unix.IPV6_AUTOFLOWLABEL},
		{unix.IPPROTO_IPV6, unix.IPV6_RECVERR},
		{unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO},
		{unix.IPPROTO_IPV6, unix.IPV6_RECVHOPLIMIT},
		{unix.IPPROTO_IPV6, unix.IPV6_RECVTCLASS},
		{unix.IPPROTO_IPV6, unix.IPV6_RECVORIGDSTADDR},
		{unix.IPPROTO_IPV6, unix.IPV6_RECVFRAGSIZE},
		{unix.IPPROTO_IPV6, unix.IPV6_FREEBIND},
		{unix.IPPROTO_IPV6, unix.IPV6_TRANSPARENT},
		{unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_HOPS},
		{unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_LOOP},
		{unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_ALL},

		{unix.SOL_SOCKET, unix.SO_PRIORITY}, // after IP_TOS, which sets one of its own (socket(7))
	}
}

// imitation is what a socket was like before Imitate changed it, and what new sockets of the program's kind are like.
type imitation struct {
	domain, kind int
	usual        []int32 // by option of imitated; missing: there is none
	own          []int32
	usualControl string // TCP_CONGESTION
	ownControl   string
	buffers      ownBuffers
	noBuffers    bool // the kernel does not tell who has set them
}

// missing stands for an option that a kind of socket does not have.
const missing = math.MinInt32

// Imitate gives the socket what a program has set on one of its own, of the same kind but for the protocol
// (MPTCP), which the program is about to lose for this one: integer options, buffer sizes, linger, time limits and
// congestion control, and O_NONBLOCK. What the program has left as it was becomes again what this socket had
// before the first call; it is found by comparing with a new socket. The descriptor is borrowed. It may be called from several
// goroutines.
//
// Some options take privilege that the program had and we may lack. The error says which could not be
// set; all others are.
func (s *Socket) Imitate(fd int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	m, err := s.imitator(fd)
	if err == nil {
		err = errors.Join(s.imitateOptions(m, fd), s.imitateTimes(fd), s.imitateBuffers(m, fd), s.imitateControl(m, fd), copyNonblock(s.fd, fd))
	}
	if err != nil {
		return s.failure("imitate socket of a program for", err)
	}
	return nil
}

// imitator finds out what is usual for a socket of the program's kind, and at the first time what is ours.
func (s *Socket) imitator(fd int) (*imitation, error) {
	domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	if err != nil {
		return nil, err
	}
	kind, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil {
		return nil, err
	}
	m := s.imitated
	if m == nil {
		options := imitated()
		m = &imitation{own: optionValues(options, s.fd)}
		for i, o := range options {
			packetInfo := o == option{unix.IPPROTO_IP, unix.IP_PKTINFO} || o == option{unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO}
			switch {
			case m.own[i] == missing:
			case packetInfo && s.spec.Options.PacketInfo: // that is for the datagrams that wait
				m.own[i] = 0
			case o == option{unix.IPPROTO_TCP, unix.TCP_MAXSEG}: // 0 is for none; the kernel tells another number
				m.own[i] = 0
			}
		}
		if s.addr.Network == TCP {
			if m.ownControl, err = unix.GetsockoptString(s.fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION); err != nil {
				return nil, err
			}
		}
		m.buffers, err = readBuffers(s.fd)
		if m.noBuffers = unknownOption(err); err != nil && !m.noBuffers {
			return nil, err
		}
		s.imitated = m
	}
	if m.domain == domain && m.kind == kind {
		return m, nil
	}
	plain, err := unix.Socket(domain, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(plain) //nolint:errcheck // it was only compared with
	if s.addr.Network == TCP {
		if m.usualControl, err = unix.GetsockoptString(plain, unix.IPPROTO_TCP, unix.TCP_CONGESTION); err != nil {
			return nil, err
		}
	}
	m.usual, m.domain, m.kind = optionValues(imitated(), plain), domain, kind
	return m, nil
}

// optionValues reads options of a socket, by their place in the list.
func optionValues(options []option, fd int) []int32 {
	values := make([]int32, len(options))
	for i, o := range options {
		value, err := unix.GetsockoptInt(fd, o.level, o.name)
		if values[i] = int32(value); err != nil {
			values[i] = missing
		}
	}
	return values
}

// imitateOptions is about those that are integers.
func (s *Socket) imitateOptions(m *imitation, fd int) error {
	var errs []error
	for i, o := range imitated() {
		if m.usual[i] == missing || m.own[i] == missing { // an IPv6 program may have an IPv4 socket
			continue
		}
		want := m.own[i]
		if theirs, err := unix.GetsockoptInt(fd, o.level, o.name); err == nil && int32(theirs) != m.usual[i] {
			want = int32(theirs)
		}
		// Also what a program has set when it had ours.
		if now, err := unix.GetsockoptInt(s.fd, o.level, o.name); err != nil || int32(now) == want {
			continue
		}
		if err := unix.SetsockoptInt(s.fd, o.level, o.name, int(want)); err != nil {
			errs = append(errs, fmt.Errorf("socket option %d of level %d: %w", o.name, o.level, err))
		}
	}
	return errors.Join(errs...)
}

// imitateControl is about TCP_CONGESTION, which is a string.
func (s *Socket) imitateControl(m *imitation, fd int) error {
	if s.addr.Network != TCP {
		return nil
	}
	want := m.ownControl
	if theirs, err := unix.GetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION); err == nil && theirs != m.usualControl {
		want = theirs // MPTCP sockets of old kernels do not tell
	}
	if ours, err := unix.GetsockoptString(s.fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION); err != nil || ours == want {
		return err
	}
	return unix.SetsockoptString(s.fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, want)
}

// ownBuffers are the sizes of the buffers, as the kernel tells them, and who of them was set (SO_BUF_LOCK, socket(7), Linux 5.14).
type ownBuffers struct{ receive, send, set int }

// imitateBuffers copies the sizes that a program has set, and has the kernel adapt the others again.
func (s *Socket) imitateBuffers(m *imitation, fd int) error {
	if m.noBuffers {
		return nil
	}
	now, err := readBuffers(s.fd)
	if err != nil {
		return err
	}
	theirs, err := readBuffers(fd)
	if err != nil || now.set|theirs.set == 0 {
		return err
	}
	if err := copyBuffers(s.fd, fd); err != nil {
		return err
	}
	// Setting a size is a lock on it, which is then as it was.
	back := now.set &^ theirs.set
	if back&lockedReceive != 0 && now.receive != m.buffers.receive {
		err = setBuffer(s.fd, m.buffers.receive, unix.SO_RCVBUF, unix.SO_RCVBUFFORCE)
	}
	if err == nil && back&lockedSend != 0 && now.send != m.buffers.send {
		err = setBuffer(s.fd, m.buffers.send, unix.SO_SNDBUF, unix.SO_SNDBUFFORCE)
	}
	if want := m.buffers.set | theirs.set; err == nil && back != 0 && want != now.set|theirs.set {
		err = unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_BUF_LOCK, want)
	}
	return err
}

func readBuffers(fd int) (b ownBuffers, err error) {
	if b.set, err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_BUF_LOCK); err != nil {
		return b, err
	}
	if b.receive, err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF); err != nil {
		return b, err
	}
	b.send, err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF)
	return b, err
}

// imitateTimes copies SO_LINGER, SO_RCVTIMEO and SO_SNDTIMEO, which [Socket.Restore] sets back.
func (s *Socket) imitateTimes(fd int) error {
	linger, err := unix.GetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER)
	if err == nil && linger.Onoff != 0 {
		err = unix.SetsockoptLinger(s.fd, unix.SOL_SOCKET, unix.SO_LINGER, linger)
	}
	for _, name := range []int{unix.SO_RCVTIMEO, unix.SO_SNDTIMEO} {
		if err != nil {
			break
		}
		var limit *unix.Timeval
		if limit, err = unix.GetsockoptTimeval(fd, unix.SOL_SOCKET, name); err == nil && *limit != (unix.Timeval{}) {
			err = unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, name, limit)
		}
	}
	return err
}

// copyNonblock copies the flag of the open file description that poll(2) and its like do not depend on.
func copyNonblock(to, from int) error {
	flags, err := unix.FcntlInt(uintptr(from), unix.F_GETFL, 0)
	if err != nil {
		return err
	}
	return unix.SetNonblock(to, flags&unix.O_NONBLOCK != 0)
}

// Copy gives a socket that is not bound yet what is set on another one of the same address family and type, which is
// not bound either, and the same owner. Both are borrowed.
func Copy(to, from int) error {
	errs := []error{sameOwner(to, from)}
	for _, o := range append(likeness(), option{unix.SOL_SOCKET, unix.SO_REUSEPORT}) {
		_, theirs := unix.GetsockoptInt(from, o.level, o.name)
		_, ours := unix.GetsockoptInt(to, o.level, o.name)
		if theirs == nil && ours == nil {
			errs = append(errs, o.copy(to, from))
		}
	}
	if err := copyBuffers(to, from); !unknownOption(err) {
		errs = append(errs, err)
	}
	return errors.Join(append(errs, copyNonblock(to, from))...)
}
