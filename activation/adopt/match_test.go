package adopt

import (
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"hibergate/activation"
	"hibergate/activation/nettest"
)

// tcp4 and tcp6 are sockets as a program asks for them, or as ours are.
func tcp4(address string) bound { return at(activation.TCP, unix.AF_INET, address) }
func tcp6(address string) bound { return at(activation.TCP, unix.AF_INET6, address) }
func udp4(address string) bound { return at(activation.UDP, unix.AF_INET, address) }
func only6(address string) bound {
	b := tcp6(address)
	b.v6only = true
	return b
}

// exact is one of ours that was learned.
func exact(b bound) bound {
	b.exact = true
	return b
}

func at(network activation.Network, domain int, address string) bound {
	ap := netip.MustParseAddrPort(address)
	return bound{network: network, domain: domain, ip: ap.Addr(), port: ap.Port()}
}

func TestMatch(t *testing.T) {
	t.Parallel()
	const none, refused = -1, -2
	these := func(all ...bound) []bound { return all }
	for name, tt := range map[string]struct {
		want  bound
		ours  []bound
		index int
		said  []string // of a refusal
	}{
		"nothing is ours":             {tcp4("127.0.0.1:80"), nil, none, nil},
		"the same IPv4 address":       {tcp4("127.0.0.1:80"), these(tcp4("127.0.0.2:80"), tcp4("127.0.0.1:80")), 1, nil},
		"the same IPv6 address":       {tcp6("[::1]:80"), these(tcp4("127.0.0.1:80"), tcp6("[::1]:80")), 1, nil},
		"another IPv4 address":        {tcp4("127.0.0.1:80"), these(tcp4("127.0.0.2:80")), none, nil},
		"another port":                {tcp4("127.0.0.1:80"), these(tcp4("127.0.0.1:81"), tcp4("0.0.0.0:8080")), none, nil},
		"UDP, and ours is TCP":        {udp4("127.0.0.1:80"), these(tcp4("127.0.0.1:80"), tcp4("0.0.0.0:80")), none, nil},
		"TCP, and ours is UDP":        {tcp4("127.0.0.1:80"), these(udp4("127.0.0.1:80")), none, nil},
		"UDP and TCP of one port":     {udp4("127.0.0.1:80"), these(tcp4("127.0.0.1:80"), udp4("127.0.0.1:80")), 1, nil},
		"the IPv4 wildcard":           {tcp4("0.0.0.0:80"), these(tcp4("0.0.0.0:80")), 0, nil},
		"ours is wider":               {tcp4("127.0.0.1:80"), these(tcp4("0.0.0.0:80")), 0, nil},
		"ours is narrower":            {tcp4("0.0.0.0:80"), these(tcp4("127.0.0.1:80")), 0, nil},
		"ours is wider, IPv6":         {tcp6("[::1]:80"), these(tcp6("[::]:80")), 0, nil},
		"ours is wider, IPv6 only":    {tcp6("[::1]:80"), these(only6("[::]:80")), 0, nil},
		"ours is narrower, IPv6":      {tcp6("[::]:80"), these(tcp6("[::1]:80")), 0, nil},
		"ours is narrower, IPv6 only": {only6("[::]:80"), these(tcp6("[::1]:80")), 0, nil},
		"both wildcards, IPv6":        {tcp6("[::]:80"), these(tcp6("[::]:80")), 0, nil},
		"both wildcards, IPv6 only":   {only6("[::]:80"), these(only6("[::]:80")), 0, nil},
		"the best of two":             {tcp4("127.0.0.1:80"), these(tcp4("0.0.0.0:80"), tcp4("127.0.0.1:80")), 1, nil},
		"the best of two, reversed":   {tcp4("127.0.0.1:80"), these(tcp4("127.0.0.1:80"), tcp4("0.0.0.0:80")), 0, nil},

		// Two that live side by side.
		"IPv6 only, and ours is IPv4":          {only6("[::]:80"), these(tcp4("0.0.0.0:80"), tcp4("127.0.0.1:80")), none, nil},
		"IPv4, and ours is IPv6 only":          {tcp4("0.0.0.0:80"), these(only6("[::]:80"), tcp6("[::1]:80")), none, nil},
		"IPv4 address, and ours is IPv6 only":  {tcp4("127.0.0.1:80"), these(only6("[::]:80")), none, nil},
		"one for each version, IPv4":           {tcp4("0.0.0.0:80"), these(only6("[::]:80"), tcp4("0.0.0.0:80")), 1, nil},
		"one for each version, IPv6":           {only6("[::]:80"), these(tcp4("0.0.0.0:80"), only6("[::]:80")), 1, nil},
		"mapped, and ours is IPv6 only":        {tcp6("[::ffff:127.0.0.1]:80"), these(only6("[::]:80")), none, nil},
		"mapped, and ours is an IPv6 address":  {tcp6("[::ffff:127.0.0.1]:80"), these(tcp6("[::1]:80")), none, nil},
		"mapped, another one":                  {tcp6("[::ffff:127.0.0.1]:80"), these(tcp4("127.0.0.2:80")), none, nil},
		"mapped wildcard, ours is IPv6 only":   {tcp6("[::ffff:0.0.0.0]:80"), these(only6("[::]:80")), none, nil},
		"IPv6 only, ours is the mapped any":    {only6("[::]:80"), these(tcp6("[::ffff:0.0.0.0]:80")), none, nil},
		"mapped wildcard, and an IPv6 address": {tcp6("[::ffff:0.0.0.0]:80"), these(tcp6("[::1]:80")), none, nil},

		// A program that asks for IPv6 knows both.
		"mapped address on an IPv4 socket":  {tcp6("[::ffff:127.0.0.1]:80"), these(tcp4("127.0.0.1:80")), 0, nil},
		"mapped address on a wider one":     {tcp6("[::ffff:127.0.0.1]:80"), these(tcp4("0.0.0.0:80")), 0, nil},
		"mapped address on both versions":   {tcp6("[::ffff:127.0.0.1]:80"), these(tcp6("[::]:80")), 0, nil},
		"mapped wildcard on an IPv4 one":    {tcp6("[::ffff:0.0.0.0]:80"), these(tcp4("0.0.0.0:80")), 0, nil},
		"mapped wildcard, ours is narrower": {tcp6("[::ffff:0.0.0.0]:80"), these(tcp4("127.0.0.1:80")), 0, nil},
		"mapped wildcard on both versions":  {tcp6("[::ffff:0.0.0.0]:80"), these(tcp6("[::]:80")), 0, nil},
		"both versions on an IPv4 socket":   {tcp6("[::]:80"), these(tcp4("0.0.0.0:80")), 0, nil},
		"both versions on an IPv4 address":  {tcp6("[::]:80"), these(tcp4("127.0.0.1:80")), 0, nil},

		// What the program would misread, or miss.
		"IPv4 address on both versions": {
			tcp4("127.0.0.1:80"), these(tcp6("[::]:80")), refused,
			[]string{"wants tcp://127.0.0.1:80,", "has tcp://[::]:80 (both IP versions)", `write "tcp://127.0.0.1:80" instead`},
		},
		"IPv4 wildcard on both versions": {
			tcp4("0.0.0.0:80"), these(tcp6("[::]:80")), refused,
			[]string{"wants tcp://0.0.0.0:80,", "(both IP versions)", `write "tcp://0.0.0.0:80" instead`},
		},
		"IPv4 on a mapped one": {
			tcp4("127.0.0.1:80"), these(tcp6("[::ffff:127.0.0.1]:80")), refused,
			[]string{"wants tcp://127.0.0.1:80,", `write "tcp://127.0.0.1:80" instead`},
		},
		"both versions, and ours is IPv6 only": {
			tcp6("[::]:80"), these(only6("[::]:80")), refused,
			[]string{"wants tcp://[::]:80 (both IP versions)", "has tcp://[::]:80 (IPv6 only)", `write { address = "tcp://[::]:80", family = "dual" } instead`},
		},
		"IPv6 only, and ours is both versions": {
			only6("[::]:80"), these(tcp6("[::]:80")), refused,
			[]string{"wants tcp://[::]:80 (IPv6 only)", "has tcp://[::]:80 (both IP versions)", `family = "ipv6"`},
		},

		// One program socket cannot be two of ours.
		"one for two of ours": {
			tcp4("0.0.0.0:80"), these(tcp4("127.0.0.1:80"), tcp4("127.0.0.2:80")), refused,
			[]string{"wants one socket, tcp://0.0.0.0:80,", "has 2 for that", `write "tcp://0.0.0.0:80" instead`},
		},
		"both versions, and ours are one for each": {
			tcp6("[::]:80"), these(tcp4("0.0.0.0:80"), only6("[::]:80")), refused, []string{"has 2 for that", `family = "dual"`},
		},
		"both versions, and ours are addresses": {
			tcp6("[::]:80"), these(tcp4("127.0.0.1:80"), tcp6("[::1]:80"), tcp4("127.0.0.1:81")), refused, []string{"has 2 for that"},
		},
		"the same, and another one too": {tcp6("[::]:80"), these(tcp4("127.0.0.1:80"), tcp6("[::]:80")), 1, nil},

		// What was learned is for the program that wants just that.
		"learned, the same":     {tcp4("127.0.0.1:80"), these(exact(tcp4("127.0.0.1:80"))), 0, nil},
		"learned, it is wider":  {tcp4("127.0.0.1:80"), these(exact(tcp4("0.0.0.0:80"))), refused, []string{"has tcp://0.0.0.0:80"}},
		"learned, another port": {tcp4("127.0.0.1:80"), these(exact(tcp4("0.0.0.0:81"))), none, nil},
		"learned, IPv4, and it wants both": {
			tcp6("[::]:80"), these(exact(tcp4("0.0.0.0:80"))), refused, []string{"wants tcp://[::]:80 (both IP versions)", "has tcp://0.0.0.0:80"},
		},
		"learned, and another is configured": {tcp4("127.0.0.1:80"), these(exact(tcp4("0.0.0.0:80")), tcp4("127.0.0.1:80")), 1, nil},

		// Link-local addresses are many times the same.
		"link-local, the same interface":  {tcp6("[fe80::1%2]:80"), these(tcp6("[fe80::1%3]:80"), tcp6("[fe80::1%2]:80")), 1, nil},
		"link-local, another interface":   {tcp6("[fe80::1%2]:80"), these(tcp6("[fe80::1%3]:80")), none, nil},
		"link-local, and ours is wider":   {tcp6("[fe80::1%2]:80"), these(tcp6("[::]:80")), 0, nil},
		"wider, and ours is link-local":   {only6("[::]:80"), these(tcp6("[fe80::1%2]:80")), 0, nil},
		"link-local, and ours is IPv4":    {tcp6("[fe80::1%2]:80"), these(tcp4("0.0.0.0:80")), none, nil},
		"wider, and ours are link-locals": {tcp6("[::]:80"), these(tcp6("[fe80::1%2]:80"), tcp6("[fe80::1%3]:80")), refused, []string{"has 2 for that"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			index, problem := match(tt.want, tt.ours)
			if tt.index == refused {
				for _, s := range tt.said {
					if !strings.Contains(problem, s) {
						t.Errorf("got %d, %q, want %q in it", index, problem, s)
					}
				}
				if index < 0 {
					t.Errorf("got index %d, want the one in the way", index)
				}
				return
			}
			if index != tt.index || problem != "" {
				t.Errorf("got %d, %q, want %d", index, problem, tt.index)
			}
		})
	}
}

