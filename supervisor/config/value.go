package config

import (
	"fmt"
	"io/fs"
	"math"
	"strconv"
	"strings"
	"time"

	"hibergate/supervisor/activity"
)

// The functions here read one value of a type, store it and return whether they
// could; where not, they note why.

// wrongType notes that a value is not of the type it should be.
func (d *decoder) wrongType(want string, raw any) bool {
	return d.wrong("must be %s, got %s", want, typeName(raw))
}

// typeName names the TOML type of a decoded value.
func typeName(raw any) string {
	switch raw.(type) {
	case string:
		return "string"
	case int64:
		return "integer"
	case float64:
		return "float"
	case bool:
		return "boolean"
	case time.Time:
		return "date or time"
	case []any:
		return "array"
	case map[string]any:
		return "table"
	case []map[string]any:
		return "array of tables"
	}
	return fmt.Sprintf("%T", raw)
}

// str reads a string that is not empty. What it stores may be part of the text of the
// file, which must not stay in memory: see keep.
func (d *decoder) str(raw any, to *string) bool {
	s, ok := raw.(string)
	switch {
	case !ok:
		return d.wrongType("a string", raw)
	case s == "":
		return d.wrong("must not be empty")
	case strings.IndexByte(s, 0) >= 0:
		return d.wrong("must not contain a zero byte")
	}
	*to = s
	return true
}

// text reads a string that is not empty and keeps it.
func (d *decoder) text(raw any, to *string) bool {
	return d.str(raw, to) && d.keep(to)
}

// keep makes a string independent of the text it was read from: a part of a string keeps
// the whole in memory. It becomes a copy, the same one for equal strings, of which
// thousands of services have many.
func (d *decoder) keep(s *string) bool {
	kept, ok := d.strings[*s]
	if !ok {
		kept = strings.Clone(*s)
		d.strings[kept] = kept
	}
	*s = kept
	return true
}

// boolean reads true or false.
func (d *decoder) boolean(raw any, to *bool) bool {
	b, ok := raw.(bool)
	if !ok {
		return d.wrongType("true or false", raw)
	}
	*to = b
	return true
}

// integer reads an integer from low to high.
func (d *decoder) integer(raw any, low, high int64, to *int) bool {
	n, ok := raw.(int64)
	if !ok {
		return d.wrongType("an integer", raw)
	}
	if n < low || n > high {
		return d.wrong("must be from %d to %d, got %d", low, high, n)
	}
	*to = int(n)
	return true
}

// optional reads an integer whose zero means something.
func (d *decoder) optional(raw any, low, high int64, to **int) bool {
	n := new(int)
	if !d.integer(raw, low, high, n) {
		return false
	}
	*to = n
	return true
}

// size reads a number of bytes.
func (d *decoder) size(raw any, high int64, to *int) bool {
	n, ok := raw.(int64)
	if s, isString := raw.(string); isString {
		if n, ok = parseSize(s); !ok {
			return d.wrong(`must be a size such as "64K", "1M" or "1G", got %q`, s)
		}
	}
	if !ok {
		return d.wrongType(`a size such as "64K" or a number of bytes`, raw)
	}
	if n < 1 || n > high {
		return d.wrong("must be from 1 to %d bytes, got %d", high, n)
	}
	*to = int(n)
	return true
}

// parseSize reads "65536", "64K", "1M" or "1G": base 1024, as systemd has it.
func parseSize(s string) (int64, bool) {
	digits := strings.TrimRight(s, "KMG")
	shift := 0
	if unit := s[len(digits):]; len(unit) == 1 {
		shift = 10 * (1 + strings.Index("KMG", unit))
	} else if unit != "" {
		return 0, false
	}
	n, err := strconv.ParseUint(digits, 10, 63)
	if err != nil || n > math.MaxInt64>>shift {
		return 0, false
	}
	return int64(n << shift), true
}

// duration reads a duration that is at least low. A number is refused: in seconds for one
// program it is in milliseconds for the next.
func (d *decoder) duration(raw any, low time.Duration, to *time.Duration) bool {
	s, ok := raw.(string)
	switch n := raw.(type) {
	case int64:
		return d.wrong(`must be a string with a unit, such as "%ds", got %d`, max(n, 1), n)
	case float64:
		return d.wrong(`must be a string with a unit, such as "5s", got %v`, n)
	}
	if !ok {
		return d.wrongType(`a duration such as "5s"`, raw)
	}
	v, ok := parseDuration(s)
	switch {
	case !ok:
		return d.wrong(`must be a duration such as "50ms", "5s", "1m30s" or "2d", got %q`, s)
	case v < low && low == 1:
		return d.wrong("must be positive, got %s", s)
	case v < low:
		return d.wrong("must be at least %v, got %s", low, s)
	case v > maxDuration:
		return d.wrong("must be at most 3650d, got %s", s)
	}
	*to = v
	return true
}

