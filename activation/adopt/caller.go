package adopt

import (
	"bytes"
	"cmp"
	"errors"
	"os"
	"path"
	"strconv"
	"strings"
	"unicode/utf8"
	"unsafe"

	"golang.org/x/sys/unix"

	"hibergate/activation"
)

// caller is the thread that waits for an answer, and the socket that it asks about. As long as its question is
// valid the kernel gives its id to nobody else, so all that is read of it is checked by that afterwards.
type caller struct {
	session *Session
	id      uint64
	tid     uint32
	fd      int // our duplicate of its descriptor; valid only with opened
	opened  bool
	denied  bool // its memory may not be read
}

func (c *caller) close() {
	if !c.opened || c.fd < 0 {
		return
	}
	// If the program has closed its own by now, this one may wait for the peer of a connection (SO_LINGER, socket(7)). None that
	// binds or listens has one.
	if linger, err := unix.GetsockoptLinger(c.fd, unix.SOL_SOCKET, unix.SO_LINGER); err == nil && linger.Onoff != 0 {
		if _, err := unix.Getpeername(c.fd); err == nil {
			_ = unix.SetsockoptLinger(c.fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{})
		}
	}
	_ = unix.Close(c.fd)
}

// valid says whether the thread still waits.
func (c *caller) valid() bool { return c.session.ioctl(ioctlIDValid, unsafe.Pointer(&c.id)) == nil }

// proc is the path of something in /proc about the thread.
func (c *caller) proc(name string) string { return "/proc/" + strconv.Itoa(int(c.tid)) + "/" + name }

// read copies memory of the thread. It returns false where there is none, or we may not (process_vm_readv(2)).
func (c *caller) read(address uint64, to []byte) bool {
	n := c.readSome(address, to)
	return n == len(to)
}

func (c *caller) readSome(address uint64, to []byte) int {
	if len(to) == 0 {
		return 0
	}
	local := []unix.Iovec{{Base: &to[0], Len: uint64(len(to))}}
	remote := []unix.RemoteIovec{{Base: uintptr(address), Len: len(to)}}
	n, err := unix.ProcessVMReadv(int(c.tid), local, remote, 0)
	c.denied = errors.Is(err, unix.EPERM)
	if err != nil || !c.valid() {
		return 0
	}
	return n
}

// text copies a string that ends in a NUL, no longer than a path may be.
func (c *caller) text(address uint64) (string, bool) {
	const page = 4096
	var out []byte
	for len(out) < page {
		// What is readable ends at the end of a page.
		chunk := make([]byte, page-address%page)
		n := c.readSome(address, chunk)
		if n == 0 {
			return "", false
		}
		if i := bytes.IndexByte(chunk[:n], 0); i >= 0 {
			return string(append(out, chunk[:i]...)), true
		}
		out = append(out, chunk[:n]...)
		address += uint64(n)
	}
	return "", false
}

// open duplicates a descriptor of the thread. That takes the right to trace it, as for its memory.
func (c *caller) open(fd uint64) bool {
	const thread = unix.O_EXCL // PIDFD_THREAD, Linux 6.9: without it, only of the first thread of a process
	pidfd, err := unix.PidfdOpen(int(c.tid), thread)
	if errors.Is(err, unix.EINVAL) {
		pidfd, err = unix.PidfdOpen(c.process(), 0)
	}
	if err != nil {
		return false
	}
	defer unix.Close(pidfd) //nolint:errcheck // nothing was written
	got, err := unix.PidfdGetfd(pidfd, int(int32(fd)), 0)
	if err != nil {
		return false
	}
	c.fd, c.opened = got, true
	return c.valid()
}

// process is the id of the process that the thread belongs to.
func (c *caller) process() int {
	n, err := strconv.Atoi(c.status("Tgid:"))
	if err != nil {
		return -1
	}
	return n
}

// status reads a line of /proc/TID/status (proc_pid_status(5)).
func (c *caller) status(key string) string {
	b, err := os.ReadFile(c.proc("status"))
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, key); ok {
			return strings.TrimSpace(rest)
		}
	}
	return ""
}

// ours says whether the socket is of our network namespace. What cannot be known is taken for ours, as before
// Linux 5.14 it could not be.
func (c *caller) ours(f *facts) bool {
	there := networkOf(c.fd)
	return there == 0 || f.network == 0 || there == f.network
}

// here is ours without any doubt.
func (c *caller) here(f *facts) bool { return f.network != 0 && networkOf(c.fd) == f.network }

