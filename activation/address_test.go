package activation

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
)

func TestParseAddress(t *testing.T) {
	t.Parallel()
	ip := netip.MustParseAddr
	long := "/" + strings.Repeat("x", 106)
	tests := map[string]struct {
		want Address
		text string // as printed; empty: as parsed
	}{
		"tcp://:8080":             {want: Address{Network: TCP, Port: 8080}},
		"tcp://127.0.0.1:80":      {want: Address{Network: TCP, IP: ip("127.0.0.1"), Port: 80}},
		"tcp://0.0.0.0:0":         {want: Address{Network: TCP, IP: ip("0.0.0.0")}},
		"tcp://[::1]:80":          {want: Address{Network: TCP, IP: ip("::1"), Port: 80}},
		"tcp://[0:0::1]:80":       {want: Address{Network: TCP, IP: ip("::1"), Port: 80}, text: "tcp://[::1]:80"},
		"tcp://[fe80::1%eth0]:80": {want: Address{Network: TCP, IP: ip("fe80::1%eth0"), Port: 80}},
		"udp://[::]:53":           {want: Address{Network: UDP, IP: ip("::"), Port: 53}},
		"udp://:00053":            {want: Address{Network: UDP, Port: 53}, text: "udp://:53"},
		"tcp://:65535":            {want: Address{Network: TCP, Port: 65535}},
		"unix:///run/x.sock":      {want: Address{Network: Unix, Path: "/run/x.sock"}},
		"unix:/run/x.sock":        {want: Address{Network: Unix, Path: "/run/x.sock"}, text: "unix:///run/x.sock"},
		"unix:@name":              {want: Address{Network: Unix, Path: "@name"}},
		"unix://@name":            {want: Address{Network: Unix, Path: "@name"}, text: "unix:@name"},
		"unix:@a/../b c":          {want: Address{Network: Unix, Path: "@a/../b c"}},
		"unixgram:///p":           {want: Address{Network: Unixgram, Path: "/p"}},
		"unixpacket:@p":           {want: Address{Network: Unixpacket, Path: "@p"}},
		"unix://" + long:          {want: Address{Network: Unix, Path: long}},
		"fifo:///run/x":           {want: Address{Network: FIFO, Path: "/run/x"}},
		"fifo://" + long + "xx":   {want: Address{Network: FIFO, Path: long + "xx"}},
	}
	for text, test := range tests {
		got, err := ParseAddress(text)
		if err != nil {
			t.Errorf("ParseAddress(%q): %v", text, err)
			continue
		}
		if got != test.want {
			t.Errorf("ParseAddress(%q): got %+v, want %+v", text, got, test.want)
		}
		if test.text == "" {
			test.text = text
		}
		if got.String() != test.text {
			t.Errorf("ParseAddress(%q).String(): got %q, want %q", text, got.String(), test.text)
		}
	}
}

