package main

import (
	"bytes"
	"errors"
	"log/slog"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coreos/go-systemd/v22/journal"
	"github.com/google/go-cmp/cmp"
)

// speak writes one record of each kind that we write.
func speak(l *slog.Logger) {
	l.Info("hibergated started", slog.Int("services", 2))
	l = l.With(slog.String("service", "web"))
	l.Warn("service changed state", slog.String("reason", "took no traffic"), slog.Duration("idle_for", 1500*time.Millisecond))
	l.WithGroup("peer").Error("refused", slog.Group("addr", slog.Int("port", 80)), slog.Any("err", errors.New("no")))
	l.Debug("never seen")
}

func TestHumanLog(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	speak(slog.New(newHumanHandler(&out, slog.LevelInfo)))
	clock := regexp.MustCompile(`(?m)^\d\d:\d\d:\d\d\.\d\d\d `)
	want := `INFO  hibergated started services=2
WARN  service changed state service=web reason="took no traffic" idle_for=1.5s
ERROR refused service=web peer.addr.port=80 peer.err=no
`
	if diff := cmp.Diff(want, clock.ReplaceAllString(out.String(), "")); diff != "" {
		t.Error(diff)
	}
	if n := len(clock.FindAllString(out.String(), -1)); n != 3 {
		t.Errorf("%d lines have the time of day, want 3:\n%s", n, &out)
	}
}

// Lines of many goroutines stay whole.
func TestHumanLogConcurrently(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	var got []string
	l := slog.New(newHumanHandler(writerFunc(func(p []byte) (int, error) {
		mu.Lock()
		defer mu.Unlock()
		got = append(got, string(p))
		return len(p), nil
	}), slog.LevelInfo))
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			l := l.With(slog.Int("n", i))
			for range 50 {
				l.Info("line", slog.Int("again", i))
			}
		})
	}
	wg.Wait()
	whole := regexp.MustCompile(`^[\d:.]{12} INFO  line n=(\d) again=(\d)\n$`)
	for _, line := range got {
		if m := whole.FindStringSubmatch(line); m == nil || m[1] != m[2] {
			t.Errorf("got %q", line)
		}
	}
	if len(got) != 400 {
		t.Errorf("got %d lines, want 400", len(got))
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func TestJournalLog(t *testing.T) {
	t.Parallel()
	type entry struct {
		Message  string
		Priority journal.Priority
		Fields   map[string]string
	}
	var got []entry
	var fallback bytes.Buffer
	send := func(message string, p journal.Priority, fields map[string]string) error {
		got = append(got, entry{message, p, fields})
		return nil
	}
	speak(slog.New(newJournalHandler(send, newHumanHandler(&fallback, slog.LevelInfo))))
	want := []entry{
		{"hibergated started services=2", journal.PriInfo, map[string]string{"SYSLOG_IDENTIFIER": "hibergated", "HIBERGATED_SERVICES": "2"}},
		{`service changed state service=web reason="took no traffic" idle_for=1.5s`, journal.PriWarning, map[string]string{
			"SYSLOG_IDENTIFIER": "hibergated", "HIBERGATED_SERVICE": "web", "HIBERGATED_REASON": "took no traffic", "HIBERGATED_IDLE_FOR": "1.5s",
		}},
		{"refused service=web peer.addr.port=80 peer.err=no", journal.PriErr, map[string]string{
			"SYSLOG_IDENTIFIER": "hibergated", "HIBERGATED_SERVICE": "web", "HIBERGATED_PEER_ADDR_PORT": "80", "HIBERGATED_PEER_ERR": "no",
		}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if fallback.Len() > 0 {
		t.Errorf("on stderr too: %s", &fallback)
	}
}

// What the journal does not take is not lost.
func TestJournalLogFallsBack(t *testing.T) {
	t.Parallel()
	var fallback bytes.Buffer
	send := func(string, journal.Priority, map[string]string) error { return errors.New("no journal") }
	speak(slog.New(newJournalHandler(send, newHumanHandler(&fallback, slog.LevelInfo))))
	if got := fallback.String(); strings.Count(got, "\n") != 3 || !strings.Contains(got, "ERROR refused service=web peer.addr.port=80 peer.err=no\n") {
		t.Errorf("got %s", got)
	}
}

func TestJSONLog(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	l, err := newLogger(&out, "json", "warn")
	if err != nil {
		t.Fatal(err)
	}
	speak(l)
	if got := out.String(); strings.Count(got, "\n") != 2 || !strings.Contains(got, `"msg":"service changed state","service":"web","reason":"took no traffic"`) {
		t.Errorf("got %s", got)
	}
}
