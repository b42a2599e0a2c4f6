package main

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestFlagsFirst(t *testing.T) { // not parallel: urfave/cli keeps its help flag in a global variable
	tests := []struct{ in, want string }{
		{"", ""},
		{"run", "run"},
		{"run --config x", "run --config x"},
		{"--config x run --log-level debug", "--config x run --log-level debug"},
		{"status web --json", "status --json -- web"},
		{"status web --control=/c --json", "status --control=/c --json -- web"},
		{"-c x status web --control /c", "-c x status --control /c -- web"},
		{"wake -c x web", "wake -c x -- web"},
		{"wake web -- --json", "wake -- web -- --json"},
		{"wake -- -web", "wake -- -web"},
		{"status web --control", "status web --control"},
		{"nonsense web --json", "nonsense web --json"},
		{"--config", "--config"},
		{"-", "-"},
	}
	app := newApp(io.Discard, io.Discard)
	for _, test := range tests {
		got := flagsFirst(app, append([]string{"hibergated"}, strings.Fields(test.in)...))
		if diff := cmp.Diff("hibergated "+test.want, strings.Join(got, " ")); strings.TrimSpace(diff) != "" && test.in != "" {
			t.Errorf("%s: %s", test.in, diff)
		}
	}
}

// FuzzFlagsFirst: no argument is lost, and it does not matter whether it was done before.
func FuzzFlagsFirst(f *testing.F) {
	f.Add("status web --json")
	f.Add("-c x run -- a --b")
	app := newApp(io.Discard, io.Discard)
	f.Fuzz(func(t *testing.T, line string) {
		in := append([]string{"hibergated"}, strings.Fields(line)...)
		out := flagsFirst(app, in)
		if n := len(out) - len(in); n != 0 && n != 1 {
			t.Fatalf("%q became %q", in, out)
		}
		if again := flagsFirst(app, out); !cmp.Equal(out, again) {
			t.Fatalf("%q became %q and then %q", in, out, again)
		}
	})
}

