package gate

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"testing"
)

func TestProxyHeader(t *testing.T) {
	t.Parallel()
	const signature = "\x0d\x0a\x0d\x0a\x00\x0d\x0a\x51\x55\x49\x54\x0a"
	tests := map[string]struct {
		client, server string // empty: invalid
		v1, v2         string
	}{
		"IPv4": {
			"192.0.2.1:56324", "198.51.100.7:443",
			"PROXY TCP4 192.0.2.1 198.51.100.7 56324 443\r\n",
			"\x21\x11\x00\x0c\xc0\x00\x02\x01\xc6\x33\x64\x07\xdc\x04\x01\xbb",
		},
		"IPv6": {
			"[2001:db8::1]:1", "[2001:db8::2]:65535",
			"PROXY TCP6 2001:db8::1 2001:db8::2 1 65535\r\n",
			"\x21\x21\x00\x24" +
				"\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01" +
				"\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\x01\xff\xff",
		},
		"IPv4-mapped is IPv4": {
			"[::ffff:192.0.2.1]:56324", "198.51.100.7:443",
			"PROXY TCP4 192.0.2.1 198.51.100.7 56324 443\r\n",
			"\x21\x11\x00\x0c\xc0\x00\x02\x01\xc6\x33\x64\x07\xdc\x04\x01\xbb",
		},
		"client IPv4, server IPv6": {
			"192.0.2.1:256", "[2001:db8::2]:2",
			"PROXY TCP6 ::ffff:c000:201 2001:db8::2 256 2\r\n",
			"\x21\x21\x00\x24" +
				"\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\xff\xff\xc0\x00\x02\x01" +
				"\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x01\x00\x00\x02",
		},
		"client IPv6, server IPv4": {
			"[::1]:256", "127.0.0.1:2",
			"PROXY TCP6 ::1 ::ffff:7f00:1 256 2\r\n",
			"\x21\x21\x00\x24" +
				"\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01" +
				"\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\xff\xff\x7f\x00\x00\x01\x01\x00\x00\x02",
		},
		"without the zone": {
			"[fe80::1%eth0]:1", "[fe80::2%eth0]:2",
			"PROXY TCP6 fe80::1 fe80::2 1 2\r\n",
			"\x21\x21\x00\x24" +
				"\xfe\x80\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01" +
				"\xfe\x80\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\x01\x00\x02",
		},
		"nothing known":     {"", "", "PROXY UNKNOWN\r\n", "\x20\x00\x00\x00"},
		"no client known":   {"", "127.0.0.1:2", "PROXY UNKNOWN\r\n", "\x20\x00\x00\x00"},
		"server is unknown": {"127.0.0.1:2", "", "PROXY UNKNOWN\r\n", "\x20\x00\x00\x00"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var client, server netip.AddrPort
			if tt.client != "" {
				client = netip.MustParseAddrPort(tt.client)
			}
			if tt.server != "" {
				server = netip.MustParseAddrPort(tt.server)
			}
			before := []byte("before")
			for version, want := range map[ProxyProtocol]string{NoProxyProtocol: "", ProxyV1: tt.v1, ProxyV2: signature + tt.v2} {
				if got := string(appendProxyHeader(before, version, client, server)); got != "before"+want {
					t.Errorf("version %d: got %q, want %q", version, got, "before"+want)
				}
			}
		})
	}
}

func TestProxyHeaderNeedsNoMemory(t *testing.T) {
	client := netip.MustParseAddrPort("[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff%eth0]:65535")
	var longest int
	b := make([]byte, 0, maxProxyHeader)
	for _, version := range []ProxyProtocol{ProxyV1, ProxyV2} {
		for _, server := range []netip.AddrPort{client, netip.MustParseAddrPort("255.255.255.255:65535"), {}} {
			longest = max(longest, len(appendProxyHeader(b, version, client, server)))
			if n := testing.AllocsPerRun(10, func() { appendProxyHeader(b, version, client, server) }); n != 0 {
				t.Errorf("version %d about %s: %v allocations", version, server, n)
			}
		}
	}
	if longest != maxProxyHeader {
		t.Errorf("the longest header has %d bytes, maxProxyHeader is %d", longest, maxProxyHeader)
	}
}

