package activity_test

import (
	"encoding/binary"
	"log/slog"
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
	"hibergate/supervisor/activity"
	"hibergate/supervisor/activity/netlink"
)

// The account of a socket with accounting = "sock-diag" touches neither nftables nor conntrack.
func TestSockDiagMakesNoTable(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces, nettest.Tool("nft"))
	l := mustListen(t, 1, "tcp4", "127.0.0.1:0")
	u := mustListen(t, 2, "udp4", "127.0.0.1:0")
	l.Accounting, u.Accounting = activity.SockDiag, activity.SockDiag
	tracker := mustTrack(t, l.Socket, u.Socket)
	if got := nft(t, "list tables"); strings.Contains(got, tableName(t)) {
		t.Errorf("got a table in %q", got)
	}
	mustDial(t, "tcp", l.Addr().String())
	l.mustAccept(t)
	got := tracker.Look(t.Context(), time.Now(), []uint32{1, 2})
	if s := got[0]; !s.Known || s.Exact || s.Open != 1 || s.Why != "" || !s.Last.IsZero() {
		t.Errorf("TCP: got %+v, want known but not exact", s)
	}
	if s := got[1]; s.Known || s.Why == "" {
		t.Errorf("UDP: got %+v, want not known, and why", s)
	}
	if flows, why := tracker.Flows(t.Context(), 1, nil); len(flows) != 1 || flows[0].Counted || why != "" {
		t.Errorf("got flows %+v (%s)", flows, why)
	}
}

// Without CAP_NET_ADMIN sock_diag alone decides, and everything says what is missing.
func TestWithoutPrivilege(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	auto := mustListen(t, 1, "tcp4", "127.0.0.1:0")
	strict := mustListen(t, 2, "tcp4", "127.0.0.1:0")
	udp := mustListen(t, 3, "udp4", "127.0.0.1:0")
	strict.Accounting = activity.Conntrack
	mustDial(t, "tcp", auto.Listener.Addr().String())
	auto.mustAccept(t)
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		header, none := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, [2]unix.CapUserData{}
		if err := unix.Capset(&header, &none[0]); err != nil {
			t.Error(err)
			return
		}
		tracker := activity.New(activity.Options{Logger: slog.New(slog.DiscardHandler), Table: "unprivileged"},
			[]activity.Socket{auto.Socket, strict.Socket, udp.Socket})
		defer tracker.Close()
		if missing := strings.Join(tracker.Missing(), "\n"); !strings.Contains(missing, "nftables: operation not permitted; run as root") ||
			!strings.Contains(missing, "conntrack: operation not permitted") {
			t.Errorf("got missing %q", missing)
		}
		got := tracker.Look(t.Context(), time.Now(), []uint32{1, 2, 3})
		if s := got[0]; !s.Known || s.Exact || s.Open != 1 || !strings.Contains(s.Why, "nftables") {
			t.Errorf("auto: got %+v", s)
		}
		if s := got[1]; s.Known || !strings.Contains(s.Why, "not permitted") {
			t.Errorf("conntrack: got %+v", s)
		}
		if s := got[2]; s.Known || !strings.Contains(s.Why, "not permitted") {
			t.Errorf("UDP: got %+v", s)
		}
		if flows, why := tracker.Flows(t.Context(), 1, nil); len(flows) != 1 || flows[0].State != "ESTABLISHED" || !strings.Contains(why, "not permitted") {
			t.Errorf("got flows %+v (%s)", flows, why)
		}
		if flows, why := tracker.Flows(t.Context(), 3, nil); len(flows) != 0 || !strings.Contains(why, "not permitted") {
			t.Errorf("UDP: got flows %+v (%s)", flows, why)
		}
	}()
	<-done
}

