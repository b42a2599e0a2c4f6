package main

import (
	"context"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
)

// slowWriter takes nothing before it is let go.
type slowWriter struct {
	let chan struct{}
	mu  sync.Mutex
	got strings.Builder
}

func (w *slowWriter) Write(p []byte) (int, error) {
	<-w.let
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.got.Write(p)
}

// Whoever logs goes on while nobody reads; what was lost is counted, and what was
// not is written before the end.
func TestLogQueue(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := &slowWriter{let: make(chan struct{})}
		q := newLogQueue()
		log := slog.New(asyncHandler{newHumanHandler(w, slog.LevelInfo), q}).With(slog.String("service", "web"))
		const lines = queuedLines + 11
		log.InfoContext(context.Background(), "line")
		synctest.Wait() // now the writer is stuck with line 0
		for i := 1; i < lines; i++ {
			log.InfoContext(context.Background(), "line", slog.Int("number", i))
		}
		log.DebugContext(context.Background(), "not wanted")
		close(w.let)
		q.close()
		got := w.got.String()
		if n := strings.Count(got, "INFO  line"); n != queuedLines+1 {
			t.Errorf("got %d lines, want %d", n, queuedLines+1)
		}
		if !strings.Contains(got, "lines=10") || !strings.Contains(got, "service=web") {
			t.Errorf("got %q, want it to say that 10 lines were lost, and of whom", got)
		}
	})
}

// The end does not wait for a reader that takes no more.
func TestLogQueueStuck(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := &slowWriter{let: make(chan struct{})}
		q := newLogQueue()
		slog.New(asyncHandler{newHumanHandler(w, slog.LevelInfo), q}).InfoContext(context.Background(), "line")
		q.close()
		close(w.let)
	})
}
