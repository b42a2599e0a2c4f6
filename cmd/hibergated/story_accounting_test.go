package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
	"hibergate/supervisor/activity"
)

// longTest has tests take the time that people would, too.
func longTest() bool { return os.Getenv("HIBERGATED_TEST_LONG") != "" }

// A service with idle_timeout = "2s" is told to stop between 2 and 3 seconds after the last of
// what counts. These bounds are promises to the user; the log says when it was.
func TestIdleTimeout(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces, nettest.Tool("nft"), nettest.Tool("conntrack"))
	var config strings.Builder
	service := func(name, listen, more string) {
		fmt.Fprintf(&config, "[service.%s]\nlisten = [%q]\ncommand = [\"ECHO-SERVER\"]\nidle.stop_after = \"2s\"\n%s\n", name, listen, more)
	}
	service("short", "tcp://127.0.0.1:0", "")
	service("long", "tcp://127.0.0.1:0", "")
	service("silent", "tcp://127.0.0.1:0", "")
	service("traffic", "tcp://127.0.0.1:0", `idle.when = "no-traffic"`)
	service("traffic6", "tcp://[::1]:0", `idle.when = "no-traffic"`)
	service("datagrams", "udp://127.0.0.1:0", "")
	service("forwarded", "tcp://127.0.0.1:0", "")
	service("unix", "unix:@"+t.Name(), "")
	service("sockdiag", "tcp://127.0.0.1:0", `accounting = "sock-diag"`)
	d := startHibergated(t, config.String())
	foreignTraffic(t)

	// in time says that a service was told to stop 2 to 3 seconds after quiet began, some time between two moments.
	inTime := func(t *testing.T, service string, before, after time.Time) {
		t.Helper()
		stop := d.stopped(t, service, 1, patience)
		t.Logf("told to stop %v after", stop.Sub(after).Round(time.Millisecond))
		if stop.Sub(before) < 2*time.Second || stop.Sub(after) > 3*time.Second {
			t.Errorf("told to stop %v to %v after, want 2s to 3s", stop.Sub(after), stop.Sub(before))
		}
		d.sleeps(t, service)
	}
	// All at once, however many processors there are: what they do is wait.
	var all sync.WaitGroup
	defer all.Wait()
	tell := func(name string, story func(t *testing.T)) { all.Go(func() { t.Run(name, story) }) }
	// closed opens a connection, closes it after a while, and expects the stop in time.
	closed := func(service string, open time.Duration) func(*testing.T) {
		return func(t *testing.T) {
			c := mustHold(t, d, service, 0)
			time.Sleep(open) // this is what is tested, not waited for
			if st := d.status(service); st.State != "running" || st.Starts != 1 || st.Sockets[0].Open != 1 {
				t.Errorf("while its connection is open: %+v", st)
			}
			before := time.Now()
			c.Close()
			inTime(t, service, before, time.Now())
		}
	}
	long := 5 * time.Second
	if longTest() {
		long = 30 * time.Second
	}
	tell("open for 0.1s", closed("short", 100*time.Millisecond))
	tell("open for long", closed("long", long))
	tell("open and silent", closed("silent", 5*time.Second))
	tell("unix", closed("unix", 3*time.Second))
	tell("sock-diag alone", closed("sockdiag", 3*time.Second))
	for _, service := range []string{"traffic", "traffic6"} {
		tell("no "+service, func(t *testing.T) {
			c := mustHold(t, d, service, 0)
			for range 10 { // as long as something comes it stays, whatever the age of the connection
				time.Sleep(300 * time.Millisecond)
				mustAsk(t, c, "again\n")
			}
			if st := d.status(service); st.Starts != 1 || st.State != "running" {
				t.Errorf("with traffic: %+v", st)
			}
			before := time.Now()
			mustAsk(t, c, "the last\n")
			inTime(t, service, before, time.Now())
			if n, err := io.Copy(io.Discard, c); n != 0 {
				t.Errorf("after the stop: %d bytes, %v", n, err)
			}
		})
	}
	tell("datagrams", func(t *testing.T) {
		c := mustDial(t, d, "datagrams", 0)
		var before time.Time
		for range 10 {
			time.Sleep(300 * time.Millisecond)
			before = time.Now()
			mustAsk(t, c, "hello\n")
		}
		after := time.Now()
		if st := d.status("datagrams"); st.Starts != 1 || st.Sockets[0].In.Packets != 10 || st.Sockets[0].Out.Packets != 10 {
			t.Errorf("after 10 datagrams: %+v", st)
		}
		inTime(t, "datagrams", before, after)
	})
	tell("forwarded", func(t *testing.T) {
		_, to := d.address("forwarded", 0)
		local := netip.MustParseAddrPort(to)
		mustRun(t, "nft", "add table ip story; add chain ip story out { type nat hook output priority -100 ; }; "+
			fmt.Sprintf("add rule ip story out ip daddr 127.0.0.5 tcp dport 8081 redirect to :%d", local.Port()))
		c, err := net.Dial("tcp", "127.0.0.5:8081")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		mustAsk(t, c, "hello\n")
		time.Sleep(3 * time.Second) // longer than the timeout
		st := d.status("forwarded")
		if len(st.Sockets[0].Flows) != 1 || st.State != "running" {
			t.Fatalf("with a connection through a redirect: %+v", st)
		}
		flow := st.Sockets[0].Flows[0]
		want := activity.Flow{
			Protocol: "tcp", Peer: netip.MustParseAddrPort(c.LocalAddr().String()), Original: netip.MustParseAddrPort("127.0.0.5:8081"), Local: local,
			State: "ESTABLISHED", Counted: true, PID: st.PIDs[0], Process: "echo-server", In: flow.In, Out: flow.Out,
		}
		if diff := cmp.Diff(want, flow, compareAddrPort()); diff != "" {
			t.Error(diff)
		}
		if flow.In.Packets < 3 || flow.Out.Packets < 2 || st.Sockets[0].In != flow.In || st.Sockets[0].Out != flow.Out {
			t.Errorf("the socket counts %+v and %+v, its only flow %+v", st.Sockets[0].In, st.Sockets[0].Out, flow)
		}
		before := time.Now()
		c.Close()
		inTime(t, "forwarded", before, time.Now())
	})
}

