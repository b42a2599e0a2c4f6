package supervisor

import (
	"context"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"testing"
	"time"

	"hibergate/activation"
	"hibergate/activation/nettest"
	"hibergate/supervisor/process"
)

// A program that knows nothing of us is started by its first client, serves it, sleeps and is woken again.
func TestAdoptRealProgram(t *testing.T) {
	nettest.Need(t, nettest.Namespaces, nettest.Tool("python3"))
	svc := &Service{
		Name: "web", Handoff: Adopt, Ready: Ready{Type: ReadyBind},
		Sockets: []activation.Spec{{Name: "web", Address: activation.Address{Network: activation.TCP, IP: netip.MustParseAddr("127.0.0.1"), Port: 18080}}},
		Exec:    process.Exec{Command: []string{"/usr/bin/python3", "-m", "http.server", "18080", "--bind", "127.0.0.1"}},
		Idle:    Idle{StopAfter: 200 * time.Millisecond},
		Start:   Start{Timeout: 10 * time.Second}, Stop: DefaultStop(), Restart: DefaultRestart(), Limits: Limits{SourcePrefix: 64},
	}
	s, err := New([]*Service{svc}, Options{Logger: slog.New(slog.NewTextHandler(os.Stderr, nil)), Name: "adopt-test"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- s.Run(ctx) }()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 20 * time.Second}
	for range 3 {
		resp, err := client.Get("http://127.0.0.1:18080/")
		if err != nil {
			t.Fatal(err)
		}
		io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		nettest.Eventually(t, func() error {
			st, err := s.Status(ctx, "web", false)
			if err == nil && st[0].State != "listening" {
				return io.EOF
			}
			return err
		})
	}
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
