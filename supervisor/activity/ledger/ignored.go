package ledger

import (
	"cmp"
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

// ignore adds the elements for the prefixes that an account ignores.
func (e *elements) ignore(key Key, prefixes []netip.Prefix) {
	for _, p := range prefixes {
		if f := familyOf(p.Addr()); key.reaches(f) {
			all := &e.ignored[key.kind()][f]
			*all = append(*all, addrRange{key, p.Addr(), lastOf(p)})
		}
	}
}

// lastOf returns the last address of a prefix.
func lastOf(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < 8*len(b); i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	last, _ := netip.AddrFromSlice(b)
	return last
}

// normalize returns prefixes in order and without those that lie in another: the kernel refuses
// elements that overlap. Invalid ones are left out. Pure.
func normalize(prefixes []netip.Prefix) []netip.Prefix {
	var all []netip.Prefix
	for _, p := range prefixes {
		if p = p.Masked(); p.IsValid() {
			all = append(all, p)
		}
	}
	// The wider first: all that lies in a prefix comes right behind it.
	slices.SortFunc(all, func(a, b netip.Prefix) int {
		if c := a.Addr().Compare(b.Addr()); c != 0 {
			return c
		}
		return cmp.Compare(a.Bits(), b.Bits())
	})
	kept := all[:0]
	for _, p := range all {
		if len(kept) == 0 || !kept[len(kept)-1].Overlaps(p) {
			kept = append(kept, p)
		}
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
