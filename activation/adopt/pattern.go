package adopt

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"hibergate/activation"
)

// Pattern says which sockets a service is to have that are only known once a process has bound
// them: how many there are, and of which IP versions, is up to the program. It is comparable; the zero
// value is [Auto].
type Pattern struct {
	Network activation.Network // TCP or UDP; 0: any socket that can be adopted
	Host    Host
	Port    uint16 // never 0 with a Network
}

// privilegedPort is the first that anybody may bind, where nobody has changed that.
const privilegedPort = 1024

// Auto is the pattern of all TCP sockets and abstract Unix sockets that a program listens on, and of the UDP sockets that
// it binds to a port below 1024.
var Auto = Pattern{} //nolint:gochecknoglobals // a constant

// Host says which IP addresses a Pattern means.
type Host uint8

// The hosts.
const (
	AnyHost   Host = iota // ":8080": any address
	Localhost             // "localhost:8080": 127.0.0.1, ::1 or both
	Wildcard6             // "[::]:8080": the IPv6 wildcard, for one IP version or both
)

// auto is how the configuration writes Auto.
const auto = "auto"

// ParsePattern reads a pattern: "auto", or an address that leaves open of which IP version the
// socket is, such as "tcp://:8080", "udp://[::]:53" and "tcp://localhost:80". ok is false for every other text: it may be
// an address ([activation.ParseAddress]), or nothing at all. An error is about a pattern that nobody can meet.
func ParsePattern(text string) (p Pattern, ok bool, err error) {
	if text == auto {
		return Auto, true, nil
	}
	if scheme, rest, found := strings.Cut(text, "://localhost:"); found {
		a, err := activation.ParseAddress(scheme + "://:" + rest)
		if err != nil || !a.Network.IP() {
			return Pattern{}, false, nil //nolint:nilerr // ParseAddress says it of the whole text
		}
		p = Pattern{a.Network, Localhost, a.Port}
	} else {
		a, err := activation.ParseAddress(text)
		if err != nil || !a.Network.IP() {
			return Pattern{}, false, nil //nolint:nilerr // as above
		}
		switch {
		case !a.IP.IsValid():
			p = Pattern{a.Network, AnyHost, a.Port}
		case a.IP == netip.IPv6Unspecified():
			p = Pattern{a.Network, Wildcard6, a.Port}
		default:
			return Pattern{}, false, nil
		}
	}
	if p.Port == 0 {
		return Pattern{}, true, fmt.Errorf("address %q: %w", text, errNoPort)
	}
	return p, true, nil
}

var errNoPort = errors.New("a port is needed: 0 stands for any, and nobody could tell which of its ports the program means")

// String returns the pattern as ParsePattern reads it.
func (p Pattern) String() string {
	if p == Auto {
		return auto
	}
	host := ""
	switch p.Host {
	case AnyHost:
	case Localhost:
		host = "localhost"
	case Wildcard6:
		host = "[::]"
	}
	return p.Network.String() + "://" + host + ":" + strconv.Itoa(int(p.Port))
}

// Matches says whether a socket bound to the address is one of those that the pattern means.
func (p Pattern) Matches(a activation.Address) bool {
	if p == Auto {
		// Programs bind UDP sockets to be clients, too, and choose ports for that as they like.
		return a.Network == activation.TCP || a.Network == activation.UDP && a.Port < privilegedPort ||
			(a.Network == activation.Unix || a.Network == activation.Unixpacket) && a.Abstract()
	}
	if p.Network != a.Network || p.Port != a.Port {
		return false
	}
	switch p.Host {
	case Localhost:
		return a.IP.IsLoopback()
	case Wildcard6:
		return a.IP == netip.IPv6Unspecified()
	case AnyHost:
	}
	return true
}
