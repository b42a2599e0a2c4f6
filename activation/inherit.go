package activation

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	systemd "github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/sys/unix"
)

// Inherited holds the sockets that were handed to this program, until they are
// taken. It is not safe for concurrent use.
type Inherited struct {
	sockets []inherited
}

// inherited is one socket that was handed over, and what the kernel says about it.
type inherited struct {
	fd        int
	inode     uint64
	name      string
	addr      Address // an IP without a zone; invalid where it is of a network that we do not know
	zone      uint32
	domain    int
	listening bool
	v6only    bool
	readWrite bool // FIFO
}

// String names the socket for errors.
func (in *inherited) String() string {
	if in.addr.Network == 0 {
		return fmt.Sprintf("%q (of an unknown kind)", in.name)
	}
	return fmt.Sprintf("%q (%s)", in.name, in.addr)
}

// Inherit takes over the sockets that systemd, or anything that speaks
// sd_listen_fds(3), handed to this program, and clears the variables that tell of
// them. Without any, the result is empty. It must be called once, before the program
// opens files of its own.
func Inherit() (*Inherited, error) {
	defer os.Unsetenv("LISTEN_PIDFDID") //nolint:errcheck // newer than go-systemd knows; cannot fail
	if err := checkListenFDs(); err != nil {
		return nil, err
	}
	h := &Inherited{}
	for _, f := range systemd.Files(true) {
		in, err := inspect(f)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("inherit descriptor %q: %w", f.Name(), err), h.Close())
		}
		h.sockets = append(h.sockets, in)
	}
	return h, nil
}

// checkListenFDs refuses a wrong LISTEN_FDS. Without it, descriptors of the Go runtime
// would be taken for sockets, and closed.
func checkListenFDs() error {
	if pid, err := strconv.Atoi(os.Getenv(listenPID)); err != nil || pid != os.Getpid() {
		return nil // not meant for us
	}
	n, err := strconv.Atoi(os.Getenv(listenFDs))
	if err != nil || n < 0 {
		return fmt.Errorf("inherit sockets: %s=%q is not a number", listenFDs, os.Getenv(listenFDs))
	}
	for fd := listenStart; fd < listenStart+n; fd++ {
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return fmt.Errorf("inherit sockets: %s=%d, but descriptor %d: %w", listenFDs, n, fd, err)
		}
		if kind := st.Mode & unix.S_IFMT; kind != unix.S_IFSOCK && kind != unix.S_IFIFO {
			return fmt.Errorf("inherit sockets: %s=%d, but descriptor %d is neither a socket nor a FIFO", listenFDs, n, fd)
		}
	}
	return nil
}

// inspect moves the descriptor out of f, which the runtime's poller may watch,
// and asks the kernel what it is.
func inspect(f *os.File) (inherited, error) {
	defer f.Close() // a duplicate lives on
	raw, err := f.SyscallConn()
	if err != nil {
		return inherited{}, err
	}
	in := inherited{fd: -1, name: f.Name()}
	if strings.HasPrefix(in.name, "LISTEN_FD_") {
		in.name = "unknown" // go-systemd's word for what systemd calls so
	}
	var dupErr error
	err = raw.Control(func(fd uintptr) { in.fd, dupErr = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, listenStart) })
	if err := errors.Join(err, dupErr); err != nil {
		return inherited{}, err
	}
	if err := errors.Join(unix.SetNonblock(in.fd, true), in.ask()); err != nil {
		return inherited{}, errors.Join(err, unix.Close(in.fd))
	}
	return in, nil
}

