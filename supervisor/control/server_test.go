package control

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
	"hibergate/supervisor"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

// fake knows one service, "web". A "slow" one is never awake and tells when its client is gone.
type fake struct {
	mu    sync.Mutex
	calls []string
	gone  chan struct{} // closed when a request for "slow" ended
}

func (f *fake) note(format string, args ...any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, fmt.Sprintf(format, args...))
}

func (f *fake) one(ctx context.Context, name string) (supervisor.Status, error) {
	switch name {
	case "web":
		return supervisor.Status{Name: name, State: "running"}, nil
	case "slow":
		<-ctx.Done()
		close(f.gone)
		return supervisor.Status{}, ctx.Err()
	case "late":
		return supervisor.Status{}, supervisor.ErrShuttingDown
	case "each":
		return supervisor.Status{}, fmt.Errorf("service %q: %w", name, supervisor.ErrPerConnection)
	case "asleep":
		return supervisor.Status{}, fmt.Errorf("freeze service %q: %w", name, supervisor.ErrNotRunning)
	case "bad":
		return supervisor.Status{}, errors.New("launch /bin/bad: exit status 1")
	}
	return supervisor.Status{}, fmt.Errorf("service %q: %w", name, supervisor.ErrUnknownService)
}

func (f *fake) Status(ctx context.Context, name string, flows bool) ([]supervisor.Status, error) {
	f.note("status %q %v", name, flows)
	if name == "" {
		name = "web"
	}
	st, err := f.one(ctx, name)
	return []supervisor.Status{st}, err
}

func (f *fake) Wake(ctx context.Context, name string) (supervisor.Status, error) {
	f.note("wake %q", name)
	return f.one(ctx, name)
}

func (f *fake) Sleep(ctx context.Context, name string) (supervisor.Status, error) {
	f.note("sleep %q", name)
	return f.one(ctx, name)
}

func (f *fake) Restart(ctx context.Context, name string) (supervisor.Status, error) {
	f.note("restart %q", name)
	return f.one(ctx, name)
}

func (f *fake) Freeze(ctx context.Context, name string) (supervisor.Status, error) {
	f.note("freeze %q", name)
	return f.one(ctx, name)
}

func (f *fake) Thaw(ctx context.Context, name string) (supervisor.Status, error) {
	f.note("thaw %q", name)
	return f.one(ctx, name)
}

func (f *fake) Reset(ctx context.Context, name string) (supervisor.Status, error) {
	f.note("reset %q", name)
	return f.one(ctx, name)
}

func (f *fake) Learn(_ context.Context, name string) ([]supervisor.LearnedSocket, error) {
	f.note("learn %q", name)
	if name == "git" {
		return nil, fmt.Errorf("service %q: %w", name, supervisor.ErrNothingToLearn)
	}
	return []supervisor.LearnedSocket{{Address: "tcp://[::]:80", Family: "dual"}}, nil
}

func options(path string) Options {
	return Options{Path: path, Version: "v1.2.3", Logger: slog.New(slog.DiscardHandler)}
}

// start serves a fake supervisor for the time of the test.
func start(t *testing.T) (string, *fake) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "c.sock")
	s, err := Listen(t.Context(), options(path))
	if err != nil {
		t.Fatal(err)
	}
	f := &fake{gone: make(chan struct{})}
	served := make(chan error, 1)
	go func() { served <- s.Serve(f) }()
	t.Cleanup(func() {
		if err := s.Close(context.Background()); err != nil {
			t.Error("close:", err)
		}
		if err := <-served; err != nil {
			t.Error("serve:", err)
		}
		if left, _ := os.ReadDir(filepath.Dir(path)); len(left) != 0 {
			t.Error("left behind:", left)
		}
	})
	return path, f
}

// speak sends one request over conn and returns its reply and the body of that, read and closed.
func speak(t *testing.T, conn net.Conn, request string) (http.Response, string) {
	t.Helper()
	if _, err := io.WriteString(conn, request); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return *resp, string(body)
}