// readProxyHeader reads a header of either version at the start of b, as a destination would; known is false for one about nobody.
func readProxyHeader(b []byte) (client, server netip.AddrPort, known bool, rest []byte, err error) {
	if body, ok := strings.CutPrefix(string(b), proxySignature); ok {
		return readProxyV2([]byte(body))
	}
	line, after, ok := strings.Cut(string(b), "\r\n")
	f := strings.Split(line, " ")
	switch {
	case !ok || f[0] != "PROXY":
		return client, server, false, nil, fmt.Errorf("no header in %q", b)
	case line == "PROXY UNKNOWN":
		return client, server, false, []byte(after), nil
	case len(f) != 6:
		return client, server, false, nil, fmt.Errorf("%d fields in %q", len(f), line)
	}
	ends := [2]netip.AddrPort{}
	for i := range ends {
		ip, err := netip.ParseAddr(f[2+i])
		if err != nil || ip.Zone() != "" || ip.Is4() != (f[1] == "TCP4") || ip.Is6() != (f[1] == "TCP6") || ip.Is6() && strings.Contains(f[2+i], ".") {
			return client, server, false, nil, fmt.Errorf("%s has the address %q: %w", f[1], f[2+i], err)
		}
		port, err := strconv.ParseUint(f[4+i], 10, 16)
		if err != nil {
			return client, server, false, nil, err
		}
		ends[i] = netip.AddrPortFrom(ip.Unmap(), uint16(port))
	}
	return ends[0], ends[1], true, []byte(after), nil
}

func readProxyV2(b []byte) (client, server netip.AddrPort, known bool, rest []byte, err error) {
	if len(b) < 4 || len(b) < 4+int(binary.BigEndian.Uint16(b[2:])) {
		return client, server, false, nil, fmt.Errorf("short header %q", b)
	}
	kind := [2]byte(b)
	body, rest := b[4:][:binary.BigEndian.Uint16(b[2:])], b[4+int(binary.BigEndian.Uint16(b[2:])):]
	size := 0
	switch kind {
	case [2]byte{0x20, 0}:
		return client, server, false, rest, nil
	case [2]byte{0x21, 0x11}:
		size = 4
	case [2]byte{0x21, 0x21}:
		size = 16
	}
	if size == 0 || len(body) != 2*size+4 {
		return client, server, false, nil, fmt.Errorf("header of kind %x has %d bytes", kind, len(body))
	}
	from, _ := netip.AddrFromSlice(body[:size])
	to, _ := netip.AddrFromSlice(body[size : 2*size])
	client = netip.AddrPortFrom(from.Unmap(), binary.BigEndian.Uint16(body[2*size:]))
	server = netip.AddrPortFrom(to.Unmap(), binary.BigEndian.Uint16(body[2*size+2:]))
	return client, server, true, rest, nil
}

func FuzzProxyHeader(f *testing.F) {
	f.Add(true, []byte{192, 0, 2, 1}, uint16(1), []byte{198, 51, 100, 1}, uint16(65535))
	f.Add(false, []byte{192, 0, 2, 1}, uint16(1), netip.MustParseAddr("2001:db8::").AsSlice(), uint16(0))
	f.Add(true, netip.MustParseAddr("::").AsSlice(), uint16(10), netip.MustParseAddr("::ffff:1.2.3.4").AsSlice(), uint16(0))
	f.Add(false, []byte{}, uint16(10), []byte{127, 0, 0, 1}, uint16(0))
	f.Fuzz(func(t *testing.T, one bool, from []byte, fromPort uint16, to []byte, toPort uint16) {
		version := ProxyV2
		if one {
			version = ProxyV1
		}
		a, _ := netip.AddrFromSlice(from)
		b, _ := netip.AddrFromSlice(to)
		client, server := netip.AddrPortFrom(a, fromPort), netip.AddrPortFrom(b, toPort)
		header := appendProxyHeader(nil, version, client, server)
		if len(header) > maxProxyHeader {
			t.Errorf("%d bytes", len(header))
		}
		gotClient, gotServer, known, rest, err := readProxyHeader(append(header, "rest"...))
		if err != nil || string(rest) != "rest" {
			t.Fatalf("header %q: rest %q, %v", header, rest, err)
		}
		if known != (a.IsValid() && b.IsValid()) {
			t.Errorf("header %q of %s and %s", header, client, server)
		}
		if known && (gotClient != netip.AddrPortFrom(a.Unmap(), fromPort) || gotServer != netip.AddrPortFrom(b.Unmap(), toPort)) {
			t.Errorf("header %q says %s and %s, want %s and %s", header, gotClient, gotServer, client, server)
		}
	})
}
