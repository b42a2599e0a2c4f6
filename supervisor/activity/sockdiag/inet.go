package sockdiag

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/supervisor/activity/netlink"
)

// State is the state of a TCP or Unix socket, as the kernel numbers them (tcp_states.h).
type State uint8

// The states.
const (
	Established State = iota + 1
	SynSent
	SynReceived
	FinWait1
	FinWait2
	TimeWait
	Close
	CloseWait
	LastAck
	Listen
	Closing
)

// String returns the name that conntrack and ss use, in capitals.
func (s State) String() string {
	names := [...]string{
		"", "ESTABLISHED", "SYN_SENT", "SYN_RECV", "FIN_WAIT1", "FIN_WAIT2", "TIME_WAIT", "CLOSE", "CLOSE_WAIT", "LAST_ACK", "LISTEN", "CLOSING",
	}
	if int(s) < len(names) && s > 0 {
		return names[s]
	}
	return fmt.Sprintf("STATE_%d", uint8(s))
}

// Inet is one TCP or UDP socket.
type Inet struct {
	State       State
	Local, Peer netip.AddrPort // IPv4 shown as such, also on a dual-stack socket; no zone
	Device      uint32         // index of the one that it, or its listener, is bound to; 0: none
	Inode       uint32         // 0: no process holds it (not accepted yet, or closed by its process)
	Cookie      uint64         // identity, never used twice
	ReceiveQ    uint32         // bytes to be read; for UDP the memory used, so only zero or not; TCP listener: queued connections

	// How long ago data was last received and sent; from the start of the connection
	// where there was none. Timed says that they are there (TCP only).
	SinceReceived, SinceSent time.Duration
	Timed                    bool
}

const (
	inetMessageSize = 72 // struct inet_diag_msg
	infoAttribute   = 2  // INET_DIAG_INFO
	lastDataSent    = 44 // offsets in struct tcp_info
	lastDataRecv    = 52
	byFamily        = 20 // SOCK_DIAG_BY_FAMILY
	filterAttribute = 1  // INET_DIAG_REQ_BYTECODE
)

// Decode decodes one row of a dump (struct inet_diag_msg with attributes). It allocates nothing. Pure.
func (s *Inet) Decode(body []byte) error {
	if len(body) < inetMessageSize {
		return netlink.ErrMalformed
	}
	*s = Inet{
		State:    State(body[1]),
		Local:    addrPort(body[0], body[8:24], body[4:6]),
		Peer:     addrPort(body[0], body[24:40], body[6:8]),
		Device:   binary.NativeEndian.Uint32(body[40:]),
		Cookie:   binary.NativeEndian.Uint64(body[44:]),
		ReceiveQ: binary.NativeEndian.Uint32(body[56:]),
		Inode:    binary.NativeEndian.Uint32(body[68:]),
	}
	as := netlink.Attributes{Rest: body[inetMessageSize:]}
	for as.Next() {
		// Of UDP and of other protocols the attribute is empty or another struct.
		if as.Type == infoAttribute && len(as.Value) >= lastDataRecv+4 {
			s.SinceSent = time.Duration(binary.NativeEndian.Uint32(as.Value[lastDataSent:])) * time.Millisecond
			s.SinceReceived = time.Duration(binary.NativeEndian.Uint32(as.Value[lastDataRecv:])) * time.Millisecond
			s.Timed = true
		}
	}
	return as.Err()
}

func addrPort(family uint8, ip, port []byte) netip.AddrPort {
	p := binary.BigEndian.Uint16(port)
	if family == unix.AF_INET {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(ip)), p)
	}
	return netip.AddrPortFrom(netip.AddrFrom16([16]byte(ip)).Unmap(), p)
}

// Query says which TCP or UDP sockets are wanted.
type Query struct {
	Family   uint8    // AF_INET, or AF_INET6 (with the IPv4 connections of dual-stack sockets)
	Protocol uint8    // IPPROTO_TCP or IPPROTO_UDP
	States   []State  // empty: all
	Ports    []uint16 // local ports; other sockets may come too when there are many
}

// maxPorts is how many ports the kernel compares one by one; more become a range.
const maxPorts = 64

func (q Query) request() *netlink.Request {
	body := make([]byte, 56) // struct inet_diag_req_v2
	body[0], body[1] = q.Family, q.Protocol
	if q.Protocol == unix.IPPROTO_TCP {
		body[2] = 1 << (infoAttribute - 1)
	}
	binary.NativeEndian.PutUint32(body[4:], stateMask(q.States))
	r := netlink.NewRequest(byFamily, unix.NLM_F_DUMP).Raw(body...)
	if f := filter(q.Ports); len(f) > 0 {
		r.Attribute(filterAttribute, f...)
	}
	return r
}

func stateMask(states []State) uint32 {
	if len(states) == 0 {
		return 1<<32 - 1
	}
	var mask uint32
	for _, s := range states {
		mask |= 1 << s
	}
	return mask
}

// filter makes the kernel's bytecode (inet_diag.h) that accepts the local ports. Pure.
// The program accepts by reaching its end exactly, and refuses by jumping beyond.
func filter(ports []uint16) []byte {
	const (
		jump, atLeast, atMost, equals = 1, 2, 3, 11 // INET_DIAG_BC_JMP, S_GE, S_LE, S_EQ
		op                            = 4           // size of struct inet_diag_bc_op
		beyond                        = 4
	)
	var b []byte
	emit := func(code, yes uint8, no int) {
		b = append(b, code, yes)
		b = binary.NativeEndian.AppendUint16(b, uint16(no))
	}
	compare := func(code uint8, port uint16, no int) { // its operand is a second op
		emit(code, 2*op, no)
		emit(0, 0, int(port))
	}
	switch n := len(ports); {
	case n == 0:
	case n > maxPorts:
		lo, hi := ports[0], ports[0]
		for _, p := range ports {
			lo, hi = min(lo, p), max(hi, p)
		}
		compare(atLeast, lo, 4*op+beyond)
		compare(atMost, hi, 2*op+beyond)
	default:
		const block = 3 * op // compare, operand, jump to the end
		for i, p := range ports[:n-1] {
			compare(equals, p, block)
			emit(jump, op, (n-1-i)*block)
		}
		compare(equals, ports[n-1], 2*op+beyond)
	}
	return b
}