// When the table goes away, nothing is known at that look; the next one is good again.
func TestLostTable(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces, nettest.Tool("nft"))
	l := mustListen(t, 1, "udp4", "127.0.0.1:0")
	tracker := mustTrack(t, l.Socket)
	client := mustDial(t, "udp", l.udp.LocalAddr().String())
	mustWrite(t, client, "x")
	look(t, tracker, 1)
	closeOwner(t, tableName(t))
	lost := time.Now()
	if s := look(t, tracker, 1); s.Known || !strings.Contains(s.Why, "deleted or changed") {
		t.Errorf("lost: got %+v", s)
	}
	mustWrite(t, client, "x")
	if s := look(t, tracker, 1); !s.Known || s.Last.Before(lost) || s.In.Packets != 2 {
		t.Errorf("made anew: got %+v, want 2 packets in all, last after %v", s, lost)
	}
}

// closeOwner closes the netlink socket to which a table belongs, so that the kernel removes the
// table. The descriptor stays valid, for whoever closes it later.
func closeOwner(tb testing.TB, table string) {
	tb.Helper()
	var port uint32 // of the owner's socket
	c := netlink.New(unix.NETLINK_NETFILTER)
	defer c.Close()
	r := netlink.NetfilterRequest(unix.NFNL_SUBSYS_NFTABLES, unix.NFT_MSG_GETTABLE, 0, unix.NFPROTO_INET).String(unix.NFTA_TABLE_NAME, table)
	err := c.Ask(r, nil, func(_ uint16, body []byte) error {
		as := netlink.Attributes{Rest: body[4:]}
		for as.Next() {
			if as.Type == 7 { // NFTA_TABLE_OWNER
				port = binary.BigEndian.Uint32(as.Value)
			}
		}
		return as.Err()
	})
	if err != nil || port == 0 {
		tb.Fatalf("table %s: owner %d, %v", table, port, err)
	}
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		tb.Fatal(err)
	}
	for _, e := range entries {
		fd, _ := strconv.Atoi(e.Name())
		name, err := unix.Getsockname(fd)
		protocol, _ := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL) // each has port numbers of its own
		if nl, ok := name.(*unix.SockaddrNetlink); err == nil && ok && protocol == unix.NETLINK_NETFILTER && nl.Pid == port {
			null, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				tb.Fatal(err)
			}
			defer unix.Close(null)
			syscall.ForkLock.RLock() // a program of another test that is being started may hold a copy
			defer syscall.ForkLock.RUnlock()
			if err := unix.Dup3(null, fd, unix.O_CLOEXEC); err != nil {
				tb.Fatal(err)
			}
			return
		}
	}
	tb.Fatalf("no socket has netlink port %d", port)
}

// Two trackers do not disturb each other: the flows of one are counted after the other has left.
func TestTwoTrackers(t *testing.T) {
	nettest.Need(t, nettest.Namespaces)
	l := mustListen(t, 1, "tcp4", "127.0.0.1:0")
	options := activity.Options{Logger: slog.New(slog.DiscardHandler), Table: "two"}
	first := activity.New(options, []activity.Socket{l.Socket})
	second := activity.New(options, []activity.Socket{l.Socket})
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	mustDial(t, "tcp", l.Addr().String())
	l.mustAccept(t)
	if s := look(t, second, 1); !s.Known || !s.Exact || s.Open != 1 || s.In.Packets == 0 {
		t.Errorf("got %+v", s)
	}
	if flows, why := second.Flows(t.Context(), 1, nil); len(flows) != 1 || !flows[0].Counted || why != "" {
		t.Errorf("got flows %+v (%s), want one, counted", flows, why)
	}
	if err := second.Close(); err != nil {
		t.Fatal(err)
	}
	if s := look(t, second, 1); s.Known || s.Why == "" {
		t.Errorf("after Close: got %+v, want not known, and why", s)
	}
	if flows, why := second.Flows(t.Context(), 1, nil); len(flows) != 0 || why == "" {
		t.Errorf("after Close: got flows %+v (%s), want none, and why", flows, why)
	}
}
