package activation

import (
	"errors"
	"fmt"
	"net/netip"
	"path"
	"strconv"
	"strings"
)

// Network is the kind of a socket, named as in the scheme of an [Address].
type Network uint8

// The networks. The zero Network is none of them.
const (
	TCP        Network = iota + 1 // "tcp", SOCK_STREAM
	UDP                           // "udp", SOCK_DGRAM
	Unix                          // "unix", AF_UNIX SOCK_STREAM
	Unixgram                      // "unixgram", AF_UNIX SOCK_DGRAM
	Unixpacket                    // "unixpacket", AF_UNIX SOCK_SEQPACKET
	FIFO                          // "fifo", a named pipe
)

// schemes are the names of the networks, by number.
func schemes() []string {
	return []string{TCP: "tcp", UDP: "udp", Unix: "unix", Unixgram: "unixgram", Unixpacket: "unixpacket", FIFO: "fifo"}
}

// String returns the scheme of the network, "tcp" for instance.
func (n Network) String() string {
	if s := schemes(); n != 0 && int(n) < len(s) {
		return s[n]
	}
	return fmt.Sprintf("network(%d)", uint8(n))
}

// Connections says whether sockets of this network have connections that can be
// accepted. The others have datagrams, or bytes.
func (n Network) Connections() bool { return n == TCP || n == Unix || n == Unixpacket }

// IP says whether addresses of this network have an IP address and a port.
func (n Network) IP() bool { return n == TCP || n == UDP }

// Unix says whether sockets of this network are of the family AF_UNIX.
func (n Network) Unix() bool { return n == Unix || n == Unixgram || n == Unixpacket }

// Path says whether addresses of this network have a path, which for the Unix
// networks may be an abstract name.
func (n Network) Path() bool { return n.Unix() || n == FIFO }

// Address says where a socket listens. It is comparable; the zero value is invalid.
type Address struct {
	Network Network
	IP      netip.Addr // TCP, UDP: the zero Addr means every address of the machine
	Port    uint16     // TCP, UDP: 0 lets the kernel choose
	Path    string     // Unix*, FIFO: an absolute path, or "@name" for an abstract Unix socket
}

// Abstract says whether the address is an abstract Unix name, which has no file.
func (a Address) Abstract() bool { return a.Network.Unix() && strings.HasPrefix(a.Path, "@") }

// String returns the address as [ParseAddress] reads it.
func (a Address) String() string {
	switch {
	case a.Network.IP() && !a.IP.IsValid():
		return a.Network.String() + "://:" + strconv.Itoa(int(a.Port))
	case a.Network.IP():
		return a.Network.String() + "://" + netip.AddrPortFrom(a.IP, a.Port).String()
	case a.Abstract():
		return a.Network.String() + ":" + a.Path
	case a.Network.Path():
		return a.Network.String() + "://" + a.Path
	}
	return "invalid address"
}

// ParseAddress reads an address: "tcp://:8080", "tcp://127.0.0.1:80",
// "udp://[::]:53", "tcp://[fe80::1%eth0]:80", "unix:///run/x.sock",
// "unix:@name", "unixgram:///run/x", "unixpacket:///run/x" or
// "fifo:///run/x". Hosts are IP addresses and ports are numbers: nothing is
// looked up. Paths must be absolute and in their shortest form. The error quotes
// the text and, where it can tell, says what to write instead.
func ParseAddress(text string) (Address, error) {
	a, err := parseAddress(text)
	if err != nil {
		return Address{}, fmt.Errorf("address %q: %w", text, err)
	}
	return a, nil
}

func parseAddress(text string) (Address, error) {
	scheme, rest, found := strings.Cut(text, ":")
	network := networkOf(scheme)
	switch {
	case text == "":
		return Address{}, errors.New(`is empty; write "tcp://:8080", for instance`)
	case network == 0:
		return Address{}, unknownScheme(text, scheme, found)
	case !found:
		return Address{}, fmt.Errorf("nothing follows the scheme; write %q", example(network))
	case network.IP():
		host, ok := strings.CutPrefix(rest, "//")
		if !ok {
			return Address{}, fmt.Errorf(`"//" must follow the scheme; write %q`, scheme+"://"+rest)
		}
		return parseHostPort(network, host)
	}
	return parsePath(network, strings.TrimPrefix(rest, "//"))
}

// networkOf returns 0 for a scheme that is none of ours. Schemes are lower case.
func networkOf(scheme string) Network {
	for n, s := range schemes() {
		if n != 0 && s == scheme {
			return Network(n)
		}
	}
	return 0
}

// example is an address of the network, to be shown in an error.
func example(n Network) string {
	switch {
	case n.IP():
		return n.String() + "://:8080"
	case n == FIFO:
		return "fifo:///run/name"
	}
	return n.String() + ":///run/name.sock"
}

// unknownScheme says what a text without a known scheme was probably meant to be.
func unknownScheme(text, scheme string, found bool) error {
	const missing = "no scheme; write %q"
	switch {
	case strings.HasPrefix(text, "/"):
		return fmt.Errorf(missing, "unix://"+text)
	case strings.HasPrefix(text, "@"):
		return fmt.Errorf(missing, "unix:"+text)
	case strings.Contains(text, "://"):
		if low := strings.ToLower(scheme); low != scheme && networkOf(low) != 0 {
			return fmt.Errorf("unknown scheme %q; write %q", scheme, low+text[len(scheme):])
		}
		if n := networkOf(strings.TrimRight(scheme, "46")); n.IP() {
			return fmt.Errorf(`unknown scheme %q; write %q and choose the IP version with the host or the option for IPv6`, scheme, n)
		}
		return fmt.Errorf("unknown scheme %q; the schemes are %s", scheme, strings.Join(schemes()[1:], ", "))
	case found:
		if _, err := parseHostPort(TCP, text); err != nil {
			return fmt.Errorf(`no scheme ("tcp://", for instance), and %w`, err)
		}
		return fmt.Errorf(missing, "tcp://"+text)
	}
	if _, err := strconv.ParseUint(text, 10, 16); err == nil {
		return fmt.Errorf(missing, "tcp://:"+text)
	}
	return fmt.Errorf(`no scheme; write "tcp://:8080" or "unix:///run/name.sock", for instance`)
}

