package activation

import (
	"errors"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Discard takes one datagram away, or what is in a FIFO at the moment, without waiting. The
// error has EAGAIN in its chain where nothing waits.
func (s *Socket) Discard() error {
	if s.addr.Network.Connections() {
		return errors.New("discard from " + s.addr.String() + ": it has connections")
	}
	var b [4096]byte
	for {
		var err error
		if s.addr.Network == FIFO {
			if err = unix.SetNonblock(s.fd, true); err == nil {
				_, err = unix.Read(s.fd, b[:])
			}
		} else {
			_, _, err = unix.Recvfrom(s.fd, b[:0], unix.MSG_DONTWAIT)
		}
		switch {
		case err == nil:
			return nil
		case !errors.Is(err, unix.EINTR):
			return s.failure("discard from", err)
		}
	}
}

// Drops returns how many packets the kernel has dropped at the socket since it was opened: those
// that its filter did not let in, and those for which its queue had no room. 0 where
// the kernel does not tell.
func (s *Socket) Drops() uint64 {
	const last = 8 // SK_MEMINFO_DROPS of SO_MEMINFO (Linux 4.12)
	var info [last + 1]uint32
	size := uint32(unsafe.Sizeof(info))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(s.fd), unix.SOL_SOCKET, unix.SO_MEMINFO,
		uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 || uintptr(size) < unsafe.Sizeof(info) {
		return 0
	}
	return uint64(info[last])
}
