package activation

import (
	"fmt"
	"io/fs"
	"time"

	"golang.org/x/sys/unix"
)

// Family says which IP versions a TCP or UDP socket on the wildcard IPv6
// address serves.
type Family uint8

// The families. They matter for an address without an IP (":80") and for "[::]".
const (
	FamilyDefault Family = iota // as /proc/sys/net/ipv6/bindv6only says; IPv4 alone where the kernel has no IPv6
	FamilyDual                  // both versions on one socket
	FamilyIPv4                  // IPv4 only
	FamilyIPv6                  // IPv6 only
)

// Options are the socket options of one socket; they mean what systemd.socket(5)
// says of the directive named beside each. The zero value of a field leaves
// the kernel's default alone.
type Options struct {
	Backlog     int    // Backlog=; 0: net.core.somaxconn
	Family      Family // BindIPv6Only=
	Device      string // BindToDevice=
	ReusePort   bool   // ReusePort=
	FreeBind    bool   // FreeBind=
	Transparent bool   // Transparent=
	Broadcast   bool   // Broadcast=

	KeepAlive         bool          // KeepAlive=
	KeepAliveTime     time.Duration // KeepAliveTimeSec=, whole seconds
	KeepAliveInterval time.Duration // KeepAliveIntervalSec=, whole seconds
	KeepAliveProbes   int           // KeepAliveProbes=
	NoDelay           bool          // NoDelay=
	DeferAccept       time.Duration // DeferAcceptSec=, whole seconds
	Congestion        string        // TCPCongestion=

	ReceiveBuffer int  // ReceiveBuffer=, bytes
	SendBuffer    int  // SendBuffer=, bytes
	PipeSize      int  // PipeSize=, bytes; FIFO only
	Mark          *int // Mark=
	Priority      *int // Priority=
	TOS           *int // IPTOS=
	TTL           int  // IPTTL=

	PassCredentials bool // PassCredentials=; Unix only
	// PacketInfo has the kernel note where each datagram went to (IP_PKTINFO), as it does for later
	// readers only where somebody asks before the datagram comes. For programs that will ask; UDP only.
	PacketInfo bool

	// Access says who may use a TCP or UDP socket; nil: everybody. It is shared, and not changed.
	Access *Access

	// Paths (Unix sockets that are not abstract, and FIFOs).
	Mode         fs.FileMode // SocketMode=; 0: 0666
	DirMode      fs.FileMode // DirectoryMode=; 0: 0755
	Owner, Group string      // SocketUser=, SocketGroup=; names or numbers; empty: unchanged
	Symlinks     []string    // Symlinks=
	RemoveOnStop bool        // RemoveOnStop=
}

// setBeforeBind sets what bind(2) looks at. Only what the user would be wrong to
// do without is an error; the rest is a warning, as in systemd.
func (s *Socket) setBeforeBind(domain int) error {
	o := &s.spec.Options
	if domain == unix.AF_INET6 && o.Family != FamilyDefault {
		only := 0
		if o.Family == FamilyIPv6 {
			only = 1
		}
		if err := unix.SetsockoptInt(s.fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, only); err != nil {
			return s.failure("set IPV6_V6ONLY of", err)
		}
	}
	if domain != unix.AF_UNIX {
		if err := s.setDevice(); err != nil {
			return err
		}
		s.keepPacketInfo(domain == unix.AF_INET6)
		if o.ReusePort {
			s.try("SO_REUSEPORT", unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
		}
		// A dual-stack socket takes the options of both versions: each applies to its own packets.
		if o.FreeBind {
			s.try("IP_FREEBIND", unix.IPPROTO_IP, unix.IP_FREEBIND, 1)
			if domain == unix.AF_INET6 {
				s.try("IPV6_FREEBIND", unix.IPPROTO_IPV6, unix.IPV6_FREEBIND, 1)
			}
		}
		if o.Transparent {
			s.try("IP_TRANSPARENT", unix.IPPROTO_IP, unix.IP_TRANSPARENT, 1)
			if domain == unix.AF_INET6 {
				s.try("IPV6_TRANSPARENT", unix.IPPROTO_IPV6, unix.IPV6_TRANSPARENT, 1)
			}
		}
	}
	// For TCP it only means not to wait for old connections, but two UDP sockets that have it share
	// a port, and one gets the datagrams of the other: not unless the user wants to share.
	if s.sharesAddress() {
		if err := unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
			return s.failure("set SO_REUSEADDR of", err)
		}
	}
	// Before anything can come in. Without it the socket would be open to those it was to be kept from.
	return s.attachAccess(o.Access, s.fd)
}

// sharesAddress says whether the socket has SO_REUSEADDR.
func (s *Socket) sharesAddress() bool {
	return s.addr.Network != UDP || s.spec.Options.ReusePort || s.addr.IP.IsMulticast()
}

// setDevice is the one option whose failure is an error in systemd too: without it the
// socket would be open to networks that it was to be kept from.
func (s *Socket) setDevice() error {
	device := s.device
	if device == "" {
		return nil
	}
	if err := unix.SetsockoptString(s.fd, unix.SOL_SOCKET, unix.SO_BINDTODEVICE, device); err != nil {
		return s.failure("bind to device "+device+":", err)
	}
	return nil
}

