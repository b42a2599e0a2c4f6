package activity

import (
	"net/netip"
	"time"
)

// Accounting chooses the witnesses that are asked about the traffic of a service.
type Accounting uint8

// The choices, as the configuration names them.
const (
	Auto      Accounting = iota // "auto": all that the kernel permits
	Conntrack                   // "conntrack": ledger and conntrack are required; without them nothing is known
	SockDiag                    // "sock-diag": sock_diag alone; no nftables table, no connection tracking
)

// When says what counts as idle.
type When uint8

// The definitions of idleness, as the configuration names them.
const (
	NoConnections When = iota // "no-connections": since the last connection closed (UDP, FIFO: since the last datagram or write)
	NoTraffic                 // "no-traffic": since the last byte of payload, open connections or not
)

// Counters counts one direction of traffic. Bytes include IP and transport
// headers, as conntrack and nftables count them.
type Counters struct {
	Packets uint64 `json:"packets"`
	Bytes   uint64 `json:"bytes"`
}

// Summary is what the kernel says about one socket at one moment.
// A Summary that is not Known must be treated as busy.
type Summary struct {
	Known bool   // every witness that can see the socket answered
	Why   string // where not Known, or where less is known than asked for: what is missing, and why

	Open   int // connections that a process holds
	Queued int // connections (also while their handshake goes on), datagrams or bytes that nobody has taken yet

	// Last is when the last packet that opened, closed or carried data came or
	// went. Exact says that it is the kernel's own time, and all there is to know.
	// Elsewhere activity between two looks is only seen as a change of Open or Peers
	// (of a FIFO: of Tracker.Read), and Last is the zero Time; of a FIFO it is that of the last
	// write as far as the wall clock can tell, good to show.
	Last  time.Time
	Exact bool

	// LastPayload is the newest time at which one of the open connections carried a
	// byte of payload. The zero Time where there is none or it cannot be told.
	LastPayload time.Time
	// PayloadUnseen says that there are open connections whose payload no witness
	// sees (Unix sockets): under NoTraffic they count as busy.
	PayloadUnseen bool

	// Peers is a hash over the identities of the open connections: it changes
	// when one of them is replaced by another.
	Peers uint64

	In, Out Counters // since the socket was first watched; zero without a ledger
}

// Flow is one tracked connection or UDP exchange of a socket, as conntrack and
// sock_diag tell it.
type Flow struct {
	Protocol string         `json:"protocol"` // "tcp", "udp", "unix"
	Peer     netip.AddrPort `json:"peer"`     // the client as the socket sees it; invalid for Unix sockets
	Original netip.AddrPort `json:"original"` // the destination the client asked for; differs from Local behind DNAT
	Local    netip.AddrPort `json:"local"`
	State    string         `json:"state"` // conntrack's TCP state, or sock_diag's where conntrack has none
	In       Counters       `json:"in"`
	Out      Counters       `json:"out"`
	Counted  bool           `json:"counted"` // In and Out are real (nf_conntrack_acct was on when the flow began)
	PID      int            `json:"pid,omitempty"`
	Process  string         `json:"process,omitempty"`
}

// String returns the word of the configuration.
func (w When) String() string {
	if w == NoTraffic {
		return "no-traffic"
	}
	return "no-connections"
}

// String returns the word of the configuration.
func (a Accounting) String() string {
	switch a {
	case Conntrack:
		return "conntrack"
	case SockDiag:
		return "sock-diag"
	case Auto:
	}
	return "auto"
}