func TestParseAddressRefuses(t *testing.T) {
	t.Parallel()
	tests := map[string]string{
		"":                                     `is empty; write "tcp://:8080", for instance`,
		":8080":                                `no scheme; write "tcp://:8080"`,
		"8080":                                 `no scheme; write "tcp://:8080"`,
		"127.0.0.1:80":                         `no scheme; write "tcp://127.0.0.1:80"`,
		"/run/x":                               `no scheme; write "unix:///run/x"`,
		"@x":                                   `no scheme; write "unix:@x"`,
		"web":                                  `no scheme; write "tcp://:8080" or "unix:///run/name.sock", for instance`,
		"http://:80":                           `unknown scheme "http"; the schemes are tcp, udp, unix, unixgram, unixpacket, fifo`,
		"TCP://:80":                            `unknown scheme "TCP"; write "tcp://:80"`,
		"tcp6://:80":                           `unknown scheme "tcp6"; write "tcp" and choose the IP version with the host or the option for IPv6`,
		"tcp":                                  `nothing follows the scheme; write "tcp://:8080"`,
		"fifo":                                 `nothing follows the scheme; write "fifo:///run/name"`,
		"tcp::80":                              `"//" must follow the scheme; write "tcp://:80"`,
		"tcp://8080":                           `a colon is missing before the port; write "tcp://:8080"`,
		"tcp://127.0.0.1":                      `the port is missing; write "tcp://127.0.0.1:8080"`,
		"tcp://:":                              `the port is missing after the colon`,
		"tcp://:65536":                         `port 65536 is larger than 65535`,
		"tcp://:http":                          `port "http" is not a number; names of services are not looked up`,
		"tcp://:-1":                            `port "-1" is not a number; names of services are not looked up`,
		"tcp://:+1":                            `port "+1" is not a number; names of services are not looked up`,
		"tcp://:80/":                           `port "80/" is not a number; names of services are not looked up`,
		"tcp://localhost:80":                   `host "localhost" is a name, not an IP address; write 127.0.0.1 or [::1]`,
		"tcp://example.org:80":                 `host "example.org" is not an IP address; names are not looked up: write 127.0.0.1 or [::1] to listen on this machine only`,
		"tcp://*:80":                           `every address of the machine is written without a host: "tcp://:80"`,
		"tcp://::1:80":                         `an IPv6 address must be in brackets; write "tcp://[::1]:80"`,
		"tcp://[::1:80":                        `"]" is missing after the IPv6 address`,
		"tcp://[::1]":                          `the port is missing; write "tcp://[::1]:8080"`,
		"tcp://[127.0.0.1]:80":                 `"127.0.0.1" in brackets is not an IPv6 address`,
		"tcp://[]:80":                          `"" in brackets is not an IPv6 address`,
		"tcp://[::ffff:1.2.3.4]:1":             `host "::ffff:1.2.3.4" is an IPv4 address in IPv6 form; write 1.2.3.4`,
		"tcp://[::1%eth0]:80":                  `host "::1%eth0" has a zone but is not a link-local address`,
		"tcp://[fe80::1%a b]:80":               `zone "a b" is not the name of a network interface`,
		"unix":                                 `nothing follows the scheme; write "unix:///run/name.sock"`,
		"unix:":                                `the path is missing; write "unix:///run/name.sock"`,
		"unix://run/x":                         `the path must be absolute; write "unix:///run/x"`,
		"unix:///run//x/../y":                  `the path is not in its shortest form; write "unix:///run/y"`,
		"unix:///run/":                         `the path is not in its shortest form; write "unix:///run"`,
		"unix:///":                             `the path is a directory`,
		"unix:@":                               `the name is missing after "@"`,
		"unix:@a\x00b":                         `the path contains a control character`,
		"fifo:///a\nb":                         `the path contains a control character`,
		"fifo:@x":                              `a fifo has a path; only Unix sockets can have an abstract name`,
		"unix:///" + strings.Repeat("x", 107):  `the path is 108 bytes long, more than the 107 that fit`,
		"unix:@" + strings.Repeat("x", 108):    `the path is 108 bytes long, more than the 107 that fit`,
		"fifo:///" + strings.Repeat("x", 4095): `the path is 4096 bytes long, more than the 4095 that fit`,
	}
	for text, want := range tests {
		a, err := ParseAddress(text)
		want = fmt.Sprintf("address %q: %s", text, want)
		if err == nil || err.Error() != want {
			t.Errorf("ParseAddress(%q): got %v, %v, want %s", text, a, err, want)
		}
	}
}

func FuzzParseAddress(f *testing.F) {
	for _, s := range []string{"tcp://:80", "tcp://[fe80::1%2]:1", "udp://0.0.0.0:0", "unix:@x", "unix:///a", "fifo:///a", "tcp6://x", "[", "unixgram:"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		a, err := ParseAddress(text)
		if err != nil {
			if a != (Address{}) {
				t.Fatalf("ParseAddress(%q): got %+v beside an error", text, a)
			}
			return
		}
		again, err := ParseAddress(a.String())
		if err != nil || again != a {
			t.Fatalf("ParseAddress(%q): got %+v, which prints as %q and parses as %+v, %v", text, a, a.String(), again, err)
		}
		if b := a; b.Network.IP() && b.Port != 0 || b.Network.Path() {
			if !(Spec{Address: a}).Conflicts(Spec{Address: b}) {
				t.Fatalf("%v does not conflict with itself", a)
			}
		}
	})
}

