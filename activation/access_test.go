package activation

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// access makes lists of words: "10.0.0.0/8" is allowed, "-10.0.0.0/8" denied. A single
// address is a prefix too.
func access(tb testing.TB, list string) *Access {
	tb.Helper()
	a := &Access{}
	for word := range strings.FieldsSeq(list) {
		text, deny := strings.CutPrefix(word, "-")
		p, err := netip.ParsePrefix(text)
		if addr, e := netip.ParseAddr(text); e == nil {
			p, err = addr.Prefix(addr.BitLen())
		}
		if err != nil {
			tb.Fatal(err)
		}
		if deny {
			a.Deny = append(a.Deny, p)
		} else {
			a.Allow = append(a.Allow, p)
		}
	}
	return a
}

func TestAccessPermits(t *testing.T) {
	t.Parallel()
	tests := map[string]struct{ permitted, denied string }{
		"": {"10.0.0.1 ::1 ::ffff:10.0.0.1", ""},
		"10.0.0.0/8": {
			"10.0.0.0 10.255.255.255 ::ffff:10.1.2.3",
			"9.255.255.255 11.0.0.0 0.0.0.0 255.255.255.255 :: ::1 ::10.0.0.1 ::fffe:10.0.0.1",
		},
		"-10.0.0.0/8": {"9.255.255.255 11.0.0.0 ::1", "10.0.0.0 10.255.255.255 ::ffff:10.1.2.3"},
		"10.0.0.0/8 -10.1.0.0/16 10.1.2.0/24 -10.1.2.3": {
			"10.0.0.1 10.2.0.0 10.1.2.0 10.1.2.2 10.1.2.4 10.1.2.255",
			"10.1.0.0 10.1.1.255 10.1.2.3 10.1.3.0 10.1.255.255 11.0.0.0",
		},
		"0.0.0.0/0":                   {"0.0.0.0 255.255.255.255 ::ffff:1.2.3.4", ":: ::1"},
		"-::/0":                       {"1.2.3.4 ::ffff:1.2.3.4", ":: ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"},
		"::ffff:10.0.0.0/104":         {"10.1.2.3", "11.0.0.0 ::ffff:11.0.0.0 ::1"},
		"10.9.8.7/8":                  {"10.0.0.1", "11.0.0.1"},
		"fe80::/10 -fe80::1":          {"fe80::2%eth0 fe80::2", "fe80::1%eth0 fe80::1 fec0::"},
		"2001:db8::/33 2001:db8:c::2": {"2001:db8:c::2 2001:db8:7fff::", "2001:db8:8000::"},
		"10.0.0.0/8 -10.0.0.0/8":      {"", "10.0.0.1 11.0.0.1"},
		"-10.0.0.0/8 ::/0":            {"::1", "10.0.0.1 11.0.0.1"},
		"-0.0.0.0/1 -255.255.255.255": {"128.0.0.0 255.255.255.254", "0.0.0.0 127.255.255.255 255.255.255.255"},
		"-ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff -ffff:ffff:ffff::/48 ffff:ffff:ffff:ffff:ffff::/80 -::": {
			"ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffe ffff:ffff:ffff:ffff:ffff::",
			":: ::1 ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff ffff:ffff:ffff:fffe::",
		},
	}
	for list, test := range tests {
		a := access(t, list)
		check := func(addrs string, want bool) {
			t.Helper()
			for text := range strings.FieldsSeq(addrs) {
				addr := netip.MustParseAddr(text)
				if got := a.Permits(addr); got != want {
					t.Errorf("%q: got %v for %s", list, got, text)
				}
				if addr = addr.Unmap().WithZone(""); !a.Everybody() && verdictOf(t, a, addr) != want {
					t.Errorf("%q: the filter says %v of %s", list, !want, text)
				}
			}
		}
		check(test.permitted, true)
		check(test.denied, false)
		if a.Everybody() != (list == "") {
			t.Errorf("%q: everybody is %v", list, a.Everybody())
		}
	}
	var none *Access
	if !none.Everybody() || !none.Permits(netip.Addr{}) || none.Check() != nil {
		t.Error("a nil access does not permit everybody")
	}
	if access(t, "-10.0.0.0/8").Permits(netip.Addr{}) {
		t.Error("the invalid address is permitted")
	}
}

