package forward

import (
	"net/netip"
	"testing"
)

// The socket that the kernel would choose for a packet to an address of both is what prefers tells of.
func TestPrefers(t *testing.T) {
	t.Parallel()
	var all netip.Addr
	one, two := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	for _, c := range []struct {
		other       netip.Addr
		otherDevice uint32
		ours        netip.Addr
		ourDevice   uint32
		want        bool
	}{
		{all, 0, all, 0, false}, // ours itself
		{one, 0, one, 0, false},
		{all, 3, all, 3, false},
		{one, 0, all, 0, true},
		{all, 0, one, 0, false},
		{one, 0, two, 0, false},
		{all, 3, all, 0, true},
		{all, 0, all, 3, false},
		{all, 3, all, 4, false},
		{one, 3, one, 0, true},
		{one, 3, one, 4, false},
		{one, 3, two, 0, false},
		{all, 3, one, 0, false},
		{one, 0, all, 3, true},
		{one, 4, all, 3, false},
		{one, 3, all, 0, true},
		{one, 3, all, 3, true},
	} {
		if got := prefers(c.other, c.otherDevice, c.ours, c.ourDevice); got != c.want {
			t.Errorf("%+v: got %v", c, got)
		}
	}
}