// mayBind says whether the program may bind a port, by CAP_NET_BIND_SERVICE where that is needed.
func (c *caller) mayBind(port uint16, f *facts) bool {
	if port >= f.privileged {
		return true
	}
	caps, err := strconv.ParseUint(c.status("CapEff:"), 16, 64)
	return err == nil && caps&(1<<unix.CAP_NET_BIND_SERVICE) != 0 && namespace(c.proc("ns/user")) == f.users && c.valid()
}

// kind is what a socket is, as far as we have any of that kind.
func (c *caller) kind() (domain, kind, protocol int, ok bool) {
	var err error
	if domain, err = unix.GetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_DOMAIN); err != nil {
		return 0, 0, 0, false
	}
	if kind, err = unix.GetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_TYPE); err != nil {
		return 0, 0, 0, false
	}
	protocol, err = unix.GetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_PROTOCOL)
	return domain, kind, protocol, err == nil
}

// wants puts what the program asks for into words.
func (c *caller) wants(a sockaddr) (bound, bool) {
	domain, kind, protocol, ok := c.kind()
	if !ok {
		return bound{}, false
	}
	b := bound{domain: domain, ip: a.ip, port: a.port}
	switch {
	case domain != unix.AF_INET && domain != unix.AF_INET6, domain == unix.AF_INET && !a.ip.Is4(), domain == unix.AF_INET6 && a.family == unix.AF_INET:
		return bound{}, false // the kernel will refuse it
	case kind == unix.SOCK_STREAM && (protocol == unix.IPPROTO_TCP || protocol == unix.IPPROTO_MPTCP):
		b.network = activation.TCP
	case kind == unix.SOCK_DGRAM && protocol == unix.IPPROTO_UDP:
		b.network = activation.UDP
	default:
		return bound{}, false
	}
	if domain == unix.AF_INET6 {
		only, err := unix.GetsockoptInt(c.fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY)
		b.v6only = err == nil && only != 0
	}
	return b, true
}

// unixNetwork says which Unix socket it is.
func (c *caller) unixNetwork() (activation.Network, bool) {
	domain, kind, _, ok := c.kind()
	if !ok || domain != unix.AF_UNIX {
		return 0, false
	}
	switch kind {
	case unix.SOCK_STREAM:
		return activation.Unix, true
	case unix.SOCK_DGRAM:
		return activation.Unixgram, true
	case unix.SOCK_SEQPACKET:
		return activation.Unixpacket, true
	}
	return 0, false
}

// address is where a socket is bound that is about to listen.
func (c *caller) address() (activation.Address, bool) {
	sa, err := unix.Getsockname(c.fd)
	if err != nil {
		return activation.Address{}, false
	}
	switch sa := sa.(type) {
	case *unix.SockaddrUnix:
		network, ok := c.unixNetwork()
		name := pathOf(c.fd)
		if abstract, found := strings.CutPrefix(name, "\x00"); found {
			name = "@" + abstract
		}
		return activation.Address{Network: network, Path: name}, ok && name != ""
	case *unix.SockaddrInet4, *unix.SockaddrInet6:
		a, ok := parseSocketAddress(sa)
		if !ok || a.port == 0 {
			return activation.Address{}, false
		}
		b, ok := c.wants(a)
		return b.address(), ok
	}
	return activation.Address{}, false
}

// plain says whether an address is one that the configuration could have, and a file of text.
func plain(a activation.Address) bool {
	again, err := activation.ParseAddress(a.String())
	return err == nil && again == a && utf8.ValidString(a.Path)
}

// tell says for people where a program listens.
func tell(a activation.Address) string {
	if plain(a) {
		return a.String()
	}
	return strconv.Quote(a.String())
}

// samePath says whether a path, as the thread writes it, is the one of one of our sockets: by its last element, and
// by the directory that it is in. dir is AT_FDCWD, or a descriptor of the thread.
func (c *caller) samePath(dir int64, p string, ours activation.Address) bool {
	if name, abstract := strings.CutPrefix(p, "\x00"); abstract || ours.Abstract() {
		return abstract && "@"+name == ours.Path
	}
	// Not by package path, which takes "link/.." away: the kernel follows the link first.
	end := strings.LastIndexByte(p, '/') + 1
	if p[end:] != path.Base(ours.Path) {
		return false
	}
	root, how := c.proc("cwd"), unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC}
	switch {
	case path.IsAbs(p):
		root, how.Resolve = c.proc("root"), unix.RESOLVE_IN_ROOT
	case dir != unix.AT_FDCWD:
		root = c.proc("fd/" + strconv.FormatInt(dir, 10))
	}
	base, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(base) //nolint:errcheck // O_PATH: there is nothing to lose
	parent, err := unix.Openat2(base, cmp.Or(p[:end], "."), &how)
	if err != nil {
		return false
	}
	defer unix.Close(parent) //nolint:errcheck // the same
	var theirs, here unix.Stat_t
	if unix.Fstat(parent, &theirs) != nil || unix.Stat(path.Dir(ours.Path), &here) != nil {
		return false
	}
	return theirs.Dev == here.Dev && theirs.Ino == here.Ino && c.valid()
}

