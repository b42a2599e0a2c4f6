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
	for {
		var err error
		if s.addr.Network == FIFO {
			err = s.spill()
		} else {
			_, _, err = unix.Recvfrom(s.fd, nil, unix.MSG_DONTWAIT)
		}
		switch {
		case err == nil:
			return nil
		case !errors.Is(err, unix.EINTR):
			return s.failure("discard from", err)
		}
	}
}

// spill takes up to 4 kB out of a FIFO. To read(2) without waiting would take O_NONBLOCK, which other processes may
// clear at any moment, and FIFOs have no RWF_NOWAIT (Linux 6.18).
func (s *Socket) spill() error {
	null, err := unix.Open("/dev/null", unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(null) //nolint:errcheck // there is nothing to lose
	_, err = unix.Splice(s.fd, nil, null, nil, 4096, unix.SPLICE_F_NONBLOCK)
	return err
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