// ask fills in everything but the descriptor and the name. Nothing that the environment
// says is believed.
func (in *inherited) ask() error {
	var st unix.Stat_t
	if err := unix.Fstat(in.fd, &st); err != nil {
		return err
	}
	in.inode = st.Ino
	if st.Mode&unix.S_IFMT == unix.S_IFIFO {
		in.addr.Network = FIFO
		flags, err := unix.FcntlInt(uintptr(in.fd), unix.F_GETFL, 0)
		if err != nil {
			return err
		}
		in.readWrite = flags&unix.O_ACCMODE == unix.O_RDWR
		in.addr.Path, err = os.Readlink("/proc/self/fd/" + strconv.Itoa(in.fd))
		return err
	}
	kind, err := unix.GetsockoptInt(in.fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil {
		return err
	}
	if in.domain, err = unix.GetsockoptInt(in.fd, unix.SOL_SOCKET, unix.SO_DOMAIN); err != nil {
		return err
	}
	protocol, err := unix.GetsockoptInt(in.fd, unix.SOL_SOCKET, unix.SO_PROTOCOL)
	if err != nil {
		return err
	}
	listening, err := unix.GetsockoptInt(in.fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	if err != nil {
		return err
	}
	in.listening = listening != 0
	in.addr.Network = networkOfSocket(in.domain, kind, protocol)
	if in.addr.Network == 0 {
		return nil
	}
	sa, err := unix.Getsockname(in.fd)
	if err != nil {
		return err
	}
	ap := addrPort(sa)
	in.addr.IP, in.addr.Port, in.addr.Path = ap.Addr(), ap.Port(), unixPath(sa)
	if sa6, ok := sa.(*unix.SockaddrInet6); ok {
		in.zone = sa6.ZoneId
		only, err := unix.GetsockoptInt(in.fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY)
		in.v6only = only != 0
		return err
	}
	return nil
}

// networkOfSocket returns 0 for what is none of ours.
func networkOfSocket(domain, kind, protocol int) Network {
	ip := domain == unix.AF_INET || domain == unix.AF_INET6
	switch {
	// MPTCP serves TCP clients as well, and is what systemd's SocketProtocol=mptcp hands over.
	case ip && kind == unix.SOCK_STREAM && (protocol == unix.IPPROTO_TCP || protocol == unix.IPPROTO_MPTCP):
		return TCP
	case ip && kind == unix.SOCK_DGRAM && protocol == unix.IPPROTO_UDP:
		return UDP
	case domain == unix.AF_UNIX && kind == unix.SOCK_STREAM:
		return Unix
	case domain == unix.AF_UNIX && kind == unix.SOCK_DGRAM:
		return Unixgram
	case domain == unix.AF_UNIX && kind == unix.SOCK_SEQPACKET:
		return Unixpacket
	}
	return 0
}

// Take returns the inherited socket that spec means, to be used in place of Open;
// false where there is none. A socket means the spec when it has its name, or
// else its address. When sockets of that name are all of another kind or
// address, that is an error, as to open a second one would hide it.
//
// Options that can be set after bind(2) are set; mode, owner and group only where spec has
// them. The rest is up to whoever bound it, but a port that a supervisor had left shared, and that nobody
// shares now, is shared no more unless spec says ReusePort. The file is removed on Close only with RemoveOnStop. The
// Spec is kept, and must not be changed any more.
func (h *Inherited) Take(spec *Spec) (*Socket, bool, error) {
	i, err := h.find(spec)
	if err != nil || i < 0 {
		return nil, false, err
	}
	in := h.sockets[i]
	s := &Socket{spec: spec, addr: spec.Address, fd: in.fd, inode: in.inode, inherited: true}
	s.addr.Port = in.addr.Port
	if err := s.adopt(&in); err != nil {
		return nil, false, err // the descriptor stays with h
	}
	h.sockets = slices.Delete(h.sockets, i, i+1)
	return s, true, nil
}

// find returns the index of the socket that spec means, -1 where there is none.
func (h *Inherited) find(spec *Spec) (int, error) {
	var wrong error
	byAddress := -1
	anyPort := spec.Address.Network.IP() && spec.Address.Port == 0 // then only the name tells it from others
	for i := range h.sockets {
		in := &h.sockets[i]
		err := in.differs(spec)
		named := spec.Name != "" && in.name == spec.Name
		switch {
		case err == nil && named:
			return i, nil // systemd gives one name to all sockets of a unit, so the address decides among them
		case err == nil && byAddress < 0 && !anyPort:
			byAddress = i
		case err != nil && named:
			wrong = errors.Join(wrong, &SocketError{Op: "inherit", Address: spec.Address, Err: fmt.Errorf("socket %s has its name, but %w", in, err)})
		}
	}
	if byAddress >= 0 {
		return byAddress, nil
	}
	return -1, wrong
}

// differs says why the socket is not the one that spec describes.
func (in *inherited) differs(spec *Spec) error {
	want := spec.Address
	switch {
	case in.addr.Network != want.Network:
		return fmt.Errorf("is not of the network %s", want.Network)
	case want.Network.Connections() && !in.listening:
		return errors.New("does not listen")
	case want.Network.Path():
		if in.addr.Path != want.Path {
			return errors.New("has another path")
		}
		if want.Network == FIFO && !in.readWrite {
			// Without a writer of our own, the end of each writer would be reported again and again.
			return errors.New("is not open for reading and writing")
		}
		return nil
	case want.Port != 0 && in.addr.Port != want.Port:
		return errors.New("has another port")
	}
	return in.differsInIP(spec)
}

// differsInIP compares IP address, zone and IP versions.
func (in *inherited) differsInIP(spec *Spec) error {
	want, family := spec.Address.IP, spec.Options.Family
	wildcard := in.addr.IP.IsUnspecified()
	six := in.domain == unix.AF_INET6
	switch {
	case want.IsValid() && want.WithZone("") != in.addr.IP, !want.IsValid() && !wildcard:
		return errors.New("has another IP address")
	case want.Is6() && want.Zone() != "":
		if zone, err := zoneIndex(in.fd, want.Zone()); err != nil || zone != in.zone {
			return errors.New("has another zone")
		}
		return nil
	case want.IsValid() && !want.IsUnspecified(), want.Is4():
		return nil
	}
	// What is left is ":80" and "[::]:80", where the family decides.
	switch family {
	case FamilyIPv4:
		if six {
			return errors.New("is not IPv4 only")
		}
	case FamilyIPv6:
		if !six || !in.v6only {
			return errors.New("is not IPv6 only")
		}
	case FamilyDual:
		if !six || in.v6only {
			return errors.New("serves one IP version only")
		}
	case FamilyDefault:
		if !six && hasIPv6() {
			return errors.New("is IPv4 only")
		}
	}
	return nil
}

// hasIPv6 says whether the kernel knows IPv6 sockets at all.
func hasIPv6() bool {
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		_ = unix.Close(fd) // it was only asked with
	}
	return !errors.Is(err, unix.EAFNOSUPPORT)
}

// adopt applies what can be applied to a socket that somebody else has bound.
func (s *Socket) adopt(in *inherited) error {
	o := &s.spec.Options
	if s.addr.Network.IP() {
		device, _ := unix.GetsockoptString(s.fd, unix.SOL_SOCKET, unix.SO_BINDTODEVICE)
		s.device = cmp.Or(o.Device, device)
		if device != s.device {
			if err := s.setDevice(); err != nil {
				return err
			}
		}
	}
	if s.addr.Network != FIFO {
		if err := s.attachAccess(o.Access, s.fd); err != nil {
			return err
		}
		s.setAfterBind(in.domain)
	} else {
		s.setPipeSize()
	}
	if o.Backlog > 0 {
		if err := s.listen(); err != nil { // a second listen(2) only changes the backlog
			return err
		}
	}
	if s.unsettled = s.addr.Network == TCP && !in.listening; s.addr.Network != FIFO && !s.unsettled {
		if err := s.settle(); err != nil {
			return err
		}
	}
	if s.addr.Network.Path() && !s.addr.Abstract() {
		return s.adoptPath()
	}
	return nil
}

// settle is what is left to be done when the socket listens.
func (s *Socket) settle() error {
	s.unsettled = false
	return errors.Join(s.unshare(), s.remember())
}

// adoptPath changes of the file only what spec says: systemd has settled the rest, and
// our defaults might open it to more people.
func (s *Socket) adoptPath() error {
	o := &s.spec.Options
	var st unix.Stat_t
	if err := unix.Lstat(s.addr.Path, &st); err != nil {
		s.warn("stat", err) // it serves those who are connected; nobody new can come
		return nil
	}
	kind, mode := uint32(unix.S_IFSOCK), st.Mode&0o7777
	if s.addr.Network == FIFO {
		kind = unix.S_IFIFO
	}
	if o.Mode != 0 {
		mode = o.mode()
	}
	s.found = &fileLook{mode: mode, uid: st.Uid, gid: st.Gid}
	uid, gid, err := owner(o)
	if err != nil {
		return s.failure("inherit", err)
	}
	if s.file, err = settle(s.addr.Path, kind, mode, uid, gid); err != nil {
		s.warn("set mode and owner of", err)
	}
	s.link()
	return nil
}

// Unused describes the sockets that nobody took, by name and address.
func (h *Inherited) Unused() []string {
	out := make([]string, len(h.sockets))
	for i := range h.sockets {
		out[i] = h.sockets[i].String()
	}
	return out
}

// Close closes the sockets that nobody took.
func (h *Inherited) Close() error {
	var errs []error
	for _, in := range h.sockets {
		if err := unix.Close(in.fd); err != nil {
			errs = append(errs, fmt.Errorf("close inherited socket %s: %w", &in, err))
		}
	}
	h.sockets = nil
	return errors.Join(errs...)
}
