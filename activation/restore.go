package activation

import (
	"errors"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Restore undoes what a process that shared the socket may have left on it, and says what
// of it a program would not normally do: "a process had connected it", for instance; empty where nothing
// was. It is to be called when the process has ended, before the socket is armed
// again. What waits in the queue stays there.
//
// A datagram socket that was connected to one peer receives from everybody again, at the
// same address and port. A UDP socket is replaced for that, unless it is an IPv4 one with a
// port of the Spec's and without a device. Where the queue would be lost, which is so
// for a unixgram socket as well, it keeps its peer while something waits: Restore does it
// after the process that takes it.
//
// A Unix socket or FIFO whose path is gone, or is another file that nobody holds, gets it back, by a new
// socket under the same descriptor number; while something waits in the old one, that stays. When
// somebody else holds the path, that is an error.
//
// So where something can be replaced, which is all but TCP, a Watcher must have forgotten the
// socket before, as for [Socket.Revive], and its Inode may change.
//
// A listening socket gets its own backlog again, and TCP its time to wait for data, except for an inherited
// one whose Spec has none. O_NONBLOCK, which all who share the socket share, is set again.
// Options by which clients would be lost without a word are as after Open again: SO_BINDTODEVICE, SO_DONTROUTE,
// SO_LINGER, SO_REUSEPORT, IP_MINTTL, IP_TTL and the like, a filter (SO_ATTACH_FILTER), and TCP_MD5SIG keys that are
// for everybody. What the process has made final is an error, and only a new socket
// helps: a filter that it has locked, or, without CAP_NET_RAW, a device. A TCP_MD5SIG key for
// certain clients, or a TCP-AO one, is not noticed.
//
// A socket that was shut down is left to Revive. Address, Spec and FD may be called at
// the same time. The error is a *SocketError.
func (s *Socket) Restore() (repaired string, err error) {
	if err := s.restoreFlags(); err != nil {
		return "", err
	}
	found, err := s.restoreSettings()
	repaired, e := s.restoreRest()
	if said := tellFound(found); said != "" && repaired != "" {
		repaired = said + "; " + repaired
	} else {
		repaired += said
	}
	return repaired, errors.Join(err, e)
}

// restoreRest is what is different about each network.
func (s *Socket) restoreRest() (repaired string, err error) {
	switch s.addr.Network {
	case TCP:
		return "", errors.Join(s.restoreDefer(), s.restoreBacklog())
	case UDP, Unixgram:
		changed, err := s.forgetPeer()
		if err != nil {
			return "", err
		}
		if changed {
			repaired = "a process had connected it"
		}
		s.keepPacketInfo(s.v6)
	case Unix, Unixpacket:
		if err := s.restoreBacklog(); err != nil {
			return "", err
		}
	case FIFO:
	}
	if path, err := s.restorePath(); path != "" || err != nil {
		return path, err
	}
	return repaired, nil
}

// restoreFlags sets O_NONBLOCK, which programs that wait in accept(2) clear, and ends signals on input, which
// whoever has the pid of the process next would get.
func (s *Socket) restoreFlags() error {
	flags, err := unix.FcntlInt(uintptr(s.fd), unix.F_GETFL, 0)
	want := flags&^unix.O_ASYNC | unix.O_NONBLOCK
	if err == nil && flags != want {
		_, err = unix.FcntlInt(uintptr(s.fd), unix.F_SETFL, want)
	}
	if err != nil {
		return s.failure("set flags of", err)
	}
	return nil
}

// restoreDefer sets TCP_DEFER_ACCEPT, without which or with which other clients would wake us.
func (s *Socket) restoreDefer() error {
	want := wholeSeconds(s.spec.Options.DeferAccept)
	if s.inherited && !s.taken && want == 0 {
		return nil // what it had is not known
	}
	if err := unix.SetsockoptInt(s.fd, unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT, want); err != nil {
		return s.failure("set TCP_DEFER_ACCEPT of", err)
	}
	return nil
}

// restorePath gives the socket its path back.
func (s *Socket) restorePath() (repaired string, err error) {
	if s.file == (node{}) {
		return "", nil
	}
	var st unix.Stat_t
	err = unix.Lstat(s.addr.Path, &st)
	switch {
	case err == nil && nodeOf(&st) == s.file:
		return "", nil
	case err == nil:
		repaired = "its path was replaced"
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
		repaired = "its path was removed"
	default:
		return "", s.failure("stat", err)
	}
	events, err := s.poll()
	if err != nil || isShut(events) || events&unix.POLLIN != 0 {
		return "", err
	}
	spec := *s.spec
	if s.found != nil {
		s.found.fill(&spec.Options)
	}
	fresh := Prepare(&spec)
	fresh.device = s.device
	if err := fresh.Open(); err != nil {
		return "", err
	}
	if err := s.takeNumber(fresh); err != nil {
		return "", err
	}
	s.become(fresh)
	return repaired, nil
}

// restoreBacklog calls listen(2), which leaves the queue of a listening socket alone.
func (s *Socket) restoreBacklog() error {
	if s.inherited && !s.taken && s.spec.Options.Backlog <= 0 {
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