func TestAccessCheck(t *testing.T) {
	t.Parallel()
	for list, want := range map[string]string{
		"":                                "",
		"10.0.0.0/8 -10.0.0.0/16":         "",
		"10.0.0.0/8 -10.1.2.3/8 ::1 -::1": "10.0.0.0/8 is both allowed and denied\n::1/128 is both allowed and denied",
		"::ffff:1.2.3.4 -1.2.3.4":         "::ffff:1.2.3.4/128 is both allowed and denied",
	} {
		if err := access(t, list).Check(); fmt.Sprint(err) != want && (err != nil || want != "") {
			t.Errorf("%q: got %v, want %q", list, err, want)
		}
	}
	invalid := &Access{Allow: []netip.Prefix{{}}, Deny: []netip.Prefix{{}}}
	if err := invalid.Check(); err == nil || strings.Contains(err.Error(), "both") {
		t.Errorf("got %v for invalid prefixes", err)
	}
	if invalid.Permits(netip.IPv6Unspecified()) || verdictOf(t, invalid, netip.IPv6Unspecified()) {
		t.Error("an invalid prefix permits")
	}
}

// The numbers of prefixes in the documentation of Check, and its error.
func TestAccessLimit(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		six   bool
		bits  int
		least int
	}{{false, 24, 1900}, {false, 32, 1900}, {true, 48, 800}, {true, 64, 800}, {true, 128, 500}} {
		a := manyPrefixes(3000, test.six, test.bits)
		err := a.Check()
		if err == nil {
			t.Fatalf("3000 prefixes of %d bits fit", test.bits)
		}
		var all, fit, size, most int
		const format = "%d prefixes are too many for the kernel, the first %d would fit (%d of at most %d instructions)"
		if _, e := fmt.Sscanf(err.Error(), format, &all, &fit, &size, &most); e != nil || all != 3000 || size <= most || most != 4096 {
			t.Fatalf("got %v, %v", err, e)
		}
		t.Logf("%d bits: %d fit, 3000 are %d instructions", test.bits, fit, size)
		if fit < test.least {
			t.Errorf("%d bits: got %d, want at least %d", test.bits, fit, test.least)
		}
		if err := a.first(fit).Check(); err != nil {
			t.Error(err)
		}
		if err := a.first(fit + 1).Check(); err == nil {
			t.Errorf("%d prefixes fit as well", fit+1)
		}
		// The kernel takes it.
		fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		s := Socket{addr: Address{Network: TCP}}
		if err := s.attachAccess(a.first(fit), fd); err != nil {
			t.Error(err)
		}
		if err := s.attachAccess(a, fd); err == nil || !strings.Contains(err.Error(), "too many") {
			t.Errorf("got %v for too many", err)
		}
		b := manyPrefixes(200, test.six, test.bits)
		sameVerdicts(t, b, probes(b))
	}
}

// manyPrefixes allows prefixes that have nothing to do with one another.
func manyPrefixes(n int, six bool, bits int) *Access {
	random := rand.New(rand.NewPCG(1, uint64(bits)))
	a := &Access{}
	for range n {
		var b [16]byte
		binary.BigEndian.PutUint64(b[:], random.Uint64()>>3|1<<61) // 2000::/3
		binary.BigEndian.PutUint64(b[8:], random.Uint64())
		addr := netip.AddrFrom16(b)
		if !six {
			addr = netip.AddrFrom4([4]byte(b[4:8]))
		}
		p, _ := addr.Prefix(bits)
		a.Allow = append(a.Allow, p)
	}
	return a
}

