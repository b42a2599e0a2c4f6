package config

import (
	"strconv"
	"strings"

	"github.com/BurntSushi/toml"
)

// A lineIndex says on which line of a TOML text each key and each array element
// stands: a path of keys, joined, to a line. The TOML decoder knows positions but does
// not tell them.
type lineIndex map[string]int

const pathSeparator = "\x00"

// find returns the line of the key with this path, or of the longest part of it that
// is in the text; 1 where there is none.
func (x lineIndex) find(path []string) int {
	for n := len(path); n > 0; n-- {
		if line, ok := x[strings.Join(path[:n], pathSeparator)]; ok {
			return line
		}
	}
	return 1
}

// indexLines finds the lines of all keys. The text must be TOML that the decoder
// accepted: the scanner only tells apart what it must to find keys, and where it meets
// something else it goes on at the next line.
func indexLines(text string) lineIndex {
	s := scanner{text: trimBOM(text), line: 1, index: lineIndex{}, tables: map[string]int{}}
	var table []string // the last [header]
	for s.skipSpace(true); s.pos < len(s.text); s.skipSpace(true) {
		if s.peek() == '[' {
			table = s.header()
			s.skipLine()
			continue
		}
		s.pair(table)
		s.skipLine()
	}
	return s.index
}

// trimBOM removes the byte order mark that the TOML decoder overlooks.
func trimBOM(text string) string {
	for _, mark := range []string{"\xff\xfe", "\xfe\xff", "\ufeff"} {
		if rest, ok := strings.CutPrefix(text, mark); ok {
			return rest
		}
	}
	return text
}

// A scanner walks over TOML text.
type scanner struct {
	text   string
	pos    int
	line   int
	index  lineIndex
	tables map[string]int // elements so far of each array of tables
}

// peek returns the byte at pos; 0 at the end.
func (s *scanner) peek() byte {
	if s.pos < len(s.text) {
		return s.text[s.pos]
	}
	return 0
}

// to moves to a later position and counts the lines on the way.
func (s *scanner) to(pos int) {
	pos = min(pos, len(s.text))
	s.line += strings.Count(s.text[s.pos:pos], "\n")
	s.pos = pos
}

// skipSpace moves over blanks, and over newlines and comments where wanted.
func (s *scanner) skipSpace(newlines bool) {
	for {
		switch c := s.peek(); {
		case c == ' ' || c == '\t' || c == '\r':
			s.pos++
		case c == '\n' && newlines:
			s.to(s.pos + 1)
		case c == '#' && newlines:
			s.skipLine()
		default:
			return
		}
	}
}

// skipLine moves behind the end of the line.
func (s *scanner) skipLine() {
	if i := strings.IndexByte(s.text[s.pos:], '\n'); i >= 0 {
		s.to(s.pos + i + 1)
		return
	}
	s.pos = len(s.text)
}

// set notes the line of a key. A table may be mentioned before it is defined
// ([a.b] before [a]); the definition wins.
func (s *scanner) set(path []string, line int, defined bool) {
	at := strings.Join(path, pathSeparator)
	if _, known := s.index[at]; defined || !known {
		s.index[at] = line
	}
}

// header reads [a.b] or [[a.b]] and returns the path of the table.
func (s *scanner) header() []string {
	line := s.line
	s.pos++
	array := s.peek() == '['
	if array {
		s.pos++
	}
	keys := s.keys()
	var path []string
	for i, k := range keys {
		path = append(path, k)
		last := i == len(keys)-1
		at := strings.Join(path, pathSeparator)
		if last && array {
			s.tables[at]++
			s.set(path, line, s.tables[at] == 1)
		} else {
			s.set(path, line, last)
		}
		if n := s.tables[at]; n > 0 { // a header speaks of the last element
			path = append(path, "#"+strconv.Itoa(n-1))
			s.set(path, line, last)
		}
	}
	return path
}

// pair reads key = value in a table.
func (s *scanner) pair(table []string) {
	line := s.line
	keys := s.keys()
	path := append(make([]string, 0, len(table)+len(keys)+2), table...)
	for i, k := range keys {
		path = append(path, k)
		s.set(path, line, i == len(keys)-1)
	}
	if s.peek() != '=' {
		return
	}
	s.pos++
	s.skipSpace(false)
	s.value(path)
}

// keys reads a dotted key and the blanks behind it.
func (s *scanner) keys() []string {
	var keys []string
	for {
		s.skipSpace(false)
		start := s.pos
		if c := s.peek(); c == '"' || c == '\'' {
			s.quoted()
			key := s.text[start+1 : max(start+1, s.pos-1)]
			if c == '"' && strings.Contains(key, `\`) {
				key = unescape(s.text[start:s.pos])
			}
			keys = append(keys, key)
		} else {
			for s.pos < len(s.text) && !strings.ContainsRune(" \t\r\n.=]#", rune(s.peek())) {
				s.pos++
			}
			keys = append(keys, s.text[start:s.pos])
		}
		s.skipSpace(false)
		if s.peek() != '.' {
			return keys
		}
		s.pos++
	}
}

// unescape returns what a quoted key with escapes stands for, as the decoder reads it.
func unescape(quoted string) string {
	var tree map[string]any
	_, _ = toml.Decode(quoted+" = 0", &tree) // never fails on a key of a text that was decoded
	for key := range tree {
		return key
	}
	return ""
}

// quoted moves over a string of any of the four kinds.
func (s *scanner) quoted() {
	quote := s.text[s.pos : s.pos+1]
	end := quote
	if long := strings.Repeat(quote, 3); strings.HasPrefix(s.text[s.pos:], long) {
		end = long
	}
	i := s.pos + len(end)
	for i < len(s.text) {
		switch {
		case s.text[i] == '\\' && quote == `"`:
			i += 2
		case strings.HasPrefix(s.text[i:], end):
			i += len(end)
			// A long string may end in up to two quotes of its own.
			for len(end) == 3 && i < len(s.text) && s.text[i] == quote[0] {
				i++
			}
			s.to(i)
			return
		default:
			i++
		}
	}
	s.to(i)
}

// value moves over a value and notes what is inside of it. path is only borrowed.
func (s *scanner) value(path []string) {
	switch s.peek() {
	case '"', '\'':
		s.quoted()
	case '[': // an array: each element has a line of its own
		s.pos++
		for n := 0; ; {
			s.skipSpace(true)
			switch s.peek() {
			case ',':
				s.pos++
				continue
			case ']':
				s.pos++
				return
			case 0:
				s.pos = len(s.text)
				return
			}
			element := append(path, "#"+strconv.Itoa(n))
			s.set(element, s.line, true)
			before := s.pos
			s.value(element)
			if s.pos == before { // nothing a value starts with
				s.pos++
			}
			n++
		}
	case '{': // an inline table, which TOML 1.1 lets span lines
		s.pos++
		for {
			s.skipSpace(true)
			switch s.peek() {
			case ',':
				s.pos++
				continue
			case '}':
				s.pos++
				return
			case 0:
				s.pos = len(s.text)
				return
			}
			before := s.pos
			s.pair(path)
			if s.pos == before {
				s.pos++
			}
		}
	default: // a number, a boolean, or a date, which may have a blank inside
		for s.pos < len(s.text) && !strings.ContainsRune(",]}#\n", rune(s.peek())) {
			s.pos++
		}
	}
}
