package ledger

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
)

func TestNormalize(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ in, want []string }{
		"none":          {nil, nil},
		"order":         {[]string{"10.0.0.0/8", "::1/128", "9.0.0.0/8"}, []string{"9.0.0.0/8", "10.0.0.0/8", "::1/128"}},
		"twice":         {[]string{"10.0.0.0/8", "10.0.0.0/8"}, []string{"10.0.0.0/8"}},
		"host bits":     {[]string{"10.1.2.3/8", "10.0.0.0/8"}, []string{"10.0.0.0/8"}},
		"within":        {[]string{"10.1.0.0/16", "10.0.0.0/8", "10.1.2.0/24", "10.255.0.0/16", "11.0.0.0/16"}, []string{"10.0.0.0/8", "11.0.0.0/16"}},
		"everything":    {[]string{"::/0", "fd00::/8", "0.0.0.0/0", "127.0.0.1/32"}, []string{"0.0.0.0/0", "::/0"}},
		"same address":  {[]string{"10.0.0.0/24", "10.0.0.0/8"}, []string{"10.0.0.0/8"}},
		"overlap":       {[]string{"10.0.0.9-10.0.0.20", "10.0.0.0-10.0.0.10", "10.0.0.20-10.0.0.30", "10.0.0.31-10.0.0.32"}, []string{"10.0.0.0-10.0.0.30", "10.0.0.31-10.0.0.32"}},
		"not a network": {[]string{""}, nil},
		"backwards":     {[]string{"10.0.0.9-10.0.0.1", "10.0.0.1-::1"}, nil},
	} {
		parse := func(texts []string) (all []Range) {
			for _, s := range texts {
				r := Range{}
				if from, to, ok := strings.Cut(s, "-"); ok {
					r = Range{netip.MustParseAddr(from), netip.MustParseAddr(to)}
				} else if p, err := netip.ParsePrefix(s); err == nil {
					r = RangeOf(p)
				}
				all = append(all, r)
			}
			return all
		}
		if got := normalize(parse(c.in)); !slices.Equal(got, parse(c.want)) {
			t.Errorf("%s: got %v, want %v", name, got, c.want)
		}
	}
}

// FuzzRangeOf: a prefix ends where netip says that it ends.
func FuzzRangeOf(f *testing.F) {
	f.Add([]byte{10, 0, 0, 0}, 8)
	f.Add([]byte{10, 0, 0, 0}, 0)
	f.Add([]byte{10, 0, 0, 1}, 32)
	f.Add(make([]byte, 16), 127)
	f.Fuzz(func(t *testing.T, address []byte, bits int) {
		a, _ := netip.AddrFromSlice(address)
		p := netip.PrefixFrom(a, bits).Masked()
		if !p.IsValid() {
			return
		}
		if r := RangeOf(p); r.From != p.Addr() || !p.Contains(r.To) || p.Contains(r.To.Next()) {
			t.Errorf("%v: got %v", p, r)
		}
	})
}
