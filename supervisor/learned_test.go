package supervisor

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"hibergate/activation"
	"hibergate/activation/adopt"
	"hibergate/activation/nettest"
)

// learning is a service that learns of what its program listens on.
func learning(patterns ...string) *Service {
	svc := &Service{Name: "web", Handoff: Adopt}
	for _, text := range patterns {
		p, ok, err := adopt.ParsePattern(text)
		if !ok || err != nil {
			panic(text)
		}
		svc.Learn = append(svc.Learn, Learn{Pattern: p, Spec: activation.Spec{Name: "name", Options: activation.Options{NoDelay: true}}})
	}
	return svc
}

// addresses are those of specs, with the rest of what was read.
func addressesOf(specs []activation.Spec) []string {
	out := []string{}
	for _, s := range specs {
		text := s.Address.String()
		for word, is := range map[string]bool{
			" dual": s.Options.Family == activation.FamilyDual, " ipv6": s.Options.Family == activation.FamilyIPv6, " ipv4": s.Options.Family == activation.FamilyIPv4,
			" free": s.Options.FreeBind, " transparent": s.Options.Transparent,
		} {
			if is {
				text += word
			}
		}
		if s.Options.Device != "" {
			text += " on " + s.Options.Device
		}
		out = append(out, text)
	}
	return out
}