func dial(t *testing.T, path string) net.Conn {
	t.Helper()
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func TestReplies(t *testing.T) {
	t.Parallel()
	path, f := start(t)
	tests := []struct {
		request string // without "HTTP/1.1" and Host
		code    int
		error   string // empty: a reply that is not an error
		call    string // what the supervisor was asked; empty: nothing
	}{
		{request: "GET /v1/status", code: 200, call: `status "" false`},
		{request: "GET /v1/status?service=web&flows=1", code: 200, call: `status "web" true`},
		{request: "GET /v1/status?service=nix", code: 404, error: `service "nix": unknown service`, call: `status "nix" false`},
		{request: "GET /v1/status?colour=web", code: 400, error: `unknown parameter "colour"`},
		{request: "GET /v1/status?service=a&service=b", code: 400, error: `parameter "service" is given 2 times`},
		{request: "GET /v1/status?flows=perhaps", code: 400, error: `parameter "flows": "perhaps" is not a boolean`},
		{request: "GET /v1/status?%zz", code: 400, error: `invalid URL escape "%zz"`},
		{request: "POST /v1/services/web/wake", code: 200, call: `wake "web"`},
		{request: "POST /v1/services/web/sleep", code: 200, call: `sleep "web"`},
		{request: "POST /v1/services/web/restart", code: 200, call: `restart "web"`},
		{request: "POST /v1/services/web/freeze", code: 200, call: `freeze "web"`},
		{request: "POST /v1/services/web/thaw", code: 200, call: `thaw "web"`},
		{request: "POST /v1/services/web/reset", code: 200, call: `reset "web"`},
		{request: "POST /v1/services/web/learn", code: 200, call: `learn "web"`},
		{request: "POST /v1/services/git/learn", code: 409, call: `learn "git"`, error: `service "git": only with handoff = "adopt" does a program bind its sockets itself`},
		{request: "POST /v1/services/a%2Fb/sleep", code: 404, error: `service "a/b": unknown service`, call: `sleep "a/b"`},
		{request: "POST /v1/services/late/wake", code: 503, error: supervisor.ErrShuttingDown.Error(), call: `wake "late"`},
		{request: "POST /v1/services/each/freeze", code: 409, error: `service "each": ` + supervisor.ErrPerConnection.Error(), call: `freeze "each"`},
		{request: "POST /v1/services/asleep/freeze", code: 409, error: `freeze service "asleep": ` + supervisor.ErrNotRunning.Error(), call: `freeze "asleep"`},
		{request: "POST /v1/services/bad/wake", code: 500, error: "launch /bin/bad: exit status 1", call: `wake "bad"`},
		{request: "GET /v1/version", code: 200},
		{request: "GET /v1/services/web/wake", code: 405, error: "/v1/services/web/wake takes POST, not GET"},
		{request: "GET /v1/services/web/reset", code: 405, error: "/v1/services/web/reset takes POST, not GET"},
		{request: "DELETE /v1/status", code: 405, error: "/v1/status takes GET, not DELETE"},
		{request: "GET /", code: 404, error: "no such path: /"},
		{request: "GET /v2/status", code: 404, error: "no such path: /v2/status"},
	}
	for _, test := range tests {
		f.mu.Lock()
		f.calls = nil
		f.mu.Unlock()
		resp, body := speak(t, dial(t, path), test.request+" HTTP/1.1\r\nHost: x\r\n\r\n")
		var reply ErrorReply
		if test.code != 200 {
			if err := json.Unmarshal([]byte(body), &reply); err != nil {
				t.Errorf("%s: %v: %q", test.request, err, body)
			}
		}
		if got := resp.StatusCode; got != test.code || reply.Error != test.error {
			t.Errorf("%s: got %d %q, want %d %q", test.request, got, reply.Error, test.code, test.error)
		}
		if got := resp.Header.Get("Content-Type"); got != "application/json" || !strings.HasSuffix(body, "\n") {
			t.Errorf("%s: got type %q, body %q", test.request, got, body)
		}
		f.mu.Lock()
		if got := strings.Join(f.calls, "; "); got != test.call {
			t.Errorf("%s: asked the supervisor %q, want %q", test.request, got, test.call)
		}
		f.mu.Unlock()
	}
}

// A client that announces a body and never sends it must get its answer and not hold the connection.
func TestBodyIsRefused(t *testing.T) {
	t.Parallel()
	path, f := start(t)
	conn := dial(t, path)
	resp, body := speak(t, conn, "POST /v1/services/web/wake HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n")
	if resp.StatusCode != http.StatusRequestEntityTooLarge || !resp.Close {
		t.Errorf("got %d %q, close %v", resp.StatusCode, body, resp.Close)
	}
	if len(f.calls) != 0 {
		t.Errorf("asked the supervisor %q", f.calls)
	}
}

func TestClient(t *testing.T) {
	t.Parallel()
	path, f := start(t)
	c := Client{Path: path}
	ctx := t.Context()

	list, err := c.Status(ctx, "", false)
	if diff := cmp.Diff([]supervisor.Status{{Name: "web", State: "running"}}, list); err != nil || diff != "" {
		t.Errorf("status: %v %s", err, diff)
	}
	if st, err := c.Wake(ctx, "web"); err != nil || st.State != "running" {
		t.Errorf("wake: got %+v, %v", st, err)
	}
	if st, err := c.Sleep(ctx, "web"); err != nil || st.Name != "web" {
		t.Errorf("sleep: got %+v, %v", st, err)
	}
	for i, act := range []func(context.Context, string) (supervisor.Status, error){c.Restart, c.Freeze, c.Thaw, c.Reset} {
		if st, err := act(ctx, "web"); err != nil || st.Name != "web" {
			t.Errorf("request %d: got %+v, %v", i, st, err)
		}
	}
	_, err = c.Wake(ctx, "a/b?c")
	var reply *ReplyError
	if !errors.As(err, &reply) || reply.Code != 404 || reply.Text != `service "a/b?c": unknown service` {
		t.Errorf("wake of an unknown service: got %v", err)
	}
	want := []string{
		`status "" false`, `wake "web"`, `sleep "web"`,
		`restart "web"`, `freeze "web"`, `thaw "web"`, `reset "web"`, `wake "a/b?c"`,
	}
	if diff := cmp.Diff(want, f.calls); diff != "" {
		t.Error("calls:", diff)
	}
}

// A request ends with the client that made it.
func TestClientGone(t *testing.T) {
	t.Parallel()
	path, f := start(t)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := Client{Path: path}.Wake(ctx, "slow")
		done <- err
	}()
	nettest.Eventually(t, func() error {
		f.mu.Lock()
		defer f.mu.Unlock()
		if len(f.calls) == 0 {
			return errors.New("not asked")
		}
		return nil
	})
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want %v", err, context.Canceled)
	}
	<-f.gone
}