// allBounds are sockets of every kind that a port can have.
func allBounds() []bound {
	return []bound{
		tcp4("127.0.0.1:80"), tcp4("127.0.0.2:80"), tcp4("0.0.0.0:80"), tcp4("127.0.0.1:81"), tcp4("0.0.0.0:81"),
		udp4("127.0.0.1:80"), udp4("0.0.0.0:80"),
		tcp6("[::1]:80"), tcp6("[::]:80"), only6("[::]:80"), only6("[::1]:80"), tcp6("[::]:81"), tcp6("[2001:db8::1]:80"),
		tcp6("[::ffff:127.0.0.1]:80"), tcp6("[::ffff:0.0.0.0]:80"), tcp6("[fe80::1%2]:80"), tcp6("[fe80::1%3]:80"),
	}
}

// Whom two sockets disturb does not depend on which is first, and what does not disturb does not fit.
func TestOverlapsAndFit(t *testing.T) {
	t.Parallel()
	for _, x := range allBounds() {
		if !x.overlaps(x) || x.fit(x) != fitsSame {
			t.Errorf("%v and itself: overlaps %v, fits %d", x, x.overlaps(x), x.fit(x))
		}
		for _, y := range allBounds() {
			if x.overlaps(y) != y.overlaps(x) {
				t.Errorf("%v and %v: overlaps %v, the other way %v", x, y, x.overlaps(y), y.overlaps(x))
			}
			if !x.overlaps(y) && x.fit(y) != 0 {
				t.Errorf("%v and %v do not overlap and fit: %d", x, y, x.fit(y))
			}
			if x.domain == unix.AF_INET && y.domain == unix.AF_INET6 && x.fit(y) != 0 {
				t.Errorf("%v fits %v, whose addresses the program cannot read", y, x)
			}
			index, problem := match(x, []bound{y})
			if (index >= 0) != x.overlaps(y) || (problem == "") != (index < 0 || x.fit(y) > 0) {
				t.Errorf("%v and %v: got %d, %q, overlaps %v, fits %d", x, y, index, problem, x.overlaps(y), x.fit(y))
			}
		}
	}
}

