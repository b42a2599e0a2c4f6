package activation

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// Spec describes one socket of a service. It is a value and is never changed.
type Spec struct {
	Address Address
	Name    string // for LISTEN_FDNAMES
	Options Options
}

// Socket owns one listening or datagram socket, or a FIFO. Its methods may be
// called from any goroutine, except that nothing else may be going on during Open and Close, and
// during Revive and Restore nothing but Address, Spec and FD, which these do not change, and for TCP
// Park, Readmit, Unpark and Parked.
type Socket struct {
	spec      *Spec   // may be shared, and is not changed
	addr      Address // as bound
	fd        int     // -1 once closed
	device    string  // what SO_BINDTODEVICE is to be
	inode     uint64
	file      node // what the path must still be to be removed; the zero node where there is none
	inherited bool
	taken     bool      // inherited from a program, so that what has no place in the Spec is for us to say
	unsettled bool      // taken before it listened
	joint     bool      // inherited with a port that another socket shares
	filtered  bool      // has a filter that is to stay
	v6        bool      // an IP socket of that version
	sound     settings  // what Restore sets back
	found     *fileLook // of the path of an inherited socket; nil: as Options say
	warnings  []error

	mu       sync.Mutex    // over parking, grouped and imitated, over the end, and while the socket of a parked one is revived
	parking  *parkingPlace // nil: not parked
	grouped  bool          // it was parked before
	imitated *imitation    // nil: Imitate was never called
}

// SocketError says what could not be done to which socket.
type SocketError struct {
	Op      string // "bind", "set SO_MARK of"
	Address Address
	Err     error // a unix.Errno is in its chain where the kernel refused
}

func (e *SocketError) Error() string { return e.Op + " " + e.Address.String() + ": " + e.Err.Error() }

// Unwrap returns Err.
func (e *SocketError) Unwrap() error { return e.Err }

// Open makes the socket that spec describes, binds it, and listens where the
// network has connections. Its descriptor is non-blocking and close-on-exec. The
// caller closes it. The error is a *SocketError; after an error nothing is left behind,
// except for directories.
//
// A file of a Unix socket that nobody holds any more is replaced. A file that is
// anything else is never touched.
func Open(spec Spec) (*Socket, error) {
	s := Prepare(&spec)
	if err := s.Open(); err != nil {
		return nil, err
	}
	return s, nil
}

// Prepare returns the socket that spec describes, to be opened later. Until then its
// Address is the Spec's, its FD is -1, Close does nothing, and all that needs a descriptor fails. The
// Spec is kept, and must not be changed any more.
func Prepare(spec *Spec) *Socket {
	return &Socket{spec: spec, addr: spec.Address, fd: -1, device: spec.Options.Device}
}

// Open opens a socket that was prepared, as the function Open does. After an error it is as it was
// before, and may be opened again; [MayOpenLater] says whether that makes sense. It
// does nothing to a socket that is open. Nothing else may be going on.
func (s *Socket) Open() error {
	if s.fd >= 0 {
		return nil
	}
	s.addr, s.file, s.warnings = s.spec.Address, node{}, nil
	if err := s.open(); err != nil {
		s.abandon()
		s.addr = s.spec.Address
		return err
	}
	s.link()
	return nil
}

// MayOpenLater says whether an error of Open can go away without anybody changing the
// Spec: the address or the device is not there yet, or somebody else has the address. A file that is
// not a socket, at the path of a Unix socket, is not somebody (EEXIST).
func MayOpenLater(err error) bool {
	return errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.EADDRINUSE) || errors.Is(err, unix.ENODEV)
}

// open makes and binds s.fd for s.addr.
func (s *Socket) open() error {
	if s.addr.Network == FIFO {
		return s.openFIFO()
	}
	domain, err := s.create()
	if err != nil {
		return err
	}
	if err := s.setBeforeBind(domain); err != nil {
		return err
	}
	if err := s.bind(domain); err != nil {
		return err
	}
	return s.start(domain)
}

// start makes a socket that is bound ready to be used: what is to hold for the first
// client is set before the socket listens.
func (s *Socket) start(domain int) error {
	s.setAfterBind(domain)
	if err := s.listen(); err != nil {
		return err
	}
	if err := s.remember(); err != nil {
		return err
	}
	return s.identify()
}

// create makes s.fd and returns its address family.
func (s *Socket) create() (domain int, err error) {
	family := s.spec.Options.Family
	kind := unix.SOCK_STREAM
	switch s.addr.Network {
	case UDP, Unixgram:
		kind = unix.SOCK_DGRAM
	case Unixpacket:
		kind = unix.SOCK_SEQPACKET
	case TCP, Unix, FIFO:
	default:
		return 0, s.failure("open", unix.EPROTONOSUPPORT)
	}
	kind |= unix.SOCK_NONBLOCK | unix.SOCK_CLOEXEC
	domain = unix.AF_INET6
	switch ip := s.addr.IP; {
	case s.addr.Network.Unix():
		domain = unix.AF_UNIX
	case ip.Is4() && family == FamilyIPv6:
		return 0, s.failure("open", fmt.Errorf("an IPv4 address cannot be IPv6 only: %w", unix.EINVAL))
	case ip.Is6() && family == FamilyIPv4:
		return 0, s.failure("open", fmt.Errorf("an IPv6 address cannot be IPv4 only: %w", unix.EINVAL))
	case ip.Is4(), family == FamilyIPv4:
		domain = unix.AF_INET
	}
	// Protocol 0 is plain TCP. Package net would ask for MPTCP, which takes 2.5 kB more of the kernel
	// for each socket.
	s.fd, err = unix.Socket(domain, kind, 0)
	if errors.Is(err, unix.EAFNOSUPPORT) && domain == unix.AF_INET6 && !s.addr.IP.IsValid() && family != FamilyIPv6 {
		if family == FamilyDual {
			s.warn("open", fmt.Errorf("the kernel has no IPv6; IPv4 only: %w", err))
		}
		domain = unix.AF_INET
		s.fd, err = unix.Socket(domain, kind, 0)
	}
	if err != nil {
		s.fd = -1
		return 0, s.failure("open", err)
	}
	return domain, nil
}

