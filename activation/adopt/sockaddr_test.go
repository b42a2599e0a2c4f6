package adopt

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// inet is the struct sockaddr_in or sockaddr_in6 of an address, of the family that its form says.
func inet(address string) []byte {
	ap := netip.MustParseAddrPort(address)
	if ap.Addr().Is4() {
		b := make([]byte, lenInet4)
		binary.NativeEndian.PutUint16(b, unix.AF_INET)
		binary.BigEndian.PutUint16(b[2:], ap.Port())
		copy(b[4:], ap.Addr().AsSlice())
		return b
	}
	b := make([]byte, lenInet6)
	binary.NativeEndian.PutUint16(b, unix.AF_INET6)
	binary.BigEndian.PutUint16(b[2:], ap.Port())
	binary.BigEndian.PutUint32(b[4:], 0x12345) // a flow label, which is nobody's business
	copy(b[8:], ap.Addr().AsSlice())
	if zone := ap.Addr().Zone(); zone != "" {
		binary.NativeEndian.PutUint32(b[24:], uint32(zone[0]-'0'))
	}
	return b
}

// unixPath is the struct sockaddr_un of a path, or of "@name", as long as it has to be.
func unixPath(name string) []byte {
	b := binary.NativeEndian.AppendUint16(nil, unix.AF_UNIX)
	if name[0] == '@' {
		return append(append(b, 0), name[1:]...)
	}
	return append(append(b, name...), 0)
}

// padded is an address in as many bytes as some programs pass.
func padded(b []byte, size int) []byte { return append(b, make([]byte, size-len(b))...) }