// What is the same for all neighbours costs nothing.
func TestAccessMerges(t *testing.T) {
	t.Parallel()
	short := len(access(t, "10.0.0.0/8").program(TCP))
	for _, list := range []string{
		"10.0.0.0/9 10.128.0.0/9", "10.0.0.0/8 10.1.2.3 10.9.0.0/16", "10.0.0.0/8 -192.168.0.0/16", "10.0.0.0/8 10.0.0.0/8",
	} {
		if got := len(access(t, list).program(TCP)); got != short {
			t.Errorf("%q: %d instructions, want %d", list, got, short)
		}
	}
}

func FuzzAccess(f *testing.F) {
	f.Add([]byte("\x08\x0a\x00\x00\x00\x97\x0a\x01\x00\x00\x20\x0a\x01\x02\x03"))
	f.Add([]byte("\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"))
	f.Add([]byte(strings.Repeat("\x40\x33 \x01\x0d\xb8\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02", 3)))
	f.Fuzz(func(t *testing.T, data []byte) {
		a := &Access{}
		var more []netip.Addr
		for len(data) >= 18 && len(a.Allow)+len(a.Deny) < 64 {
			addr := netip.AddrFrom16([16]byte(data[2:18]))
			if data[0]&1 != 0 {
				addr = netip.AddrFrom4([4]byte(data[2:6]))
			}
			if data[0]&2 != 0 && len(more) > 0 { // near another one
				addr = more[int(data[3])%len(more)]
			}
			p, _ := addr.Prefix(int(data[1]) % (addr.BitLen() + 1))
			if data[0]&4 != 0 {
				a.Deny = append(a.Deny, p)
			} else {
				a.Allow = append(a.Allow, p)
			}
			more = append(more, addr)
			data = data[18:]
		}
		if len(data) >= 16 {
			more = append(more, netip.AddrFrom16([16]byte(data)), netip.AddrFrom4([4]byte(data)))
		}
		if a.Everybody() {
			return
		}
		sameVerdicts(t, a, append(more, probes(a)...))
	})
}

