package main

import (
	"bytes"
	"flag"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/urfave/cli/v2"

	"hibergate/supervisor"
)

var writeDocs = flag.Bool("write-docs", false, "write docs/ instead of comparing it")

// What docs/ says of the commands is what the program says. Package config has the same for its keys.
func TestDocs(t *testing.T) { // not parallel: urfave/cli keeps its help flag in a global variable
	for name, want := range map[string]string{"commands.md": commandsDoc(t)} {
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

// The manual page names each command with its flags, each flag, and each state, and nothing that is not there.
func TestManual(t *testing.T) {
	t.Parallel()
	b, err := os.ReadFile(filepath.Join("..", "..", "docs", "hibergated.8"))
	if err != nil {
		t.Fatal(err)
	}
	text := strings.ReplaceAll(string(b), `\-`, "-")
	app := newApp(io.Discard, io.Discard)
	all := map[string]bool{"--help": true, "-h": true, "--version": true, "-v": true} // urfave/cli adds these
	want, got := map[string][]string{}, map[string][]string{}
	for _, cmd := range app.Commands {
		want[cmd.Name] = nil
		for _, f := range cmd.Flags {
			want[cmd.Name] = append(want[cmd.Name], dashed(f)[0])
			for _, name := range dashed(f) {
				all[name] = true
			}
		}
		slices.Sort(want[cmd.Name])
	}
	flags := regexp.MustCompile(`-{1,2}[a-z][a-z-]*`)
	for _, section := range strings.Split(between(text, ".SH COMMANDS\n", ".SH "), "\n.SS ")[1:] {
		name, usage, _ := strings.Cut(section, "\n")
		usage, _, _ = strings.Cut(usage, ".PP\n")
		got[name] = flags.FindAllString(usage, -1)
		slices.Sort(got[name])
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("commands and their flags (-want +got):\n%s", diff)
	}

	options := map[string]bool{}
	for _, item := range strings.Split(between(text, ".SH OPTIONS\n", ".SH "), ".TP\n")[1:] {
		tag, _, _ := strings.Cut(item, "\n")
		for _, name := range flags.FindAllString(tag, -1) {
			options[name] = true
		}
	}
	if diff := cmp.Diff(all, options); diff != "" {
		t.Errorf("options (-want +got):\n%s", diff)
	}

	var states []string
	for s := supervisor.Listening; s.String() != "unknown"; s++ {
		states = append(states, s.String())
	}
	var described []string
	for _, item := range strings.Split(between(text, ".SH STATES\n", ".SH "), ".TP\n")[1:] {
		tag, _, _ := strings.Cut(item, "\n")
		described = append(described, strings.TrimPrefix(tag, ".B "))
	}
	if diff := cmp.Diff(states, described); diff != "" {
		t.Errorf("states (-want +got):\n%s", diff)
	}
}

// dashed returns the names of a flag as they are typed.
func dashed(f cli.Flag) []string {
	var names []string
	for _, name := range f.Names() {
		if len(name) == 1 {
			names = append(names, "-"+name)
		} else {
			names = append(names, "--"+name)
		}
	}
	return names
}

// between returns what stands between two texts.
func between(text, begin, end string) string {
	_, text, _ = strings.Cut(text, begin)
	text, _, _ = strings.Cut(text, end)
	return text
}
