package main

import (
	"bytes"
	"flag"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"hibergate/supervisor/config"
)

var writeDocs = flag.Bool("write-docs", false, "write docs/ instead of comparing it")

// What docs/ says of the commands and of the configuration is what the program says.
func TestDocs(t *testing.T) { // not parallel: urfave/cli keeps its help flag in a global variable
	for name, want := range map[string]string{"commands.md": commandsDoc(t), "configuration.md": configDoc()} {
		path := filepath.Join("..", "..", "docs", name)
		if *writeDocs {
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, []byte(want), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		got, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, string(got)); diff != "" {
			t.Errorf("docs/%s is not up to date, run make docs: %s", name, diff)
		}
	}
}

func commandsDoc(t *testing.T) string {
	t.Helper()
	var out strings.Builder
	out.WriteString("# Commands\n\nWritten by `make docs` from what `--help` says.\n")
	section := func(title string, args ...string) {
		var stdout bytes.Buffer
		if code := execute(append(args, "--help"), &stdout, io.Discard); code != exitOK {
			t.Fatalf("%q: exit status %d", args, code)
		}
		var help strings.Builder
		skip := false
		for line := range strings.Lines(strings.TrimSpace(stdout.String()) + "\n") {
			if heading := line[0] != ' ' && line[0] != '\n'; heading {
				skip = strings.HasPrefix(line, "VERSION:") // differs from build to build
			}
			if !skip {
				help.WriteString(strings.TrimRight(line, " \n") + "\n")
			}
		}
		out.WriteString("\n## " + title + "\n\n```\n" + help.String() + "```\n")
	}
	section("hibergated", "hibergated")
	for _, cmd := range newApp(io.Discard, io.Discard).Commands {
		section("hibergated "+cmd.Name, "hibergated", cmd.Name)
	}
	return out.String()
}

func configDoc() string {
	return "# Configuration\n\nWritten by `make docs` from the table that `hibergated check` validates against.\n\n" +
		strings.TrimSpace(config.Reference()) + "\n"
}
