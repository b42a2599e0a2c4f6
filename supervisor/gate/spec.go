package gate

import (
	"net"
	"strconv"
	"time"

	"hibergate/activation"
)

// Spec is what a gate is configured to do: validated, immutable, shared freely between goroutines.
type Spec struct {
	// Destinations are where what comes to the sockets goes. Connections go to those of TCP and Unix, datagrams to those
	// of UDP; there is at least one for each kind of socket that the service has.
	Destinations []Destination
	Balance      Balance

	Launch, Stop  []string      // commands, run as the service's user; empty: nothing has to be done for it
	LaunchTimeout time.Duration // of the launch command; 0: start.timeout alone bounds it
	Ready         Ready

	ConnectTimeout time.Duration // of one connect(2) to a destination; never 0, config sets 5 s
	SessionTimeout time.Duration // a client of a UDP socket that has neither sent nor got anything for so long is forgotten; never 0, config sets 1 min

	// With a PendingTimeout clients are accepted while the destination wakes, at most MaxPending at a time, and those that have
	// waited for so long get OnTimeout. Without, they wait in the queue of the kernel for as long as they like.
	MaxPending     int // never 0; config sets 1000
	PendingTimeout time.Duration
	OnTimeout      Answer

	MaxConnections int  // that are relayed at a time; 0: any number
	CloseExcess    bool // what is above MaxConnections is accepted and closed; else it waits

	ProxyProtocol ProxyProtocol // TCP and Unix destinations only
	Transparent   bool          // TCP connections come from the client's own address; needs CAP_NET_ADMIN and a way back through this machine

	Forward       Forward
	CheckInterval time.Duration // with Forward: how often the destination is asked whether it is there; never 0, config sets 5 s

	WatchDestination bool // connections to a destination that do not come through the gate keep the service awake
}

// Destination is where a gate leads.
type Destination struct {
	Network activation.Network // TCP, UDP or Unix
	Host    string             // TCP and UDP: an IP address or a name, which is looked up at each wake
	Port    uint16
	Path    string // Unix: absolute
}

// String returns the destination as the configuration has it.
func (d Destination) String() string {
	if d.Network == activation.Unix {
		return "unix://" + d.Path
	}
	return d.Network.String() + "://" + net.JoinHostPort(d.Host, strconv.Itoa(int(d.Port)))
}

// Balance says which of several destinations gets the next connection.
type Balance uint8

// The choices, as the configuration names them.
const (
	RoundRobin       Balance = iota // "round-robin"
	LeastConnections                // "least-connections"
)

// Ready says when the destination can be connected to.
type Ready struct {
	Type     ReadyType
	Path     string        // ReadyHTTP: what is asked for
	Status   int           // ReadyHTTP: the answer to wait for
	Command  []string      // ReadyCommand
	Interval time.Duration // between two tries; never 0
	Timeout  time.Duration // of one try; never 0
}

// ReadyType says how a gate learns that a destination is ready.
type ReadyType uint8

// The types, as the configuration names them.
const (
	ReadyConnect  ReadyType = iota // "connect": it accepts a connection
	ReadyLaunched                  // "launched": the launch command has ended with status 0
	ReadyHTTP                      // { http = "/path", status = 200 }: it answers a GET request so
	ReadyCommand                   // { command = [...] }: the command ends with status 0
)

// Answer is what clients get that have waited too long. The zero value: their connection is closed.
type Answer struct {
	Reset  bool   // it is reset
	Banner string // it is sent, and then the connection is closed
}

// ProxyProtocol is a version of the header that tells a destination who its client is.
type ProxyProtocol uint8

// The choices, as the configuration names them.
const (
	NoProxyProtocol ProxyProtocol = iota
	ProxyV1                       // "v1": a line of text
	ProxyV2                       // "v2": binary
)

// Forward says who moves the bytes while the destination is awake.
type Forward uint8

// The choices, as the configuration names them.
const (
	Relay  Forward = iota // "relay": hibergated
	Kernel                // "kernel": a rule in nftables sends new connections to the destination, past hibergated
)

// Target is a destination that can be connected to now.
type Target struct {
	Index   int                // in Spec.Destinations
	Address activation.Address // TCP or UDP with an IP, or Unix
	FD      int                // a connection with it that nobody has used yet, whose ownership goes with it; -1: none
}
