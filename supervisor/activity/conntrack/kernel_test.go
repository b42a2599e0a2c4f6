package conntrack_test

import (
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
	"hibergate/supervisor/activity/conntrack"
)

// Of the flows whose answers come from one address and port, and of no others, each is there until it is deleted.
func TestDumpFromAndDelete(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces, nettest.Tool("nft"))
	track := exec.Command("nft", "-f", "-")
	track.Stdin = strings.NewReader("table inet track { chain in { type filter hook input priority 0; ct state new accept; }; }")
	if out, err := track.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for name, address := range map[string]string{"v4": "127.0.0.1:0", "v6": "[::1]:0"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a, b, client := mustListen(t, address), mustListen(t, address), mustListen(t, address)
			c := conntrack.New()
			defer c.Close()
			for _, to := range []*net.UDPConn{a, b} {
				if _, err := client.WriteToUDPAddrPort([]byte("x"), of(to)); err != nil {
					t.Fatal(err)
				}
			}
			dump := func(from netip.AddrPort) (all []conntrack.Flow) {
				t.Helper()
				if err := c.DumpFrom(unix.IPPROTO_UDP, from, func() { all = nil }, func(f *conntrack.Flow) { all = append(all, *f) }); err != nil {
					t.Fatal(err)
				}
				return all
			}
			all := dump(of(a))
			if len(all) != 1 || all[0].Original.Source != of(client) || all[0].Original.Destination != of(a) || all[0].ID == 0 ||
				all[0].Status&conntrack.DestinationNAT != 0 {
				t.Fatalf("got %+v, want the flow of %v to %v", all, of(client), of(a))
			}
			other := netip.MustParseAddr("127.0.0.2")
			if name == "v6" {
				other = netip.MustParseAddr("::2")
			}
			if got := dump(netip.AddrPortFrom(other, of(a).Port())); len(got) > 0 {
				t.Errorf("got %+v from another address", got)
			}
			stranger := all[0]
			stranger.ID++
			for i, want := range []bool{false, true, false} {
				f := all[0]
				if i == 0 {
					f = stranger
				}
				if got, err := c.Delete(&f); err != nil || got != want {
					t.Errorf("delete, %d: got %v, %v, want %v", i, got, err, want)
				}
			}
			if got := dump(of(a)); len(got) > 0 {
				t.Errorf("got %+v, want it deleted", got)
			}
			if got := dump(of(b)); len(got) != 1 {
				t.Errorf("got %+v, want the other flow still there", got)
			}
		})
	}
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

func of(c *net.UDPConn) netip.AddrPort { return c.LocalAddr().(*net.UDPAddr).AddrPort() }
