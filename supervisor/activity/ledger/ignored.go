package ledger

import (
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"hibergate/supervisor/activity/netlink"
)

// family is that of a peer's address.
type family uint8

const (
	v4 family = iota
	v6
	families
)

func (f family) String() string { return [...]string{"v4", "v6"}[f] }

func familyOf(a netip.Addr) family {
	if a.Is4() {
		return v4
	}
	return v6
}

// reaches says whether packets with peers of a family can belong to an account.
func (k Key) reaches(f family) bool {
	return k.Family == unix.NFPROTO_UNSPEC || (k.Family == unix.NFPROTO_IPV4) == (f == v4)
}

// addrRange is an element of a set of what is ignored: an account, and from which peer to which.
type addrRange struct {
	key      Key
	from, to netip.Addr
}

// ignore adds the elements for what an account ignores.
func (e *elements) ignore(key Key, ranges []Range) {
	for _, r := range ranges {
		if f := familyOf(r.From); key.reaches(f) {
			all := &e.ignored[key.kind()][f]
			*all = append(*all, addrRange{key, r.From, r.To})
		}
	}
}

// Range is the addresses from one to another, both included, of one IP version.
type Range struct{ From, To netip.Addr }

// RangeOf returns the addresses of a valid prefix.
func RangeOf(p netip.Prefix) Range {
	p = p.Masked()
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < 8*len(b); i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	last, _ := netip.AddrFromSlice(b) // of 4 or 16 bytes
	return Range{p.Addr(), last}
}

// normalize returns ranges in order and merges those that overlap, which the kernel refuses.
// Invalid ones are left out. Pure.
func normalize(ranges []Range) []Range {
	var all []Range
	for _, r := range ranges {
		if r.From.IsValid() && r.From.BitLen() == r.To.BitLen() && r.From.Compare(r.To) <= 0 {
			all = append(all, r)
		}
	}
	slices.SortFunc(all, func(a, b Range) int { return a.From.Compare(b.From) })
	kept := all[:0]
	for _, r := range all {
		if n := len(kept); n > 0 && kept[n-1].To.BitLen() == r.From.BitLen() && r.From.Compare(kept[n-1].To) <= 0 {
			if kept[n-1].To.Less(r.To) {
				kept[n-1].To = r.To
			}
			continue
		}
		kept = append(kept, r)
	}
	return kept
}

// addRanges adds a list of elements that consist of an account and a range of peers.
func addRanges(r *netlink.Request, ranges []addrRange) {
	end := func(attribute uint16, key Key, peer netip.Addr) {
		r.Nested(attribute, func(r *netlink.Request) {
			r.Attribute(unix.NFTA_DATA_VALUE, append(key.encode(), peer.AsSlice()...)...)
		})
	}
	for _, e := range ranges {
		r.Nested(unix.NFTA_LIST_ELEM, func(*netlink.Request) {
			end(unix.NFTA_SET_ELEM_KEY, e.key, e.from)
			end(nftaSetElemKeyEnd, e.key, e.to)
		})
	}
}

// nftaSetElemKeyEnd is NFTA_SET_ELEM_KEY_END (Linux 5.6).
const nftaSetElemKeyEnd = 10