// probes returns the addresses at the edges of all prefixes, and of all values.
func probes(a *Access) []netip.Addr {
	four, six := netip.IPv4Unspecified(), netip.IPv6Unspecified()
	out := []netip.Addr{
		four, six, netip.MustParseAddr("::ffff:0:0"), netip.MustParseAddr("::ffff:255.255.255.255"), netip.MustParseAddr("255.255.255.255"), netip.MustParseAddr("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
	}
	for _, list := range [][]netip.Prefix{a.Allow, a.Deny} {
		for _, p := range list {
			p = p.Masked()
			next := after(p)
			out = append(out, p.Addr(), p.Addr().Prev(), p.Addr().Next(), next)
			if next.IsValid() {
				out = append(out, next.Prev(), next.Next())
			}
		}
	}
	return out
}

func sameVerdicts(t *testing.T, a *Access, addrs []netip.Addr) {
	t.Helper()
	code := map[Network][]unix.SockFilter{TCP: a.program(TCP), UDP: a.program(UDP)}
	for _, addr := range addrs {
		if !addr.IsValid() {
			continue
		}
		want := a.Permits(addr) && !addr.Is4In6() // which nobody has in a packet
		for network, code := range code {
			if got := interpret(t, code, addr, tcpFlagSYN); got != want {
				t.Fatalf("allow %v, deny %v: got %v for %s (%s), want %v", a.Allow, a.Deny, got, addr, network, want)
			}
		}
	}
}

func verdictOf(t *testing.T, a *Access, source netip.Addr) bool {
	t.Helper()
	return interpret(t, a.program(TCP), source, tcpFlagSYN)
}

// Only a SYN is looked at, and all others pass after three instructions.
func TestAccessFlags(t *testing.T) {
	t.Parallel()
	a := access(t, "-0.0.0.0/0 ::/0")
	denied := netip.MustParseAddr("192.0.2.1")
	for flags := range 256 {
		syn := flags&(tcpFlagSYN|tcpFlagACK) == tcpFlagSYN
		if got := interpret(t, a.program(TCP), denied, byte(flags)); got == syn {
			t.Errorf("flags %#x: got %v", flags, got)
		}
		if interpret(t, a.program(UDP), denied, byte(flags)) {
			t.Errorf("a datagram passes")
		}
	}
	if code := a.program(TCP)[:3]; code[1].Code != jumpAnyBit || code[1].K != tcpFlagACK || a.program(TCP)[2+code[1].Jt].K != pass {
		t.Errorf("got %+v at the start, want that ACK is done with", code)
	}
}

// interpret runs a filter as the kernel does (net/core/filter.c).
func interpret(t *testing.T, code []unix.SockFilter, source netip.Addr, flags byte) bool {
	t.Helper()
	ip := make([]byte, 40)
	ip[0] = 6<<4 | 15
	copy(ip[8:], source.AsSlice())
	if source.Is4() {
		ip[0] = 4<<4 | 15
		copy(ip[12:], source.AsSlice())
	}
	transport := make([]byte, 20)
	transport[13] = flags
	load := func(k uint32, size int) uint32 {
		from, offset := transport, int(int32(k))
		if offset < 0 {
			from, offset = ip, offset+0x100000
		}
		var word [4]byte
		copy(word[4-size:], from[offset:offset+size])
		return binary.BigEndian.Uint32(word[:])
	}
	var a uint32
	for pc, steps := 0, 0; ; pc, steps = pc+1, steps+1 {
		if steps > 100 {
			t.Fatal("more than 100 steps")
		}
		in := code[pc]
		yes := false
		switch in.Code {
		case loadByte:
			a = load(in.K, 1)
			continue
		case loadWord:
			a = load(in.K, 4)
			continue
		case verdict:
			return in.K != 0
		case jumpAlways:
			pc += int(in.K)
			continue
		case jumpEqual:
			yes = a == in.K
		case jumpAtLeast:
			yes = a >= in.K
		case jumpAnyBit:
			yes = a&in.K != 0
		default:
			t.Fatalf("instruction %d is unknown: %+v", pc, in)
		}
		if yes {
			pc += int(in.Jt)
		} else {
			pc += int(in.Jf)
		}
	}
}

// Denied is what Permits does not permit.
func TestAccessDenied(t *testing.T) {
	t.Parallel()
	prefix := netip.MustParsePrefix
	for _, a := range []Access{
		{Deny: []netip.Prefix{prefix("192.0.2.0/24"), prefix("2001:db8::/32")}},
		{Allow: []netip.Prefix{prefix("192.0.2.0/24"), prefix("2001:db8::/32")}},
		{Allow: []netip.Prefix{prefix("0.0.0.0/0")}, Deny: []netip.Prefix{prefix("255.0.0.0/8"), prefix("0.0.0.0/32")}},
	} {
		for _, addr := range []string{
			"0.0.0.0", "0.0.0.1", "192.0.1.255", "192.0.2.0", "192.0.2.255", "192.0.3.0", "254.255.255.255", "255.0.0.0", "255.255.255.255",
			"::", "2001:db7:ffff:ffff:ffff:ffff:ffff:ffff", "2001:db8::", "2001:db8:ffff:ffff:ffff:ffff:ffff:ffff", "2001:db9::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
		} {
			at := netip.MustParseAddr(addr)
			denied := slices.ContainsFunc(a.Denied(), func(r Range) bool {
				return r.From.BitLen() == at.BitLen() && r.From.Compare(at) <= 0 && at.Compare(r.To) <= 0
			})
			if denied == a.Permits(at) {
				t.Errorf("%+v, %s: permitted %v, denied %v", a, addr, a.Permits(at), denied)
			}
		}
	}
	if got := (&Access{}).Denied(); got != nil {
		t.Errorf("got %v of everybody", got)
	}
}

func TestExplainFilter(t *testing.T) {
	t.Parallel()
	for err, want := range map[error]string{
		unix.EPERM:  "it needs root or CAP_NET_ADMIN here: operation not permitted",
		unix.ENOMEM: "net.core.optmem_max may be too low for it: cannot allocate memory",
		unix.EINVAL: "invalid argument",
	} {
		if got := explainFilter(err); got.Error() != want || !errors.Is(got, err) {
			t.Errorf("got %v, want %s", got, want)
		}
	}
}
