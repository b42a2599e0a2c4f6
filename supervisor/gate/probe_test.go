package gate

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"hibergate/activation"
)

// listenTCP returns a listener on loopback and a destination that leads there.
func listenTCP(t *testing.T) (net.Listener, Destination) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	at := l.Addr().(*net.TCPAddr).AddrPort()
	return l, Destination{Network: activation.TCP, Host: at.Addr().String(), Port: at.Port()}
}

func probeSpec(d ...Destination) *Spec {
	return &Spec{Destinations: d, Ready: Ready{Interval: time.Millisecond, Timeout: 30 * time.Second}}
}

func noCommand(context.Context, []string) error { return errors.New("no command was to be run") }

func TestProbeConnect(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "s")
	unixL, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer unixL.Close()
	l, tcp := listenTCP(t)
	named := tcp
	named.Host = "localhost"
	for _, tt := range []struct {
		l  net.Listener
		to Destination
	}{{l, tcp}, {l, named}, {unixL, Destination{Network: activation.Unix, Path: path}}} {
		targets, err := probeSpec(tt.to).Probe(t.Context(), noCommand)
		if err != nil || len(targets) != 1 || targets[0].FD < 0 {
			t.Fatalf("%s: %v, %v", tt.to, targets, err)
		}
		c, err := tt.l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		// It is a connection that the first client can have.
		if _, err := unix.Write(targets[0].FD, []byte("x")); err != nil {
			t.Error(err)
		}
		Abandon(targets)
		b := make([]byte, 2)
		if n, _ := c.Read(b); string(b[:n]) != "x" {
			t.Errorf("%s: got %q", tt.to, b[:n])
		}
		if n, err := c.Read(b); err == nil {
			t.Errorf("%s: %d bytes after the end", tt.to, n)
		}
		c.Close()
	}
}

// The others come too where one is ready, and it is told which are not where none is.
func TestProbeSeveral(t *testing.T) {
	t.Parallel()
	_, up := listenTCP(t)
	gone, down := listenTCP(t)
	gone.Close()
	missing := Destination{Network: activation.Unix, Path: filepath.Join(t.TempDir(), "none")}
	targets, err := probeSpec(down, missing, up).Probe(t.Context(), noCommand)
	if err != nil || len(targets) != 3 || targets[0].FD >= 0 || targets[1].FD >= 0 || targets[2].FD < 0 {
		t.Errorf("%v, %v", targets, err)
	}
	Abandon(targets)
	_, err = probeSpec(down, missing).Probe(t.Context(), noCommand)
	if !errors.Is(err, unix.ECONNREFUSED) || !errors.Is(err, unix.ENOENT) || !strings.Contains(err.Error(), down.String()) {
		t.Errorf("got %v", err)
	}
}

// full is a listener whose queue is full, so that SYNs are dropped.
func full(t *testing.T) (fd int, at activation.Address) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	at = activation.Address{Network: activation.TCP, IP: netip.AddrFrom4([4]byte{127, 0, 0, 1}), Port: uint16(sa.(*unix.SockaddrInet4).Port)}
	for {
		c, done, err := begin(at)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(c) })
		if !done { // on loopback the handshake is over at once, or never
			p := []unix.PollFd{{Fd: int32(c), Events: unix.POLLOUT}}
			if n, _ := unix.Poll(p, 100); n == 0 {
				return fd, at
			}
		}
	}
}

func TestConnectSilence(t *testing.T) {
	t.Parallel()
	_, at := full(t)
	if fd, err := dial(t.Context(), at, 300*time.Millisecond); !errors.Is(err, unix.ETIMEDOUT) {
		t.Errorf("got %d, %v", fd, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if fd, err := dial(ctx, at, time.Hour); !errors.Is(err, unix.ETIMEDOUT) {
		t.Errorf("got %d, %v", fd, err)
	}
}

// A destination that begins to answer late is found by a new try, not by the kernel's next one.
func TestConnectAnew(t *testing.T) {
	t.Parallel()
	l, at := full(t)
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		for {
			c, _, err := unix.Accept4(l, unix.SOCK_CLOEXEC)
			if err != nil {
				return
			}
			unix.Close(c)
		}
	}()
	<-drained
	fd, err := dial(t.Context(), at, 30*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(fd)
}

func TestProbeHTTP(t *testing.T) {
	t.Parallel()
	l, to := listenTCP(t)
	status := make(chan int, 1)
	server := http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		code := <-status
		if r.URL.Path != "/healthz" || r.URL.RawQuery != "full" {
			code = http.StatusTeapot
		}
		w.Header().Set("Location", "/elsewhere")
		w.WriteHeader(code)
		fmt.Fprint(w, strings.Repeat("x", 1<<20)) // more than anybody wants to read
	})}
	defer server.Close()
	go server.Serve(l)
	s := probeSpec(to)
	s.Ready.Type, s.Ready.Path, s.Ready.Status = ReadyHTTP, "/healthz?full", 204
	for _, tt := range []struct {
		code int
		want string
	}{{204, ""}, {200, "200 OK, not 204"}, {302, "302 Found, not 204"}, {503, "503 Service Unavailable, not 204"}} {
		status <- tt.code
		targets, err := s.Probe(t.Context(), noCommand)
		switch {
		case tt.want == "" && (err != nil || len(targets) != 1 || targets[0].FD >= 0):
			t.Errorf("%d: %v, %v", tt.code, targets, err)
		case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)):
			t.Errorf("%d: %v", tt.code, err)
		}
	}
}

