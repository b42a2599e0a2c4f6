package config

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Problem is one thing that is wrong in a configuration. Parts that do not apply
// are empty or 0.
type Problem struct {
	File    string
	Line    int // from 1
	Service string
	Key     string // within the service; for a problem outside of services with the table's name
	Text    string
}

// String returns `file:line: service "x": key: what is wrong`.
func (p Problem) String() string {
	var b strings.Builder
	b.WriteString(p.File)
	if p.Line > 0 {
		b.WriteString(":" + strconv.Itoa(p.Line))
	}
	if p.Service != "" {
		fmt.Fprintf(&b, ": service %q", p.Service)
	}
	if p.Key != "" {
		b.WriteString(": " + p.Key)
	}
	b.WriteString(": " + p.Text)
	return b.String()
}

// Problems are all problems of a configuration, sorted by file and line.
type Problems []Problem

// Error returns one problem per line.
func (p Problems) Error() string {
	lines := make([]string, len(p))
	for i, one := range p {
		lines[i] = one.String()
	}
	return strings.Join(lines, "\n")
}

// A source is one file while Load runs.
type source struct {
	name  string
	text  string
	lines lineIndex // made when first needed: a good configuration never does
}

// A place is a key in a file. Array elements are written "#0", "#1" in the path.
type place struct {
	source *source
	path   []string
}

// line returns the line of the key, or of the nearest table around it.
func (p place) line() int {
	if p.source.lines == nil {
		p.source.lines = indexLines(p.source.text)
	}
	return p.source.lines.find(p.path)
}

// String returns "file:line".
func (p place) String() string { return p.source.name + ":" + strconv.Itoa(p.line()) }

// A finding is a problem whose line is not looked up yet.
type finding struct {
	problem Problem
	at      place // no path: problem.Line holds
	other   place // where Text ends with another place
}

// problems looks up the lines of all findings.
func (d *decoder) problems() Problems {
	out := make(Problems, len(d.findings))
	for i, f := range d.findings {
		out[i] = f.problem
		if f.at.path != nil {
			out[i].Line = f.at.line()
		}
		if f.other.source != nil {
			out[i].Text += " (" + f.other.String() + ")"
		}
	}
	slices.SortStableFunc(out, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line),
			cmp.Compare(a.Service, b.Service), cmp.Compare(a.Key, b.Key), cmp.Compare(a.Text, b.Text))
	})
	return out
}
