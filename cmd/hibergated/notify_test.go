package main

import (
	"context"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"hibergate/supervisor"
)

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

func TestStatusLine(t *testing.T) {
	t.Parallel()
	for want, c := range map[string]supervisor.Counts{
		"2 of 5 services awake":            {Awake: 2, Total: 5},
		"0 of 1 service awake":             {Total: 1},
		"0 of 5 services awake, 1 failing": {Total: 5, Failing: 1},
	} {
		if got := statusLine(c); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}

// Without systemd nothing is sent, and nobody asks for counts.
func TestNotifierWithoutSystemd(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "")
	n := newNotifier(quiet())
	n.ready(1)
	n.stopping()
	ended := make(chan struct{})
	close(ended)
	n.run(t.Context(), ended, nil)
	if n.changed != nil {
		t.Error("counts are wanted")
	}
}

func TestNotifierSpeaksToSystemd(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	t.Setenv("NOTIFY_SOCKET", path)
	t.Setenv("WATCHDOG_USEC", "5000000")
	t.Setenv("WATCHDOG_PID", "")
	n := newNotifier(quiet())
	if n.watchdog != 5*time.Second {
		t.Errorf("watchdog: got %v, want 5s", n.watchdog)
	}
	n.ready(3)
	n.stopping()
	ended := make(chan struct{})
	close(ended) // what was said before the end is still sent
	n.run(t.Context(), ended, nil)
	buf := make([]byte, 256)
	for _, want := range []string{"READY=1\nSTATUS=0 of 3 services awake", "STOPPING=1"} {
		size, err := conn.Read(buf)
		if got := string(buf[:size]); err != nil || got != want {
			t.Errorf("got %q, %v, want %q", got, err, want)
		}
	}
}

// The watchdog hears from us for as long as the loop answers, at half the time it allows.
func TestNotifierRun(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var sent []string
		var stuck atomic.Bool
		n := &notifier{logger: quiet(), send: func(s string) { sent = append(sent, s) }, changed: make(chan supervisor.Counts, 1), watchdog: 10 * time.Second}
		ping := func(ctx context.Context) error {
			if stuck.Load() {
				<-ctx.Done()
				return ctx.Err()
			}
			return nil
		}
		ended, done := make(chan struct{}), make(chan struct{})
		go func() { n.run(t.Context(), ended, ping); close(done) }()
		n.changed <- supervisor.Counts{Awake: 1, Total: 2}
		time.Sleep(11 * time.Second)
		synctest.Wait()
		stuck.Store(true)
		time.Sleep(60 * time.Second)
		close(ended)
		<-done
		if diff := cmp.Diff([]string{"STATUS=1 of 2 services awake", "WATCHDOG=1", "WATCHDOG=1"}, sent); diff != "" {
			t.Error(diff)
		}
	})
}

// The first request to end is polite, each further one is not, and a terminal that goes away is neither.
func TestWatchSignals(t *testing.T) {
	t.Parallel()
	signals, ended := make(chan os.Signal), make(chan struct{})
	var did []string
	done := make(chan struct{})
	go func() {
		defer close(done)
		watchSignals(signals, ended, quiet(), func() { did = append(did, "shutdown") }, func() { did = append(did, "kill") })
	}()
	for _, sig := range []os.Signal{syscall.SIGHUP, syscall.SIGPIPE, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGINT, syscall.SIGTERM} {
		signals <- sig
	}
	close(ended)
	<-done
	if diff := cmp.Diff([]string{"shutdown", "kill", "kill"}, did); diff != "" {
		t.Error(diff)
	}
}

func TestMachineName(t *testing.T) {
	t.Parallel()
	a, b := machineName("/run/hibergated/control.sock"), machineName("/run/other.sock")
	if a != "hibergated-7ed9766c" || a == b {
		t.Errorf("got %s and %s", a, b)
	}
}