func TestProbeCommand(t *testing.T) {
	t.Parallel()
	s := probeSpec(Destination{Network: activation.UDP, Host: "127.0.0.1", Port: 53})
	s.Ready.Type, s.Ready.Command = ReadyCommand, []string{"/bin/check", "it"}
	var said []string
	tries := 0
	run := func(_ context.Context, argv []string) error {
		if strings.Join(argv, " ") != "/bin/check it" {
			t.Errorf("run %q", argv)
		}
		if tries++; tries < 3 {
			return fmt.Errorf("try %d", tries)
		}
		return nil
	}
	targets, err := s.Await(t.Context(), run, func(err error) { said = append(said, err.Error()) })
	if err != nil || len(targets) != 1 || tries != 3 || strings.Join(said, ", ") != "ready: try 1, ready: try 2" {
		t.Errorf("%v, %v after %d tries: %q", targets, err, tries, said)
	}
	gone, to := listenTCP(t)
	s.Destinations = []Destination{to}
	gone.Close()
	if targets, err := s.Probe(t.Context(), func(context.Context, []string) error { return nil }); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("%v, %v: the command said yes, and nobody listens", targets, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	missing := func(error) { cancel() }
	_, err = s.Await(ctx, func(ctx context.Context, _ []string) error { return errors.Join(ctx.Err(), os.ErrNotExist) }, missing)
	if !errors.Is(err, os.ErrNotExist) || errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want what was missing at last", err)
	}
}

func TestProbeNames(t *testing.T) {
	t.Parallel()
	_, up := listenTCP(t)
	unknown := Destination{Network: activation.TCP, Host: "no-such-name.invalid", Port: 1}
	if targets, err := probeSpec(unknown).Probe(t.Context(), noCommand); err == nil || !strings.Contains(err.Error(), unknown.String()) {
		t.Errorf("%v, %v", targets, err)
	}
	targets, err := probeSpec(unknown, up).Probe(t.Context(), noCommand)
	if err != nil || len(targets) != 1 || targets[0].Index != 1 {
		t.Errorf("%v, %v", targets, err)
	}
	Abandon(targets)
}

func TestLaunched(t *testing.T) {
	t.Parallel()
	s := probeSpec(Destination{Network: activation.TCP, Host: "127.0.0.1", Port: 1})
	s.Ready.Type = ReadyLaunched
	if targets, err := s.Probe(t.Context(), noCommand); err == nil {
		t.Errorf("ready before it was launched: %v", targets)
	}
	if targets, err := s.Launched(t.Context()); err != nil || len(targets) != 1 || targets[0].FD >= 0 {
		t.Errorf("%v, %v", targets, err)
	}
}

// What was stopped is waited for until it refuses connections, or is not ready any more.
func TestAwaitEnd(t *testing.T) {
	t.Parallel()
	l, to := listenTCP(t)
	s := probeSpec(to)
	asked := 0
	s.Ready.Type = ReadyCommand
	run := func(context.Context, []string) error {
		if asked++; asked == 3 {
			l.Close()
		}
		return nil
	}
	if err := s.AwaitEnd(t.Context(), run); err != nil || asked != 3 {
		t.Errorf("asked %d times: %v", asked, err)
	}
	_, to = listenTCP(t)
	s = probeSpec(to)
	s.Ready.Type = ReadyCommand
	if err := s.AwaitEnd(t.Context(), func(context.Context, []string) error { return errors.New("not ready") }); err != nil {
		t.Error(err)
	}
	s.Ready.Type = ReadyConnect
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := s.AwaitEnd(ctx, noCommand); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("of what stays: %v", err)
	}
}

// What a hostile destination answers is told in a few words that do nothing to a terminal.
func TestProbeHostile(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("x", 10000)
	for _, answer := range []string{
		"HTTP/1.1 404 \x1b]0;owned\x07\x1b[2J\x80" + long + "\r\n\r\n",
		"HTTP/1.1 200 OK\r\n\x1b[2J" + long + "\r\n\r\n",
		"\x1b[2J" + long + "\r\n\r\n",
		"HTTP/1.1 200 OK\r\nContent-Length: \x1b[2J" + long + "\r\n\r\n",
		strings.Repeat("HTTP/1.1 100 Continue\r\n\r\n", 5000),
	} {
		b := backend(t, "tcp")
		go func() {
			c, err := b.Accept()
			if err != nil {
				return
			}
			_, _ = c.Read(make([]byte, 4096))
			_, _ = c.Write([]byte(answer))
			c.Close()
		}()
		r := Ready{Type: ReadyHTTP, Path: "/", Status: 200, Timeout: patience}
		err := r.get(t.Context(), addressOf(b.Addr()))
		if err == nil || len(err.Error()) > 300 || strings.ContainsFunc(err.Error(), func(r rune) bool { return r < ' ' || r == utf8.RuneError }) {
			t.Errorf("%.20q: got %v", answer, err)
		}
	}
}