// setAfterBind sets what accepted sockets inherit and what packets carry. It is
// done before listen(2), so that the first connection has it too. Failures are
// warnings: the socket works on without.
func (s *Socket) setAfterBind(domain int) {
	o := &s.spec.Options
	if s.addr.Network == TCP {
		s.setTCP()
	}
	if domain != unix.AF_UNIX {
		s.setIP(domain)
	}
	if o.PassCredentials && domain == unix.AF_UNIX {
		s.try("SO_PASSCRED", unix.SOL_SOCKET, unix.SO_PASSCRED, 1)
	}
	s.setBuffer("receive", o.ReceiveBuffer, unix.SO_RCVBUF, unix.SO_RCVBUFFORCE)
	s.setBuffer("send", o.SendBuffer, unix.SO_SNDBUF, unix.SO_SNDBUFFORCE)
	if o.Mark != nil {
		s.try("SO_MARK", unix.SOL_SOCKET, unix.SO_MARK, *o.Mark)
	}
	// After IP_TOS, which sets a priority of its own (socket(7)).
	if o.Priority != nil {
		s.try("SO_PRIORITY", unix.SOL_SOCKET, unix.SO_PRIORITY, *o.Priority)
	}
}

// setTCP sets the options of tcp(7), which accepted sockets inherit.
func (s *Socket) setTCP() {
	o := &s.spec.Options
	if o.KeepAlive {
		s.try("SO_KEEPALIVE", unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1)
	}
	if o.KeepAliveTime > 0 {
		s.try("TCP_KEEPIDLE", unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, wholeSeconds(o.KeepAliveTime))
	}
	if o.KeepAliveInterval > 0 {
		s.try("TCP_KEEPINTVL", unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, wholeSeconds(o.KeepAliveInterval))
	}
	if o.KeepAliveProbes > 0 {
		s.try("TCP_KEEPCNT", unix.IPPROTO_TCP, unix.TCP_KEEPCNT, o.KeepAliveProbes)
	}
	if o.NoDelay {
		s.try("TCP_NODELAY", unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	}
	if o.DeferAccept > 0 {
		s.try("TCP_DEFER_ACCEPT", unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT, wholeSeconds(o.DeferAccept))
	}
	if o.Congestion != "" {
		if err := unix.SetsockoptString(s.fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, o.Congestion); err != nil {
			s.warn("set TCP_CONGESTION of", fmt.Errorf("%s: %w", o.Congestion, err))
		}
	}
}

// setIP sets the options of ip(7) and ipv6(7). On a dual-stack socket each version
// has its own.
func (s *Socket) setIP(domain int) {
	o := &s.spec.Options
	if o.Broadcast {
		s.try("SO_BROADCAST", unix.SOL_SOCKET, unix.SO_BROADCAST, 1)
	}
	if o.TOS != nil {
		s.try("IP_TOS", unix.IPPROTO_IP, unix.IP_TOS, *o.TOS)
		if domain == unix.AF_INET6 {
			s.try("IPV6_TCLASS", unix.IPPROTO_IPV6, unix.IPV6_TCLASS, *o.TOS)
		}
	}
	if o.TTL > 0 {
		s.try("IP_TTL", unix.IPPROTO_IP, unix.IP_TTL, o.TTL)
		if domain == unix.AF_INET6 {
			s.try("IPV6_UNICAST_HOPS", unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS, o.TTL)
		}
	}
}

// keepPacketInfo sets what PacketInfo asks for.
func (s *Socket) keepPacketInfo(v6 bool) {
	if s.addr.Network != UDP || !s.spec.Options.PacketInfo {
		return
	}
	s.try("IP_PKTINFO", unix.IPPROTO_IP, unix.IP_PKTINFO, 1)
	if v6 {
		s.try("IPV6_RECVPKTINFO", unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1)
	}
}

// setBuffer sets the size of a socket buffer past net.core.[rw]mem_max where that is
// permitted, and up to it elsewhere.
func (s *Socket) setBuffer(which string, size, option, force int) {
	if size <= 0 || unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, force, size) == nil {
		return
	}
	op := "set " + which + " buffer of"
	if err := unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, option, size); err != nil {
		s.warn(op, err)
		return
	}
	// The kernel cuts the size silently, and reports twice the size (socket(7)).
	if got, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, option); err == nil && got/2 < size {
		s.warn(op, fmt.Errorf("limited to %d of %d bytes by net.core: %w", got/2, size, unix.EPERM))
	}
}

// try sets an integer option; a failure is a warning.
func (s *Socket) try(name string, level, option, value int) {
	if err := unix.SetsockoptInt(s.fd, level, option, value); err != nil {
		s.warn("set "+name+" of", err)
	}
}

// wholeSeconds rounds up, so that a short time never becomes 0, which the kernel refuses.
func wholeSeconds(d time.Duration) int { return int((d + time.Second - 1) / time.Second) }