// Every command line that does not need a supervisor: exit status and what is said.
func TestExecute(t *testing.T) { // not parallel: urfave/cli keeps its help flag in a global variable
	dir := t.TempDir()
	missing := filepath.Join(dir, "missing")
	good := filepath.Join(dir, "good.toml")
	config := "[hibergated]\ncontrol = \"" + filepath.Join(dir, "c.sock") + "\"\n\n[service.web]\nlisten = [\"tcp://:8080\"]\ncommand = [\"/bin/true\"]\nidle_timeout = \"5m\"\n"
	if err := os.WriteFile(good, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	bad := filepath.Join(dir, "bad.toml")
	if err := os.WriteFile(bad, []byte("[service.web]\nlisten = [\"tcp://:8080\"]\ncommand = [\"true\"]\ncolour = 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	gated := filepath.Join(dir, "gated.toml")
	config = "hibergated.control = \"off\"\n[service.web]\nlisten = [\"tcp://:8080\"]\nhandoff = \"gate\"\nidle_timeout = \"5m\"\n" +
		"gate = { destination = [\"tcp://web:80\", \"unix:///run/web\"], launch = \"x\", stop = \"y\" }\n"
	if err := os.WriteFile(gated, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	const try = "\nTry 'hibergated --help'.\n"
	tests := []struct {
		args   []string
		code   int
		stdout string // begins with
		stderr string // begins with
	}{
		{args: nil, code: 2, stderr: "hibergated: no command given" + try},
		{args: []string{"dance"}, code: 2, stderr: `hibergated: unknown command "dance"` + try},
		{args: []string{"--dance"}, code: 2, stderr: "hibergated: flag provided but not defined: -dance" + try},
		{args: []string{"run", "--dance"}, code: 2, stderr: "hibergated: flag provided but not defined: -dance" + try},
		{args: []string{"run", "web"}, code: 2, stderr: `hibergated: run: unexpected argument "web"` + try},
		{args: []string{"run", "--log-format", "xml"}, code: 2, stderr: `hibergated: --log-format: "xml" is not human or json` + try},
		{args: []string{"run", "--log-level=loud"}, code: 2, stderr: `hibergated: --log-level: "loud" is not debug, info, warn or error` + try},
		{args: []string{"run", "-c", missing}, code: 1, stderr: "hibergated: read configuration: "},
		{args: []string{"run", "-c", bad}, code: 1, stderr: bad + ":3: service \"web\": command[0]: must be an absolute path"},
		{args: []string{"gate", "x"}, code: 2, stderr: `hibergated: gate: unexpected argument "x"` + try},
		{args: []string{"--config", good, "gate"}, code: 2, stderr: "hibergated: gate: --config is not for this command"},
		{args: []string{"gate", "--print-config"}, code: 1, stderr: "environment: HIBERGATE_LISTENPORT: is missing\n"},
		{args: []string{"gate", "--help"}, code: 0, stdout: "NAME:\n   hibergated gate - run as hibergate does"},
		{args: []string{"check", "-c", gated}, code: 0, stdout: "web: tcp://:8080 -> gate tcp://web:80, unix:///run/web, sleeps after 5m0s\n"},
		{args: []string{"status", "-c", gated}, code: 1, stderr: "hibergated: the configuration turns the control socket off"},
		{args: []string{"wake"}, code: 2, stderr: "hibergated: wake: give the name of one service" + try},
		{args: []string{"sleep", "a", "b"}, code: 2, stderr: "hibergated: sleep: give the name of one service" + try},
		{args: []string{"restart"}, code: 2, stderr: "hibergated: restart: give the name of one service" + try},
		{args: []string{"freeze"}, code: 2, stderr: "hibergated: freeze: give the name of one service" + try},
		{args: []string{"thaw", ""}, code: 2, stderr: "hibergated: thaw: give the name of one service" + try},
		{args: []string{"reset", "a", "b"}, code: 2, stderr: "hibergated: reset: give the name of one service" + try},
		{args: []string{"status", "a", "b"}, code: 2, stderr: "hibergated: status: give the name of one service, or none" + try},
		{args: []string{"version", "a"}, code: 2, stderr: `hibergated: version: unexpected argument "a"` + try},
		{args: []string{"version"}, code: 0, stdout: "hibergated version "},
		{args: []string{"--help"}, code: 0, stdout: "NAME:\n   hibergated - let network services sleep"},
		{args: []string{"check", "--help"}, code: 0, stdout: "NAME:\n   hibergated check - validate"},
		{args: []string{"check", "--config", good}, code: 0, stdout: "web: tcp://:8080 -> listen-fds /bin/true, sleeps after 5m0s\n"},
		{args: []string{"--config", good, "check"}, code: 0, stdout: "web: tcp://:8080 -> "},
		{args: []string{"--config", missing, "check", "-c", good}, code: 0, stdout: "web: tcp://:8080 -> "},
		{args: []string{"check", "--config", bad}, code: 1, stderr: bad + ":3: service \"web\": command[0]: must be an absolute path"},
		{args: []string{"check", "--config", missing}, code: 1, stderr: "hibergated: read configuration: "},
		{args: []string{"status", "--config", good}, code: 1, stderr: "hibergated: connect " + dir + "/c.sock: no such file or directory; is hibergated running?\n"},
		{args: []string{"status", "web", "--json", "--control", missing}, code: 1, stderr: "hibergated: connect " + missing + ": no such file"},
		{args: []string{"--control", missing, "wake", "web"}, code: 1, stderr: "hibergated: connect " + missing + ": no such file"},
		{args: []string{"sleep", "web", "--config", missing}, code: 1, stderr: "hibergated: read configuration: "},
	}
	for _, test := range tests {
		var stdout, stderr bytes.Buffer
		code := execute(append([]string{"hibergated"}, test.args...), &stdout, &stderr)
		if code != test.code || !strings.HasPrefix(stdout.String(), test.stdout) || !strings.HasPrefix(stderr.String(), test.stderr) {
			t.Errorf("%q: got %d\n%s%s, want %d\n%s%s", test.args, code, &stdout, &stderr, test.code, test.stdout, test.stderr)
		}
		if code == 0 && stderr.Len() > 0 || code != 0 && stdout.Len() > 0 {
			t.Errorf("%q: %d, with stdout %q and stderr %q", test.args, code, &stdout, &stderr)
		}
	}
}

func TestVersionOf(t *testing.T) {
	t.Parallel()
	setting := func(k, v string) debug.BuildSetting { return debug.BuildSetting{Key: k, Value: v} }
	for want, info := range map[string]debug.BuildInfo{
		"(devel)": {},
		"v1.2.3":  {Main: debug.Module{Version: "v1.2.3"}},
		"(devel) (0123456789ab, modified)": {
			Main:     debug.Module{Version: "(devel)"},
			Settings: []debug.BuildSetting{setting("vcs.revision", "0123456789abcdef"), setting("vcs.modified", "true")},
		},
	} {
		if got := versionOf(&info); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}
