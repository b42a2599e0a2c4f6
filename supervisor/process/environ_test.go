package process

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/google/go-cmp/cmp"
)

func TestParseEnvironmentFile(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		in   string
		want []string
	}{
		"empty":                    {"", nil},
		"simple":                   {"A=b\nC=d", []string{"A=b", "C=d"}},
		"comments and empty lines": {"# A=1\n\n ; B=2\n  \nC=3 # not a comment\n", []string{"C=3 # not a comment"}},
		"comment does not go on":   {"# a \\\nB=1\n", []string{"B=1"}},
		"no equals sign":           {"nothing\nA=1\nlast", []string{"A=1"}},
		"no variable name":         {"export A=1\n1B=2\n=3\nC D=4\nE=5", []string{"E=5"}},
		"no value":                 {"A=\nB= \nC=''\n", []string{"A=", "B=", "C="}},
		"blanks":                   {" \tA \t= \t b  c \t\r\nB=d", []string{"A=b  c", "B=d"}},
		"equals sign in value":     {"A=b=c", []string{"A=b=c"}},
		"continued":                {"A=one\\\ntwo\nB=3", []string{"A=onetwo", "B=3"}},
		"continued to the end":     {"A=one\\\n", []string{"A=one"}},
		"backslash at the end":     {"A=one\\", []string{"A=one"}},
		"backslashes":              {`A=\a\\b\ ` + "\n", []string{`A=a\b `}},
		"escaped blank is kept":    {"A=x\\  \n", []string{"A=x "}},
		"escaped quote":            {`A=\"b\"`, []string{`A="b"`}},
		"quote inside":             {`A=it's "so"`, []string{`A=it's "so"`}},
		"single quotes":            {`A='b "c" \d $e' `, []string{`A=b "c" \d $e`}},
		"single over lines":        {"A='b\n#c\n'\nD=1", []string{"A=b\n#c\n", "D=1"}},
		"double quotes":            {`A="b 'c' \"d\" \\ \$e \` + "`" + ` \n"`, []string{`A=b 'c' "d" \ $e ` + "`" + ` \n`}},
		"double over lines":        {"A=\"b\nc\\\nd\"\nE=1", []string{"A=b\ncd", "E=1"}},
		"quoted blanks are kept":   {`A="  b  "  `, []string{"A=  b  "}},
		"parts":                    {`A='a' "b"c 'd' `, []string{`A=abc 'd'`}},
		"continued after quote":    {"A='a'\\\nb\nC=1", []string{"A=ab", "C=1"}},
		"not closed":               {`A="b` + "\nC='d", []string{"A=b\nC='d"}},
		"nothing is expanded":      {"A=$B `c` ~", []string{"A=$B `c` ~"}},
		"later stays later":        {"A=1\nA=2", []string{"A=1", "A=2"}},
		"not ASCII":                {"A=Grüße", []string{"A=Grüße"}},
	} {
		got, err := parseEnvironmentFile([]byte(tc.in))
		if diff := cmp.Diff(tc.want, got); diff != "" || err != nil {
			t.Errorf("%s: parse %q: %v (-want +got):\n%s", name, tc.in, err, diff)
		}
	}
	for in, want := range map[string]string{
		"A=1\nB=\x00": "line 2: a NUL byte",
		"A=\xff":      "not UTF-8",
	} {
		if got, err := parseEnvironmentFile([]byte(in)); err == nil || err.Error() != want {
			t.Errorf("parse %q: got %q, %v, want error %q", in, got, err, want)
		}
	}
}