// bind binds s.fd to s.addr.
func (s *Socket) bind(domain int) error {
	if domain == unix.AF_UNIX && !s.addr.Abstract() {
		return s.bindPath()
	}
	sa, err := s.sockaddr(domain)
	if err != nil {
		return s.failure("bind", err)
	}
	if err := unix.Bind(s.fd, sa); err != nil {
		return s.failure("bind", err)
	}
	return nil
}

// listen makes the socket listen where its network has connections, or sets the backlog anew.
func (s *Socket) listen() error {
	if !s.addr.Network.Connections() {
		return nil
	}
	if err := unix.Listen(s.fd, s.backlog()); err != nil {
		return s.failure("listen on", err)
	}
	return nil
}

// Listen calls listen(2) with a backlog, for a program that shares the socket, or with the socket's own, which is
// longer. The error is a *SocketError.
func (s *Socket) Listen(backlog int) error {
	if !s.inherited || s.taken || s.spec.Options.Backlog > 0 {
		backlog = max(backlog, s.backlog())
	}
	if err := unix.Listen(s.fd, backlog); err != nil {
		return s.failure("listen on", err)
	}
	if s.unsettled {
		return s.settle()
	}
	return nil
}

// backlog is what listen(2) is told.
func (s *Socket) backlog() int {
	if n := s.spec.Options.Backlog; n > 0 {
		return n
	}
	return math.MaxInt32 // the kernel cuts it down to net.core.somaxconn
}

// identify reads back the port and the inode that the kernel chose.
func (s *Socket) identify() error {
	if s.addr.Network.IP() {
		sa, err := unix.Getsockname(s.fd)
		if err != nil {
			return s.failure("read address of", err)
		}
		s.addr.Port = addrPort(sa).Port()
	}
	var st unix.Stat_t
	if err := unix.Fstat(s.fd, &st); err != nil {
		return s.failure("stat", err)
	}
	s.inode = st.Ino
	return nil
}

// Spec returns what the socket was opened from. It is not to be changed.
func (s *Socket) Spec() *Spec { return s.spec }

// Address returns where the socket is bound: as in the Spec, with the port that
// the kernel chose where the Spec had none.
func (s *Socket) Address() Address { return s.addr }

// FD returns the descriptor, borrowed: it stays the property of the socket. It is
// -1 after Close. Do not put it into package net, which would poll it for ever and
// change its flags for every process that shares it.
func (s *Socket) FD() int { return s.fd }

// Inode returns the number that /proc/PID/fd and sock_diag(7) know the socket by;
// for a FIFO that of its file. [Socket.Revive] and [Socket.Restore] may change it.
func (s *Socket) Inode() uint64 { return s.inode }

// Warnings returns what was asked for and could not be had: each a *SocketError.
// The socket works without.
func (s *Socket) Warnings() []error { return slices.Clone(s.warnings) }

// Close closes the socket, and with RemoveOnStop removes its file and symbolic
// links where they still are its own. It does nothing the second time. A
// Watcher must have forgotten the descriptor before.
func (s *Socket) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fd < 0 {
		return nil
	}
	if s.parking != nil {
		s.parking.close()
		s.parking = nil
		s.letNobodyJoin() // whoever handed the socket over, or shares it, keeps it
	}
	var err error
	if s.spec.Options.RemoveOnStop {
		// While the descriptor is open the inode cannot be given to another file.
		err = errors.Join(s.removeFile(), s.removeLinks())
	}
	// A process that is being started has a copy of every descriptor until its exec. Wait for it, so
	// that the address is free when Close returns.
	syscall.ForkLock.RLock()
	e := unix.Close(s.fd)
	syscall.ForkLock.RUnlock()
	if e != nil {
		err = errors.Join(err, s.failure("close", e))
	}
	s.fd = -1
	return err
}

// abandon undoes a failed Open.
func (s *Socket) abandon() {
	_ = s.removeFile() // the error of Open matters more
	if s.fd >= 0 {
		_ = unix.Close(s.fd) // the same
	}
	s.fd = -1
}

// failure wraps an error with what was done to which socket.
func (s *Socket) failure(op string, err error) error {
	return &SocketError{Op: op, Address: s.addr, Err: err}
}

// warn keeps an error that does not keep the socket from working.
func (s *Socket) warn(op string, err error) {
	s.warnings = append(s.warnings, s.failure(op, err))
}
