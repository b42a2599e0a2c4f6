package config

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"hibergate/activation"
	"hibergate/supervisor"
)

func TestParseDuration(t *testing.T) {
	t.Parallel()
	const day = 24 * time.Hour
	for text, want := range map[string]time.Duration{
		"1m30s": 90 * time.Second, "2d": 2 * day, "50ms": 50 * time.Millisecond, "1d12h": 36 * time.Hour,
		"1.5d": 36 * time.Hour, "0": 0, "-5s": -5 * time.Second, "1.5h": 90 * time.Minute, "0d1s": time.Second,
	} {
		if got, ok := parseDuration(text); !ok || got != want {
			t.Errorf("%q: got %v %v, want %v", text, got, ok, want)
		}
	}
	for _, text := range []string{"", "5", "d", "-1d", "1d-1h", "1d+1h", "1h2d", "1dd", "1d5", "106752d", "106751d24h", "5 s", "1D", ".d"} {
		if got, ok := parseDuration(text); ok {
			t.Errorf("%q: got %v, want an error", text, got)
		}
	}
}

func TestParseSize(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]int64{"64K": 64 << 10, "1M": 1 << 20, "2G": 2 << 30, "65536": 65536, "0": 0} {
		if got, ok := parseSize(text); !ok || got != want {
			t.Errorf("%q: got %v %v, want %v", text, got, ok, want)
		}
	}
	for _, text := range []string{"", "K", "-1K", "1KM", "1k", "1 K", "1.5M", "9223372036854775807K", "+1", "0x10"} {
		if got, ok := parseSize(text); ok {
			t.Errorf("%q: got %v, want an error", text, got)
		}
	}
}

func TestParseRate(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]supervisor.Rate{
		"100/1s": {Count: 100, Per: time.Second}, "100/s": {Count: 100, Per: time.Second}, "5/m": {Count: 5, Per: time.Minute},
		"5/1m30s": {Count: 5, Per: 90 * time.Second}, "1/d": {Count: 1, Per: 24 * time.Hour}, "7/ms": {Count: 7, Per: time.Millisecond},
	} {
		if got, ok := parseRate(text); !ok || got != want {
			t.Errorf("%q: got %v %v, want %v", text, got, ok, want)
		}
	}
	for _, text := range []string{"", "/", "5", "5/", "/s", "s/5", "-5/s", "+5/s", "5/5", "5/x", "5 / s", "5/s/s", "99999999999/s", "1.5/s"} {
		if got, ok := parseRate(text); ok {
			t.Errorf("%q: got %v, want an error", text, got)
		}
	}
}

func TestParsePrefix(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"192.0.2.0/24": "192.0.2.0/24", "192.0.2.7": "192.0.2.7/32", "0.0.0.0/0": "0.0.0.0/0",
		"2001:db8::/32": "2001:db8::/32", "::1": "::1/128", "::/0": "::/0", "2001:DB8:0::/48": "2001:db8::/48",
	} {
		if got, _, ok := parsePrefix(text); !ok || got.String() != want {
			t.Errorf("%q: got %v %v, want %v", text, got, ok, want)
		}
	}
	for text, want := range map[string]string{
		"192.0.2.7/24": "192.0.2.0/24", "2001:db8::1/32": "2001:db8::/32", "10.1.2.3/0": "0.0.0.0/0",
		"::ffff:192.0.2.7": "192.0.2.7/32", "::ffff:192.0.2.0/120": "192.0.2.0/24", "::ffff:192.0.2.7/120": "192.0.2.0/24",
		"::ffff:0:0/96": "0.0.0.0/0",
	} {
		if _, meant, ok := parsePrefix(text); ok || meant.String() != want {
			t.Errorf("%q: got %v %v, want that %v was meant", text, meant, ok, want)
		}
	}
	for _, text := range []string{"", "192.0.2/24", "192.0.2.0/33", "192.0.2.0/", "/24", "fe80::1%eth0", "fe80::%eth0/64", "localhost", "192.0.2.0/024", "192.0.2.0 /24"} {
		if p, meant, ok := parsePrefix(text); ok || meant.IsValid() {
			t.Errorf("%q: got %v and %v, want an error", text, p, meant)
		}
	}
}

