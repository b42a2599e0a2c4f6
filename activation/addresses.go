package activation

import (
	"encoding/binary"
	"errors"
	"fmt"
	"iter"

	"golang.org/x/sys/unix"
)

// AddressWatch hears from the kernel when addresses and network interfaces appear, in the network
// namespace where it was made (rtnetlink(7)). It needs no privilege. It is not safe for concurrent use.
type AddressWatch struct {
	fd  int
	buf [8192]byte
}

// drainLimit bounds how many messages one Drain reads.
const drainLimit = 1000

// NewAddressWatch starts listening. The caller closes it.
func NewAddressWatch() (*AddressWatch, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("watch addresses: %w", err)
	}
	const groups = 1<<(unix.RTNLGRP_LINK-1) | 1<<(unix.RTNLGRP_IPV4_IFADDR-1) | 1<<(unix.RTNLGRP_IPV6_IFADDR-1)
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}); err != nil {
		return nil, errors.Join(fmt.Errorf("watch addresses: %w", err), unix.Close(fd))
	}
	return &AddressWatch{fd: fd}, nil
}

// FD returns the descriptor, borrowed: it is readable when Drain has something to read. It is -1 after Close.
func (w *AddressWatch) FD() int { return w.fd }

// Drain reads what waits, without waiting, and says whether an address has become usable or a
// network interface has appeared or come up since the last time, so that an Open that failed may
// succeed. Where the kernel says that messages were lost, that counts as well. After
// very many messages it leaves the rest for the next time, and the descriptor readable.
func (w *AddressWatch) Drain() (changed bool, err error) {
	for range drainLimit {
		n, _, flags, _, err := unix.Recvmsg(w.fd, w.buf[:], nil, 0)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return changed, nil
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.ENOBUFS):
			changed = true
		case err != nil:
			return changed, fmt.Errorf("watch addresses: %w", err)
		case flags&unix.MSG_TRUNC != 0:
			changed = true // it cannot be read whole
		default:
			changed = changed || tellsOfAddress(w.buf[:n])
		}
	}
	return changed, nil
}

// Close stops listening. It does nothing the second time.
func (w *AddressWatch) Close() error {
	if w.fd < 0 {
		return nil
	}
	err := unix.Close(w.fd)
	w.fd = -1
	if err != nil {
		return fmt.Errorf("watch addresses: %w", err)
	}
	return nil
}

// tellsOfAddress says whether one of the messages tells of an address that can be used from now on, or of an
// interface that has appeared or come up. What it cannot read says nothing.
func tellsOfAddress(b []byte) bool {
	for header, body := range records(b, unix.SizeofNlMsghdr, func(h []byte) int { return int(binary.NativeEndian.Uint32(h)) }) {
		switch binary.NativeEndian.Uint16(header[4:]) {
		case unix.RTM_NEWADDR:
			if usableAddress(body) {
				return true
			}
		case unix.RTM_NEWLINK:
			if newLink(body) {
				return true
			}
		}
	}
	return false
}

// newLink reads a struct ifinfomsg (rtnetlink(7)). Its ifi_change has the flags that are
// different now: all of them for an interface that is new.
func newLink(b []byte) bool {
	if len(b) < unix.SizeofIfInfomsg {
		return false
	}
	flags, change := binary.NativeEndian.Uint32(b[8:]), binary.NativeEndian.Uint32(b[12:])
	return change == 1<<32-1 || flags&change&unix.IFF_UP != 0
}

// usableAddress reads a struct ifaddrmsg and its attributes (rtnetlink(7)). An IPv6 address can
// only be bound when it is known that nobody else has it; until then it is tentative, and
// is told of again.
func usableAddress(b []byte) bool {
	if len(b) < unix.SizeofIfAddrmsg {
		return false
	}
	flags := uint32(b[2])
	length := func(h []byte) int { return int(binary.NativeEndian.Uint16(h)) }
	for header, value := range records(b[unix.SizeofIfAddrmsg:], unix.SizeofRtAttr, length) {
		if binary.NativeEndian.Uint16(header[2:]) == unix.IFA_FLAGS && len(value) >= 4 {
			flags = binary.NativeEndian.Uint32(value) // all of them; the other field has room for eight
		}
	}
	const optimistic = unix.IFA_F_TENTATIVE | unix.IFA_F_OPTIMISTIC // may be used while that is found out (RFC 4429)
	return flags&optimistic != unix.IFA_F_TENTATIVE && flags&unix.IFA_F_DADFAILED == 0
}

// records walks through what netlink(7) lines up: a header, which says the length of both, what follows it, and room
// up to the next multiple of four. It ends at the first that does not fit.
func records(b []byte, header int, length func([]byte) int) iter.Seq2[[]byte, []byte] {
	return func(yield func([]byte, []byte) bool) {
		for len(b) >= header {
			n := length(b)
			if n < header || n > len(b) || !yield(b[:header], b[header:n]) {
				return
			}
			b = b[min((n+3)&^3, len(b)):]
		}
	}
}
