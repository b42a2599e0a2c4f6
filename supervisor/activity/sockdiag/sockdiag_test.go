package sockdiag_test

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
	"hibergate/supervisor/activity/sockdiag"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

// The kernel's filter lets through the sockets of the ports asked for, whether few, many or one.
func TestPorts(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	var all []uint16
	for range 100 {
		c, err := net.ListenPacket("udp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		all = append(all, netip.MustParseAddrPort(c.LocalAddr().String()).Port())
	}
	d := sockdiag.New()
	t.Cleanup(func() { d.Close() })
	for _, n := range []int{1, 2, 3, 64, 65, 100} {
		got := map[uint16]bool{}

		err := d.Inet(sockdiag.Query{Family: unix.AF_INET, Protocol: unix.IPPROTO_UDP, Ports: all[:n]}, func() { clear(got) },
			func(s *sockdiag.Inet) {
				got[s.Local.Port()] = true
			})
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range all[:n] {
			if !got[p] {
				t.Errorf("%d ports: port %d is missing", n, p)
			}
			delete(got, p)
		}
		if n <= 64 && len(got) > 0 {
			t.Errorf("%d ports: got others too: %v", n, got)
		}
	}
}

// A row of a connection says whether it is accepted, who the peer is, and when data came.
func TestConnection(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	for _, network := range []string{"tcp4", "tcp6", "tcp"} { // the last: IPv4 on a dual-stack socket
		t.Run(network, func(t *testing.T) {
			t.Parallel()
			address, family := "127.0.0.1:0", uint8(unix.AF_INET)
			switch network {
			case "tcp6":
				address, family = "[::1]:0", unix.AF_INET6
			case "tcp":
				address, family = ":0", unix.AF_INET6
			}
			l, err := net.Listen(network, address)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { l.Close() })
			port := uint16(l.Addr().(*net.TCPAddr).Port)
			to := l.Addr().String()
			if network == "tcp" {
				to = fmt.Sprintf("127.0.0.1:%d", port)
			}
			c, err := net.Dial("tcp", to)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close() })
			d := sockdiag.New()
			t.Cleanup(func() { d.Close() })
			row := func() (found sockdiag.Inet) {
				q := sockdiag.Query{Family: family, Protocol: unix.IPPROTO_TCP, States: []sockdiag.State{sockdiag.Established}, Ports: []uint16{port}}
				if err := d.Inet(q, nil, func(s *sockdiag.Inet) { found = *s }); err != nil {
					t.Fatal(err)
				}
				return found
			}
			peer := netip.MustParseAddrPort(c.LocalAddr().String())
			got := row()
			if got.Inode != 0 || got.Peer != peer || got.Local.String() != to || !got.Timed {
				t.Errorf("queued: got %+v, want inode 0, peer %v, local %v, timed", got, peer, to)
			}
			s, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { s.Close() })
			if accepted := row(); accepted.Inode == 0 || accepted.Cookie != got.Cookie {
				t.Errorf("accepted: got %+v, want an inode and cookie %x", accepted, got.Cookie)
			}
		})
	}
}

// Unix connections are found by the name of their listener, paths and abstract names.
func TestUnix(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	path := filepath.Join(t.TempDir(), "s")
	for _, name := range []string{path, "@" + path} {
		l, err := net.Listen("unix", name)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		want := name
		if name[0] == '@' {
			want = "\x00" + name[1:]
		}
		for range 2 {
			c, err := net.Dial("unix", name)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close() })
		}
		s, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close() })
		d := sockdiag.New()
		t.Cleanup(func() { d.Close() })
		var queued, open int
		err = d.Unix(nil, func(s *sockdiag.Unix) {
			switch {
			case string(s.Name) != want:
			case s.State == sockdiag.Listen:
				queued += int(s.ReceiveQ)
			case s.State == sockdiag.Established && s.Peer != 0:
				open++
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		if queued != 1 || open != 1 {
			t.Errorf("%q: got %d queued, %d open, want 1 and 1", name, queued, open)
		}
	}
}
