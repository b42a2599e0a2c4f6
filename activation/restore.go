package activation

import (
	"errors"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Restore undoes what a process that shared the socket may have left on it, and says
// whether the socket had a peer and has none any more. It is to be called when the process
// has ended, before the socket is armed again. What waits in the queue stays there.
//
// A datagram socket that was connected to one peer receives from everybody again, at the
// same address and port. A UDP socket is replaced for that, unless it is an IPv4 one with a
// port of the Spec's and without a device. So a Watcher must have forgotten it before, as
// for [Socket.Revive], and its Inode may change. Where the queue would be lost, which is so
// for a unixgram socket as well, it keeps its peer while something waits: Restore does it
// after the process that takes it.
//
// A listening socket gets its own backlog again, except for an inherited one whose Spec has
// none. A socket that was shut down is left to Revive. Address, Spec and FD may be called at
// the same time. The error is a *SocketError.
func (s *Socket) Restore() (changed bool, err error) {
	switch s.addr.Network {
	case TCP, Unix, Unixpacket:
		return false, s.restoreBacklog()
	case UDP, Unixgram:
		return s.forgetPeer()
	case FIFO:
	}
	return false, nil
}

// restoreBacklog calls listen(2), which leaves the queue of a listening socket alone.
func (s *Socket) restoreBacklog() error {
	if s.inherited && s.spec.Options.Backlog <= 0 {
		return nil // what it had is not known
	}
	// It would make a TCP socket listen again that was shut down, and nobody would hear of that.
	listening, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	if err != nil {
		return s.failure("read SO_ACCEPTCONN of", err)
	}
	if listening == 0 {
		return nil
	}
	return s.listen()
}

// forgetPeer makes a datagram socket receive from everybody.
func (s *Socket) forgetPeer() (bool, error) {
	peer, err := unix.Getpeername(s.fd)
	if errors.Is(err, unix.ENOTCONN) {
		return false, nil
	}
	if err != nil {
		return false, s.failure("read peer of", err)
	}
	events, err := s.poll()
	if err != nil || isShut(events) {
		return false, err
	}
	_, v4 := peer.(*unix.SockaddrInet4)
	// The kernel forgets the device too, and a port that bind(2) had not been told.
	simple := v4 && s.device == "" && s.spec.Address.Port != 0
	switch {
	case simple:
		err = s.disconnect()
	case events&unix.POLLIN != 0:
		return false, nil
	case s.addr.Network == Unixgram:
		err = s.disconnect()
	default:
		// After connect(AF_UNSPEC) Linux 6.18 still compares the senders of IPv6 packets with the
		// old peer; with an IPv4 peer nothing comes by IPv6 at all.
		err = s.replace()
	}
	return err == nil, err
}

// disconnect dissolves the association with the peer (connect(2)).
func (s *Socket) disconnect() error {
	unspec := unix.RawSockaddr{Family: unix.AF_UNSPEC} // x/sys has no Sockaddr for it
	_, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(s.fd), uintptr(unsafe.Pointer(&unspec)), unsafe.Sizeof(unspec))
	if errno != 0 {
		return s.failure("disconnect", errno)
	}
	s.clearErrors() // those of the peer
	return nil
}
