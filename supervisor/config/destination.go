package config

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"hibergate/activation"
	"hibergate/supervisor/gate"
)

// maxHost is how long a host name is at most: RFC 1035, in text.
const maxHost = 253

// parseDestination reads where a gate leads: "tcp://127.0.0.1:80", "tcp://name:80", "udp://[::1]:53" or
// "unix:///run/x.sock". Unlike an address of listen it has a host, which may be a name. Nothing is looked up. The error quotes the text and,
// where it can tell, says what to write instead.
func parseDestination(text string) (gate.Destination, error) {
	t, err := destinationOf(text)
	if err != nil {
		return gate.Destination{}, fmt.Errorf("destination %q: %w", text, err)
	}
	return t, nil
}

func destinationOf(text string) (gate.Destination, error) {
	scheme, rest, found := strings.Cut(text, "://")
	a, err := activation.ParseAddress(text)
	switch {
	case found && (scheme == "tcp" || scheme == "udp"):
		return hostDestination(scheme, rest)
	case err == nil && a.Network != activation.Unix, found && scheme == strings.ToLower(scheme) && scheme != "unix":
		return gate.Destination{}, errors.New("a gate leads to tcp, udp or unix")
	case err == nil && a.Abstract():
		return gate.Destination{}, errors.New("an abstract name is no path; write a path")
	case err == nil:
		return gate.Destination{Network: a.Network, Path: strings.Clone(a.Path)}, nil
	case found || strings.HasPrefix(text, "/") || strings.HasPrefix(text, "unix:"):
		return gate.Destination{}, inner(err)
	case strings.Contains(text, ":"):
		return gate.Destination{}, fmt.Errorf("no scheme; write %q", "tcp://"+text)
	}
	return gate.Destination{}, fmt.Errorf("no scheme and no port; write %q", "tcp://"+text+":8080")
}

// hostDestination reads what follows "tcp://" or "udp://".
func hostDestination(scheme, rest string) (gate.Destination, error) {
	host, port := "", ""
	if i := strings.LastIndexByte(rest, ':'); i >= 0 {
		host, port = rest[:i], rest[i+1:]
	}
	if _, err := netip.ParseAddr(host); host == "" || err == nil || strings.ContainsAny(host, ":[]") {
		a, err := activation.ParseAddress(scheme + "://" + rest)
		switch {
		case err != nil:
			return gate.Destination{}, inner(err)
		case !a.IP.IsValid():
			return gate.Destination{}, fmt.Errorf("the host is missing; write %q", fmt.Sprintf("%s://127.0.0.1:%d", scheme, a.Port))
		case a.IP.IsUnspecified():
			return gate.Destination{}, fmt.Errorf("%s is every address of a machine, and none to connect to; write 127.0.0.1 or [::1] for this machine", a.IP)
		case a.IP.IsMulticast():
			return gate.Destination{}, fmt.Errorf("%s is a group of machines, and none to connect to", a.IP)
		case a.Port == 0:
			return gate.Destination{}, errors.New("the port is missing: 0 is none to connect to")
		}
		return gate.Destination{Network: a.Network, Host: a.IP.String(), Port: a.Port}, nil
	}
	if strings.Trim(host, "0123456789.") == "" || !validHost(host) {
		return gate.Destination{}, fmt.Errorf("host %q is neither an IP address nor a name", host)
	}
	a, err := activation.ParseAddress(scheme + "://:" + port)
	switch {
	case err != nil:
		return gate.Destination{}, inner(err)
	case a.Port == 0:
		return gate.Destination{}, errors.New("the port is missing: 0 is none to connect to")
	}
	return gate.Destination{Network: a.Network, Host: strings.Clone(host), Port: a.Port}, nil
}

// inner is an error of ParseAddress without the text, which it calls an address.
func inner(err error) error {
	if e := errors.Unwrap(err); e != nil {
		return e
	}
	return err
}

// validHost says whether a host may be called s. Underscores occur in names of containers.
func validHost(s string) bool {
	for label := range strings.SplitSeq(strings.TrimSuffix(s, "."), ".") {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
		for i := range len(label) {
			if c := label[i]; !isLetter(c) && !isDigit(c) && c != '-' && c != '_' {
				return false
			}
		}
	}
	return len(s) <= maxHost
}

// destinationIP returns the address of a destination whose host is one; the zero Addr for a name and for a path.
func destinationIP(t *gate.Destination) netip.Addr {
	ip, _ := netip.ParseAddr(t.Host) // the zero Addr for all else
	return ip
}

// isLocal says whether a destination is certainly on this machine.
func isLocal(t *gate.Destination) bool {
	return t.Network == activation.Unix || isLocalhost(t) || destinationIP(t).IsLoopback()
}

func isLocalhost(t *gate.Destination) bool {
	return strings.EqualFold(strings.TrimSuffix(t.Host, "."), "localhost")
}

// leadsTo says whether a destination is the socket itself, as far as can be told without looking anything up: what comes to it
// would come to it again.
func leadsTo(t *gate.Destination, s *activation.Spec) bool {
	a := s.Address
	switch {
	case t.Network != a.Network:
		return false
	case !a.Network.IP():
		return t.Path == a.Path
	case t.Port != a.Port:
		return false
	}
	ip := destinationIP(t)
	four, six := serves(s)
	switch {
	case isLocalhost(t):
		return isWildcard(a) || a.IP.IsLoopback()
	case !ip.IsValid():
		return false
	case isWildcard(a):
		return ip.IsLoopback() && (ip.Is4() && four || ip.Is6() && six)
	}
	return ip == a.IP
}

// serves says of which IP versions clients may come to a socket.
func serves(s *activation.Spec) (four, six bool) {
	switch a, family := s.Address, s.Options.Family; {
	case !isWildcard(a):
		return a.IP.Is4(), a.IP.Is6()
	case a.IP.Is4():
		return true, false
	default:
		return family != activation.FamilyIPv6, family != activation.FamilyIPv4
	}
}
