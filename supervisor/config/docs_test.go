package config

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const docs = "../../docs"

// What docs/ lists of keys is what the schema has. With -update the lists are written anew.
func TestDocs(t *testing.T) {
	t.Parallel()
	for _, doc := range []struct{ file, begin, end, text string }{
		{"configuration.md", "<!-- reference: begin -->\n", "<!-- reference: end -->\n", "\n" + strings.TrimSpace(Reference()) + "\n\n"},
		{"hibergated.toml.5", ".\\\" reference: begin\n", ".\\\" reference: end\n", manual()},
	} {
		path := filepath.Join(docs, doc.file)
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		before, rest, begun := strings.Cut(string(b), doc.begin)
		got, after, ended := strings.Cut(rest, doc.end)
		if !begun || !ended {
			t.Fatalf("docs/%s has no place for the reference: %q and %q", doc.file, doc.begin, doc.end)
		}
		if *update && got != doc.text {
			if err := os.WriteFile(path, []byte(before+doc.begin+doc.text+doc.end+after), 0o644); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if diff := cmp.Diff(doc.text, got); diff != "" {
			t.Errorf("docs/%s is not up to date, run go test ./supervisor/config -run TestDocs -update (-want +got):\n%s", doc.file, diff)
		}
	}
}

// manual is Reference as a part of a manual page, man(7).
func manual() string {
	var b strings.Builder
	for _, table := range newSchema().tables()[1:] {
		fmt.Fprintf(&b, ".SS %s\n", roff(strings.ToUpper(table.title[:1])+table.title[1:]))
		for _, k := range table.keys {
			fmt.Fprintf(&b, ".TP\n\\fB%s\\fR (%s)\n%s", roff(k.name), roff(k.kind), roff(strings.ToUpper(k.meaning[:1])+k.meaning[1:]))
			if k.fits != 0 {
				b.WriteString("; for " + k.fits.String())
			}
			b.WriteString(".\n")
			switch k.def {
			case "":
			case "required":
				b.WriteString("Required.\n")
			default:
				fmt.Fprintf(&b, "Default: %s.\n", roff(k.def))
			}
		}
	}
	return b.String()
}

// roff escapes what means something to troff. What is code in Markdown becomes bold.
func roff(text string) string {
	text = strings.NewReplacer(`\`, `\e`, "-", `\-`, "'", `\(aq`, "~", `\(ti`, "^", `\(ha`).Replace(text)
	parts := strings.Split(text, "`")
	for i := 1; i < len(parts); i += 2 {
		parts[i] = `\fB` + parts[i] + `\fR`
	}
	text = strings.Join(parts, "")
	if strings.HasPrefix(text, ".") {
		text = `\&` + text
	}
	return text
}

// Every example in the documents is a configuration of its own that loads.
func TestExamples(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob(filepath.Join(docs, "*.md"))
	if err != nil {
		t.Fatal(err)
	}
	examples := 0
	for _, file := range append(files, "../../README.md") {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for rest := b; ; {
			_, text, found := bytes.Cut(rest, []byte("\n```toml\n"))
			if !found {
				break
			}
			line := 1 + bytes.Count(b[:len(b)-len(text)], []byte("\n"))
			text, rest, found = bytes.Cut(text, []byte("\n```\n"))
			if !found {
				t.Fatalf("%s:%d: the example does not end", file, line)
			}
			examples++
			if _, err := Load(write(t, t.TempDir(), "example.toml", string(text)+"\n")); err != nil {
				t.Errorf("%s: the example at line %d:\n%v", file, line, err)
			}
		}
	}
	if examples < 5 {
		t.Errorf("got %d examples, want at least 5", examples)
	}
}

// TestRecipes loads the configurations in contrib.
func TestRecipes(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("../../contrib/*/*/*.toml")
	if err != nil || len(files) < 5 {
		t.Fatalf("got %q, %v", files, err)
	}
	for _, file := range files {
		if _, err := Load(file); err != nil {
			t.Errorf("%s:\n%v", file, err)
		}
	}
}
