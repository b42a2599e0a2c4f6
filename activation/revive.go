package activation

import (
	"errors"
	"syscall"

	"golang.org/x/sys/unix"
)

// ErrShutDown says that a process that shares the socket has shut it down, so that
// it receives nothing. [Socket.Revive] mends it.
var ErrShutDown = errors.New("socket was shut down")

// Pending says, without waiting, whether a connection, a datagram or a byte is
// there to be taken. The error is a *SocketError with ErrShutDown where a
// process has shut the socket down.
func (s *Socket) Pending() (bool, error) {
	events, err := s.poll()
	switch {
	case err != nil:
		return false, err
	case isShut(events):
		return false, s.failure("poll", ErrShutDown)
	}
	return events&unix.POLLIN != 0, nil
}

// isShut says whether the events tell of a socket that receives nothing. Where only the
// receiving side was shut down, POLLRDHUP is all there is, beside a POLLIN without end
// with nothing to take. TCP leaves the listening state in either case, which is POLLHUP.
func isShut(events int16) bool { return events&(unix.POLLHUP|unix.POLLRDHUP) != 0 }

// poll returns what poll(2) says of the socket at this moment.
func (s *Socket) poll() (int16, error) {
	if s.fd < 0 {
		return 0, s.failure("poll", unix.EBADF) // poll(2) would skip it
	}
	fds := []unix.PollFd{{Fd: int32(s.fd), Events: unix.POLLIN | unix.POLLRDHUP}}
	for {
		_, err := unix.Poll(fds, 0)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 0, s.failure("poll", err)
		case fds[0].Revents&unix.POLLNVAL != 0:
			return 0, s.failure("poll", unix.EBADF)
		default:
			return fds[0].Revents, nil
		}
	}
}

// Revive makes a socket usable that a process has shut down, and says whether it
// was. What was in its queue is lost; for TCP the kernel has reset it already, or has
// moved it where it is parked, and it stays parked.
// It also takes away an error that waits on a datagram socket, which would
// wake a Watcher again and again.
//
// A TCP socket listens again and stays the same. Any other kind is replaced by a
// new socket under the same descriptor number, so a Watcher must have forgotten it
// before ([Watcher.Remove]), and processes that hold the old one have that only.
// After an error it is still shut down, and Revive may be called again: an abstract
// name, for instance, is only free when no process holds the old socket any more.
// Address, Spec and FD may be called at the same time, and stay the same.
func (s *Socket) Revive() (bool, error) {
	events, err := s.poll()
	if err != nil {
		return false, err
	}
	if events&unix.POLLERR != 0 {
		s.clearErrors()
	}
	if !isShut(events) || s.addr.Network == FIFO {
		return false, nil
	}
	if s.addr.Network == TCP {
		s.mu.Lock()
		defer s.mu.Unlock()
		return true, s.relisten()
	}
	return true, s.replace()
}

// relisten has a TCP socket listen that was shut down. It is called with mu held.
//
// One that was ever parked has a group (SO_REUSEPORT), of which it counts as closed now. listen(2) takes it back in only while it
// asks to share its address; otherwise the next group would be made without it, and what waits there be lost at its end.
func (s *Socket) relisten() error {
	alone := s.parking == nil && s.grouped
	err := s.rejoin()
	if err == nil && alone {
		err = s.letJoin()
	}
	if err != nil {
		return s.failure("revive", err)
	}
	if err = s.rebind(); err == nil {
		err = s.listen()
	}
	if alone {
		s.letNobodyJoin()
	}
	return err
}

// rebind binds a TCP socket again to a port that the kernel chose: shutdown(2) gave it back. One that
// was asked for is still bound.
func (s *Socket) rebind() error {
	domain, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	if err != nil {
		return s.failure("read address family of", err)
	}
	if err := s.bind(domain); !errors.Is(err, unix.EINVAL) {
		return err
	}
	return nil
}

// replace puts a new socket, bound to the same address, under the same descriptor number.
func (s *Socket) replace() error {
	fresh := Socket{spec: s.spec, addr: s.addr, fd: -1, device: s.device}
	domain, err := fresh.create()
	if err != nil {
		return err
	}
	if s.addr.Network == UDP {
		return s.overtake(&fresh, domain)
	}
	// First of all our hold on the old socket goes: an abstract name is only free after that.
	if err := s.takeNumber(&fresh); err != nil {
		return err
	}
	err = errors.Join(s.removeFile(), fresh.setBeforeBind(domain))
	if err == nil {
		err = fresh.bind(domain)
	}
	if err == nil {
		err = fresh.start(domain)
	}
	if err != nil {
		// A datagram socket that is not bound looks sound. It is to be tried again.
		_ = unix.Shutdown(s.fd, unix.SHUT_RDWR) // one that is not connected may say ENOTCONN
	}
	s.become(&fresh)
	return err
}

// overtake binds fresh while the old UDP socket is still bound, so that the port is
// never free, and no matter which processes still hold the old one. After an error the
// old one is as it was.
func (s *Socket) overtake(fresh *Socket, domain int) error {
	// Both have to agree to share the port, for as long as there are two.
	err := errors.Join(fresh.setBeforeBind(domain), s.shareAddress(1), fresh.shareAddress(1))
	if err == nil {
		err = fresh.bind(domain)
	}
	if err == nil {
		err = fresh.start(domain)
	}
	if err == nil && !s.sharesAddress() {
		err = fresh.shareAddress(0)
	}
	if err != nil {
		if !s.sharesAddress() {
			err = errors.Join(err, s.shareAddress(0))
		}
		_ = unix.Close(fresh.fd) // it was never used
		return err
	}
	if err := s.takeNumber(fresh); err != nil {
		return err
	}
	s.become(fresh)
	return nil
}

// shareAddress sets SO_REUSEADDR.
func (s *Socket) shareAddress(on int) error {
	if err := unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, on); err != nil {
		return s.failure("set SO_REUSEADDR of", err)
	}
	return nil
}

// takeNumber puts fresh under the descriptor number of s, whose own socket is closed by that.
func (s *Socket) takeNumber(fresh *Socket) error {
	// The lock is what it is in Close.
	syscall.ForkLock.RLock()
	err := unix.Dup3(fresh.fd, s.fd, unix.O_CLOEXEC)
	syscall.ForkLock.RUnlock()
	_ = unix.Close(fresh.fd) // the other descriptor of the same socket
	fresh.fd = s.fd
	if err != nil {
		return s.failure("replace", err)
	}
	return nil
}

// become takes over what is different about fresh. What others may read at the same
// time is the same, and is not written.
func (s *Socket) become(fresh *Socket) {
	s.file, s.inode, s.warnings = fresh.file, fresh.inode, append(s.warnings, fresh.warnings...)
	s.filtered, s.v6, s.sound = fresh.filtered, fresh.v6, fresh.sound
}

// clearErrors empties what POLLERR stands for: the pending error and the queue of
// errors that a process asked for by IP_RECVERR (ip(7)).
func (s *Socket) clearErrors() {
	_, _ = unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_ERROR) // reading it clears it
	var data, oob [64]byte
	for {
		_, _, _, _, err := unix.Recvmsg(s.fd, data[:], oob[:], unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
		if err != nil {
			return
		}
	}
}
