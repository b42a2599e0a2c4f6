package config

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/BurntSushi/toml"

	"hibergate/activation"
	"hibergate/supervisor"
	"hibergate/supervisor/activity"
	"hibergate/supervisor/gate"
)

const (
	maxUnixPath = 107 // what a struct sockaddr_un holds beside the terminating zero
	off         = "off"
)

// A decoder turns the files of one Load into a Config. A value that is wrong becomes a
// finding, and the decoder goes on.
type decoder struct {
	schema   *schema
	config   *Config
	findings []finding
	strings  map[string]string // see keep
	indexes  []string          // "#0", "#1", ...

	hibergatedIn      *source // the file that has [hibergated]
	defaultAccounting activity.Accounting
	unaccounted       []*supervisor.Service // those without an accounting of their own
	named             map[string]*source    // where each service is
	book              addressBook
	held              []place // where ready.hold is true

	// Where the decoder is.
	source   *source
	keys     []toml.Key // of the file, in the order of its text
	path     []string   // from the top level of the file to the value being read
	meant    []string   // the keys that unknown ones of the service were probably meant to be
	service  *supervisor.Service
	elements []socketDraft     // of listen; it is used again for the next service
	socket   *socketDraft      // the element being read
	access   activation.Access // of the service
	gate     gate.Spec         // of the service; it is read whether the service is a gate or not
}

func newDecoder() *decoder {
	return &decoder{
		schema:  newSchema(),
		config:  &Config{Control: DefaultControl(), State: DefaultState()},
		strings: map[string]string{},
		named:   map[string]*source{},
	}
}

// index returns "#i", as paths name array elements.
func (d *decoder) index(i int) string {
	for len(d.indexes) <= i {
		d.indexes = append(d.indexes, "#"+strconv.Itoa(len(d.indexes)))
	}
	return d.indexes[i]
}

// wrong notes that the value where the decoder is, is wrong. It returns false.
func (d *decoder) wrong(format string, args ...any) bool {
	d.wrongAt(d.path, d.path, format, args...)
	return false
}

// wrongAt notes a problem of the value at path, which is shown under the name of key.
func (d *decoder) wrongAt(path, key []string, format string, args ...any) {
	f := finding{
		problem: Problem{File: d.source.name, Text: fmt.Sprintf(format, args...)},
		at:      place{d.source, slices.Clone(path)},
	}
	if len(key) > 1 && key[0] == "service" {
		f.problem.Service, key = key[1], key[2:]
	}
	f.problem.Key = keyName(key)
	d.findings = append(d.findings, f)
}

// here returns where the decoder is.
func (d *decoder) here() place { return place{d.source, slices.Clone(d.path)} }

// wrongKey notes a problem of a key of the service being read, by its dotted name.
func (d *decoder) wrongKey(key, format string, args ...any) {
	path := append(slices.Clone(d.path[:2]), strings.Split(key, ".")...)
	d.wrongAt(path, path, format, args...)
}

// other says that the text of the last finding speaks of another place.
func (d *decoder) other(in *source, path ...string) {
	d.findings[len(d.findings)-1].other = place{in, path}
}

// failed tells whether there are findings for keys of the service being read, from
// the one numbered since: rules about several keys are silent where one of them is wrong anyway.
func (d *decoder) failed(since int, keys ...string) bool {
	for _, f := range d.findings[since:] {
		for _, k := range keys {
			if rest, ok := strings.CutPrefix(f.problem.Key, k); ok && (rest == "" || rest[0] == '.' || rest[0] == '[') {
				return true
			}
		}
	}
	return false
}

// keyName prints a path: listen[0].mode.
func keyName(path []string) string {
	var b strings.Builder
	for _, p := range path {
		if n, ok := strings.CutPrefix(p, "#"); ok {
			b.WriteString("[" + n + "]")
			continue
		}
		if b.Len() > 0 {
			b.WriteByte('.')
		}
		b.WriteString(toml.Key{p}.String())
	}
	return b.String()
}

