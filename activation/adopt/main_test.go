package adopt

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"hibergate/activation"
	"hibergate/activation/nettest"
)

func TestMain(m *testing.M) {
	if role := os.Getenv(roleEnv); role != "" {
		os.Exit(play(role)) // a test started this binary as its program
	}
	os.Exit(nettest.Main(m))
}

// asks is the feature that a process can be given a filter that asks.
var asks = sync.OnceValue(func() error {
	if err := nettest.Namespaces(); err != nil && os.Getenv(restrictedEnv) == "" {
		return err
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), roleEnv+"="+roleProbe)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("no filter that asks: %w: %s", err, out)
	}
	return nil
})

func mustOpen(tb testing.TB, address string, o activation.Options) *activation.Socket {
	tb.Helper()
	a, err := activation.ParseAddress(address)
	if err != nil {
		tb.Fatal(err)
	}
	s, err := activation.Open(activation.Spec{Address: a, Options: o})
	if err != nil {
		tb.Fatal(err)
	}
	closeAfter(tb, s)
	return s
}

// closeAfter closes a socket that the test has, or was told of.
func closeAfter(tb testing.TB, s *activation.Socket) {
	tb.Helper()
	tb.Cleanup(func() {
		if err := s.Close(); err != nil {
			tb.Error(err)
		}
	})
}

// mustDial connects to a socket of any kind and says something.
func mustDial(tb testing.TB, s *activation.Socket, text string) int {
	tb.Helper()
	fd := mustSocket(tb, getInt(tb, s.FD(), unix.SOL_SOCKET, unix.SO_DOMAIN), getInt(tb, s.FD(), unix.SOL_SOCKET, unix.SO_TYPE))
	sa, err := unix.Getsockname(s.FD()) // connecting to a wildcard reaches this machine
	if err == nil {
		err = unix.Connect(fd, sa)
	}
	if err == nil && text != "" {
		_, err = unix.Write(fd, []byte(text))
	}
	if err != nil {
		tb.Fatalf("connect to %s: %v", s.Address(), err)
	}
	return fd
}

func mustSocket(tb testing.TB, domain, kind int) int {
	tb.Helper()
	fd, err := unix.Socket(domain, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { unix.Close(fd) })
	return fd
}

// closeNow closes a descriptor so that nobody has it any more: a process that is being started has a copy until its exec.
func closeNow(fd int) {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	unix.Close(fd)
}

func getInt(tb testing.TB, fd, level, option int) int {
	tb.Helper()
	v, err := unix.GetsockoptInt(fd, level, option)
	if err != nil {
		tb.Fatal(err)
	}
	return v
}

// backlogOf is what listen(2) was told (tcpi_sacked of a listener).
func backlogOf(tb testing.TB, fd int) int {
	tb.Helper()
	info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil {
		tb.Fatal(err)
	}
	return int(info.Sacked)
}

// wantErrno fails the test unless err is the error number; 0: none.
func wantErrno(tb testing.TB, what string, err error, want unix.Errno) {
	tb.Helper()
	if want == 0 && err != nil || want != 0 && !errors.Is(err, want) {
		tb.Errorf("%s: got %v, want %v", what, err, want)
	}
}
