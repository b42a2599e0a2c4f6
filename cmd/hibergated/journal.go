package main

import (
	"context"
	"log/slog"
	"slices"
	"strings"

	"github.com/coreos/go-systemd/v22/journal"
)

// sendFunc is journal.Send.
type sendFunc func(message string, p journal.Priority, fields map[string]string) error

// journalHandler sends records to the journal: the message with its attributes for those who read, and
// each attribute as a field of its own, HIBERGATED_SERVICE=web, for those who
// search. What the journal does not take goes where the human handler writes.
type journalHandler struct {
	attrFormatter
	send   sendFunc
	human  slog.Handler
	prefix string // of fields, for the open groups
	fields []slog.Attr
}

func newJournalHandler(send sendFunc, human humanHandler) journalHandler {
	return journalHandler{attrFormatter: human.attrFormatter, send: send, human: human, prefix: "HIBERGATED_"}
}

func (h journalHandler) Handle(ctx context.Context, r slog.Record) error {
	fields := map[string]string{"SYSLOG_IDENTIFIER": "hibergated"}
	for _, a := range h.fields {
		fields[a.Key] = a.Value.String()
	}
	r.Attrs(func(a slog.Attr) bool {
		addField(fields, h.prefix, a)
		return true
	})
	err := h.format(ctx, r, func(attrs string) error {
		return h.send(r.Message+attrs, priority(r.Level), fields)
	})
	if err != nil {
		return h.human.Handle(ctx, r)
	}
	return nil
}

func (h journalHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	fields := map[string]string{}
	for _, a := range attrs {
		addField(fields, h.prefix, a)
	}
	h.fields = slices.Clone(h.fields)
	for k, v := range fields {
		h.fields = append(h.fields, slog.String(k, v))
	}
	h.inner = h.inner.WithAttrs(attrs)
	h.human = h.human.WithAttrs(attrs)
	return h
}

func (h journalHandler) WithGroup(name string) slog.Handler {
	h.prefix += fieldName(name) + "_"
	h.inner = h.inner.WithGroup(name)
	h.human = h.human.WithGroup(name)
	return h
}

func addField(fields map[string]string, prefix string, a slog.Attr) {
	v := a.Value.Resolve()
	if v.Kind() == slog.KindGroup {
		if a.Key != "" {
			prefix += fieldName(a.Key) + "_"
		}
		for _, member := range v.Group() {
			addField(fields, prefix, member)
		}
		return
	}
	fields[prefix+fieldName(a.Key)] = v.String()
}

// fieldName makes a name that the journal takes: A-Z, 0-9 and _ (systemd.journal-fields(7)).
func fieldName(key string) string {
	return strings.Map(func(r rune) rune {
		if r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' {
			return r
		}
		return '_'
	}, strings.ToUpper(key))
}

func priority(l slog.Level) journal.Priority {
	switch {
	case l >= slog.LevelError:
		return journal.PriErr
	case l >= slog.LevelWarn:
		return journal.PriWarning
	case l >= slog.LevelInfo:
		return journal.PriInfo
	default:
		return journal.PriDebug
	}
}
