package config

import (
	"net/netip"
	"slices"
	"strings"
	"time"

	"hibergate/activation"
)

const (
	// maxMinBytes is what a client can always send before it is accepted: half of the
	// receive buffer that tcp(7) gives a socket by default.
	maxMinBytes = 64 << 10
	// minBytesDefer is how long the kernel waits for the first data of a client before it
	// reports it without.
	minBytesDefer = 30 * time.Second
)

func accessKeys() []key {
	return []key{
		{
			"allow", "array of prefixes", "everybody", "clients that may connect; all others then may not", 0,
			func(d *decoder, raw any) { d.prefixes(raw, &d.access.Allow) },
		},
		{
			"deny", "array of prefixes", "nobody", "clients that may not connect; of the prefixes of both lists that a client is in, the more specific one holds", 0,
			func(d *decoder, raw any) { d.prefixes(raw, &d.access.Deny) },
		},
	}
}

func wakeKeys() []key {
	const needs = "; needs tcp sockets and `accept = false`"
	return []key{
		{
			"ignore", "array of prefixes", "none", "clients that may use the service but neither wake it nor keep it awake" + needs, 0,
			func(d *decoder, raw any) { d.prefixes(raw, &d.service.Wake.Ignore) },
		},
		{
			"min_bytes", "integer", "none", "how many bytes a client must have sent before it wakes the service; at most 65536" + needs, 0,
			func(d *decoder, raw any) { d.integer(raw, 1, maxMinBytes, &d.service.Wake.MinBytes) },
		},
	}
}

// prefixes reads a list of IP prefixes.
func (d *decoder) prefixes(raw any, to *[]netip.Prefix) {
	all, _ := raw.([]any)
	out := make([]netip.Prefix, 0, len(all))
	seen := make(map[netip.Prefix]bool, len(all))
	ok := d.each(raw, "an array of prefixes", func(raw any) {
		var s string
		if !d.str(raw, &s) {
			return
		}
		p, meant, ok := parsePrefix(s)
		switch {
		case ok && seen[p]:
			d.wrong("%q is given twice", s)
		case ok:
			seen[p] = true
			out = append(out, p)
		case meant.IsValid():
			d.wrong("%q is not a prefix; did you mean %q?", s, meant)
		default:
			d.wrong(`must be a prefix such as "192.0.2.0/24", "2001:db8::/32" or one address, got %q`, s)
		}
	})
	if ok {
		*to = out
	}
}

// parsePrefix reads a prefix or an address, which stands for itself alone. Where bits are
// set that do not count, or an IPv4 prefix is written as IPv6, it returns what was meant:
// whoever wrote it may think that it holds for more, or for less.
func parsePrefix(s string) (p, meant netip.Prefix, ok bool) {
	if a, err := netip.ParseAddr(s); err == nil && a.Zone() == "" {
		p = netip.PrefixFrom(a, a.BitLen())
	} else if p, err = netip.ParsePrefix(s); err != nil {
		return netip.Prefix{}, netip.Prefix{}, false
	}
	meant = p.Masked()
	if a := p.Addr(); a.Is4In6() && p.Bits() >= 96 {
		meant = netip.PrefixFrom(a.Unmap(), p.Bits()-96).Masked()
	}
	return p, meant, p == meant
}

// has says whether the service has a socket of one of the kinds. "auto" may come to be one, and one whose
// address is wrong may have been meant to be.
func (d *decoder) has(want kinds) bool {
	for i := range d.elements {
		if one := kindOf(d.elements[i].spec.Address); one == 0 || want.fit(one) {
			return true
		}
	}
	return len(d.elements) == 0
}

// checkAccess checks the lists and gives them to the sockets, which share them.
func (d *decoder) checkAccess(since int) {
	if d.access.Allow == nil && d.access.Deny == nil {
		return
	}
	for i, p := range d.access.Deny {
		if slices.Contains(d.access.Allow, p) {
			d.wrongKey("access.deny."+d.index(i), "%s is in allow too", p)
		}
	}
	if !d.has(forTCP | forUDP) {
		d.wrongKey("access", "is for %s, and there is none", forTCP|forUDP)
	}
	if d.failed(since, "access") {
		return
	}
	access := &activation.Access{Allow: d.access.Allow, Deny: d.access.Deny}
	if err := access.Check(); err != nil {
		d.wrongKey("access", "%v", err)
		return
	}
	for i := range d.elements {
		if s := &d.elements[i]; s.spec.Address.Network.IP() || s.learn {
			s.spec.Options.Access = access
		}
	}
}

// checkWake checks what wakes the service against its sockets, and lets the kernel keep
// silent clients back where only those that send something count.
func (d *decoder) checkWake(since int, keys map[string]any) {
	wake, _ := keys["wake"].(map[string]any)
	for _, k := range []string{"ignore", "min_bytes"} {
		if wake[k] == nil {
			continue
		}
		if d.service.Accept && !d.failed(since, "accept") {
			d.wrongKey("wake."+k, "needs accept = false: with accept = true each client has a process of its own")
		}
		var others []string
		for i := range d.elements {
			// Who comes to a socket that is not TCP cannot be told, and "auto" may come to be one.
			if s := &d.elements[i]; s.spec.Address.Network != activation.TCP && (s.learn || s.spec.Address.Network != 0) {
				others = append(others, s.String())
			}
		}
		if len(others) > 0 {
			d.wrongKey("wake."+k, "needs %s, not %s", forTCP, strings.Join(others, ", "))
		}
	}
	if d.service.Wake.MinBytes == 0 {
		return
	}
	for i := range d.elements {
		s := &d.elements[i]
		if n := s.spec.Options.ReceiveBuffer; n > 0 && n < d.service.Wake.MinBytes {
			d.wrongKey("wake.min_bytes", "is more than the receive_buffer of %s holds", s)
		}
		if s.spec.Address.Network == activation.TCP && s.spec.Options.DeferAccept == 0 {
			s.spec.Options.DeferAccept = minBytesDefer
		}
	}
}
