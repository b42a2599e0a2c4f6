package process

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"
)

// parseEnvironmentFile reads assignments as systemd's EnvironmentFile= does; see
// systemd.exec(5). Lines that begin with # or ;, lines without "=" and names that
// are no variable names are passed over. Values may be quoted:
//
//	plain     ends with the line, blanks at both ends go; \x is x, \newline is nothing
//	'single'  verbatim, over several lines
//	"double"  over several lines; \" \\ \` \$ lose the backslash, \newline is nothing
//
// Quoted and plain parts may follow each other. A quote is one only at the start
// of a value or behind another quoted part. Nothing is expanded.
func parseEnvironmentFile(b []byte) ([]string, error) {
	if !utf8.Valid(b) {
		return nil, errors.New("not UTF-8")
	}
	if before, _, found := bytes.Cut(b, []byte{0}); found {
		return nil, fmt.Errorf("line %d: a NUL byte", 1+bytes.Count(before, []byte("\n")))
	}
	var vars []string
	rest := string(b)
	for rest != "" {
		rest = strings.TrimLeft(rest, " \t\r\n")
		end := strings.IndexAny(rest, "=\n")
		if end < 0 || rest[0] == '#' || rest[0] == ';' || rest[end] == '\n' {
			_, rest, _ = strings.Cut(rest, "\n")
			continue
		}
		name := strings.TrimRight(rest[:end], " \t\r")
		var value string
		value, rest = parseValue(rest[end+1:])
		if validName(name) {
			vars = append(vars, name+"="+value)
		}
	}
	return vars, nil
}

// parseValue reads what follows "=" up to the end of the assignment, which
// quotes and backslashes may put behind the end of the line.
func parseValue(s string) (value, rest string) {
	var out strings.Builder
	for {
		s = strings.TrimLeft(s, " \t\r")
		switch {
		case s == "":
			return out.String(), ""
		case s[0] == '\n':
			return out.String(), s[1:]
		case s[0] == '\'':
			var part string
			part, s, _ = strings.Cut(s[1:], "'")
			out.WriteString(part)
		case s[0] == '"':
			s = parseDoubleQuoted(&out, s[1:])
		default:
			return parsePlain(&out, s)
		}
	}
}

// parseDoubleQuoted adds what stands before the closing quote and returns what follows it.
func parseDoubleQuoted(out *strings.Builder, s string) (rest string) {
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] == '"':
			return s[i+1:]
		case s[i] == '\\' && i+1 < len(s):
			i++
			if strings.IndexByte("\"\\`$\n", s[i]) < 0 {
				out.WriteByte('\\')
			}
			if s[i] != '\n' {
				out.WriteByte(s[i])
			}
		default:
			out.WriteByte(s[i])
		}
	}
	return ""
}

// parsePlain adds an unquoted part and ends the value.
func parsePlain(out *strings.Builder, s string) (value, rest string) {
	keep := out.Len() // what blanks at the end may not be cut off from
	i := 0
	for ; i < len(s) && s[i] != '\n'; i++ {
		if s[i] != '\\' {
			out.WriteByte(s[i])
			if s[i] != ' ' && s[i] != '\t' && s[i] != '\r' {
				keep = out.Len()
			}
			continue
		}
		i++
		if i < len(s) && s[i] != '\n' {
			out.WriteByte(s[i])
			keep = out.Len()
		}
	}
	return out.String()[:keep], s[min(i+1, len(s)):]
}

// validName reports whether s can name a variable.
func validName(s string) bool {
	for i, c := range []byte(s) {
		letter := c == '_' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
		if !letter && (i == 0 || c < '0' || c > '9') {
			return false
		}
	}
	return s != ""
}
