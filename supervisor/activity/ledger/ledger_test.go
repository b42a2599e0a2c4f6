package ledger_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
	"hibergate/supervisor/activity/ledger"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

func mustOpen(t *testing.T, name string, keys ...ledger.Key) *ledger.Ledger {
	t.Helper()
	l, err := ledger.Open(name, accounts(keys...), false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

func accounts(keys ...ledger.Key) []ledger.Account {
	var all []ledger.Account
	for _, k := range keys {
		all = append(all, ledger.Account{Key: k})
	}
	return all
}

func mustRead(t *testing.T, l *ledger.Ledger, key ledger.Key) ledger.Reading {
	t.Helper()
	if err := l.Read([]ledger.Key{key}); err != nil {
		t.Fatal(err)
	}
	return l.Reading(key)
}

func udpKey(a netip.AddrPort) ledger.Key {
	family := uint8(unix.NFPROTO_IPV6)
	if a.Addr().Is4() {
		family = unix.NFPROTO_IPV4
	}
	return ledger.Key{Addr: a.Addr(), Family: family, Protocol: unix.IPPROTO_UDP, Port: a.Port()}
}

// The ledger counts what comes to and goes from its own key, and nothing else.
func TestCounts(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	for name, address := range map[string]string{"v4": "127.0.0.1:0", "v6": "[::1]:0"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a, b, c, other := mustListen(t, address), mustListen(t, address), mustListen(t, address), mustListen(t, address)
			specific := udpKey(a.LocalAddr().(*net.UDPAddr).AddrPort())
			wild := udpKey(b.LocalAddr().(*net.UDPAddr).AddrPort())
			wild.Addr = netip.Addr{}
			dual := ledger.Key{Protocol: unix.IPPROTO_UDP, Port: udpKey(c.LocalAddr().(*net.UDPAddr).AddrPort()).Port}
			l := mustOpen(t, "counts-"+name, specific, wild, dual)
			for _, to := range []*net.UDPConn{a, b, c} {
				mustSend(t, other, to, 100) // in
				mustSend(t, other, to, 100)
				mustSend(t, to, other, 50) // out
			}
			header := uint64(28)
			if name == "v6" {
				header = 48
			}
			want := ledger.Reading{In: ledger.Counters{Packets: 2, Bytes: 2 * (100 + header)}, Out: ledger.Counters{Packets: 1, Bytes: 50 + header}}
			for _, key := range []ledger.Key{specific, wild, dual} {
				got := mustRead(t, l, key)
				got.Quiet = 0
				if got != want {
					t.Errorf("%+v: got %+v, want %+v", key, got, want)
				}
			}
		})
	}
}

// Quiet grows until the next packet, and starts again with it.
func TestQuiet(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	a, b := mustListen(t, "127.0.0.1:0"), mustListen(t, "127.0.0.1:0")
	key := udpKey(a.LocalAddr().(*net.UDPAddr).AddrPort())
	l := mustOpen(t, "quiet", key)
	opened := time.Now()
	nettest.Eventually(t, func() error {
		if q := mustRead(t, l, key).Quiet; q < 100*time.Millisecond {
			return fmt.Errorf("quiet for %v", q)
		}
		return nil
	})
	if got, most := mustRead(t, l, key).Quiet, time.Since(opened)+time.Second; got > most {
		t.Errorf("got %v, want at most %v", got, most)
	}
	sent := time.Now()
	mustSend(t, b, a, 1)
	if got, most := mustRead(t, l, key).Quiet, time.Since(sent)+ticks; got > most {
		t.Errorf("after a packet: got %v, want at most %v", got, most)
	}
}

// Two ledgers of one name live side by side; each removes only its own table.
func TestTwoOfOneName(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces, nettest.Tool("nft"))
	key := ledger.Key{Family: unix.NFPROTO_IPV4, Protocol: unix.IPPROTO_TCP, Port: 1}
	one := mustOpen(t, "two", key)
	two, err := ledger.Open("two", accounts(key), false)
	if err != nil {
		t.Fatal(err)
	}
	if one.Name() != "two" || two.Name() != "two-2" {
		t.Errorf("got %q and %q, want two and two-2", one.Name(), two.Name())
	}
	if err := two.Close(); err != nil {
		t.Fatal(err)
	}
	if got := nft(t, "list tables"); !strings.Contains(got, "table inet two\n") || strings.Contains(got, "two-2") {
		t.Errorf("after closing the second: got tables %q", got)
	}
	mustRead(t, one, key)
}

// A table that a killed process left behind is replaced.
func TestTakesOverLeftOver(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces, nettest.Tool("nft"))
	nft(t, "add table inet left; add chain inet left in { type filter hook input priority 0; policy accept; }; add set inet left in_any { type inet_service; }")
	key := ledger.Key{Family: unix.NFPROTO_IPV4, Protocol: unix.IPPROTO_TCP, Port: 1}
	l := mustOpen(t, "left", key)
	if l.Name() != "left" {
		t.Errorf("got name %q, want left", l.Name())
	}
	mustRead(t, l, key)
}

// An administrator's flush does not touch the table where the kernel knows owners; where
// it does, the next reading says so.
func TestFlushRuleset(t *testing.T) {
	nettest.Need(t, nettest.Namespaces, nettest.Tool("nft"))
	key := ledger.Key{Family: unix.NFPROTO_IPV4, Protocol: unix.IPPROTO_TCP, Port: 1}
	l := mustOpen(t, "flushed", key)
	nft(t, "flush ruleset")
	if err := l.Read([]ledger.Key{key}); err != nil && !errors.Is(err, ledger.ErrLost) {
		t.Errorf("got %v, want nil or ErrLost", err)
	}
}