// Whether two sockets disturb each other is what the kernel says.
func TestOverlapsIsTheKernels(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	addresses := []bound{
		tcp4("127.0.0.1:80"), tcp4("127.0.0.2:80"), tcp4("0.0.0.0:80"), tcp6("[::1]:80"), tcp6("[::]:80"), only6("[::]:80"), only6("[::1]:80"),
		tcp6("[::ffff:127.0.0.1]:80"), tcp6("[::ffff:0.0.0.0]:80"),
	}
	for _, x := range addresses {
		for _, y := range addresses {
			port := uint16(freshPort()) // a process that another test starts may have the last one until its exec
			x.port, y.port = port, port
			first, err := tryBind(x)
			if err == nil {
				err = unix.Listen(first, 1)
			}
			if err != nil {
				t.Fatal(err)
			}
			second, err := tryBind(y)
			if got := err != nil; got != x.overlaps(y) {
				t.Errorf("%v, then %v: got %v, overlaps says %v", x, y, err, x.overlaps(y))
			}
			closeNow(first)
			if second >= 0 {
				closeNow(second)
			}
		}
	}
}

// tryBind makes a socket of the kind and binds it. Ports are those of a network that is the tests' own.
func tryBind(b bound) (int, error) {
	kind := unix.SOCK_STREAM
	if b.network == activation.UDP {
		kind = unix.SOCK_DGRAM
	}
	fd, err := unix.Socket(b.domain, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	if b.domain == unix.AF_INET {
		err = unix.Bind(fd, &unix.SockaddrInet4{Port: int(b.port), Addr: b.ip.As4()})
	} else {
		only := 0
		if b.v6only {
			only = 1
		}
		if err = unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, only); err == nil {
			err = unix.Bind(fd, &unix.SockaddrInet6{Port: int(b.port), Addr: b.ip.As16()})
		}
	}
	if err != nil {
		closeNow(fd)
		return -1, err
	}
	return fd, nil
}