func compareAddrPort() cmp.Option {
	return cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })
}

// foreignTraffic has packets on other ports for as long as the test goes on; no service may be kept awake by them.
func foreignTraffic(tb testing.TB) {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	client, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		tb.Fatal(err)
	}
	server, err := l.Accept()
	if err != nil {
		tb.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			if _, err := server.Write([]byte("x")); err != nil {
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
	}()
	go io.Copy(io.Discard, client)
	tb.Cleanup(func() {
		server.Close()
		<-done
		client.Close()
		l.Close()
	})
}

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

var conntrackLine = regexp.MustCompile(`^ipv[46] +\d+ +(tcp|udp) +\d+ +\d+ +(?:([A-Z_]+) +)?src=(\S+) dst=(\S+) sport=(\d+) dport=(\d+) packets=(\d+) bytes=(\d+) (?:\[UNREPLIED\] )?src=\S+ dst=\S+ sport=\d+ dport=\d+ packets=(\d+) bytes=(\d+)`)

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

// Somebody flushes the ruleset, and deletes our table as only we could: nothing is stopped
// while a connection is open, and the account is made anew. Not parallel, as other tests have rules, too.
func TestTableDeleted(t *testing.T) {
	nettest.Need(t, nettest.Namespaces, nettest.Tool("nft"))
	d := startHibergated(t, `
[service.web]
listen       = ["tcp://127.0.0.1:0"]
command      = ["ECHO-SERVER"]
idle_timeout = "200ms"
[service.dns]
listen       = ["udp://127.0.0.1:0"]
command      = ["ECHO-SERVER"]
idle_timeout = "200ms"
`)
	c := mustHold(t, d, "web", 0)
	datagrams := mustDial(t, d, "dns", 0)
	table := ownTable(t)
	mustRun(t, "nft", "flush", "ruleset")
	if out, err := exec.Command("nft", "delete", "table", "inet", table).CombinedOutput(); err == nil {
		t.Log("this kernel lets others delete the table")
	} else {
		t.Logf("the kernel protects the table: %s", out)
	}
	for i := range 3 {
		if i > 0 {
			deleteTable(t, d.pid, table)
		}
		mustAsk(t, c, "hello\n")
		mustAsk(t, datagrams, "hello\n")
		time.Sleep(500 * time.Millisecond) // longer than the timeout: it has looked
		st := d.status("web")
		if st.State != "running" || st.Starts != 1 || !st.Sockets[0].Known || st.Sockets[0].Open != 1 {
			t.Errorf("with an open connection: %+v", st)
		}
		before := st.Sockets[0].In
		mustAsk(t, c, "hello\n")
		if after := d.status("web").Sockets[0].In; after.Packets <= before.Packets {
			t.Errorf("no longer counted: %+v, then %+v", before, after)
		}
		d.sleeps(t, "dns")
		ownTable(t)
	}
	c.Close()
	d.sleeps(t, "web")
	if st := d.status("web"); st.Starts != 1 || st.Failures != 0 {
		t.Errorf("at the end: %+v", st)
	}
}