// take makes a Socket of the one that the caller has opened, which it has no more.
func (c *caller) take(l *Learn) (*activation.Socket, error) {
	sock, err := activation.Take(l.Spec, c.fd)
	if err == nil {
		c.fd = -1
	}
	return sock, err
}

// put has fd be our descriptor src in the process of the thread, closed on exec if its own was.
func (c *caller) put(fd uint64, src int) error {
	a := addFD{id: c.id, flags: unix.SECCOMP_ADDFD_FLAG_SETFD, srcFD: uint32(src), newFD: uint32(fd), newFDFlags: c.descriptorFlags(fd)}
	return c.session.ioctl(ioctlAddFD, unsafe.Pointer(&a))
}

// descriptorFlags reads O_CLOEXEC, which belongs to the descriptor and not to the socket, from /proc/TID/fdinfo.
func (c *caller) descriptorFlags(fd uint64) uint32 {
	b, err := os.ReadFile(c.proc("fdinfo/" + strconv.FormatUint(fd, 10)))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, "flags:"); ok {
			flags, err := strconv.ParseUint(strings.TrimSpace(rest), 8, 32)
			if err == nil {
				return uint32(flags) & unix.O_CLOEXEC
			}
		}
	}
	return 0
}

// replaceMPTCP puts a plain TCP socket in the place of an MPTCP one that is not bound yet. Where that fails it stays.
func (c *caller) replaceMPTCP(fd uint64, domain int) {
	protocol, err := unix.GetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_PROTOCOL)
	if err != nil || protocol != unix.IPPROTO_MPTCP {
		return
	}
	plain, err := unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return
	}
	defer unix.Close(plain) //nolint:errcheck // the program has its own descriptor of it
	if activation.Copy(plain, c.fd) == nil {
		_ = c.put(fd, plain)
	}
}

// bindRaw is bind(2) with an address as the program gave it.
func bindRaw(fd int, address []byte) error {
	_, _, errno := unix.Syscall(unix.SYS_BIND, uintptr(fd), uintptr(unsafe.Pointer(&address[0])), uintptr(len(address)))
	if errno != 0 {
		return errno
	}
	return nil
}

// sharesPort says whether the program has asked to share its address with other sockets.
func sharesPort(fd int) bool {
	on, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT)
	return err == nil && on != 0
}

// pathOf is where a Unix socket is bound, as bind(2) was told: package unix ends an abstract name at a NUL.
func pathOf(fd int) string {
	var b [lenUnix]byte
	size := uint32(len(b))
	_, _, errno := unix.Syscall(unix.SYS_GETSOCKNAME, uintptr(fd), uintptr(unsafe.Pointer(&b)), uintptr(unsafe.Pointer(&size)))
	if errno != 0 {
		return ""
	}
	a, _ := parseSockaddr(b[:min(size, lenUnix)])
	return a.path
}

// harmful says why ours cannot stand for the program's: it would receive what that would not.
func harmful(fd int, ours *activation.Socket) string {
	if !ours.Address().Network.IP() {
		return ""
	}
	theirs, err := unix.GetsockoptString(fd, unix.SOL_SOCKET, unix.SO_BINDTODEVICE)
	if err != nil || theirs == "" {
		return ""
	}
	if device, err := unix.GetsockoptString(ours.FD(), unix.SOL_SOCKET, unix.SO_BINDTODEVICE); err != nil || device != theirs {
		return "the program binds to the network interface " + theirs + "; write device = " + strconv.Quote(theirs) + " for the socket in the configuration"
	}
	return ""
}

// describe says what one of ours is.
func describe(sock *activation.Socket) bound {
	a := sock.Address()
	b := bound{network: a.Network, ip: a.IP, port: a.Port}
	if !a.Network.IP() {
		return b
	}
	b.domain, _ = unix.GetsockoptInt(sock.FD(), unix.SOL_SOCKET, unix.SO_DOMAIN)
	if sa, err := unix.Getsockname(sock.FD()); err == nil {
		if real, ok := parseSocketAddress(sa); ok {
			b.ip = real.ip
		}
	}
	if b.domain == unix.AF_INET6 {
		only, err := unix.GetsockoptInt(sock.FD(), unix.IPPROTO_IPV6, unix.IPV6_V6ONLY)
		b.v6only = err == nil && only != 0
	}
	return b
}