func TestParseLearned(t *testing.T) {
	t.Parallel()
	many := make([]string, 2*adopt.MaxSockets)
	for i := range many {
		many[i] = fmt.Sprintf(`{"address": "tcp://127.0.0.1:%d"}`, 1000+i)
	}
	for name, tt := range map[string]struct {
		svc  *Service
		text string
		want []string
	}{
		"none":             {learning("auto"), `{"sockets": []}`, nil},
		"no list":          {learning("auto"), `{}`, nil},
		"null":             {learning("auto"), `null`, nil},
		"one":              {learning("auto"), `{"sockets": [{"address": "tcp://127.0.0.1:80"}]}`, []string{"tcp://127.0.0.1:80"}},
		"both versions":    {learning("tcp://:80"), `{"sockets": [{"address": "tcp://[::]:80", "family": "dual"}]}`, []string{"tcp://[::]:80 dual"}},
		"IPv6 only":        {learning("tcp://[::]:80"), `{"sockets": [{"address": "tcp://[::]:80", "family": "ipv6"}]}`, []string{"tcp://[::]:80 ipv6"}},
		"one of each":      {learning("tcp://:80"), `{"sockets": [{"address": "tcp://[::]:80", "family": "ipv6"}, {"address": "tcp://0.0.0.0:80"}]}`, []string{"tcp://[::]:80 ipv6", "tcp://0.0.0.0:80"}},
		"options":          {learning("auto"), `{"sockets": [{"address": "tcp://192.0.2.1:80", "device": "eth0", "free_bind": true, "transparent": true}]}`, []string{"tcp://192.0.2.1:80 free transparent on eth0"}},
		"abstract":         {learning("auto"), `{"sockets": [{"address": "unix:@name"}]}`, []string{"unix:@name"}},
		"a new key":        {learning("auto"), `{"version": 9, "sockets": [{"address": "tcp://127.0.0.1:80", "colour": "red"}]}`, []string{"tcp://127.0.0.1:80"}},
		"another pattern":  {learning("tcp://:81"), `{"sockets": [{"address": "tcp://127.0.0.1:80"}]}`, nil},
		"the second of it": {learning("udp://:80", "tcp://localhost:80"), `{"sockets": [{"address": "tcp://127.0.0.1:80"}]}`, []string{"tcp://127.0.0.1:80"}},
		"twice":            {learning("auto"), `{"sockets": [{"address": "tcp://127.0.0.1:80"}, {"address": "tcp://127.0.0.1:80"}]}`, []string{"tcp://127.0.0.1:80"}},
		"within another":   {learning("auto"), `{"sockets": [{"address": "tcp://0.0.0.0:80"}, {"address": "tcp://127.0.0.1:80"}]}`, []string{"tcp://0.0.0.0:80"}},
		"too many":         {learning("auto"), `{"sockets": [` + strings.Join(many, ",") + `]}`, nil},

		// What is wrong is learned again, and the rest is of use.
		"no address":       {learning("auto"), `{"sockets": [{}, {"address": "tcp://127.0.0.1:80"}]}`, []string{"tcp://127.0.0.1:80"}},
		"a wrong address":  {learning("auto"), `{"sockets": [{"address": "tcp://a name:80"}, {"address": "tcp://127.0.0.1:80"}]}`, []string{"tcp://127.0.0.1:80"}},
		"a wrong family":   {learning("auto"), `{"sockets": [{"address": "tcp://127.0.0.1:80", "family": "x25"}, {"address": "tcp://127.0.0.1:81"}]}`, []string{"tcp://127.0.0.1:81"}},
		"a path":           {learning("auto"), `{"sockets": [{"address": "unix:///etc/passwd"}, {"address": "fifo:///etc/passwd"}, {"address": "unixgram:@x"}]}`, nil},
		"no port":          {learning("auto"), `{"sockets": [{"address": "tcp://127.0.0.1:0"}]}`, nil},
		"no host":          {learning("tcp://:80"), `{"sockets": [{"address": "tcp://:80"}]}`, nil},
		"a high UDP port":  {learning("auto"), `{"sockets": [{"address": "udp://127.0.0.1:5353"}]}`, nil},
		"a low UDP port":   {learning("auto"), `{"sockets": [{"address": "udp://127.0.0.1:53"}]}`, []string{"udp://127.0.0.1:53"}},
		"one that is told": {listening(learning("auto"), "tcp://0.0.0.0:80"), `{"sockets": [{"address": "tcp://127.0.0.1:80"}, {"address": "tcp://127.0.0.1:81"}]}`, []string{"tcp://127.0.0.1:81"}},
	} {
		specs, err := parseLearned([]byte(tt.text), tt.svc)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if name == "too many" {
			if len(specs) != adopt.MaxSockets {
				t.Errorf("%s: got %d, want %d", name, len(specs), adopt.MaxSockets)
			}
			continue
		}
		got := map[string]bool{}
		for _, s := range addressesOf(specs) {
			got[words(s)] = true
		}
		want := map[string]bool{}
		for _, s := range tt.want {
			want[words(s)] = true
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
		for _, s := range specs {
			if s.Name != "name" || !s.Options.NoDelay || s.Options.PacketInfo != (s.Address.Network == activation.UDP) {
				t.Errorf("%s: got %+v, want the name and the options of the configuration", name, s)
			}
		}
	}
	for name, text := range map[string]string{
		"nothing": "", "no JSON": "{", "a list": "[]", "a string": `"x"`, "numbers": `{"sockets": [{"address": 80}]}`, "two": `{}{}`,
		"cut off": `{"sockets": [{"address": "tcp://127.0.0.1:80"}, {"addr`, "a list of strings": `{"sockets": ["tcp://127.0.0.1:80"]}`,
		"deep": strings.Repeat(`{"sockets":[`, 20000), "binary": "\x00\xff",
	} {
		if specs, err := parseLearned([]byte(text), learning("auto")); err == nil || specs != nil {
			t.Errorf("%s: got %v, %v, want an error", name, specs, err)
		}
	}
}

// words puts the words behind an address in an order of their own.
func words(text string) string {
	f := strings.Fields(text)
	set := map[string]bool{}
	for _, w := range f[1:] {
		set[w] = true
	}
	b, err := json.Marshal(set) // in order
	if err != nil {
		panic(err)
	}
	return f[0] + " " + string(b)
}

// listening gives a service a socket that is configured.
func listening(svc *Service, address string) *Service {
	a, err := activation.ParseAddress(address)
	if err != nil {
		panic(err)
	}
	svc.Sockets = append(svc.Sockets, activation.Spec{Address: a})
	return svc
}

// What is kept is what is there again, each socket in its own words.
func TestLearnedRoundTrip(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	state := t.TempDir()
	var socks []*activation.Socket
	want := []string{}
	for text, o := range map[string]activation.Options{
		"tcp://127.0.0.1:7601":  {},
		"tcp://0.0.0.0:7602":    {},
		"tcp://[::1]:7603":      {},
		"tcp://[::]:7604":       {Family: activation.FamilyDual},
		"tcp://[::]:7605":       {Family: activation.FamilyIPv6},
		"tcp://192.0.2.1:7606":  {FreeBind: true},
		"tcp://0.0.0.0:7607":    {Device: "lo"},
		"udp://127.0.0.1:607":   {},
		"unix:@hg-learned":      {},
		"unixpacket:@hg-learnt": {},
	} {
		a, err := activation.ParseAddress(text)
		if err != nil {
			t.Fatal(err)
		}
		sock, err := activation.Open(activation.Spec{Address: a, Options: o})
		if err != nil {
			t.Fatal(err)
		}
		defer sock.Close()
		socks = append(socks, sock)
		want = append(want, addressesOf([]activation.Spec{{Address: a, Options: o}})...)
	}
	svc := learning("auto")
	name := learnedPath(state, svc.Name)
	for range 2 { // the second one replaces the first
		if err := saveLearned(name, socks); err != nil {
			t.Fatal(err)
		}
		specs, err := loadLearned(state, svc)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, addressesOf(specs)); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
		socks, want = socks[:5], want[:5]
	}
	// Nobody else reads it, and nothing is left beside it.
	st, err := os.Stat(name)
	if err != nil {
		t.Fatal(err)
	}
	if st.Mode().Perm()&0o077 != 0 {
		t.Errorf("got mode %v, want it for the owner alone", st.Mode())
	}
	entries, err := os.ReadDir(filepath.Dir(name))
	if err != nil || len(entries) != 1 {
		t.Errorf("got %v, %v, want one file", entries, err)
	}
	// Nothing to keep is an empty list, which is not an error, and neither is a socket that is closed by now.
	for _, sock := range socks {
		if err := sock.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if err := saveLearned(name, socks); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(name)
	if err != nil || !strings.Contains(string(b), "[]") {
		t.Errorf("got %q, %v", b, err)
	}
	if specs, err := loadLearned(state, svc); len(specs) > 0 || err != nil {
		t.Errorf("got %v, %v", specs, err)
	}
}

// Where there is no directory for it, or nothing is learned, nothing is read and nothing is wrong.
func TestLoadLearnedNothing(t *testing.T) {
	t.Parallel()
	state := t.TempDir()
	for name, tt := range map[string]struct {
		state string
		svc   *Service
	}{
		"no state":     {"", learning("auto")},
		"no directory": {filepath.Join(state, "none"), learning("auto")},
		"no file":      {state, learning("auto")},
		"no pattern":   {state, learning()},
	} {
		if specs, err := loadLearned(tt.state, tt.svc); specs != nil || err != nil {
			t.Errorf("%s: got %v, %v", name, specs, err)
		}
	}
	name := learnedPath(state, "web")
	if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte("no JSON"), 0o600); err != nil {
		t.Fatal(err)
	}
	if specs, err := loadLearned(state, learning()); specs != nil || err != nil { // nobody asks what is in it
		t.Errorf("no pattern: got %v, %v", specs, err)
	}
}

