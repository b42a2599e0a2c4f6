package lookup

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"hibergate/supervisor/activity/sockdiag"
)

var (
	// ErrNoListener says that nobody listens on the address of the destination in our network namespace.
	ErrNoListener = errors.New("nobody listens there in this network namespace")
	// ErrUnfit says that the socket of the destination cannot be led to, and why; it is of no use to try again as long as the destination
	// is the program that it is.
	ErrUnfit = errors.New("its socket cannot be led to")
	// ErrShared says that another socket than ours would get some of the connections.
	ErrShared = errors.New("another socket listens on the same port")
)

// listener is a listening socket.
type listener struct {
	address netip.AddrPort // of IPv4 as such
	device  uint32
	inode   uint32
}

// listeners are those of this network namespace on a port.
func listeners(sockets *sockdiag.Conn, port uint16) ([]listener, error) {
	var all []listener
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		n := len(all)
		q := sockdiag.Query{Family: family, Protocol: unix.IPPROTO_TCP, States: []sockdiag.State{sockdiag.Listen}, Ports: []uint16{port}}
		err := sockets.Inet(q, func() { all = all[:n] }, func(s *sockdiag.Inet) {
			if s.Local.Port() == port {
				all = append(all, listener{s.Local, s.Device, s.Inode})
			}
		})
		if err != nil {
			return nil, err
		}
	}
	return all, nil
}

// fitting leaves those that get the connections to an address; there are several where they share the port. One on all addresses
// of IPv6 may take IPv4 too, or not.
func fitting(all []listener, to netip.AddrPort) []listener {
	const none = 3
	rank := func(l listener) int {
		switch ip := l.address.Addr(); {
		case ip == to.Addr():
			return 0
		case !ip.IsUnspecified(), to.Addr().Is6() && ip.Is4():
			return none
		case ip.Is4():
			return 1
		}
		return 2
	}
	best := none
	for _, l := range all {
		best = min(best, rank(l))
	}
	return slices.DeleteFunc(all, func(l listener) bool { return rank(l) == none || rank(l) > best })
}

// holder is a process that has a socket, and its descriptor there.
type holder struct{ pid, fd int }

// mostDescriptors bounds how many descriptors are looked at: any user may open very many.
const mostDescriptors = 1 << 20

// search is for the processes that have some sockets.
type search struct {
	wanted map[string]uint32 // inodes, by what their descriptors are called
	found  map[uint32]holder // one of the processes for each
	looked int               // at descriptors
	hidden bool              // there are descriptors that cannot be looked at
}

// holders looks for processes that have the sockets. A socket that we have ourselves is ours, whoever else has it.
func holders(all []listener) *search {
	s := &search{wanted: make(map[string]uint32), found: make(map[uint32]holder)}
	for _, l := range all {
		s.wanted["socket:["+strconv.FormatUint(uint64(l.inode), 10)+"]"] = l.inode
	}
	s.process(strconv.Itoa(os.Getpid()))
	_ = eachName("/proc", func(name string) bool {
		s.process(name)
		return !s.over()
	})
	return s
}

func (s *search) over() bool { return len(s.found) == len(s.wanted) || s.looked >= mostDescriptors }

// process looks at the descriptors of one, if it is one.
func (s *search) process(name string) {
	pid, err := strconv.Atoi(name)
	if err != nil {
		return
	}
	dir := "/proc/" + name + "/fd"
	err = eachName(dir, func(name string) bool {
		s.looked++
		to, err := os.Readlink(dir + "/" + name)
		s.hidden = s.hidden || errors.Is(err, fs.ErrPermission)
		if inode, ok := s.wanted[to]; ok {
			if fd, err := strconv.Atoi(name); err == nil && s.found[inode].pid == 0 {
				s.found[inode] = holder{pid, fd}
			}
		}
		return !s.over()
	})
	s.hidden = s.hidden || errors.Is(err, fs.ErrPermission)
}

// missing is the error about a socket that was not found.
func (s *search) missing(l listener) error {
	switch {
	case s.looked >= mostDescriptors:
		return fmt.Errorf("%w: the process that has the socket on %v is not among those of the first %d descriptors", ErrNoListener, l.address, mostDescriptors)
	case s.hidden:
		return fmt.Errorf("find the process that listens on %v: it needs CAP_SYS_PTRACE to look at all of them: %w", l.address, unix.EPERM)
	}
	return fmt.Errorf("%w: no process that can be seen from here has the socket on %v", ErrNoListener, l.address)
}

// eachName calls f for the names in a directory until it returns false.
func eachName(path string, f func(name string) bool) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	for {
		names, err := d.Readdirnames(256)
		for _, name := range names {
			if !f(name) {
				return nil
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// take gets the socket out of its process (pidfd_getfd(2), Linux 5.6) and calls use with it and the versions of IP of which it can
// take packets. The descriptor is closed when use returns, so that the socket goes on to be the process's alone. No child of
// os/exec is begun meanwhile, which would have a copy until its exec; those of the supervisor close at once what is not for them.
func (l listener) take(h holder, use func(fd int, v versions) error) error {
	process, err := unix.PidfdOpen(h.pid, 0)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) { // it has ended
		return ErrNoListener
	}
	if err != nil {
		return fmt.Errorf("open process %d: %w", h.pid, err)
	}
	defer unix.Close(process) //nolint:errcheck // nothing was written
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	fd, err := unix.PidfdGetfd(process, h.fd, 0)
	switch {
	case errors.Is(err, unix.ESRCH), errors.Is(err, unix.EBADF): // it has ended, or closed it
		return ErrNoListener
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("get the socket of process %d: it needs the right to trace it, CAP_SYS_PTRACE or the same user: %w", h.pid, err)
	case errors.Is(err, unix.ENOSYS):
		return fmt.Errorf("get the socket of process %d: the kernel is older than Linux 5.6: %w", h.pid, err)
	case err != nil:
		return fmt.Errorf("get the socket of process %d: %w", h.pid, err)
	}
	defer unix.Close(fd) //nolint:errcheck // it is the process's
	v, err := l.inspect(fd)
	if err == nil {
		err = use(fd, v)
	}
	return err
}

// inspect says of which versions of IP the socket takes packets, if it is the one.
func (l listener) inspect(fd int) (versions, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return versions{}, fmt.Errorf("look at its socket: %w", err)
	}
	if uint32(st.Ino) != l.inode { // another process has the number by now, or another file
		return versions{}, ErrNoListener
	}
	protocol, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL)
	if err != nil {
		return versions{}, fmt.Errorf("look at its socket: %w", err)
	}
	switch ip := l.address.Addr(); {
	case protocol == unix.IPPROTO_MPTCP:
		return versions{}, fmt.Errorf("%w: it is of MPTCP (programs in Go: GODEBUG=multipathtcp=0)", ErrUnfit)
	case ip.Is4():
		return versions{four: true}, nil
	case !ip.IsUnspecified():
		return versions{six: true}, nil
	}
	only6, err := unix.GetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY)
	if err != nil {
		return versions{}, fmt.Errorf("look at its socket: %w", err)
	}
	return versions{four: only6 == 0, six: true}, nil
}
