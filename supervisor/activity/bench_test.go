package activity_test

import (
	"encoding/binary"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
	"hibergate/supervisor/activity"
	"hibergate/supervisor/activity/netlink"
)

const foreignFlows = 250_000

// mustFill puts foreign flows into the conntrack table of this namespace.
func mustFill(b *testing.B, n int) {
	b.Helper()
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		b.Fatal(err)
	}
	defer unix.Close(fd)
	var batch []byte
	for i := range n {
		client := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 40000)
		server := netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, 1}), 443)
		batch = append(batch, newFlow(client, server)...)
		if i%100 == 99 || i == n-1 {
			if _, err := unix.Write(fd, batch); err != nil {
				b.Fatal(err)
			}
			batch = batch[:0]
		}
	}
}

// newFlow is the message that creates an established TCP flow.
func newFlow(client, server netip.AddrPort) []byte {
	r := netlink.NetfilterRequest(unix.NFNL_SUBSYS_CTNETLINK, 0 /* IPCTNL_MSG_CT_NEW */, unix.NLM_F_CREATE|unix.NLM_F_EXCL, unix.AF_INET)
	tuple := func(attribute uint16, from, to netip.AddrPort) {
		r.Nested(attribute, func(r *netlink.Request) {
			r.Nested(1, func(r *netlink.Request) {
				r.Attribute(1, from.Addr().AsSlice()...).Attribute(2, to.Addr().AsSlice()...)
			})
			r.Nested(2, func(r *netlink.Request) {
				r.Attribute(1, unix.IPPROTO_TCP)
				r.Attribute(2, binary.BigEndian.AppendUint16(nil, from.Port())...)
				r.Attribute(3, binary.BigEndian.AppendUint16(nil, to.Port())...)
			})
		})
	}
	tuple(1, client, server)
	tuple(2, server, client)
	r.Nested(4, func(r *netlink.Request) {
		r.Nested(1, func(r *netlink.Request) { r.Attribute(1, 3) }) // ESTABLISHED
	})
	r.Attribute(7, binary.BigEndian.AppendUint32(nil, 3600)...)
	return r.Bytes()
}

func cpu(b *testing.B) time.Duration {
	b.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkLook100 is one look at 100 services, TCP and UDP, with three clients each, while
// 250,000 foreign flows are in the table.
func BenchmarkLook100(b *testing.B) {
	nettest.Need(b, nettest.Namespaces)
	var sockets []activity.Socket
	var keys []uint32
	for key := range uint32(100) {
		network := "tcp4"
		if key%2 == 1 {
			network = "udp4"
		}
		l := mustListen(b, key, network, "127.0.0.1:0")
		for range 3 {
			if l.udp != nil {
				mustWrite(b, mustDial(b, network, l.udp.LocalAddr().String()), "x")
			} else {
				mustDial(b, network, l.Listener.Addr().String())
				l.mustAccept(b)
			}
		}
		sockets, keys = append(sockets, l.Socket), append(keys, key)
	}
	tracker := mustTrack(b, sockets...)
	mustFill(b, foreignFlows)
	b.ReportAllocs()
	before := cpu(b)
	for b.Loop() {
		for i, s := range tracker.Look(b.Context(), time.Now(), keys) {
			if !s.Known || !s.Exact || i%2 == 0 && s.Open != 3 {
				b.Fatalf("socket %d: %+v", i, s)
			}
		}
	}
	b.ReportMetric(float64((cpu(b)-before).Microseconds())/1000/float64(b.N), "cpu-ms/look")
	b.ReportMetric(float64(tableSize(b)), "flows-in-table")
}

// BenchmarkWaiting lists 100 clients in the queue of one socket.
func BenchmarkWaiting(b *testing.B) {
	nettest.Need(b, nettest.Namespaces)
	l := mustListen(b, 1, "tcp4", "127.0.0.1:0")
	l.Accounting = activity.SockDiag
	tracker := mustTrack(b, l.Socket)
	for range 100 {
		mustDial(b, "tcp", l.Addr().String())
	}
	b.ReportAllocs()
	for b.Loop() {
		if clients, err := tracker.Waiting(b.Context(), 1); len(clients) != 100 || err != nil {
			b.Fatalf("got %d clients, %v", len(clients), err)
		}
	}
}

// BenchmarkFlowsUDP lists 900 UDP exchanges out of 250,000 flows.
func BenchmarkFlowsUDP(b *testing.B) {
	nettest.Need(b, nettest.Namespaces)
	l := mustListen(b, 1, "udp4", "127.0.0.1:0")
	tracker := mustTrack(b, l.Socket)
	for range 900 {
		c := mustDial(b, "udp4", l.udp.LocalAddr().String())
		mustWrite(b, c, "x")
		c.Close()
	}
	mustFill(b, foreignFlows)
	b.ReportAllocs()
	before := cpu(b)
	for b.Loop() {
		if flows, why := tracker.Flows(b.Context(), 1, nil); len(flows) < 800 || why != "" {
			b.Fatalf("got %d flows (%s)", len(flows), why)
		}
	}
	b.ReportMetric(float64((cpu(b)-before).Microseconds())/1000/float64(b.N), "cpu-ms/list")
	b.ReportMetric(float64(tableSize(b)), "flows-in-table")
}

func tableSize(b *testing.B) int {
	b.Helper()
	out, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_count")
	if err != nil {
		b.Fatal(err)
	}
	n := 0
	for _, c := range out {
		if c >= '0' && c <= '9' {
			n = n*10 + int(c-'0')
		}
	}
	return n
}
