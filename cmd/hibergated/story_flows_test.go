package main

import (
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"hibergate/activation/nettest"
	"hibergate/supervisor/activity"
)

// What status says of connections is what conntrack and ss say at that moment.
func TestFlowsAgree(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces, nettest.Tool("nft"), nettest.Tool("conntrack"), nettest.Tool("ss"))
	d := startHibergated(t, `
[service.web]
listen  = ["tcp://127.0.0.1:0", "tcp://[::1]:0", "udp://127.0.0.1:0"]
command = ["ECHO-SERVER"]
`)
	var conns []net.Conn
	for i := range 3 {
		conns = append(conns, mustHold(t, d, "web", 0), mustHold(t, d, "web", 1))
		mustAsk(t, conns[2*i], strings.Repeat("x", 1000*i)+"\n")
	}
	datagram := mustDial(t, d, "web", 2)
	mustAsk(t, datagram, "hello\n")
	nettest.Eventually(t, func() error { // the last acknowledgements are still on their way
		before := d.status("web")
		diff := cmp.Diff(conntrackFlows(t, before.PIDs[0]), statusFlows(t, d), compareAddrPort())
		if diff != "" {
			return fmt.Errorf("conntrack and status differ: %s", diff)
		}
		return nil
	})
	want := map[string]bool{}
	for _, c := range conns {
		want[c.RemoteAddr().String()+" "+c.LocalAddr().String()] = true
	}
	got := map[string]bool{}
	for line := range strings.Lines(mustRun(t, "ss", "-Htn", "state", "established")) {
		f := strings.Fields(line)
		if key := f[2] + " " + f[3]; want[key] {
			got[key] = true
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error("ss does not show the connections:", diff)
	}
	open := map[string]bool{}
	st := d.status("web")
	for _, s := range st.Sockets[:2] {
		for _, f := range s.Flows {
			open[f.Local.String()+" "+f.Peer.String()] = true
		}
	}
	if diff := cmp.Diff(want, open); diff != "" {
		t.Error("status does not show the connections:", diff)
	}
	if a, b, c := st.Sockets[0].Open, st.Sockets[1].Open, len(st.Sockets[2].Flows); a != 3 || b != 3 || c != 1 {
		t.Errorf("%d, %d and %d flows are open", a, b, c)
	}
}

// statusFlows reads what the command prints, by client.
func statusFlows(t *testing.T, d *hibergated) map[netip.AddrPort]activity.Flow {
	t.Helper()
	flows := map[netip.AddrPort]activity.Flow{}
	for _, s := range d.status("web").Sockets {
		for _, f := range s.Flows {
			flows[f.Peer] = f
		}
	}
	return flows
}

var conntrackLine = regexp.MustCompile(`^ipv[46] +\d+ +(tcp|udp) +\d+ +\d+ +(?:([A-Z_]+) +)?src=(\S+) dst=(\S+) sport=(\d+) dport=(\d+) packets=(\d+) bytes=(\d+) (?:\[UNREPLIED\] )?src=\S+ dst=\S+ sport=\d+ dport=\d+ packets=(\d+) bytes=(\d+)( \[ASSURED\])?`)

// conntrackFlows reads what conntrack prints of the connections to a process, by client.
func conntrackFlows(t *testing.T, pid int) map[netip.AddrPort]activity.Flow {
	t.Helper()
	ours := map[string]bool{} // the process's own sockets, by port
	for line := range strings.Lines(mustRun(t, "ss", "-Htulnp")) {
		if f := strings.Fields(line); strings.Contains(line, fmt.Sprintf("pid=%d,", pid)) {
			ours[f[0]+" "+f[4]] = true
		}
	}
	flows := map[netip.AddrPort]activity.Flow{}
	for _, family := range []string{"ipv4", "ipv6"} {
		for line := range strings.Lines(mustRun(t, "conntrack", "-L", "-o", "extended", "-f", family)) {
			m := conntrackLine.FindStringSubmatch(line)
			if m == nil {
				continue
			}
			local := netip.AddrPortFrom(netip.MustParseAddr(m[4]), uint16(number(t, m[6])))
			if !ours[m[1]+" "+local.String()] {
				continue
			}
			f := activity.Flow{
				Protocol: m[1], State: m[2], Local: local, Original: local, Counted: true, PID: pid, Process: "echo-server",
				Peer: netip.AddrPortFrom(netip.MustParseAddr(m[3]), uint16(number(t, m[5]))),
				In:   activity.Counters{Packets: number(t, m[7]), Bytes: number(t, m[8])},
				Out:  activity.Counters{Packets: number(t, m[9]), Bytes: number(t, m[10])},
			}
			if f.Protocol == "udp" { // it has no states, and no socket for each peer
				f.PID, f.Process, f.State = 0, "", "REPLIED"
				if m[11] != "" {
					f.State = "ASSURED"
				}
			}
			flows[f.Peer] = f
		}
	}
	if len(flows) == 0 {
		t.Fatal("conntrack prints nothing of them")
	}
	return flows
}

func number(t *testing.T, s string) uint64 {
	t.Helper()
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func compareAddrPort() cmp.Option {
	return cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })
}
