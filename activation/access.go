package activation

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sort"

	"golang.org/x/sys/unix"
)

// Access says which source addresses may use a TCP or UDP socket. Of the prefixes that
// hold an address the longest decides. An address that none holds may use the socket
// where nothing is allowed by name, and may not where something is.
//
// The zero value, and a nil pointer, permit everybody. IPv4 prefixes are for IPv4
// sources, also on dual-stack sockets, and "::/0" is IPv6 alone. An IPv4-mapped prefix of at
// least 96 bits is the IPv4 one. What a prefix has beyond its bits is ignored.
//
// Where there is something to check, some kernels ask for root or CAP_NET_ADMIN, and say EPERM to an
// ordinary user when the socket is opened.
type Access struct {
	Allow, Deny []netip.Prefix
}

// Everybody says whether there is nothing to check.
func (a *Access) Everybody() bool { return a == nil || len(a.Allow)+len(a.Deny) == 0 }

// Permits says whether the source may use the socket. The zone does not matter. A prefix
// in both lists, which Check refuses, denies. The invalid Addr is not permitted unless everybody is.
func (a *Access) Permits(addr netip.Addr) bool {
	if a.Everybody() {
		return true
	}
	if !addr.IsValid() {
		return false
	}
	addr = addr.Unmap().WithZone("")
	allow, deny := longest(a.Allow, addr), longest(a.Deny, addr)
	if allow == deny { // in practice -1 both
		return allow < 0 && a.permitsRest()
	}
	return allow > deny
}

// permitsRest is the verdict on sources that no prefix holds.
func (a *Access) permitsRest() bool { return len(a.Allow) == 0 }

// longest returns the length of the longest prefix that holds addr, -1 where none does.
func longest(list []netip.Prefix, addr netip.Addr) int {
	bits := -1
	for _, p := range list {
		if p = canonical(p); p.Bits() > bits && p.Contains(addr) {
			bits = p.Bits()
		}
	}
	return bits
}

// canonical returns the one way to write a prefix: without what is beyond its bits, IPv4
// as IPv4. An invalid one stays invalid, and holds nothing.
func canonical(p netip.Prefix) netip.Prefix {
	p = p.Masked()
	if p.Addr().Is4In6() && p.Bits() >= 96 {
		return netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
	}
	return p
}

// Check says what is wrong with the lists: an invalid prefix, one that is in both, or
// more than the kernel takes. Its limit is 4096 instructions (BPF_MAXINSNS of
// linux/bpf_common.h), which is about 2000 IPv4 prefixes that have nothing to do with one another, or
// 500 to 1000 of IPv6; neighbours with the same verdict count as one. Where net.core.optmem_max
// is 20480, as in older kernels, it is a third of that, or less; then it is opening the socket that fails.
func (a *Access) Check() error {
	if a.Everybody() {
		return nil
	}
	var errs []error
	denied := make(map[netip.Prefix]bool, len(a.Deny))
	for _, p := range a.Deny {
		if !p.IsValid() {
			errs = append(errs, errors.New("a prefix to deny is invalid"))
		}
		denied[canonical(p)] = true
	}
	for _, p := range a.Allow {
		switch {
		case !p.IsValid():
			errs = append(errs, errors.New("a prefix to allow is invalid"))
		case denied[canonical(p)]:
			errs = append(errs, fmt.Errorf("%s is both allowed and denied", p))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if size := len(a.program(TCP)); size > unix.BPF_MAXINSNS {
		all := len(a.Allow) + len(a.Deny)
		fit := sort.Search(all, func(n int) bool { return len(a.first(n+1).program(TCP)) > unix.BPF_MAXINSNS })
		return fmt.Errorf("%d prefixes are too many for the kernel, the first %d would fit (%d of at most %d instructions)", all, fit, size, unix.BPF_MAXINSNS)
	}
	return nil
}

// first returns the access with only the first n prefixes, those to allow before those to deny.
func (a *Access) first(n int) *Access {
	allow := min(n, len(a.Allow))
	return &Access{Allow: a.Allow[:allow], Deny: a.Deny[:n-allow]}
}

// span is a run of addresses with one verdict. It ends where the next one begins.
type span struct {
	from      netip.Addr
	permitted bool
}

// spans divides all addresses of the IP version of zero, its lowest address, into spans, in order;
// neighbours have different verdicts. There is at least one, from zero. IPv4-mapped addresses are denied.
func (a *Access) spans(zero netip.Addr) []span {
	type rule struct {
		netip.Prefix
		permitted bool
	}
	var rules []rule
	add := func(list []netip.Prefix, permitted bool) {
		for _, p := range list {
			if p = canonical(p); p.Addr().BitLen() == zero.BitLen() {
				rules = append(rules, rule{p, permitted})
			}
		}
	}
	// Of equal prefixes the last one counts below, so it is those to deny that come last.
	add(a.Allow, true)
	add(a.Deny, false)
	if zero.Is6() {
		rules = append(rules, rule{netip.PrefixFrom(netip.AddrFrom16([16]byte{10: 0xff, 11: 0xff}), 96), false}) // forged, see access_bpf.go
	}
	slices.SortStableFunc(rules, func(x, y rule) int { return x.Compare(y.Prefix) })

	var out []span
	begin := func(from netip.Addr, permitted bool) {
		if n := len(out); n > 0 && out[n-1].from == from {
			out = out[:n-1]
		}
		if n := len(out); n == 0 || out[n-1].permitted != permitted {
			out = append(out, span{from, permitted})
		}
	}
	begin(zero, a.permitsRest())
	// Prefixes are nested or apart, so those around the current address are a stack.
	var around []rule
	leave := func(until netip.Addr) {
		for n := len(around) - 1; n >= 0 && !around[n].Contains(until); n-- {
			next := after(around[n].Prefix)
			around = around[:n]
			switch {
			case !next.IsValid(): // it went to the last address of all
			case n > 0:
				begin(next, around[n-1].permitted)
			default:
				begin(next, a.permitsRest())
			}
		}
	}
	for _, r := range rules {
		leave(r.Addr())
		begin(r.Addr(), r.permitted)
		around = append(around, r)
	}
	leave(netip.Addr{})
	return out
}

// Range is the addresses from one to another, both included, of one IP version.
type Range struct{ From, To netip.Addr }

// Denied returns the sources that may not use the socket, in order.
func (a *Access) Denied() []Range {
	if a.Everybody() {
		return nil
	}
	var out []Range
	for _, zero := range []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
		spans := a.spans(zero)
		for i, s := range spans {
			if s.permitted {
				continue
			}
			to := last(netip.PrefixFrom(zero, 0))
			if i+1 < len(spans) {
				to = spans[i+1].from.Prev()
			}
			out = append(out, Range{s.from, to})
		}
	}
	return out
}

// after returns the address that follows the last one of p; invalid where there is none.
func after(p netip.Prefix) netip.Addr { return last(p).Next() }

// last returns the last address of p.
func last(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < 8*len(b); i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b) // of 4 or 16 bytes
	return a
}
