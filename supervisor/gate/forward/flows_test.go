package forward_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
)

// A connection of which one end has said that it sends no more still carries what the other one sends.
func TestHalfClosedIsOpen(t *testing.T) {
	t.Parallel()
	table := mustOpen(t)
	gate := mustServe(t, "gate", "127.0.0.1:0")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	to := netip.MustParseAddrPort(l.Addr().String())
	mustAdd(t, table, 1, gate, to)
	client := dial(t, gate.Addr().String()).(*net.TCPConn)
	served, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer served.Close()
	if err := client.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if _, err := served.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Fatalf("got %v, want EOF", err)
	}
	mustRemove(t, table, 1)
	state := func(want string, open int) {
		t.Helper()
		nettest.Eventually(t, func() error {
			a, err := table.Drain(t.Context(), gate.address(), to)
			if err != nil {
				t.Fatal(err)
			}
			if a.Open != open || open > 0 && a.List[0].State != want {
				return fmt.Errorf("got %+v, want %s", a, want)
			}
			return nil
		})
	}
	state("CLOSE_WAIT", 1)
	if _, err := served.Write([]byte("answer")); err != nil {
		t.Fatal(err)
	}
	if n, err := client.Read(make([]byte, 100)); n != 6 || err != nil {
		t.Errorf("got %d bytes, %v, want the answer", n, err)
	}
	state("CLOSE_WAIT", 1)
	served.Close()
	state("", 0)
}

// A client whom the destination has not answered yet was sent there, and will be served there.
func TestUnansweredIsOpen(t *testing.T) {
	t.Parallel()
	mustBoot(t, "silent0", []string{"10.83.0.1/24"}, []string{"10.83.0.2/24"})
	table := mustOpen(t)
	gate := mustServe(t, "gate", "10.83.0.1:0")
	to := netip.MustParseAddrPort("10.83.0.9:80") // nobody
	mustAdd(t, table, 1, gate, to)
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Connect(fd, sockaddr(gate.addrPort())); !errors.Is(err, unix.EINPROGRESS) {
		t.Fatal(err)
	}
	if a := mustFlows(t, table, gate, to); a.Open != 1 || a.Begun != 1 || a.List[0].State != "SYN_SENT" {
		t.Errorf("got %+v, want one that is unanswered", a)
	}
	mustRemove(t, table, 1)
	if a := mustFlows(t, table, gate, to); a.Open != 1 {
		t.Errorf("got %+v, want it still open", a)
	}
}

// One look at all rules says of each what a look at it says.
func TestAll(t *testing.T) {
	t.Parallel()
	mustBoot(t, "all0", []string{"10.84.0.1/24", "fd84::1/64"}, []string{"10.84.0.2/24"})
	table := mustOpen(t)
	gates := []*server{
		mustServe(t, "gate", "127.0.0.1:0"), mustServe(t, "gate", "[::1]:0"), mustServe(t, "gate", "127.0.0.1:0"), mustServe(t, "gate", "[::]:0"),
	}
	var destinations []*server
	for i, address := range []string{"127.0.0.1:0", "[::1]:0", "127.0.0.1:0", "10.84.0.1:0"} {
		d := mustServe(t, "destination", address)
		destinations = append(destinations, d)
		mustAdd(t, table, uint32(i), gates[i], d.addrPort())
	}
	_, port := split(gates[3])
	for _, to := range []string{gates[0].Addr().String(), gates[0].Addr().String(), gates[1].Addr().String(), "10.84.0.1:" + port} {
		expectOn(t, dial(t, to), "destination")
	}
	all, err := table.All(t.Context())
	if err != nil || len(all) != len(gates) {
		t.Fatalf("got %+v, %v, want %d accounts", all, err, len(gates))
	}
	for i, open := range []int{2, 1, 0, 1} {
		got, want := all[uint32(i)], mustFlows(t, table, gates[i], destinations[i].addrPort())
		if got.Open != open || got.Begun != uint64(open) || got.Peers != want.Peers || len(got.List) != open || !got.Counted || (got.In.Bytes > 0) != (open > 0) {
			t.Errorf("%d: got %+v, want %+v, with %d open", i, got, want, open)
		}
	}
	for i := range gates {
		mustRemove(t, table, uint32(i))
	}
	if all, err := table.All(t.Context()); err != nil || len(all) > 0 {
		t.Errorf("got %+v, %v, want nothing", all, err)
	}
}

func TestFlowsCanceled(t *testing.T) {
	t.Parallel()
	table := mustOpen(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	gate := mustServe(t, "gate", "127.0.0.1:0")
	to := netip.MustParseAddrPort("127.0.0.1:1")
	_, flows := table.Flows(ctx, gate.address(), to)
	_, drain := table.Drain(ctx, gate.address(), to)
	_, destination := table.Destination(ctx, to)
	mustAdd(t, table, 1, gate, netip.MustParseAddrPort("127.0.0.1:2"))
	_, all := table.All(ctx)
	for _, err := range []error{flows, drain, destination, all, table.Sever(ctx, gate.address(), to)} {
		if !errors.Is(err, context.Canceled) {
			t.Errorf("got %v, want that it was canceled", err)
		}
	}
}
