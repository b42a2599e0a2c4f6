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

func TestNearest(t *testing.T) {
	t.Parallel()
	words := newSchema().service.names()
	for word, want := range map[string]string{
		"comand": "command", "command ": "command", "listne": "listen", "Listen": "listen", "idle_timeuot": "idle_timeout",
		"env": "", "ready": "", "x": "", "usr": "user", "": "",
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
