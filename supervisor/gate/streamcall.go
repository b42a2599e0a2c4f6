package gate

import (
	"encoding/binary"
	"net"
	"net/netip"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"

	"hibergate/activation"
)

// The system calls of the data path. Every descriptor here is non-blocking, so none of these calls can wait, and the
// scheduler of Go need not hear of them: RawSyscall saves more than a tenth of a small read. What can wait is in loop.wait.

// recv is recvfrom(2) without an address.
func recv(fd int32, b []byte, flags int) (int, unix.Errno) {
	for {
		n, _, e := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)),
			uintptr(unix.MSG_DONTWAIT|flags), 0, 0)
		if e != unix.EINTR {
			return int(n), e
		}
	}
}

// send is sendto(2) without an address. A connection that is broken is an error and no signal.
func send(fd int32, b []byte, flags int) (int, unix.Errno) {
	for {
		n, _, e := unix.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)),
			uintptr(unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL|flags), 0, 0)
		if e != unix.EINTR {
			return int(n), e
		}
	}
}

// splice is splice(2) between a socket and a pipe.
func splice(from, to int32, n int) (int, unix.Errno) {
	for {
		n, _, e := unix.RawSyscall6(unix.SYS_SPLICE, uintptr(from), 0, uintptr(to), 0, uintptr(n), unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
		if e != unix.EINTR {
			return int(n), e
		}
	}
}

// accept4 is accept4(2). It is known to the scheduler: whoever shares a listening socket can make it blocking.
func accept4(fd int, from *unix.RawSockaddrAny) (int32, unix.Errno) {
	size := uint32(unix.SizeofSockaddrAny)
	for {
		n, _, e := unix.Syscall6(unix.SYS_ACCEPT4, uintptr(fd), uintptr(unsafe.Pointer(from)), uintptr(unsafe.Pointer(&size)),
			unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0, 0)
		if e != unix.EINTR {
			return int32(n), e
		}
	}
}

// socket is socket(2) for a stream, non-blocking and close-on-exec.
func socket(family int) (int32, unix.Errno) {
	fd, _, e := unix.RawSyscall(unix.SYS_SOCKET, uintptr(family), unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	return int32(fd), e
}

// connect is connect(2).
func connect(fd int32, to []byte) unix.Errno {
	_, _, e := unix.RawSyscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(to))), uintptr(len(to)))
	return e
}

// shutdownWrite tells the other end that nothing more comes.
func shutdownWrite(fd int32) {
	_, _, _ = unix.RawSyscall(unix.SYS_SHUTDOWN, uintptr(fd), unix.SHUT_WR, 0) // the other end may have left
}

// closeFD closes a descriptor; close(2) releases it whatever it returns.
func closeFD(fd int32) { _, _, _ = unix.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0) }

// resetFD closes a TCP connection so that the other end gets a reset.
func resetFD(fd int32) {
	linger := unix.Linger{Onoff: 1}
	_, _, _ = unix.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_LINGER,
		uintptr(unsafe.Pointer(&linger)), unsafe.Sizeof(linger), 0)
	closeFD(fd)
}

// setInt sets an integer option of a socket.
func setInt(fd int32, level, option int, value int32) unix.Errno {
	_, _, e := unix.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(fd), uintptr(level), uintptr(option),
		uintptr(unsafe.Pointer(&value)), unsafe.Sizeof(value), 0)
	return e
}

// epollControl is epoll_ctl(2); token comes back with the events.
func epollControl(epoll int32, op int, fd int32, events uint32, token, generation uint32) unix.Errno {
	event := unix.EpollEvent{Events: events, Fd: int32(token), Pad: int32(generation)}
	_, _, e := unix.RawSyscall6(unix.SYS_EPOLL_CTL, uintptr(epoll), uintptr(op), uintptr(fd), uintptr(unsafe.Pointer(&event)), 0, 0)
	return e
}

// peerOf returns who is at the other end of an accepted connection; the invalid AddrPort for Unix sockets. IPv4 is IPv4.
func peerOf(from *unix.RawSockaddrAny) netip.AddrPort {
	switch from.Addr.Family {
	case unix.AF_INET:
		in := (*unix.RawSockaddrInet4)(unsafe.Pointer(from))
		return netip.AddrPortFrom(netip.AddrFrom4(in.Addr), networkOrder(in.Port))
	case unix.AF_INET6:
		in := (*unix.RawSockaddrInet6)(unsafe.Pointer(from))
		ip := netip.AddrFrom16(in.Addr).Unmap()
		if in.Scope_id != 0 && ip.Is6() {
			ip = ip.WithZone(strconv.FormatUint(uint64(in.Scope_id), 10))
		}
		return netip.AddrPortFrom(ip, networkOrder(in.Port))
	}
	return netip.AddrPort{}
}

// networkOrder turns a port of the kernel's structures into a number, and back.
func networkOrder(port uint16) uint16 {
	return binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, port))
}

// sockaddr returns what connect(2) and bind(2) take for an address, and its family. The error says that its zone is no
// network interface.
func sockaddr(a activation.Address) ([]byte, int, error) {
	switch {
	case a.Network == activation.Unix:
		b := binary.NativeEndian.AppendUint16(nil, unix.AF_UNIX)
		if a.Abstract() {
			return append(append(b, 0), a.Path[1:]...), unix.AF_UNIX, nil
		}
		return append(append(b, a.Path...), 0), unix.AF_UNIX, nil
	case a.IP.Unmap().Is4():
		ip := a.IP.Unmap().As4()
		b := binary.BigEndian.AppendUint16(binary.NativeEndian.AppendUint16(nil, unix.AF_INET), a.Port)
		return append(append(b, ip[:]...), make([]byte, 8)...), unix.AF_INET, nil
	}
	var scope uint32
	if zone := a.IP.Zone(); zone != "" {
		if n, err := strconv.ParseUint(zone, 10, 32); err == nil {
			scope = uint32(n)
		} else {
			i, err := net.InterfaceByName(zone)
			if err != nil {
				return nil, 0, err
			}
			scope = uint32(i.Index)
		}
	}
	ip := a.IP.As16()
	b := binary.BigEndian.AppendUint16(binary.NativeEndian.AppendUint16(nil, unix.AF_INET6), a.Port)
	b = append(append(b, 0, 0, 0, 0), ip[:]...)
	return binary.NativeEndian.AppendUint32(b, scope), unix.AF_INET6, nil
}

// bind is bind(2).
func bind(fd int32, to []byte) unix.Errno {
	_, _, e := unix.RawSyscall(unix.SYS_BIND, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(to))), uintptr(len(to)))
	return e
}
