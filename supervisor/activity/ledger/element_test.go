package ledger

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"hibergate/supervisor/activity/netlink/captured"
	"hibergate/supervisor/activity/nftable"
)

func TestDecodeElements(t *testing.T) {
	t.Parallel()
	want := []string{
		"127.0.0.1 2/6 8080/5 left=281 0s true",
		"127.0.0.1 2/17 5353/1 left=29 0s true",
		"127.0.0.1 2/17 5353/0 left=0 24000h0m0s true",
		"127.0.0.1 2/6 8080/0 left=0 24000h0m0s true",
		"::1 10/17 5353/0 left=0 0s true",
		"::1 10/17 5353/0 left=0 24000h0m0s true",
		"invalid IP 10/6 8090/3 left=229 0s true",
		"invalid IP 2/6 8090/3 left=164 0s true",
		"invalid IP 2/6 8090/0 left=0 24000h0m0s true",
		"invalid IP 10/6 8090/0 left=0 24000h0m0s true",
	}
	var got []string
	for _, m := range captured.Messages(t, "set_elements.hex") {
		err := nftable.DecodeElements(m, func(e nftable.Element) {
			k := ip4
			switch {
			case len(e.Key) == 24:
				k = ip6
			case e.Key[0] == unix.NFPROTO_IPV4 || e.Key[0] == unix.NFPROTO_IPV6: // the addresses are all loopback
				k = wildcard
			}
			key, ok := decodeKey(k, e.Key)
			got = append(got, fmt.Sprintf("%v %v/%d %d/%d left=%v %v %v", key.Addr, key.Family, key.Protocol, key.Port, e.Packets, e.Bytes, e.Left.Round(time.Hour), ok))
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestKeyRoundTrip(t *testing.T) {
	t.Parallel()
	for _, key := range []Key{
		{Addr: netip.MustParseAddr("192.0.2.1"), Family: unix.NFPROTO_IPV4, Protocol: unix.IPPROTO_TCP, Port: 80},
		{Addr: netip.MustParseAddr("2001:db8::1"), Family: unix.NFPROTO_IPV6, Protocol: unix.IPPROTO_UDP, Port: 65535},
		{Family: unix.NFPROTO_IPV4, Protocol: unix.IPPROTO_TCP, Port: 1},
		{Family: unix.NFPROTO_IPV6, Protocol: unix.IPPROTO_TCP, Port: 1},
		{Protocol: unix.IPPROTO_TCP, Port: 1},
	} {
		if got, ok := decodeKey(key.kind(), key.encode()); !ok || got != key {
			t.Errorf("got %+v, want %+v", got, key)
		}
	}
}

func TestDecodeAllocatesNothing(t *testing.T) {
	messages := captured.Messages(t, "set_elements.hex")
	n := 0
	take := func(e nftable.Element) { n += len(e.Key) }
	if allocs := testing.AllocsPerRun(100, func() {
		for _, m := range messages {
			if err := nftable.DecodeElements(m, take); err != nil {
				t.Fatal(err)
			}
		}
	}); allocs != 0 {
		t.Errorf("got %v allocations, want none", allocs)
	}
}

// FuzzLedger: no bytes make the decoder panic, and a key that reads writes the same.
func FuzzLedger(f *testing.F) {
	for _, m := range captured.Messages(f, "set_elements.hex") {
		f.Add(m)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		_ = nftable.DecodeElements(b, func(e nftable.Element) {
			if e.Left < 0 {
				t.Errorf("negative time left: %v", e.Left)
			}
			for k := range kinds {
				key, ok := decodeKey(k, e.Key)
				if !ok {
					continue
				}
				if again, ok := decodeKey(k, key.encode()); !ok || again != key {
					t.Errorf("kind %v: %x reads as %+v, then as %+v", k, e.Key, key, again)
				}
			}
		})
	})
}
