package main

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"strings"
	"sync"

	"github.com/coreos/go-systemd/v22/journal"
	"github.com/urfave/cli/v2"
)

const (
	flagLogFormat = "log-format"
	flagLogLevel  = "log-level"
)

func logFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: flagLogFormat, Value: "human", Usage: "write log lines as `FORMAT`: human or json; as human they go to the journal natively under systemd"},
		&cli.StringFlag{Name: flagLogLevel, Value: "info", Usage: "log from this `LEVEL` on: debug, info, warn or error"},
	}
}

// newLogger returns the logger that the flags ask for, on stderr.
func newLogger(stderr io.Writer, format, level string) (*slog.Logger, error) {
	var min slog.Level
	if err := min.UnmarshalText([]byte(level)); err != nil {
		return nil, usagef("--%s: %q is not debug, info, warn or error", flagLogLevel, level)
	}
	switch format {
	case "human":
		human := newHumanHandler(stderr, min)
		if ok, err := journal.StderrIsJournalStream(); err == nil && ok {
			return slog.New(newJournalHandler(journal.Send, human)), nil
		}
		return slog.New(human), nil
	case "json":
		return slog.New(slog.NewJSONHandler(stderr, &slog.HandlerOptions{Level: min})), nil
	}
	return nil, usagef("--%s: %q is not human or json", flagLogFormat, format)
}

// attrFormatter turns a record into its attributes as text, " key=value key=value". Package slog
// does the quoting; time, level and message are left out.
type attrFormatter struct {
	out   *attrBuffer
	inner slog.Handler // writes into out
}

// attrBuffer is shared by a formatter and all that were made from it.
type attrBuffer struct {
	mu sync.Mutex // makes one line of one record; guards buf
	bytes.Buffer
}

func newAttrFormatter(level slog.Leveler) attrFormatter {
	out := &attrBuffer{}
	return attrFormatter{out: out, inner: slog.NewTextHandler(out, &slog.HandlerOptions{
		Level: level,
		ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
			if len(groups) == 0 && (a.Key == slog.TimeKey || a.Key == slog.LevelKey || a.Key == slog.MessageKey) {
				return slog.Attr{}
			}
			return a
		},
	})}
}

// format calls use with the text while no other record can change it.
func (f attrFormatter) format(ctx context.Context, r slog.Record, use func(attrs string) error) error {
	f.out.mu.Lock()
	defer f.out.mu.Unlock()
	f.out.Reset()
	if err := f.inner.Handle(ctx, r); err != nil {
		return err
	}
	attrs := strings.TrimSuffix(f.out.String(), "\n")
	if attrs != "" {
		attrs = " " + attrs
	}
	return use(attrs)
}

func (f attrFormatter) Enabled(ctx context.Context, l slog.Level) bool {
	return f.inner.Enabled(ctx, l)
}

// humanHandler writes lines for people:
//
//	15:04:05.000 INFO  service changed state service=web from=listening to=starting
type humanHandler struct {
	attrFormatter
	w io.Writer
}

func newHumanHandler(w io.Writer, level slog.Leveler) humanHandler {
	return humanHandler{attrFormatter: newAttrFormatter(level), w: w}
}

// Handle writes one line with one call, so that lines of several processes on one terminal stay whole.
func (h humanHandler) Handle(ctx context.Context, r slog.Record) error {
	return h.format(ctx, r, func(attrs string) error {
		level := r.Level.String()
		pad := strings.Repeat(" ", max(5-len(level), 0))
		_, err := io.WriteString(h.w, r.Time.Format("15:04:05.000")+" "+level+pad+" "+r.Message+attrs+"\n")
		return err
	})
}

func (h humanHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	h.inner = h.inner.WithAttrs(attrs)
	return h
}

func (h humanHandler) WithGroup(name string) slog.Handler {
	h.inner = h.inner.WithGroup(name)
	return h
}