func TestClientErrors(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	missing, stale, other := filepath.Join(dir, "missing"), filepath.Join(dir, "stale"), filepath.Join(dir, "other")
	leaveStale(t, stale)
	l, err := net.Listen("unix", other)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.NotFoundHandler()}
	go srv.Serve(l)
	defer srv.Close()

	for path, want := range map[string]string{
		missing: "connect " + missing + ": no such file or directory; is hibergated running?",
		stale:   "connect " + stale + ": connection refused; is hibergated running?",
		other:   other + " answered 404 Not Found: is this hibergated?",
	} {
		if _, err := (Client{Path: path}).Status(t.Context(), "", false); err == nil || err.Error() != want {
			t.Errorf("got %v, want %s", err, want)
		}
	}
}

// More connections than the limit wait for their turn, and get it.
func TestConnectionLimit(t *testing.T) {
	t.Parallel()
	path, _ := start(t)
	var held []net.Conn
	for range maxConns {
		held = append(held, dial(t, path))
	}
	done := make(chan error, 1)
	go func() {
		_, err := Client{Path: path}.Status(t.Context(), "", false)
		done <- err
	}()
	for _, c := range held {
		c.Close()
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// The mode keeps other users out; where somebody has opened it, the credentials do.
func TestOtherUserIsRefused(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.RealRoot)
	path, f := start(t)
	for dir := filepath.Dir(path); dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := dialAs(65534, path); !errors.Is(err, unix.EACCES) {
		t.Fatalf("connect to the socket as it is: got %v, want %v", err, unix.EACCES)
	}
	if err := os.Chmod(path, 0o666); err != nil {
		t.Fatal(err)
	}
	for _, request := range []string{"GET /v1/status", "GET /v1/version", "POST /v1/services/web/wake"} {
		conn, err := dialAs(65534, path)
		if err != nil {
			t.Fatal(err)
		}
		resp, body := speak(t, conn, request+" HTTP/1.1\r\nHost: x\r\n\r\n")
		conn.Close()
		if resp.StatusCode != http.StatusForbidden || !strings.Contains(body, "user 65534 may not") {
			t.Errorf("%s: got %d %s", request, resp.StatusCode, body)
		}
	}
	if len(f.calls) != 0 {
		t.Errorf("asked the supervisor %q", f.calls)
	}
}

// dialAs connects as another user: on a thread whose identity it changes and which ends with it.
func dialAs(uid int, path string) (conn net.Conn, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the runtime throws the thread away
		if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), uintptr(uid), ^uintptr(0)); e != 0 {
			err = e
			return
		}
		conn, err = net.Dial("unix", path)
	}()
	<-done
	return conn, err
}

