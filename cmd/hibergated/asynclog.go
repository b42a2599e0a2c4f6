package main

import (
	"context"
	"log/slog"
	"sync/atomic"
	"time"
)

// logQueue lets log lines be written by a goroutine of its own: whoever logs, the
// supervisor's loop above all, must not wait for a terminal that was stopped or
// for a pipe that nobody reads. What does not fit is counted and dropped.
type logQueue struct {
	lines   chan logLine
	dropped atomic.Uint64
	stop    chan struct{}
	ended   chan struct{}
}

type logLine struct {
	handler slog.Handler
	record  slog.Record
}

// queuedLines is how many lines may wait to be written.
const queuedLines = 256

// lastWords is how long close waits for a reader that takes no more.
const lastWords = time.Second

func newLogQueue() *logQueue {
	q := &logQueue{lines: make(chan logLine, queuedLines), stop: make(chan struct{}), ended: make(chan struct{})}
	go q.run()
	return q
}

func (q *logQueue) run() {
	defer close(q.ended)
	for {
		select {
		case l := <-q.lines:
			q.write(l)
		case <-q.stop:
			for {
				select {
				case l := <-q.lines:
					q.write(l)
				default:
					return
				}
			}
		}
	}
}

// write writes one line. There is nobody to tell that a log line could not be written.
func (q *logQueue) write(l logLine) {
	ctx := context.Background()
	if n := q.dropped.Swap(0); n > 0 {
		lost := slog.NewRecord(time.Now(), slog.LevelWarn, "log lines lost: nobody takes them in time", 0)
		lost.AddAttrs(slog.Uint64("lines", n))
		_ = l.handler.Handle(ctx, lost)
	}
	_ = l.handler.Handle(ctx, l.record)
}

// close writes what is left, but does not wait for ever.
func (q *logQueue) close() {
	close(q.stop)
	select {
	case <-q.ended:
	case <-time.After(lastWords):
	}
}

// asyncHandler hands records to the queue.
type asyncHandler struct {
	slog.Handler // the one that writes
	queue        *logQueue
}

// Handle implements slog.Handler. It never waits.
func (h asyncHandler) Handle(_ context.Context, r slog.Record) error {
	select {
	case h.queue.lines <- logLine{h.Handler, r.Clone()}:
	default:
		h.queue.dropped.Add(1)
	}
	return nil
}

// WithAttrs implements slog.Handler.
func (h asyncHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	h.Handler = h.Handler.WithAttrs(attrs)
	return h
}

// WithGroup implements slog.Handler.
func (h asyncHandler) WithGroup(name string) slog.Handler {
	h.Handler = h.Handler.WithGroup(name)
	return h
}
