package gate

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation"
	"hibergate/activation/nettest"
)

// stream is what *net.TCPConn and *net.UnixConn have in common.
type stream interface {
	net.Conn
	CloseWrite() error
	CloseRead() error
	syscall.Conn
}

func mustDial(tb testing.TB, network, address string) stream {
	tb.Helper()
	c, err := net.Dial(network, address)
	if err != nil {
		tb.Fatal(err)
	}
	return guard(tb, c)
}

func guard(tb testing.TB, c net.Conn) stream {
	tb.Helper()
	tb.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		tb.Fatal(err)
	}
	return c.(stream)
}

// backend listens on a network, "tcp" or "unix".
func backend(tb testing.TB, network string) net.Listener {
	tb.Helper()
	address := "127.0.0.1:0"
	if network == "unix" {
		address = tempPath(tb, "b")
	}
	b, err := net.Listen(network, address)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { b.Close() })
	return b
}

// tempPath returns a short path for a socket, which t.TempDir does not promise.
func tempPath(tb testing.TB, name string) string {
	tb.Helper()
	dir, err := os.MkdirTemp("", "hg") //nolint:usetesting // a socket's path must be short
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, name)
}

func mustAccept(tb testing.TB, b net.Listener) stream {
	tb.Helper()
	if err := b.(interface{ SetDeadline(time.Time) error }).SetDeadline(time.Now().Add(patience)); err != nil {
		tb.Fatal(err)
	}
	c, err := b.Accept()
	if err != nil {
		tb.Fatal(err)
	}
	return guard(tb, c)
}

func mustWrite(tb testing.TB, c net.Conn, text string) {
	tb.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		tb.Fatal(err)
	}
}

func mustRead(tb testing.TB, c net.Conn, want string) {
	tb.Helper()
	b := make([]byte, len(want))
	if n, err := io.ReadFull(c, b); err != nil || string(b) != want {
		tb.Fatalf("got %q, %v, want %q", b[:n], err, want)
	}
}

// wantEnd fails unless all that comes yet is text and then the end of the stream.
func wantEnd(tb testing.TB, c net.Conn, text string) {
	tb.Helper()
	if b, err := io.ReadAll(c); err != nil || string(b) != text {
		tb.Fatalf("got %d bytes %.50q, %v, want %d bytes and the end", len(b), b, err, len(text))
	}
}

// wantReset fails unless what comes is a reset, at once or after other data.
func wantReset(tb testing.TB, c net.Conn) {
	tb.Helper()
	if n, err := io.Copy(io.Discard, c); !errors.Is(err, unix.ECONNRESET) {
		tb.Fatalf("got %d bytes and %v, want a reset", n, err)
	}
}

// reset closes a TCP connection so that the other end gets a reset.
func reset(tb testing.TB, c stream) {
	tb.Helper()
	if err := c.(*net.TCPConn).SetLinger(0); err != nil {
		tb.Fatal(err)
	}
	c.Close()
}

// noise returns bytes that differ everywhere.
func noise(seed uint64, n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)}).Read(b)
	return b
}

// fill writes until nothing more is taken, and returns what was.
func fill(tb testing.TB, c stream) []byte {
	tb.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		tb.Fatal(err)
	}
	chunk, all := noise(9, 1<<16), []byte(nil)
	for {
		n := 0
		if err := raw.Write(func(fd uintptr) bool {
			n, err = unix.Write(int(fd), chunk)
			return true
		}); err != nil {
			tb.Fatal(err)
		}
		if n <= 0 {
			if errors.Is(err, unix.EAGAIN) {
				return all
			}
			tb.Fatal(err)
		}
		all = append(all, chunk[:n]...)
	}
}

// deaf listens on TCP and has its queue full, so that further connections get no answer.
func deaf(tb testing.TB) (at activation.Address, answer func() net.Listener) {
	tb.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { unix.Close(fd) })
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		tb.Fatal(err)
	}
	if err := unix.Listen(fd, 0); err != nil {
		tb.Fatal(err)
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		tb.Fatal(err)
	}
	in := sa.(*unix.SockaddrInet4)
	to := &net.TCPAddr{IP: in.Addr[:], Port: in.Port}
	mustDial(tb, "tcp", to.String()).Close()
	return addressOf(to), func() net.Listener {
		unix.Close(fd)
		b, err := net.Listen("tcp", to.String())
		if err != nil {
			tb.Fatal(err)
		}
		tb.Cleanup(func() { b.Close() })
		return b
	}
}

// sockets lists the descriptors of this process, without those of the runtime.
func sockets() []string {
	return slices.DeleteFunc(nettest.OpenFDs(), func(s string) bool { return strings.Contains(s, "/proc/") })
}

// noLeak fails the test where descriptors are left at its end. Nothing else may be going on in the process.
func noLeak(t *testing.T) {
	t.Helper()
	before := sockets()
	t.Cleanup(func() {
		nettest.Eventually(t, func() error {
			if after := sockets(); len(after) > len(before) {
				return fmt.Errorf("descriptors before %v, after %v", before, after)
			}
			return nil
		})
	})
}

func equal(tb testing.TB, got, want []byte) {
	tb.Helper()
	if !bytes.Equal(got, want) {
		tb.Fatalf("got %d bytes, want %d, or they differ", len(got), len(want))
	}
}
