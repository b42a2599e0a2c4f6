package ledger

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
	"hibergate/supervisor/activity/nftable"
)

func mustOpen(t *testing.T, accounts ...Account) *Ledger {
	t.Helper()
	l, err := Open(t.Name(), accounts, false)
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

// networks returns n ranges with room between them, of the form of a prefix.
func networks(form string, n int) (all []Range) {
	for i := range n {
		all = append(all, RangeOf(netip.MustParsePrefix(fmt.Sprintf(form, 2*i>>8, 2*i&255))))
	}
	return all
}

// A list too long for one transaction is taken, and let go.
func TestLongList(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	key := Key{Family: unix.NFPROTO_IPV6, Protocol: unix.IPPROTO_TCP, Port: 80, Addr: netip.IPv6Loopback()}
	l := mustOpen(t, Account{key, networks("2001:db8:%02x%02x::/48", 2500)})
	if err := l.Refused(); err != nil {
		t.Error(err)
	}
	if err := l.Put(Account{Key: key}); err != nil {
		t.Fatal(err)
	}
	if err := l.Read([]Key{key}); err != nil {
		t.Error(err)
	}
}

// A batch fits into the send buffer of a socket by default.
func TestBatchesAreBounded(t *testing.T) {
	t.Parallel()
	var e elements
	key := Key{Family: unix.NFPROTO_IPV6, Protocol: unix.IPPROTO_TCP, Port: 80, Addr: netip.IPv6Loopback()}
	e.ignore(key, networks("2001:db8:%02x%02x::/48", 20000))
	table := table{Table: &nftable.Table{}}
	table.sets[ip6].ignored[v6] = &nftables.Set{Name: "ignored"}
	messages := 0
	for i, batch := range table.batches(unix.NFT_MSG_DELSETELEM, &e) {
		size := 0
		for _, m := range batch {
			size += unix.SizeofNlMsghdr + len(m.Data)
		}
		if size > bytesPerBatch || len(batch) == 0 || len(batch) > perBatch {
			t.Errorf("batch %d: got %d messages of %d bytes", i, len(batch), size)
		}
		messages += len(batch)
	}
	if want := 20000 / chunk; messages != want {
		t.Errorf("got %d messages, want %d", messages, want)
	}
}

// What the kernel does not take of one account costs that account what it ignores, and no other one anything.
func TestRefused(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	key := func(port uint16) Key { return Key{Family: unix.NFPROTO_IPV4, Protocol: unix.IPPROTO_TCP, Port: port} }
	l := mustOpen(t)
	// A set that holds only so many elements stands for the limits of kernels.
	limit(t, l, wildcard, v4, 100, nftables.TypeNFProto, nftables.TypeInetProto, nftables.TypeInetService, nftables.TypeIPAddr)
	put := func(port uint16, ignored int) {
		t.Helper()
		if err := l.Put(Account{key(port), networks("10.%d.%d.0/24", ignored)}); err != nil {
			t.Fatal(err)
		}
	}
	expect := func(refused ...uint16) {
		t.Helper()
		if len(l.refused) != len(refused) || (l.Refused() == nil) != (len(refused) == 0) {
			t.Errorf("got %v refused (%v), want %v", l.refused, l.Refused(), refused)
		}
		for _, port := range refused {
			if err := l.refused[key(port)]; !errors.Is(err, unix.ENFILE) {
				t.Errorf("port %d: got %v, want ENFILE", port, err)
			}
		}
	}
	put(1, 10)
	expect()
	put(2, 101)
	expect(2)
	put(3, 90)
	expect(2)
	put(3, 101) // what it ignored before has gone
	expect(2, 3)
	put(4, 90)
	expect(2, 3)
	put(4, 10)
	put(2, 20)
	expect(3)
	if err := l.Read([]Key{key(1), key(2), key(3), key(4)}); err != nil {
		t.Error(err)
	}
	// As at the start: of many only the one is left out.
	var keys []Key
	for port := uint16(10); port < 20; port++ {
		put(port, 0)
		l.accounts[key(port)].ignored = networks("10.%d.%d.0/24", 5)
		keys = append(keys, key(port))
	}
	l.accounts[key(15)].ignored = networks("10.%d.%d.0/24", 101)
	if err := l.ignore(keys); err != nil {
		t.Fatal(err)
	}
	expect(3, 15)
	for port := uint16(10); port < 20; port++ {
		if n := len(l.accounts[key(port)].ignored); (n == 0) != (port == 15) {
			t.Errorf("port %d: got %d ranges ignored", port, n)
		}
	}
	for _, port := range []uint16{1, 2, 3, 4, 15} {
		if err := l.Remove(key(port)); err != nil {
			t.Error(err)
		}
	}
	expect()
}

// Where the kernel takes only the first of several transactions, that is undone.
func TestRefusedLate(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	const size = 1400
	l := mustOpen(t)
	limit(t, l, ip6, v6, size, nftables.TypeIP6Addr, nftables.TypeInetProto, nftables.TypeInetService, nftables.TypeIP6Addr)
	key := Key{Family: unix.NFPROTO_IPV6, Protocol: unix.IPPROTO_TCP, Port: 80, Addr: netip.IPv6Loopback()}
	var e elements
	ignored := networks("2001:db8:%02x%02x::/48", size+1)
	e.ignore(key, ignored)
	if n := len(l.table.batches(unix.NFT_MSG_NEWSETELEM, &e)); n < 2 {
		t.Fatalf("got %d transactions", n)
	}
	for range 2 { // as often as one likes
		if err := l.Put(Account{key, ignored}); err != nil {
			t.Fatal(err)
		}
		if err := l.Refused(); !errors.Is(err, unix.ENFILE) {
			t.Errorf("got %v, want ENFILE", err)
		}
	}
	if err := l.Put(Account{key, ignored[:size]}); err != nil || l.Refused() != nil {
		t.Errorf("got %v, %v, want room for %d", err, l.Refused(), size)
	}
}

// limit makes the set of what accounts of a kind ignore hold only so many elements.
func limit(t *testing.T, l *Ledger, k kind, f family, size uint32, key ...nftables.SetDatatype) {
	t.Helper()
	set := nftables.Set{
		Table: l.table.Home(), Name: "ignored_" + k.String() + "_" + f.String(), Interval: true, Concatenation: true, Size: size, ID: 1,
		KeyType: nftables.MustConcatSetType(key...),
	}
	if err := l.table.Batch().AddSet(&set, nil); err != nil {
		t.Fatal(err)
	}
	if err := l.table.Flush(); err != nil {
		t.Fatal(err)
	}
	l.table.sets[k].ignored[f] = &set
}
