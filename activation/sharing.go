package activation

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"
)

// unshare has an inherited TCP socket share its port no more, which a supervisor before may have left so when it
// ended, unless it is to be shared or another socket shares it now.
func (s *Socket) unshare() error {
	if s.addr.Network != TCP || s.spec.Options.ReusePort {
		return nil
	}
	shared, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_REUSEPORT)
	if err != nil {
		return s.failure("read SO_REUSEPORT of", err)
	}
	if shared == 0 {
		return nil
	}
	// What cannot be found out is taken for shared.
	if others, err := s.othersListen(); err != nil || others {
		s.joint = true
		return nil
	}
	s.letNobodyJoin()
	return nil
}

// othersListen asks sock_diag(7) whether another TCP socket listens on the address of s. It needs no privilege.
func (s *Socket) othersListen() (bool, error) {
	sa, err := unix.Getsockname(s.fd)
	if err != nil {
		return false, err
	}
	family := uint8(unix.AF_INET)
	var source [16]byte
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		copy(source[:], sa.Addr[:])
	case *unix.SockaddrInet6:
		family, source = unix.AF_INET6, sa.Addr
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return false, err
	}
	defer unix.Close(fd) //nolint:errcheck // it was only asked with
	if err := unix.Sendto(fd, askListeners(family, addrPort(sa).Port()), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return false, err
	}
	buf := make([]byte, 32<<10) // as long as the messages of a dump are
	for {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return false, err
		}
		others, err := listenerBeside(buf[:n], source, uint32(s.inode))
		if errors.Is(err, io.EOF) {
			return others, nil
		}
		if others || err != nil {
			return others, err
		}
	}
}

// askListeners is the request for all TCP sockets that listen on the port: a struct inet_diag_req_v2.
func askListeners(family uint8, port uint16) []byte {
	const size, byFamily, listen = unix.SizeofNlMsghdr + 56, 20, 10 // SOCK_DIAG_BY_FAMILY, TCP_LISTEN
	b := make([]byte, size)
	binary.NativeEndian.PutUint32(b, size)
	binary.NativeEndian.PutUint16(b[4:], byFamily)
	binary.NativeEndian.PutUint16(b[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	r := b[unix.SizeofNlMsghdr:]
	r[0], r[1] = family, unix.IPPROTO_TCP
	binary.NativeEndian.PutUint32(r[4:], 1<<listen)
	binary.BigEndian.PutUint16(r[8:], port)
	return b
}

// listenerBeside says whether the messages tell of a socket with this address that is not the one with the inode. The
// error is io.EOF where they are the last.
func listenerBeside(b []byte, source [16]byte, inode uint32) (bool, error) {
	const size, sourceAt, inodeAt = 72, 8, 68 // of struct inet_diag_msg
	length := func(h []byte) int { return int(binary.NativeEndian.Uint32(h)) }
	for header, body := range records(b, unix.SizeofNlMsghdr, length) {
		switch binary.NativeEndian.Uint16(header[4:]) {
		case unix.NLMSG_DONE:
			return false, io.EOF
		case unix.NLMSG_ERROR:
			if len(body) < 4 {
				return false, io.ErrUnexpectedEOF
			}
			return false, fmt.Errorf("list listeners: %w", unix.Errno(-int32(binary.NativeEndian.Uint32(body))))
		}
		if len(body) < size {
			return false, io.ErrUnexpectedEOF
		}
		if bytes.Equal(body[sourceAt:sourceAt+len(source)], source[:]) && binary.NativeEndian.Uint32(body[inodeAt:]) != inode {
			return true, nil
		}
	}
	return false, nil
}