// maxDuration is ten years, so that sums of a few durations do not overflow.
const maxDuration = 3650 * 24 * time.Hour

// parseDuration is time.ParseDuration with days in front.
func parseDuration(s string) (time.Duration, bool) {
	var days time.Duration
	if i := strings.IndexByte(s, 'd'); i >= 0 {
		if strings.Trim(s[:i], "0123456789.") != "" {
			return 0, false
		}
		h, err := time.ParseDuration(s[:i] + "h")
		if err != nil || h > math.MaxInt64/24 {
			return 0, false
		}
		days = 24 * h // an hour with the same number in front, so that fractions work alike
		if s = s[i+1:]; s == "" {
			return days, true
		}
		if s[0] == '-' || s[0] == '+' {
			return 0, false
		}
	}
	v, err := time.ParseDuration(s)
	if err != nil || v > math.MaxInt64-days {
		return 0, false
	}
	return days + v, true
}

// seconds reads a duration that the kernel takes in whole seconds.
func (d *decoder) seconds(raw any, high time.Duration, to *time.Duration) bool {
	var v time.Duration
	if !d.duration(raw, 1, &v) {
		return false
	}
	if v%time.Second != 0 {
		return d.wrong("must be whole seconds, got %v", v)
	}
	if v > high {
		return d.wrong("must be at most %ds, got %s", high/time.Second, raw)
	}
	*to = v
	return true
}

// mode reads the permissions of a path. An integer is refused: 660 is not 0o660, and who
// writes it means the other.
func (d *decoder) mode(raw any, to *fs.FileMode) bool {
	s, ok := raw.(string)
	if !ok {
		return d.wrongType(`an octal string such as "0660"`, raw)
	}
	n, err := strconv.ParseUint(s, 8, 32)
	if err != nil || n > maxPermission || len(s) < 3 {
		return d.wrong(`must be an octal string such as "0660", got %q`, s)
	}
	if n == 0 {
		return d.wrong("must permit something, got %q", s) // and 0 means the default
	}
	*to = fs.FileMode(n)
	return true
}

// choice reads one of some words.
func (d *decoder) choice(raw any, to *string, words ...string) bool {
	s, ok := raw.(string)
	if !ok {
		return d.wrongType(oneOf(words), raw)
	}
	for _, w := range words {
		if s == w {
			*to = w
			return true
		}
	}
	return d.wrong("must be %s, got %q", oneOf(words), s)
}

// oneOf returns `"a", "b" or "c"`.
func oneOf(words []string) string {
	var b strings.Builder
	for i, w := range words {
		switch {
		case i > 0 && i == len(words)-1:
			b.WriteString(" or ")
		case i > 0:
			b.WriteString(", ")
		}
		b.WriteString(strconv.Quote(w))
	}
	return b.String()
}

// accounting reads which witnesses are asked.
func (d *decoder) accounting(raw any, to *activity.Accounting) bool {
	var word string
	if !d.choice(raw, &word, "auto", "conntrack", "sock-diag") {
		return false
	}
	*to = map[string]activity.Accounting{"auto": activity.Auto, "conntrack": activity.Conntrack, "sock-diag": activity.SockDiag}[word]
	return true
}

// account reads the name or number of a user or group. Whether it exists is seen at
// each start.
func (d *decoder) account(raw any, to *string) bool {
	var s string
	if !d.str(raw, &s) {
		return false
	}
	if strings.ContainsAny(s, ":/ \t\n,") {
		return d.wrong("must be one name or number, got %q", s)
	}
	*to = s
	return d.keep(to)
}

// absolute reads an absolute path.
func (d *decoder) absolute(raw any, to *string) bool {
	var s string
	if !d.str(raw, &s) {
		return false
	}
	if s[0] != '/' {
		return d.wrong("must be an absolute path, got %q", s)
	}
	*to = s
	return d.keep(to)
}

// each reads an array: one call for each element, which d.wrong then names. The array
// may be one of tables: [[service.NAME.listen]].
func (d *decoder) each(raw any, want string, element func(raw any)) bool {
	var elements []any
	switch raw := raw.(type) {
	case []any:
		elements = raw
	case []map[string]any:
		for _, m := range raw {
			elements = append(elements, m)
		}
	default:
		return d.wrongType(want, raw)
	}
	if len(elements) == 0 {
		return d.wrong("must not be empty")
	}
	before := len(d.findings)
	for i, e := range elements {
		d.path = append(d.path, d.index(i))
		element(e)
		d.path = d.path[:len(d.path)-1]
	}
	return len(d.findings) == before
}

// texts reads an array of strings.
func (d *decoder) texts(raw any, to *[]string, element func(d *decoder, raw any, to *string) bool) bool {
	all, _ := raw.([]any)
	out := make([]string, 0, len(all))
	ok := d.each(raw, "an array of strings", func(raw any) {
		var s string
		if element(d, raw, &s) {
			out = append(out, s)
		}
	})
	if ok {
		*to = out
	}
	return ok
}
