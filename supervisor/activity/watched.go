package activity

import (
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"hibergate/activation"
	"hibergate/supervisor/activity/ledger"
)

// watched is a socket with what was found out about it.
type watched struct {
	Socket
	problem string // why nothing can be known about it; empty: fine

	// TCP and UDP.
	protocol uint8
	domain   uint8      // AF_INET or AF_INET6: in which list of sockets its connections are
	ip       netip.Addr // the zero Addr: every address
	port     uint16
	only6    bool       // every address, but of IPv6 only
	device   uint32     // the network device that it is bound to; 0: none
	account  ledger.Key // in the ledger; zero without one

	// Unix sockets.
	inode uint32 // newest; see identify
	name  string // as sock_diag tells it: abstract names with a leading NUL

	counted       counted // newest figures of the ledger
	countedBefore counted // by ledgers that were lost
}

type counted struct{ in, out Counters }

// watch examines a socket.
func watch(s Socket) *watched {
	w := &watched{Socket: s}
	w.Ignore = nil
	if s.Address.Network == activation.TCP {
		for _, p := range s.Ignore {
			w.Ignore = append(w.Ignore, unmapped(p))
		}
	}
	if err := w.examine(); err != nil {
		w.problem = fmt.Sprintf("examine socket: %v", err)
	}
	return w
}

func (w *watched) examine() error {
	if w.Address.Network == activation.FIFO {
		return nil
	}
	// The kernel's own word, not the address as written: it tells the family, too.
	bound, err := unix.Getsockname(w.FD)
	if err != nil {
		return err
	}
	switch a := bound.(type) {
	case *unix.SockaddrInet4:
		w.domain, w.ip, w.port = unix.AF_INET, netip.AddrFrom4(a.Addr), uint16(a.Port)
	case *unix.SockaddrInet6:
		w.domain, w.ip, w.port = unix.AF_INET6, netip.AddrFrom16(a.Addr).Unmap(), uint16(a.Port)
		only, err := unix.GetsockoptInt(w.FD, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY)
		if err != nil {
			return err
		}
		w.only6 = only != 0
	case *unix.SockaddrUnix:
		w.name = socketName(a)
		return nil
	default:
		return fmt.Errorf("address of unknown kind %T", bound)
	}
	w.protocol = unix.IPPROTO_TCP
	if w.Address.Network == activation.UDP {
		w.protocol = unix.IPPROTO_UDP
	}
	if w.ip.IsUnspecified() && !w.mapped4() {
		w.ip = netip.Addr{}
	}
	if w.device, err = boundDevice(w.FD); err != nil {
		return err
	}
	if w.Accounting != SockDiag {
		w.account = w.key()
	}
	return nil
}

// accounted says whether the socket has an account in the ledger.
func (w *watched) accounted() bool { return w.account != ledger.Key{} }

// unmapped returns a prefix of IPv4-mapped addresses as one of IPv4.
func unmapped(p netip.Prefix) netip.Prefix {
	if p.Addr().Is4In6() && p.Bits() >= 96 {
		return netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
	}
	return p
}

// unheard returns the sources whose packets are no activity.
func (w *watched) unheard() []ledger.Range {
	var out []ledger.Range
	for _, p := range w.Ignore {
		out = append(out, ledger.RangeOf(p))
	}
	for _, r := range w.Denied {
		out = append(out, ledger.Range(r))
	}
	return out
}

// ignores says whether connections from this address do not matter.
func (w *watched) ignores(peer netip.Addr) bool {
	for _, p := range w.Ignore {
		if p.Contains(peer) {
			return true
		}
	}
	return false
}

// unknowable says why nothing can be known about the socket; empty: fine. The program has the socket
// too and may make it transparent at any time, so that is asked each time.
func (w *watched) unknowable() string {
	if w.problem != "" || !w.Address.Network.IP() {
		return w.problem
	}
	level, option := unix.IPPROTO_IP, unix.IP_TRANSPARENT
	if w.domain == unix.AF_INET6 {
		level, option = unix.IPPROTO_IPV6, unix.IPV6_TRANSPARENT
	}
	transparent, err := unix.GetsockoptInt(w.FD, level, option)
	switch {
	case err != nil:
		return fmt.Sprintf("examine socket: %v", err)
	case transparent != 0:
		return "connections of a transparent socket have addresses of their own, which no witness can be asked about"
	}
	return ""
}

// identify reads the inode of a Unix socket: there may be another socket under the
// descriptor than the last time (one that was shut down is replaced).
func (w *watched) identify() error {
	var st unix.Stat_t
	if err := unix.Fstat(w.FD, &st); err != nil {
		return fmt.Errorf("identify socket: %w", err)
	}
	w.inode = uint32(st.Ino)
	return nil
}

// isIn says whether connections of the socket are in the list of a family.
func (w *watched) isIn(domain uint8) bool { return w.domain == domain || w.HandedOver }

// mapped4 says that the socket is an IPv6 one bound to ::ffff:0.0.0.0: every address of IPv4.
func (w *watched) mapped4() bool { return w.domain == unix.AF_INET6 && w.ip.Is4() }

// key returns the name of the socket's account in the ledger. The ledger knows no devices: sockets with the
// same address on several of them share an account, and the activity of each counts for all.
func (w *watched) key() ledger.Key {
	key := ledger.Key{Protocol: w.protocol, Port: w.port}
	switch {
	case w.domain == unix.AF_INET, w.mapped4():
		key.Family = unix.NFPROTO_IPV4
	case w.ip.IsValid(), w.only6:
		key.Family = unix.NFPROTO_IPV6
	}
	if w.ip.IsValid() && !w.ip.IsUnspecified() {
		key.Addr = w.ip
	}
	return key
}

// count takes the figures of the ledger, and adds those of ledgers that were lost.
func (w *watched) count(r ledger.Reading) {
	before := w.countedBefore
	w.counted = counted{
		in:  Counters{before.in.Packets + r.In.Packets, before.in.Bytes + r.In.Bytes},
		out: Counters{before.out.Packets + r.Out.Packets, before.out.Bytes + r.Out.Bytes},
	}
}