func TestUnknownKeyIsLost(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	key := ledger.Key{Family: unix.NFPROTO_IPV4, Protocol: unix.IPPROTO_TCP, Port: 1}
	l := mustOpen(t, "unknown", key)
	key.Port++
	if err := l.Read([]ledger.Key{key}); !errors.Is(err, ledger.ErrLost) {
		t.Errorf("got %v, want ErrLost", err)
	}
}

// Put and Remove leave the other accounts alone, whatever kinds there are, and rules stay in
// the order in which the kernel chooses sockets.
func TestPutAndRemove(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	a, other := mustListen(t, "127.0.0.1:0"), mustListen(t, "127.0.0.1:0")
	specific := udpKey(a.LocalAddr().(*net.UDPAddr).AddrPort())
	wild, dual := specific, specific
	wild.Addr = netip.Addr{}
	dual.Addr, dual.Family = netip.Addr{}, unix.NFPROTO_UNSPEC
	l := mustOpen(t, "put")
	count := func(want map[ledger.Key]uint64) {
		t.Helper()
		for key, n := range want {
			if got := mustRead(t, l, key).In.Packets; got != n {
				t.Errorf("%+v: got %d packets, want %d", key, got, n)
			}
		}
	}
	put := func(key ledger.Key, ignored ...string) {
		t.Helper()
		account := ledger.Account{Key: key}
		for _, p := range ignored {
			account.Ignored = append(account.Ignored, ledger.RangeOf(netip.MustParsePrefix(p)))
		}
		if err := l.Put(account); err != nil {
			t.Fatal(err)
		}
	}
	put(dual)
	mustSend(t, other, a, 1)
	count(map[ledger.Key]uint64{dual: 1})
	put(wild)
	mustSend(t, other, a, 1)
	count(map[ledger.Key]uint64{dual: 1, wild: 1})
	put(specific, "10.0.0.0/8", "10.1.0.0/16", "fd00::/8")
	mustSend(t, other, a, 1)
	count(map[ledger.Key]uint64{dual: 1, wild: 1, specific: 1})

	for _, ignored := range [][]string{{"127.0.0.0/8"}, {"127.0.0.1/32", "10.0.0.0/8"}} {
		put(specific, ignored...)
		nettest.Eventually(t, func() error {
			if q := mustRead(t, l, specific).Quiet; q < 50*time.Millisecond {
				return fmt.Errorf("quiet for %v", q)
			}
			return nil
		})
		mustSend(t, other, a, 1)
		mustSend(t, a, other, 1)
		if r := mustRead(t, l, specific); r.Quiet < 50*time.Millisecond {
			t.Errorf("ignored %v: got %+v, want it still quiet", ignored, r)
		}
	}
	put(specific) // ignores nothing any more
	sent := time.Now()
	mustSend(t, other, a, 1)
	if got, most := mustRead(t, l, specific).Quiet, time.Since(sent)+ticks; got > most {
		t.Errorf("got quiet for %v, want at most %v", got, most)
	}
	count(map[ledger.Key]uint64{dual: 1, wild: 1, specific: 4})

	put(specific, "127.0.0.0/8")
	for range 2 { // the second time there is none
		if err := l.Remove(specific); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Read([]ledger.Key{specific}); !errors.Is(err, ledger.ErrLost) {
		t.Errorf("got %v from a removed account, want ErrLost", err)
	}
	mustSend(t, other, a, 1)
	count(map[ledger.Key]uint64{dual: 1, wild: 2})
	put(specific, "127.0.0.0/8")
	count(map[ledger.Key]uint64{specific: 0})
}

func mustListen(t *testing.T, address string) *net.UDPConn {
	t.Helper()
	c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(address)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func mustSend(t *testing.T, from, to *net.UDPConn, n int) {
	t.Helper()
	if _, err := from.WriteToUDP(make([]byte, n), to.LocalAddr().(*net.UDPAddr)); err != nil {
		t.Fatal(err)
	}
}

func nft(t *testing.T, script string) string {
	t.Helper()
	out, err := exec.Command("nft", script).CombinedOutput()
	if err != nil {
		t.Fatalf("nft %s: %v\n%s", script, err, out)
	}
	return string(out)
}

// BenchmarkOpen5000 is what a supervisor of 5,000 sockets waits for at its start.
func BenchmarkOpen5000(b *testing.B) {
	nettest.Need(b, nettest.Namespaces)
	var keys []ledger.Key
	for i := range 5000 {
		keys = append(keys, ledger.Key{Protocol: unix.IPPROTO_TCP, Port: uint16(1000 + i)})
	}
	all := accounts(keys...)
	b.ReportAllocs()
	for b.Loop() {
		l, err := ledger.Open("bench", all, true)
		if err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		if err := l.Close(); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}

func BenchmarkRead(b *testing.B) {
	nettest.Need(b, nettest.Namespaces)
	var keys []ledger.Key
	for i := range 5000 {
		keys = append(keys, ledger.Key{Family: unix.NFPROTO_IPV4, Protocol: unix.IPPROTO_TCP, Port: uint16(1000 + i)})
	}
	l, err := ledger.Open("bench", accounts(keys...), true)
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	for _, n := range []int{1, 64, 100, 5000} {
		b.Run(fmt.Sprintf("%dof5000", n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if err := l.Read(keys[:n]); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// ticks is what the clock of a set may be off, as it goes by the ticks of the kernel: three of them, at HZ=100 at most.
const ticks = 3 * 10 * time.Millisecond
