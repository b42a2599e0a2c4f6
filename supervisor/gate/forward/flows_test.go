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
	for _, err := range []error{flows, drain, destination, table.Sever(ctx, gate.address(), to)} {
		if !errors.Is(err, context.Canceled) {
			t.Errorf("got %v, want that it was canceled", err)
		}
	}
}
