package supervisor

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"hibergate/activation"
	"hibergate/activation/adopt"
	"hibergate/activation/nettest"
	"hibergate/supervisor/process"
)

// listeners.py listens where the lines of the file say that is its argument, as "HOST PORT", and says ok to everybody.
const listenersPy = `
import selectors, socket, sys
s = selectors.DefaultSelector()
for line in open(sys.argv[1]):
    host, port = line.split()
    l = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    l.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if ":" in host:
        l.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    l.bind((host, int(port)))
    l.listen(5)
    s.register(l, selectors.EVENT_READ)
while True:
    for key, _ in s.select():
        c = key.fileobj.accept()[0]
        c.sendall(b"ok\n")
        c.close()
`

// adopting is a supervisor with one program that listens where the test likes.
type adopting struct {
	*Supervisor
	t    *testing.T
	file string
}

func mustAdopt(t *testing.T, svc *Service, state string, where ...string) *adopting {
	t.Helper()
	nettest.Need(t, nettest.Namespaces, nettest.Tool("python3"))
	dir := t.TempDir()
	a := &adopting{t: t, file: filepath.Join(dir, "where")}
	a.listens(where...)
	script := filepath.Join(dir, "listeners.py")
	if err := os.WriteFile(script, []byte(listenersPy), 0o600); err != nil {
		t.Fatal(err)
	}
	svc.Name, svc.Handoff, svc.Ready.Type = "web", Adopt, ReadyBind
	svc.Exec = process.Exec{Command: []string{"/usr/bin/python3", script, a.file}}
	svc.Start.Timeout, svc.Stop, svc.Limits.SourcePrefix = 10*time.Second, DefaultStop(), 64
	svc.Restart = Restart{Delay: time.Millisecond, MaxDelay: time.Millisecond, Interval: time.Hour}
	var err error
	a.Supervisor, err = New([]*Service{svc}, Options{Logger: slog.New(slog.DiscardHandler), Name: fmt.Sprintf("adopt-%d-%s", os.Getpid(), t.Name()), State: state})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- a.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return a
}

// listens says where the program is to listen the next time.
func (a *adopting) listens(where ...string) {
	a.t.Helper()
	if err := os.WriteFile(a.file, []byte(strings.Join(where, "\n")+"\n"), 0o600); err != nil {
		a.t.Fatal(err)
	}
}

// wants checks what is known of where it listens, and that it answers there when it is woken, and when it sleeps.
func (a *adopting) wants(addresses ...string) {
	a.t.Helper()
	if _, err := a.Wake(a.t.Context(), "web"); err != nil {
		a.t.Fatal(err)
	}
	// It is ready with the first of several sockets: how many there will be only the program knows.
	nettest.Eventually(a.t, func() error {
		got, err := a.Learn(a.t.Context(), "web")
		if err != nil {
			return err
		}
		var known []string
		for _, l := range got {
			known = append(known, strings.TrimSpace(l.Address+" "+l.Family))
		}
		slices.Sort(known)
		if diff := cmp.Diff(addresses, known); diff != "" {
			return fmt.Errorf("where it listens (-want +got):\n%s", diff)
		}
		return nil
	})
	for range 2 {
		for _, address := range addresses {
			address, _, _ = strings.Cut(strings.TrimPrefix(address, "tcp://"), " ")
			c, err := net.DialTimeout("tcp", strings.Replace(address, "0.0.0.0", "127.0.0.1", 1), 10*time.Second)
			if err != nil {
				a.t.Fatal(err)
			}
			c.SetDeadline(time.Now().Add(10 * time.Second))
			if b, err := io.ReadAll(c); string(b) != "ok\n" {
				a.t.Errorf("%s: got %q, %v", address, b, err)
			}
			c.Close()
		}
		if _, err := a.Sleep(a.t.Context(), "web"); err != nil {
			a.t.Fatal(err)
		}
	}
}

func learnFrom(patterns ...adopt.Pattern) *Service {
	svc := &Service{}
	for _, p := range patterns {
		svc.Learn = append(svc.Learn, Learn{Pattern: p, Spec: activation.Spec{Name: "web"}})
	}
	return svc
}

// A program that is told to listen elsewhere gets exactly what it asks for then, no more and no less, and what it
// does not want any more is given up. The next supervisor knows it.
func TestLearnAnew(t *testing.T) {
	t.Parallel()
	state := t.TempDir()
	pattern := adopt.Pattern{Network: activation.TCP, Port: 18301}
	a := mustAdopt(t, learnFrom(pattern), state, "0.0.0.0 18301")
	a.wants("tcp://0.0.0.0:18301")
	a.listens("127.0.0.1 18301")
	a.wants("tcp://127.0.0.1:18301")
	a.listens(":: 18301")
	a.wants("tcp://[::]:18301 dual")
	a.listens("127.0.0.1 18301", "::1 18301")
	a.wants("tcp://127.0.0.1:18301", "tcp://[::1]:18301")
	a.listens("127.0.0.1 18301")
	a.wants("tcp://127.0.0.1:18301")
	st, err := a.Status(t.Context(), "web", false)
	if err != nil || st[0].Failures != 0 {
		t.Errorf("got %+v, %v", st, err)
	}
	specs, err := loadLearned(state, learnFrom(pattern))
	if err != nil || len(specs) != 0 {
		t.Errorf("a service without a name: got %v, %v", specs, err)
	}
	svc := learnFrom(pattern)
	svc.Name = "web"
	nettest.Eventually(t, func() error {
		specs, err := loadLearned(state, svc)
		if err != nil || len(specs) != 1 || specs[0].Address.String() != "tcp://127.0.0.1:18301" {
			return fmt.Errorf("kept: got %v, %w", specs, err)
		}
		return nil
	})
}

// A program may listen in more places than we care to hold for it.
func TestLearnMany(t *testing.T) {
	t.Parallel()
	var where []string
	for port := range 100 {
		where = append(where, fmt.Sprintf("127.0.0.1 %d", 18400+port))
	}
	a := mustAdopt(t, learnFrom(adopt.Auto), "", where...)
	if _, err := a.Wake(t.Context(), "web"); err != nil {
		t.Fatal(err)
	}
	nettest.Eventually(t, func() error {
		st, err := a.Status(t.Context(), "web", false)
		if err != nil {
			return err
		}
		if len(st[0].Sockets) != adopt.MaxSockets || len(st[0].Notes) == 0 {
			return fmt.Errorf("got %d sockets, notes %q", len(st[0].Sockets), st[0].Notes)
		}
		return nil
	})
}

// A learned address that is taken when the next supervisor comes is learned anew, as soon as it can be had.
func TestLearnedTaken(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	state := t.TempDir()
	other, err := net.Listen("tcp4", "127.0.0.1:18302")
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(state, "learned")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "web.json"), []byte(`{"sockets": [{"address": "tcp://127.0.0.1:18302"}]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	svc := learnFrom(adopt.Pattern{Network: activation.TCP, Port: 18302})
	a := mustAdopt(t, svc, state, "127.0.0.1 18302")
	nettest.Eventually(t, func() error {
		st, err := a.Status(t.Context(), "web", false)
		if err == nil && st[0].Failures == 0 {
			err = fmt.Errorf("got %+v, want that it fails", st[0])
		}
		return err
	})
	other.Close()
	nettest.Eventually(t, func() error {
		st, err := a.Status(t.Context(), "web", false)
		if err == nil && st[0].State != Running.String() {
			err = fmt.Errorf("got %+v, want that it runs", st[0])
		}
		return err
	})
	a.wants("tcp://127.0.0.1:18302")
}
