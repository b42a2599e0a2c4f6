package activity_test

import (
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation"
	"hibergate/activation/nettest"
	"hibergate/supervisor/activity"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

// listener is a socket under test, held as package net holds it; the Tracker only borrows its descriptor.
type listener struct {
	activity.Socket
	net.Listener
	udp *net.UDPConn
}

var networks = map[string]activation.Network{
	"tcp": activation.TCP, "udp": activation.UDP, "unix": activation.Unix, "unixpacket": activation.Unixpacket, "unixgram": activation.Unixgram,
}

// mustListen opens a socket such as "tcp 127.0.0.1:0" or "udp [::]:0". A number after the network gives the family.
func mustListen(tb testing.TB, key uint32, network, address string) *listener {
	tb.Helper()
	l := &listener{}
	l.Key = key
	l.Address.Network = networks[strings.TrimRight(network, "46")]
	var raw interface{ Control(func(uintptr)) error }
	var err error
	var bound net.Addr
	switch l.Address.Network {
	case activation.UDP:
		var p net.PacketConn
		shared := net.ListenConfig{Control: func(_, address string, c syscall.RawConn) error {
			if strings.HasSuffix(address, ":0") {
				return nil
			}
			return c.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
		}}
		if p, err = shared.ListenPacket(tb.Context(), network, address); err == nil {
			l.udp = p.(*net.UDPConn)
			bound = p.LocalAddr()
			raw, err = l.udp.SyscallConn()
			tb.Cleanup(func() { p.Close() })
		}
	case activation.Unixgram:
		var c *net.UnixConn
		if c, err = net.ListenUnixgram(network, &net.UnixAddr{Name: address, Net: network}); err == nil {
			raw, err = c.SyscallConn()
			tb.Cleanup(func() { c.Close() })
			bound = c.LocalAddr()
		}
	case activation.FIFO:
		tb.Fatal("a FIFO is no listener")
	case activation.TCP, activation.Unix, activation.Unixpacket:
		if l.Listener, err = net.Listen(network, address); err == nil {
			switch x := l.Listener.(type) {
			case *net.TCPListener:
				raw, err = x.SyscallConn()
			case *net.UnixListener:
				raw, err = x.SyscallConn()
			}
			bound = l.Addr()
			tb.Cleanup(func() { l.Close() })
		}
	}
	if err != nil {
		tb.Fatal(err)
	}
	if a, err := netip.ParseAddrPort(bound.String()); err == nil {
		l.Address.Port = a.Port()
		if !a.Addr().IsUnspecified() {
			l.Address.IP = a.Addr()
		}
	} else {
		l.Address.Path = address
	}
	if err := raw.Control(func(fd uintptr) { l.FD = int(fd) }); err != nil {
		tb.Fatal(err)
	}
	return l
}

func mustTrack(tb testing.TB, sockets ...activity.Socket) *activity.Tracker {
	tb.Helper()
	tracker := activity.New(activity.Options{Logger: slog.New(slog.DiscardHandler), Table: tableName(tb)}, sockets)
	tb.Cleanup(func() {
		if err := tracker.Close(); err != nil {
			tb.Error(err)
		}
	})
	return tracker
}

func tableName(tb testing.TB) string {
	tb.Helper()
	return strings.NewReplacer("/", "-", "#", "-").Replace(tb.Name())
}

func look(tb testing.TB, tracker *activity.Tracker, key uint32) activity.Summary {
	tb.Helper()
	return tracker.Look(tb.Context(), time.Now(), []uint32{key})[0]
}

func mustDial(tb testing.TB, network, address string) net.Conn {
	tb.Helper()
	c, err := net.Dial(network, address)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { c.Close() })
	return c
}

func (l *listener) mustAccept(tb testing.TB) net.Conn {
	tb.Helper()
	c, err := l.Accept()
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { c.Close() })
	return c
}

// eventually waits for a summary that is as wanted; the kernel closes connections on its own time.
func eventually(tb testing.TB, tracker *activity.Tracker, key uint32, what string, ok func(activity.Summary) bool) activity.Summary {
	tb.Helper()
	var s activity.Summary
	nettest.Eventually(tb, func() error {
		if s = look(tb, tracker, key); !ok(s) {
			return fmt.Errorf("not %s: %+v", what, s)
		}
		return nil
	})
	return s
}

func mustWrite(tb testing.TB, c net.Conn, text string) {
	tb.Helper()
	if _, err := c.Write([]byte(text)); err != nil {
		tb.Fatal(err)
	}
}

func run(tb testing.TB, name string, args ...string) string {
	tb.Helper()
	out, err := exec.Command(name, args...).Output()
	if err != nil {
		tb.Fatalf("%s %v: %v", name, args, err)
	}
	return string(out)
}

func nft(tb testing.TB, script string) string {
	tb.Helper()
	cmd := exec.Command("nft", "-f", "-")
	cmd.Stdin = strings.NewReader(script)
	out, err := cmd.CombinedOutput()
	if err != nil {
		tb.Fatalf("nft %s: %v\n%s", script, err, out)
	}
	return string(out)
}