// A rate that is one stays the same when it is written again.
func FuzzParseRate(f *testing.F) {
	for _, text := range []string{"100/1s", "5/m", "5/1m30s", "0/s", "1/-1s", "1/.5s", "1/2d", "/", "1/s/s"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		r, ok := parseRate(text)
		if !ok {
			return
		}
		if again, ok := parseRate(fmt.Sprintf("%d/%v", r.Count, r.Per)); !ok || again != r {
			t.Errorf("%q: got %v, and from that %v %v", text, r, again, ok)
		}
	})
}

// What is accepted has no bits that do not count, and what is said to be meant is accepted.
func FuzzParsePrefix(f *testing.F) {
	for _, text := range []string{"192.0.2.0/24", "192.0.2.7/24", "::1", "::ffff:1.2.3.4/99", "::ffff:1.2.3.4/7", "fe80::1%e/64", "1.2.3.4/33"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		p, meant, ok := parsePrefix(text)
		if ok && (p != p.Masked() || p.Addr().Is4In6() || p.Addr().Zone() != "" || p != meant) {
			t.Errorf("%q: got %v", text, p)
		}
		if !ok && meant.IsValid() {
			if again, _, ok := parsePrefix(meant.String()); !ok || again != meant {
				t.Errorf("%q: %v was meant, from which comes %v %v", text, meant, again, ok)
			}
		}
	})
}

func TestNearest(t *testing.T) {
	t.Parallel()
	words := newSchema().service.names()
	for word, want := range map[string]string{
		"comand": "command", "command ": "command", "listne": "listen", "Listen": "listen", "idle_timeuot": "idle_timeout",
		"env": "", "resources": "", "x": "", "usr": "user", "": "",
	} {
		if got := nearest(word, words); got != want {
			t.Errorf("%q: got %q, want %q", word, got, want)
		}
	}
	for pair, want := range map[[2]string]int{{"", "abc"}: 3, {"abc", ""}: 3, {"ab", "ba"}: 1, {"kitten", "sitting"}: 3, {"abc", "abc"}: 0} {
		if got := distance(pair[0], pair[1]); got != want {
			t.Errorf("distance of %q: got %d, want %d", pair, got, want)
		}
	}
}

// The book finds a conflict exactly where comparing each with each finds one.
func TestAddressBook(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewPCG(1, 2))
	addr := netip.MustParseAddr
	ips := []netip.Addr{{}, addr("0.0.0.0"), addr("::"), addr("127.0.0.1"), addr("127.0.0.2"), addr("::1")}
	spec := func() *activation.Spec {
		s := &activation.Spec{Address: activation.Address{Network: activation.Network(1 + random.IntN(6))}}
		if !s.Address.Network.IP() {
			s.Address.Path = fmt.Sprintf("%c%d", "/@"[random.IntN(2)], random.IntN(6))
			return s
		}
		s.Address.IP, s.Address.Port = ips[random.IntN(len(ips))], uint16(random.IntN(3))
		s.Options.ReusePort = random.IntN(2) == 0
		s.Options.Family = activation.Family(random.IntN(4))
		s.Options.Device = []string{"", "", "a", "b"}[random.IntN(4)]
		return s
	}
	for range 20_000 {
		book := newAddressBook(0)
		var all []*activation.Spec
		for range 8 {
			s, want := spec(), false
			for _, o := range all {
				want = want || s.Conflicts(*o)
			}
			e := book.conflict(s)
			if got := e != nil; got != want || got && !s.Conflicts(*e.spec) {
				t.Fatalf("%+v among %+v: got %v, want %v", s, all, got, want)
			}
			book.add(&entry{spec: s, service: &supervisor.Service{}})
			all = append(all, s)
		}
	}
}
