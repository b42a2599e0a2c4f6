package activation

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
)

func TestMain(m *testing.M) {
	if role := os.Getenv("HIBERGATED_TEST_ROLE"); role != "" {
		os.Exit(play(role)) // a test started this binary as its helper
	}
	os.Exit(nettest.Main(m))
}

func mustOpen(tb testing.TB, address string, o Options) *Socket {
	tb.Helper()
	s, err := Open(Spec{Address: mustParse(tb, address), Options: o})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := s.Close(); err != nil {
			tb.Error(err)
		}
	})
	return s
}

// tempPath returns a short path for a socket or FIFO, which t.TempDir does not promise.
func tempPath(tb testing.TB, name string) string {
	tb.Helper()
	dir, err := os.MkdirTemp("", "hg") //nolint:usetesting // a socket's path must be short
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, name)
}

// mustDial connects to s.
func mustDial(tb testing.TB, s *Socket) int {
	tb.Helper()
	domain := getInt(tb, s.FD(), unix.SOL_SOCKET, unix.SO_DOMAIN)
	kind := getInt(tb, s.FD(), unix.SOL_SOCKET, unix.SO_TYPE)
	fd, err := unix.Socket(domain, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { unix.Close(fd) })
	sa, err := unix.Getsockname(s.FD()) // connecting to a wildcard reaches this machine
	if err != nil {
		tb.Fatal(err)
	}
	if err := unix.Connect(fd, sa); err != nil {
		tb.Fatalf("connect to %s: %v", s.Address(), err)
	}
	return fd
}

func getInt(tb testing.TB, fd, level, option int) int {
	tb.Helper()
	v, err := unix.GetsockoptInt(fd, level, option)
	if err != nil {
		tb.Fatal(err)
	}
	return v
}
