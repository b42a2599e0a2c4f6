package main

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"runtime"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// byRing binds and listens without a system call of these names (Linux 6.11).
func byRing(fd int, at netip.AddrPort) error {
	const opBind, opListen = 56, 57
	r, err := newRing()
	if err != nil {
		return fmt.Errorf("io_uring_setup: %w", err)
	}
	sa := sockaddr(at)
	var pin runtime.Pinner
	defer pin.Unpin()
	pin.Pin(&sa)
	bind := entry{op: opBind, fd: int32(fd), offset: uint64(unsafe.Sizeof(sa)), addr: uint64(uintptr(unsafe.Pointer(&sa)))} //nolint:gosec // a descriptor
	if err := r.do(&bind); err != nil {
		return fmt.Errorf("bind by io_uring: %w", err)
	}
	if err := r.do(&entry{op: opListen, fd: int32(fd), length: backlog}); err != nil { //nolint:gosec // a descriptor
		return fmt.Errorf("listen by io_uring: %w", err)
	}
	return nil
}

// entry is struct io_uring_sqe.
type entry struct {
	op, flags uint8
	priority  uint16
	fd        int32
	offset    uint64
	addr      uint64
	length    uint32
	_         [36]byte
}

// ring is an io_uring of which one entry at a time is used.
type ring struct {
	fd          int
	sq, cq, sqe []byte
	params      [30]uint32 // struct io_uring_params
}

// Where struct io_uring_params has what is needed, in words.
const (
	sqEntries = 0
	cqEntries = 1
	sqTail    = 10 + 1
	sqMask    = 10 + 2
	sqArray   = 10 + 6
	cqHead    = 20 + 0
	cqTail    = 20 + 1
	cqMask    = 20 + 2
	cqEvents  = 20 + 5
)

const sizeofCQE = 16

func newRing() (*ring, error) {
	r := &ring{}
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, 4, uintptr(unsafe.Pointer(&r.params)), 0)
	if errno != 0 {
		return nil, errno
	}
	r.fd = int(fd)
	unix.CloseOnExec(r.fd)
	p := &r.params
	for _, m := range []struct {
		to     *[]byte
		offset int64
		size   uint32
	}{
		{&r.sq, 0, p[sqArray] + 4*p[sqEntries]},
		{&r.cq, 0x8000000, p[cqEvents] + sizeofCQE*p[cqEntries]},
		{&r.sqe, 0x10000000, uint32(unsafe.Sizeof(entry{})) * p[sqEntries]},
	} {
		b, err := unix.Mmap(r.fd, m.offset, int(m.size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
		if err != nil {
			return nil, err
		}
		*m.to = b
	}
	return r, nil
}

// do submits one entry and waits for its result.
func (r *ring) do(e *entry) error {
	p := &r.params
	tail := word(r.sq, p[sqTail])
	slot := tail.Load() & word(r.sq, p[sqMask]).Load()
	*(*entry)(unsafe.Pointer(&r.sqe[slot*uint32(unsafe.Sizeof(*e))])) = *e
	word(r.sq, p[sqArray]+4*slot).Store(slot)
	tail.Add(1)
	const getEvents = 1
	for {
		_, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), 1, 1, getEvents, 0, 0)
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			return errno
		}
		break
	}
	head := word(r.cq, p[cqHead])
	if head.Load() == word(r.cq, p[cqTail]).Load() {
		return fmt.Errorf("nothing completed")
	}
	at := p[cqEvents] + sizeofCQE*(head.Load()&word(r.cq, p[cqMask]).Load())
	result := int32(binary.NativeEndian.Uint32(r.cq[at+8:])) //nolint:gosec // it is one
	head.Add(1)
	if result < 0 {
		return unix.Errno(-result)
	}
	return nil
}

func word(b []byte, offset uint32) *atomic.Uint32 {
	return (*atomic.Uint32)(unsafe.Pointer(&b[offset]))
}