func ExampleParseAddress() {
	a, err := ParseAddress("tcp://[::1]:8080")
	fmt.Println(a.Network, a.IP, a.Port, err)
	_, err = ParseAddress("localhost:8080")
	fmt.Println(err)
	// Output:
	// tcp ::1 8080 <nil>
	// address "localhost:8080": no scheme ("tcp://", for instance), and host "localhost" is a name, not an IP address; write 127.0.0.1 or [::1]
}

func TestNetworkString(t *testing.T) {
	t.Parallel()
	if got := Network(99).String(); got != "network(99)" {
		t.Errorf("got %s", got)
	}
	if got := (Address{}).String(); got != "invalid address" {
		t.Errorf("got %s", got)
	}
}

func TestConflicts(t *testing.T) {
	t.Parallel()
	yes := [][2]string{
		{"tcp://:80", "tcp://:80"},
		{"tcp://:80", "tcp://127.0.0.1:80"},
		{"tcp://:80", "tcp://[::1]:80"},
		{"tcp://[::]:80", "tcp://0.0.0.0:80"},
		{"tcp://[::]:80", "tcp://127.0.0.1:80"},
		{"tcp://0.0.0.0:80", "tcp://127.0.0.1:80"},
		{"udp://[::1]:80", "udp://[::1]:80"},
		{"unix:///a", "unix:///a"},
		{"unix:///a", "fifo:///a"},
		{"unix:///a", "unixgram:///a"},
		{"unix:@a", "unix:@a"},
	}
	no := [][2]string{
		{"tcp://:80", "udp://:80"},
		{"tcp://:80", "tcp://:81"},
		{"tcp://:0", "tcp://:0"},
		{"tcp://127.0.0.1:80", "tcp://127.0.0.2:80"},
		{"tcp://0.0.0.0:80", "tcp://[::1]:80"},
		{"unix:///a", "unix:///b"},
		{"unix:@a", "unixgram:@a"},
		{"tcp://:80", "unix:///a"},
	}
	for want, pairs := range map[bool][][2]string{true: yes, false: no} {
		for _, p := range pairs {
			a, b := Spec{Address: mustParse(t, p[0])}, Spec{Address: mustParse(t, p[1])}
			if a.Conflicts(b) != want || b.Conflicts(a) != want {
				t.Errorf("%v and %v: got %v and %v, want %v", a.Address, b.Address, a.Conflicts(b), b.Conflicts(a), want)
			}
		}
	}
}

func TestSpecConflicts(t *testing.T) {
	t.Parallel()
	spec := func(text string, o Options) Spec { return Spec{Address: mustParse(t, text), Options: o} }
	tests := map[string]struct {
		a, b Spec
		want bool
	}{
		"IPv6 only beside IPv4":     {spec("tcp://[::]:80", Options{Family: FamilyIPv6}), spec("tcp://0.0.0.0:80", Options{}), false},
		"IPv4 only beside IPv6":     {spec("tcp://:80", Options{Family: FamilyIPv4}), spec("tcp://[::1]:80", Options{}), false},
		"IPv4 only beside IPv4":     {spec("tcp://:80", Options{Family: FamilyIPv4}), spec("tcp://127.0.0.1:80", Options{}), true},
		"both with ReusePort":       {spec("tcp://:80", Options{ReusePort: true}), spec("tcp://:80", Options{ReusePort: true}), false},
		"one with ReusePort":        {spec("tcp://:80", Options{ReusePort: true}), spec("tcp://:80", Options{}), true},
		"two devices":               {spec("tcp://:80", Options{Device: "a"}), spec("tcp://:80", Options{Device: "b"}), false},
		"a device and none":         {spec("tcp://:80", Options{Device: "a"}), spec("tcp://:80", Options{}), true},
		"one path, whatever is set": {spec("unix:///a", Options{ReusePort: true}), spec("unix:///a", Options{ReusePort: true}), true},
	}
	for name, test := range tests {
		if got, back := test.a.Conflicts(test.b), test.b.Conflicts(test.a); got != test.want || back != test.want {
			t.Errorf("%s: got %v and %v, want %v", name, got, back, test.want)
		}
	}
}

func mustParse(tb testing.TB, text string) Address {
	tb.Helper()
	a, err := ParseAddress(text)
	if err != nil {
		tb.Fatal(err)
	}
	return a
}