// parseHostPort reads what follows "tcp://".
func parseHostPort(network Network, text string) (Address, error) {
	host, port, err := splitHostPort(network, text)
	if err != nil {
		return Address{}, err
	}
	a := Address{Network: network}
	n, err := strconv.ParseUint(port, 10, 16)
	switch {
	case port == "":
		return Address{}, errors.New("the port is missing after the colon")
	case err != nil && strings.Trim(port, "0123456789") == "":
		return Address{}, fmt.Errorf("port %s is larger than 65535", port)
	case err != nil:
		return Address{}, fmt.Errorf("port %q is not a number; names of services are not looked up", port)
	}
	a.Port = uint16(n)
	if host == "" {
		return a, nil
	}
	a.IP, err = netip.ParseAddr(host)
	zone := a.IP.Zone()
	switch {
	case host == "localhost":
		return Address{}, errors.New(`host "localhost" is a name, not an IP address; write 127.0.0.1 or [::1]`)
	case host == "*":
		return Address{}, fmt.Errorf("every address of the machine is written without a host: %q", network.String()+"://:"+port)
	case err != nil:
		return Address{}, fmt.Errorf("host %q is not an IP address; names are not looked up: write 127.0.0.1 or [::1] to listen on this machine only", host)
	case a.IP.Is4In6():
		return Address{}, fmt.Errorf("host %q is an IPv4 address in IPv6 form; write %s", host, a.IP.WithZone("").Unmap())
	case zone != "" && !a.IP.IsLinkLocalUnicast() && !a.IP.IsLinkLocalMulticast():
		// The kernel would ignore it, and the user would believe in it.
		return Address{}, fmt.Errorf("host %q has a zone but is not a link-local address", host)
	case len(zone) > 15 || strings.ContainsFunc(zone, func(r rune) bool { return r <= ' ' || r > '~' || r == '/' || r == ']' || r == '%' }):
		return Address{}, fmt.Errorf("zone %q is not the name of a network interface", zone)
	}
	return a, nil
}

// splitHostPort is net.SplitHostPort with errors that say what to write.
func splitHostPort(network Network, text string) (host, port string, err error) {
	if inner, ok := strings.CutPrefix(text, "["); ok {
		host, port, ok = strings.Cut(inner, "]")
		switch {
		case !ok:
			return "", "", errors.New(`"]" is missing after the IPv6 address`)
		case !strings.HasPrefix(port, ":"):
			return "", "", fmt.Errorf("the port is missing; write %q", network.String()+"://["+host+"]:8080")
		case host == "" || !strings.Contains(host, ":"):
			return "", "", fmt.Errorf("%q in brackets is not an IPv6 address", host)
		}
		return host, port[1:], nil
	}
	i := strings.LastIndexByte(text, ':')
	if i < 0 {
		if _, err := strconv.ParseUint(text, 10, 16); err == nil {
			return "", "", fmt.Errorf("a colon is missing before the port; write %q", network.String()+"://:"+text)
		}
		return "", "", fmt.Errorf("the port is missing; write %q", network.String()+"://"+text+":8080")
	}
	host, port = text[:i], text[i+1:]
	if strings.Contains(host, ":") {
		return "", "", fmt.Errorf("an IPv6 address must be in brackets; write %q", network.String()+"://["+host+"]:"+port)
	}
	return host, port, nil
}

// What a struct sockaddr_un holds beside a terminating or leading NUL, and what
// open(2) takes.
const (
	maxUnixPath = 107
	maxPath     = 4095
)

// parsePath reads what follows "unix:" or "unix://". A path in another form than its
// shortest would hide that two services use the same one.
func parsePath(network Network, p string) (Address, error) {
	limit := maxUnixPath
	if network == FIFO {
		limit = maxPath
	}
	abstract := strings.HasPrefix(p, "@")
	switch {
	case p == "":
		return Address{}, fmt.Errorf("the path is missing; write %q", example(network))
	// A NUL would cut the path short; the others would break lines of logs and tables.
	case strings.ContainsFunc(p, func(r rune) bool { return r < ' ' || r == 0x7f }):
		return Address{}, errors.New("the path contains a control character")
	case abstract && network == FIFO:
		return Address{}, errors.New("a fifo has a path; only Unix sockets can have an abstract name")
	case abstract && len(p) == 1:
		return Address{}, errors.New(`the name is missing after "@"`)
	case !abstract && p[0] != '/':
		return Address{}, fmt.Errorf("the path must be absolute; write %q", network.String()+":///"+p)
	case !abstract && path.Clean(p) != p:
		return Address{}, fmt.Errorf("the path is not in its shortest form; write %q", network.String()+"://"+path.Clean(p))
	case p == "/":
		return Address{}, errors.New("the path is a directory")
	case len(strings.TrimPrefix(p, "@")) > limit:
		return Address{}, fmt.Errorf("the path is %d bytes long, more than the %d that fit", len(strings.TrimPrefix(p, "@")), limit)
	}
	return Address{Network: network, Path: p}, nil
}