func TestParseSockaddr(t *testing.T) {
	t.Parallel()
	ip := netip.MustParseAddr
	wide := inet("[fe80::1]:80")
	binary.NativeEndian.PutUint32(wide[24:], 4294967295)
	global := inet("[2001:db8::1]:80")
	binary.NativeEndian.PutUint32(global[24:], 2)
	multicast := inet("[ff02::1]:80")
	binary.NativeEndian.PutUint32(multicast[24:], 2)
	site := inet("[ff05::1]:80")
	binary.NativeEndian.PutUint32(site[24:], 2)
	full := unixPath("/" + string(make([]byte, 107)))[:110]
	for i := range full[2:] {
		full[2+i] = 'x'
	}
	for name, tt := range map[string]struct {
		b    []byte
		want sockaddr
	}{
		"IPv4":                          {inet("127.0.0.1:80"), sockaddr{family: unix.AF_INET, ip: ip("127.0.0.1"), port: 80}},
		"IPv4 wildcard":                 {inet("0.0.0.0:65535"), sockaddr{family: unix.AF_INET, ip: ip("0.0.0.0"), port: 65535}},
		"IPv4 in a sockaddr_storage":    {padded(inet("192.0.2.1:1"), lenStorage), sockaddr{family: unix.AF_INET, ip: ip("192.0.2.1"), port: 1}},
		"IPv4 as long as an IPv6":       {padded(inet("192.0.2.1:1"), lenInet6), sockaddr{family: unix.AF_INET, ip: ip("192.0.2.1"), port: 1}},
		"IPv6":                          {inet("[::1]:80"), sockaddr{family: unix.AF_INET6, ip: ip("::1"), port: 80}},
		"IPv6 of RFC 2133":              {inet("[::1]:80")[:lenInet6Old], sockaddr{family: unix.AF_INET6, ip: ip("::1"), port: 80}},
		"IPv6 in a sockaddr_storage":    {padded(inet("[::]:80"), lenStorage), sockaddr{family: unix.AF_INET6, ip: ip("::"), port: 80}},
		"mapped":                        {inet("[::ffff:127.0.0.1]:80"), sockaddr{family: unix.AF_INET6, ip: ip("::ffff:127.0.0.1"), port: 80}},
		"link-local":                    {inet("[fe80::1%7]:80"), sockaddr{family: unix.AF_INET6, ip: ip("fe80::1%7"), port: 80}},
		"link-local, no scope":          {inet("[fe80::1]:80"), sockaddr{family: unix.AF_INET6, ip: ip("fe80::1"), port: 80}},
		"link-local, RFC 2133":          {inet("[fe80::1%7]:80")[:lenInet6Old], sockaddr{family: unix.AF_INET6, ip: ip("fe80::1"), port: 80}},
		"link-local, a large scope":     {wide, sockaddr{family: unix.AF_INET6, ip: ip("fe80::1%4294967295"), port: 80}},
		"a scope that nobody looks at":  {global, sockaddr{family: unix.AF_INET6, ip: ip("2001:db8::1"), port: 80}},
		"link-local multicast":          {multicast, sockaddr{family: unix.AF_INET6, ip: ip("ff02::1%2"), port: 80}},
		"multicast of a wider scope":    {site, sockaddr{family: unix.AF_INET6, ip: ip("ff05::1"), port: 80}},
		"path":                          {unixPath("/run/x"), sockaddr{family: unix.AF_UNIX, path: "/run/x"}},
		"path without a NUL":            {unixPath("/run/x")[:8], sockaddr{family: unix.AF_UNIX, path: "/run/x"}},
		"path of one byte":              {unixPath("x")[:3], sockaddr{family: unix.AF_UNIX, path: "x"}},
		"path in a whole sockaddr_un":   {padded(unixPath("x"), 110), sockaddr{family: unix.AF_UNIX, path: "x"}},
		"path that fills it":            {full, sockaddr{family: unix.AF_UNIX, path: string(full[2:])}},
		"path with rubbish behind":      {append(unixPath("/run/x"), "rubbish"...), sockaddr{family: unix.AF_UNIX, path: "/run/x"}},
		"abstract":                      {unixPath("@name"), sockaddr{family: unix.AF_UNIX, path: "\x00name"}},
		"abstract, a NUL is a byte":     {append(unixPath("@name"), "\x00x"...), sockaddr{family: unix.AF_UNIX, path: "\x00name\x00x"}},
		"abstract with an empty name":   {unixPath("@"), sockaddr{family: unix.AF_UNIX, path: "\x00"}},
		"abstract in a whole structure": {padded(unixPath("@n"), 110), sockaddr{family: unix.AF_UNIX, path: "\x00n" + string(make([]byte, 106))}},
	} {
		if got, ok := parseSockaddr(tt.b); got != tt.want || !ok {
			t.Errorf("%s: got %+v, %v, want %+v", name, got, ok, tt.want)
		}
	}
	family := func(f uint16, size int) []byte { return padded(binary.NativeEndian.AppendUint16(nil, f), size) }
	for name, b := range map[string][]byte{
		"nothing":                   nil,
		"half a family":             {unix.AF_INET},
		"only a family":             family(unix.AF_INET, 2),
		"short IPv4":                inet("127.0.0.1:80")[:lenInet4-1],
		"short IPv6":                inet("[::1]:80")[:lenInet6Old-1],
		"a Unix socket without one": family(unix.AF_UNIX, 2),
		"a long sockaddr_un":        padded(unixPath("x"), 111),
		"AF_UNSPEC":                 family(unix.AF_UNSPEC, 16),
		"netlink":                   family(unix.AF_NETLINK, 12),
		"packet":                    family(unix.AF_PACKET, 20),
		"vsock":                     family(unix.AF_VSOCK, 16),
	} {
		if got, ok := parseSockaddr(b); ok {
			t.Errorf("%s: got %+v, want nothing", name, got)
		}
	}
}

// FuzzSockaddr: what reads is of one of three families, and a socket address that the kernel takes
// apart is read as the kernel does.
func FuzzSockaddr(f *testing.F) {
	for _, b := range [][]byte{inet("127.0.0.1:80"), inet("[::1]:80"), inet("[fe80::1%7]:80"), unixPath("/run/x"), unixPath("@name"), padded(inet("[::]:1"), lenStorage), {1}} {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		a, ok := parseSockaddr(b)
		if !ok {
			return
		}
		switch a.family {
		case unix.AF_INET:
			if !a.ip.Is4() || a.path != "" || len(b) < lenInet4 {
				t.Errorf("got %+v", a)
			}
		case unix.AF_INET6:
			if !a.ip.Is6() || a.path != "" || len(b) < lenInet6Old || a.ip.Zone() != "" && len(b) < lenInet6 {
				t.Errorf("got %+v", a)
			}
		case unix.AF_UNIX:
			if a.ip.IsValid() || a.port != 0 || a.path != "" && a.path[0] != 0 && string(b[2:2+len(a.path)]) != a.path {
				t.Errorf("got %+v", a)
			}
		default:
			t.Errorf("got family %d", a.family)
		}
	})
}