func leaveStale(t *testing.T, path string) {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
}

func TestListenMode(t *testing.T) { // not parallel: the umask belongs to the process
	defer syscall.Umask(syscall.Umask(0))
	path := filepath.Join(t.TempDir(), "run", "hibergated", "c.sock")
	s, err := Listen(t.Context(), options(path))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close(t.Context())
	for name, want := range map[string]os.FileMode{
		path:               os.ModeSocket | 0o600,
		path + ".lock":     0o600,
		filepath.Dir(path): os.ModeDir | 0o755,
	} {
		info, err := os.Stat(name)
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode() != want {
			t.Errorf("%s: got mode %v, want %v", name, info.Mode(), want)
		}
	}
}

func TestListenTakesOverStaleSocket(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "c.sock")
	leaveStale(t, path)
	if err := os.WriteFile(path+".lock", nil, 0o600); err != nil { // a killed predecessor leaves this too
		t.Fatal(err)
	}
	s, err := Listen(t.Context(), options(path))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(context.Background()); err != nil {
		t.Error(err)
	}
}

func TestListenRefuses(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	ours, foreign, file := filepath.Join(dir, "ours"), filepath.Join(dir, "foreign"), filepath.Join(dir, "file")
	s, err := Listen(t.Context(), options(ours))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close(t.Context())
	l, err := net.Listen("unix", foreign)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	long := filepath.Join(dir, strings.Repeat("x", maxPath))

	for path, want := range map[string]string{
		ours:         "another hibergated is running: it holds " + ours + ".lock",
		foreign:      "another hibergated is running: it answers on " + foreign,
		file:         file + " exists and is not a socket",
		long:         "the path is longer than 107 bytes",
		"run/c.sock": "the path must be absolute",
	} {
		_, err := Listen(t.Context(), options(path))
		if want = "open control socket " + path + ": " + want; err == nil || err.Error() != want {
			t.Errorf("got %v, want %s", err, want)
		}
	}
	for _, path := range []string{ours, foreign, file} {
		if _, err := os.Lstat(path); err != nil {
			t.Error("removed:", err)
		}
	}
	for _, path := range []string{foreign, file} {
		if _, err := os.Lstat(path + ".lock"); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s.lock: got %v, want it removed", path, err)
		}
	}
}

// Of many that start at once over a stale socket, one runs; and the path is free for
// the next as soon as that one has closed.
func TestListenRace(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "c.sock")
	for range 50 {
		leaveStale(t, path)
		var wg sync.WaitGroup
		won := make(chan *Server, 8)
		for range cap(won) {
			wg.Go(func() {
				s, err := Listen(t.Context(), options(path))
				switch {
				case err == nil:
					won <- s
				case !errors.Is(err, ErrRunning):
					t.Error(err)
				}
			})
		}
		wg.Wait()
		close(won)
		if len(won) != 1 {
			t.Errorf("%d supervisors run, want 1", len(won))
		}
		for s := range won {
			if err := s.Close(context.Background()); err != nil {
				t.Error(err)
			}
		}
	}
}
