package activity_test

import (
	"context"
	"net"
	"strconv"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation"
	"hibergate/activation/nettest"
	"hibergate/supervisor/activity"
)

// Connections that are led past a socket count for it, also where they are with a socket of the other IP version. Here that shares its port.
func TestHandedOver(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	lc := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) (err error) {
		raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1) })
		return err
	}}
	lc.SetMultipathTCP(false)
	ours, err := lc.Listen(context.Background(), "tcp", "[::]:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ours.Close()
	port := ours.Addr().(*net.TCPAddr).Port
	other, err := lc.Listen(context.Background(), "tcp4", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	raw, err := ours.(*net.TCPListener).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	s := activity.Socket{Key: 1, Address: activation.Address{Network: activation.TCP, Port: uint16(port)}, Accounting: activity.SockDiag}
	raw.Control(func(fd uintptr) { s.FD = int(fd) })
	tracker := mustTrack(t, s)
	expect := func(open, queued, flows int) {
		t.Helper()
		if got := tracker.Look(t.Context(), time.Now(), []uint32{1})[0]; !got.Known || got.Open != open || got.Queued != queued || got.LastPayload.IsZero() != (open == 0) {
			t.Errorf("got %+v, want %d open, %d queued", got, open, queued)
		}
		if got, why := tracker.Flows(t.Context(), 1, nil); len(got) != flows {
			t.Errorf("got %+v, want %d (%s)", got, flows, why)
		}
		if got, err := tracker.Queued(t.Context(), []uint32{1}); err != nil || len(got) != queued {
			t.Errorf("got %v queued, %v, want %d", got, err, queued)
		}
	}
	mustDial(t, "tcp", other.Addr().String())
	expect(0, 0, 0)
	s.HandedOver = true
	tracker.Add(s)
	expect(0, 1, 1)
	c, err := other.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	expect(1, 0, 1)
	mustDial(t, "tcp6", net.JoinHostPort("::1", strconv.Itoa(port)))
	expect(1, 1, 2)
}