// file reads one file; err says why there is no text.
func (d *decoder) file(name, text string, err error) {
	d.source, d.path = &source{name: name, text: text}, nil
	if err != nil {
		d.findings = append(d.findings, finding{problem: Problem{File: name, Text: err.Error()}})
		return
	}
	tree, keys, err := parse(text)
	if err != nil {
		p := Problem{File: name, Text: err.Error()}
		if syntax := (toml.ParseError{}); errors.As(err, &syntax) {
			p.Text, p.Line = syntaxText(syntax.Message), syntaxLine(text, syntax.Position)
		}
		d.findings = append(d.findings, finding{problem: p})
		return
	}
	d.keys = keys
	d.table(&d.schema.root, tree)
	d.keys = nil
}

// syntaxText makes a message of the TOML decoder read like ours.
func syntaxText(message string) string {
	message = strings.TrimSuffix(message, ".")
	if strings.HasPrefix(message, "Key ") || strings.HasPrefix(message, "Invalid ") {
		message = strings.ToLower(message[:1]) + message[1:]
	}
	return message
}

// syntaxLine returns the line of a position of the TOML decoder, whose own count is one
// too many where it stumbled over the end of a line.
func syntaxLine(text string, at toml.Position) int {
	text = trimBOM(text)
	return 1 + strings.Count(text[:max(0, min(at.Start, len(text)))], "\n")
}

// table reads a table: each key by its own function.
func (d *decoder) table(t *table, raw any) (map[string]any, bool) {
	m, ok := raw.(map[string]any)
	if !ok {
		return nil, d.wrongType("a table", raw)
	}
	for name, v := range m {
		d.path = append(d.path, name)
		if k := t.byName[name]; k != nil {
			k.set(d, v)
		} else {
			d.unknown(t, name, v)
		}
		d.path = d.path[:len(d.path)-1]
	}
	return m, true
}

// unknown notes a key that the table does not have, with what was probably meant.
func (d *decoder) unknown(t *table, name string, raw any) {
	note := func(format string, args ...any) {
		d.wrongAt(d.path, d.path[:len(d.path)-1], "unknown key %q"+format, append([]any{name}, args...)...)
	}
	if near := nearest(name, t.names()); near != "" {
		d.meant = append(d.meant, near)
		note("; did you mean %q?", near)
		return
	}
	var others []string
	for _, other := range d.schema.tables() {
		if other.byName[name] != nil {
			others = append(others, other.title)
		}
	}
	if len(others) > 0 {
		note("; it belongs in %s", strings.Join(others, " or "))
		return
	}
	if m, ok := raw.(map[string]any); ok && t == &d.schema.service && (m["listen"] != nil || m["command"] != nil) {
		d.meant = append(d.meant, "listen", "command")
		note("; a service with a dot in its name is written [service.%q]", d.path[len(d.path)-2]+"."+name)
		return
	}
	note("")
}

// missing notes that a table lacks a key, unless an unknown key was probably meant to be it. hint follows the text.
func (d *decoder) missing(keys map[string]any, name, hint string) {
	if keys[name] == nil && !slices.Contains(d.meant, name) {
		d.path = append(d.path, name)
		d.wrong("is missing%s", hint)
		d.path = d.path[:len(d.path)-1]
	}
}

// hibergated reads [hibergated].
func (d *decoder) hibergated(raw any) {
	if d.hibergatedIn != nil {
		d.wrong("is already given")
		d.other(d.hibergatedIn, "hibergated")
	}
	d.hibergatedIn = d.source
	d.table(&d.schema.hibergated, raw)
}

// control reads the path of the control socket, or that there is none.
func (d *decoder) control(raw any) {
	if raw == off {
		d.config.Control = ""
		return
	}
	var path string
	if !d.absolute(raw, &path) {
		return
	}
	if len(path) > maxUnixPath {
		d.wrong("is %d bytes long, more than the %d that fit", len(path), maxUnixPath)
		return
	}
	d.config.Control = path
}

// finish applies what needs all files.
func (d *decoder) finish() {
	d.checkHeld()
	for _, s := range d.unaccounted {
		s.Accounting = d.defaultAccounting
	}
	if d.config.Control == "" {
		return
	}
	control := activation.Spec{Address: activation.Address{Network: activation.Unix, Path: d.config.Control}}
	if e := d.book.conflict(&control); e != nil {
		d.source = e.source
		d.wrongAt(e.path(), e.path(), "%s is the control socket of hibergated", e.spec.Address)
	}
}
