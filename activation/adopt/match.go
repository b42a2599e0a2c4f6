package adopt

import (
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"hibergate/activation"
)

// bound is a socket as it is, or would be after bind(2). Pure: the zones of addresses are numbers, or none.
type bound struct {
	network activation.Network
	domain  int // AF_INET or AF_INET6
	ip      netip.Addr
	port    uint16
	v6only  bool // of the IPv6 wildcard
	exact   bool // it is only for a program that wants just this: nobody has said that it may have more, or less
}

func (b bound) wildcard() bool { return b.ip.Unmap().IsUnspecified() }

// wildcard6 says whether it is the IPv6 wildcard: that of IPv4 in IPv6 form, "::ffff:0.0.0.0", is not.
func (b bound) wildcard6() bool { return b.ip == netip.IPv6Unspecified() }

// dual says whether it serves both IP versions.
func (b bound) dual() bool { return b.wildcard6() && !b.v6only }

// String returns the address, and the versions where they are not plain.
func (b bound) String() string {
	s := b.network.String() + "://" + netip.AddrPortFrom(b.ip, b.port).String()
	if b.wildcard6() {
		if b.v6only {
			return s + " (IPv6 only)"
		}
		return s + " (both IP versions)"
	}
	return s
}

// overlaps says whether the two could not both listen.
func (b bound) overlaps(o bound) bool {
	if b.network != o.network || b.port != o.port {
		return false
	}
	x, y := b.ip.Unmap(), o.ip.Unmap()
	switch {
	case x == y:
		return true
	case b.wildcard() && o.wildcard():
		return b.dual() || o.dual()
	case b.wildcard():
		return y.Is4() == x.Is4() || y.Is4() && b.dual()
	case o.wildcard():
		return x.Is4() == y.Is4() || x.Is4() && o.dual()
	}
	return false
}

// How well one of ours stands for what a program wants; 0: not at all.
const (
	fitsWider    = iota + 1 // it serves more, or less, as the configuration says
	fitsVersions            // the same addresses, by a socket of another IP version
	fitsSame
)

// fit judges one of ours for what the program wants. The program reads the addresses of its clients as those of the
// domain that it has asked for: one that asked for IPv4 would misread an IPv6 socket. Those that ask for IPv6 know both.
func (b bound) fit(ours bound) int {
	if !b.overlaps(ours) || b.domain == unix.AF_INET && ours.domain != unix.AF_INET {
		return 0
	}
	x, y := b.ip.Unmap(), ours.ip.Unmap()
	switch {
	case b.domain == ours.domain && x == y:
		if b.wildcard6() && b.v6only != ours.v6only {
			return 0
		}
		return fitsSame
	case ours.exact:
		return 0
	case x == y, b.dual() && ours.wildcard():
		return fitsVersions
	}
	return fitsWider
}

// match finds which of ours a program is to have for what it wants. index is -1 where none has to do
// with it. problem says why the one that is in its way cannot be given.
func match(want bound, ours []bound) (index int, problem string) {
	index, best, touched := -1, 0, 0
	for i, o := range ours {
		if !want.overlaps(o) {
			continue
		}
		touched++
		if fit := want.fit(o); fit > best || index < 0 {
			index, best = i, fit
		}
	}
	switch {
	case best == fitsSame, best > 0 && touched == 1, index < 0:
		return index, ""
	case best > 0:
		return index, fmt.Sprintf("the program wants one socket, %s, and hibergated has %d for that; write %s instead", want, touched, want.configure())
	}
	return index, fmt.Sprintf("the program wants %s, and hibergated has %s; write %s instead", want, ours[index], want.configure())
}

// suggest is the address of the configuration.
func (b bound) suggest() string {
	return b.address().String()
}

// configure is what to write in the configuration.
func (b bound) configure() string {
	if b.wildcard6() {
		family := "dual"
		if b.v6only {
			family = "ipv6"
		}
		return fmt.Sprintf(`{ address = %q, family = %q }`, b.suggest(), family)
	}
	return fmt.Sprintf("%q", b.suggest())
}

// address is where it is, or will be.
func (b bound) address() activation.Address {
	return activation.Address{Network: b.network, IP: b.ip.Unmap(), Port: b.port}
}