// What is in the place of the file is an error that does not hold anybody up.
func TestLoadLearnedHostile(t *testing.T) {
	t.Parallel()
	other := filepath.Join(t.TempDir(), "other")
	if err := os.WriteFile(other, []byte(`{"sockets": [{"address": "tcp://127.0.0.1:80"}]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	for what, make := range map[string]func(name string) error{
		"a link":      func(name string) error { return os.Symlink(other, name) },
		"a FIFO":      func(name string) error { return unix.Mkfifo(name, 0o600) },
		"a directory": func(name string) error { return os.Mkdir(name, 0o700) },
		"no JSON":     func(name string) error { return os.WriteFile(name, []byte("no JSON"), 0o600) },
		"empty":       func(name string) error { return os.WriteFile(name, nil, 0o600) },
		"huge": func(name string) error {
			if err := os.WriteFile(name, []byte(`{"sockets": [`), 0o600); err != nil {
				return err
			}
			return os.Truncate(name, 1<<40)
		},
		"a device": func(name string) error { return os.Symlink("/dev/zero", name) },
		"a socket": func(name string) error { return unix.Mknod(name, unix.S_IFSOCK|0o600, 0) },
	} {
		state := t.TempDir()
		svc := learning("auto")
		name := learnedPath(state, svc.Name)
		if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := make(name); err != nil {
			t.Fatal(what, err)
		}
		if specs, err := loadLearned(state, svc); err == nil || specs != nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: got %v, %v, want an error that names the file", what, specs, err)
		}
	}
}

// What cannot be replaced is an error, and nothing is left of the attempt.
func TestSaveLearnedFails(t *testing.T) {
	t.Parallel()
	for what, prepare := range map[string]func(name string) error{
		"a file for a directory": func(name string) error { return os.WriteFile(filepath.Dir(name), nil, 0o600) },
		"a directory in its place": func(name string) error {
			return os.MkdirAll(filepath.Join(name, "full"), 0o700)
		},
	} {
		state := t.TempDir()
		name := learnedPath(state, "web")
		if err := prepare(name); err != nil {
			t.Fatal(err)
		}
		if err := saveLearned(name, nil); err == nil {
			t.Errorf("%s: saved", what)
		}
		if entries, err := os.ReadDir(filepath.Dir(name)); err == nil && len(entries) != 1 {
			t.Errorf("%s: got %v beside it", what, entries)
		}
	}
	// A link in its place is replaced, and what it leads to stays.
	state := t.TempDir()
	name, other := learnedPath(state, "web"), filepath.Join(state, "other")
	if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(other, []byte("other"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(other, name); err != nil {
		t.Fatal(err)
	}
	if err := saveLearned(name, nil); err != nil {
		t.Error(err)
	}
	if st, err := os.Lstat(name); err != nil || !st.Mode().IsRegular() {
		t.Errorf("got %v, %v, want a file", st, err)
	}
	if b, err := os.ReadFile(other); string(b) != "other" || err != nil {
		t.Errorf("got %q, %v of what the link led to", b, err)
	}
}

// FuzzLearned: whatever the file says, nobody gets more sockets, or others, than the patterns mean, and what is read can be
// opened beside what is configured.
func FuzzLearned(f *testing.F) {
	for _, s := range []string{
		`{"sockets": [{"address": "tcp://127.0.0.1:80", "family": "dual", "device": "lo", "free_bind": true}]}`,
		`{"sockets": [{"address": "tcp://[::]:80", "family": "ipv6"}, {"address": "tcp://0.0.0.0:80"}, {"address": "unix:@x"}]}`,
		`{"sockets": [{"address": "udp://[fe80::1%lo]:53"}]}`, `{"sockets": [{"address": "unix:///x"}]}`, `null`, `{}`, `[`, ``,
	} {
		f.Add([]byte(s), true)
		f.Add([]byte(s), false)
	}
	f.Fuzz(func(t *testing.T, b []byte, auto bool) {
		svc := listening(learning("tcp://localhost:80", "udp://:53"), "tcp://127.0.0.1:8080")
		if auto {
			svc = listening(learning("auto"), "tcp://127.0.0.1:8080")
		}
		specs, err := parseLearned(b, svc)
		if err != nil && specs != nil || len(specs) > adopt.MaxSockets {
			t.Fatalf("got %d sockets, %v", len(specs), err)
		}
		for i, s := range specs {
			a := s.Address
			matches := false
			for _, l := range svc.Learn {
				matches = matches || l.Pattern.Matches(a)
			}
			again, err := activation.ParseAddress(a.String())
			if !matches || err != nil || again != a || a.Network.Path() && !a.Abstract() || a.Network.IP() && (a.Port == 0 || !a.IP.IsValid()) {
				t.Errorf("got %+v", s)
			}
			for _, o := range append(svc.Sockets, specs[:i]...) {
				if s.Conflicts(o) {
					t.Errorf("%s and %s cannot both be opened", a, o.Address)
				}
			}
		}
	})
}