// ownTable returns the name of the one table of hibergated.
func ownTable(t *testing.T) string {
	t.Helper()
	var names []string
	for line := range strings.Lines(mustRun(t, "nft", "list", "tables")) {
		if f := strings.Fields(line); len(f) == 3 && strings.HasPrefix(f[2], "hibergated-") {
			names = append(names, f[2])
		}
	}
	if len(names) != 1 {
		t.Fatalf("the tables of hibergated are %q", names)
	}
	return names[0]
}

// deleteTable deletes a table that belongs to a socket of a process, by borrowing that socket: the
// kernel lets nobody else.
func deleteTable(t *testing.T, pid int, table string) {
	t.Helper()
	owner, name := tableOwner(t, table)
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pidfd)
	for fd := range 64 {
		theirs, err := unix.PidfdGetfd(pidfd, fd, 0)
		if err != nil {
			continue
		}
		defer unix.Close(theirs)
		if sa, err := unix.Getsockname(theirs); err != nil {
			continue
		} else if sa, ok := sa.(*unix.SockaddrNetlink); !ok || sa.Pid != owner {
			continue
		}
		// Without NLM_F_ACK, so that no answer comes for which the process does not wait.
		var batch []byte
		for _, m := range []netlink.Message{
			nfMessage(unix.NFNL_MSG_BATCH_BEGIN, []byte{unix.AF_UNSPEC, 0, 0, unix.NFNL_SUBSYS_NFTABLES}),
			nfMessage(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_DELTABLE, name),
			nfMessage(unix.NFNL_MSG_BATCH_END, []byte{unix.AF_UNSPEC, 0, 0, unix.NFNL_SUBSYS_NFTABLES}),
		} {
			b, err := m.MarshalBinary()
			if err != nil {
				t.Fatal(err)
			}
			batch = append(batch, b...)
		}
		if err := unix.Sendto(theirs, batch, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Fatal("no socket of hibergated owns its table")
}

// tableOwner returns the netlink port that owns a table, and the body of a message about the table.
func tableOwner(t *testing.T, table string) (port uint32, body []byte) {
	t.Helper()
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	name, err := netlink.MarshalAttributes([]netlink.Attribute{{Type: unix.NFTA_TABLE_NAME, Data: append([]byte(table), 0)}})
	if err != nil {
		t.Fatal(err)
	}
	body = append([]byte{unix.NFPROTO_INET, 0, 0, 0}, name...)
	replies, err := conn.Execute(nfMessage(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETTABLE, body))
	if err != nil {
		t.Fatal(err)
	}
	const ownedBy = 7 // NFTA_TABLE_OWNER
	for _, reply := range replies {
		attributes, err := netlink.UnmarshalAttributes(reply.Data[4:])
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range attributes {
			if a.Type == ownedBy {
				return binary.BigEndian.Uint32(a.Data), body
			}
		}
	}
	nettest.Need(t, func() error { return errors.New("tables have no owners in this kernel") })
	return 0, nil
}

func nfMessage(typ uint16, body []byte) netlink.Message {
	return netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(typ), Flags: netlink.Request, Length: uint32(unix.SizeofNlMsghdr + len(body))},
		Data:   body,
	}
}