func FuzzParseEnvironmentFile(f *testing.F) {
	for _, s := range []string{"A=1\nB='x\ny'\n", `A="b\"c" d\` + "\ne", "#\\\n;\n = \nA\\=1", "A='", "A=\"\\"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		vars, err := parseEnvironmentFile(b)
		if err != nil && vars != nil {
			t.Errorf("parse %q: both %q and %v", b, vars, err)
		}
		for _, v := range vars {
			name, value, ok := strings.Cut(v, "=")
			if !ok || !validName(name) || len(value) > len(b) || strings.Contains(v, "\x00") {
				t.Errorf("parse %q: got %q", b, v)
			}
			// What was read can be written so that it is read again.
			quoted := name + "='" + value + "'"
			if strings.Contains(value, "'") {
				continue
			}
			again, err := parseEnvironmentFile([]byte(quoted))
			if err != nil || len(again) != 1 || again[0] != v {
				t.Errorf("parse %q: got %q, %v, want %q", quoted, again, err, v)
			}
		}
	})
}

func TestEnviron(t *testing.T) {
	t.Setenv("LANG", "de_DE.UTF-8")
	t.Setenv("SECRET", "x")
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	one, two := write("1.env", "FILE=1\nA=file\nX=1"), write("2.env", "FILE=2\n")
	path := "PATH=" + defaultPath
	for name, tc := range map[string]struct {
		exec  Exec
		id    *Identity
		extra []string
		want  []string
	}{
		"nothing": {want: []string{path, "LANG=de_DE.UTF-8"}},
		"user": {
			id:   &Identity{Name: "git", Home: "/srv/git", Shell: "/bin/sh"},
			want: []string{path, "LANG=de_DE.UTF-8", "USER=git", "LOGNAME=git", "HOME=/srv/git", "SHELL=/bin/sh"},
		},
		"user without a name": {id: &Identity{UID: 7}, want: []string{path, "LANG=de_DE.UTF-8"}},
		"later wins": {
			exec:  Exec{Environment: []string{"A=1", "LANG=C", "X=0", "PATH=/bin"}, EnvironmentFiles: []string{one, two}},
			extra: []string{"X=2", "LISTEN_FDS=1"},
			want:  []string{"PATH=/bin", "LANG=C", "A=file", "X=2", "FILE=2", "LISTEN_FDS=1"},
		},
		"missing and allowed": {
			exec: Exec{EnvironmentFiles: []string{"-" + dir + "/none", "-" + dir + "/none.*", "-" + two}},
			want: []string{path, "LANG=de_DE.UTF-8", "FILE=2"},
		},
		"passed": {
			exec: Exec{PassEnvironment: []string{"SECRET", "NONE", "LISTEN_FDS"}, Environment: []string{"A=1"}},
			want: []string{path, "LANG=de_DE.UTF-8", "SECRET=x", "A=1"},
		},
		"wildcard": {
			exec: Exec{EnvironmentFiles: []string{dir + "/*.env"}},
			want: []string{path, "LANG=de_DE.UTF-8", "FILE=2", "A=file", "X=1"},
		},
	} {
		got, err := tc.exec.Environ(tc.id, tc.extra)
		if diff := cmp.Diff(tc.want, got); diff != "" || err != nil {
			t.Errorf("%s: %v (-want +got):\n%s", name, err, diff)
		}
	}

	all := Exec{PassEnvironment: []string{"*"}}
	own := []string{"PATH=/own", "LISTEN_FDS=1", "LISTEN_PID=1", "WATCHDOG_USEC=1", "NOTIFY_SOCKET=/s", "odd%%=1", "NOTIFY_SOCKETS=1"}
	if diff := cmp.Diff([]string{"PATH=/own", "odd%%=1", "NOTIFY_SOCKETS=1"}, all.passed(own)); diff != "" {
		t.Errorf("all that is passed (-want +got):\n%s", diff)
	}

	large := write("large", strings.Repeat("#", maxEnvironmentFile+1))
	bad := write("bad", "A=\xff")
	for file, want := range map[string]string{
		dir + "/none":   "read environment file " + dir + "/none: no such file or directory",
		dir + "/none.*": "read environment file " + dir + "/none.*: file does not exist",
		dir:             "read environment file " + dir + ": not a regular file",
		"-" + large:     "read environment file " + large + ": larger than 1048576 bytes",
		"-" + bad:       "read environment file " + bad + ": not UTF-8",
	} {
		_, err := (&Exec{EnvironmentFiles: []string{file}}).Environ(nil, nil)
		if err == nil || err.Error() != want {
			t.Errorf("%s: got %v, want %s", file, err, want)
		}
		if strings.Contains(file, "none") && !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: got %v, want it to be %v", file, err, fs.ErrNotExist)
		}
	}
}

// What is not a regular file is not waited for.
func TestEnvironmentFileIsFIFO(t *testing.T) {
	path := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	x := Exec{EnvironmentFiles: []string{path}}
	want := "read environment file " + path + ": not a regular file"
	if _, err := x.Environ(nil, nil); err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}
