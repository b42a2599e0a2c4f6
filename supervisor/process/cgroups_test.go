package process

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
)

func cgroupV2() error {
	g, err := openCgroups(testName() + "-feature")
	if err != nil {
		return err
	}
	return g.close()
}

func TestTreeWithoutClone3(t *testing.T) {
	nettest.Need(t, nettest.RealRoot, cgroupV2, nettest.Tool("setsid"))
	s := newSpawner(t)
	if got := s.Tracking(); got != "cgroup" {
		t.Errorf("got tracking %q, want cgroup", got)
	}
	s.noClone3.Store(true)
	tree := s.NewTree("web")
	p := start(t, s, tree, "(setsid sleep 1000 &) ; exec sleep 1000")
	wantPIDs(t, tree, 2)
	if got := s.Tracking(); !strings.HasPrefix(got, "process tree: ") || !strings.Contains(got, "clone3") {
		t.Errorf("got tracking %q", got)
	}
	endTree(t, tree, p)
}

func TestTrackingOfOrdinaryUser(t *testing.T) {
	if cgroupV2() == nil {
		t.Skip("may make cgroups")
	}
	s := newSpawner(t)
	if got, ok := strings.CutPrefix(s.Tracking(), "process tree: "); !ok || got == "" {
		t.Errorf("got tracking %q, want the reason", got)
	}
}

func TestLeftovers(t *testing.T) {
	nettest.Need(t, nettest.RealRoot, cgroupV2)
	first := newSpawner(t)
	lives, dead, frozen := first.NewTree("lives"), first.NewTree("dead"), first.NewTree("frozen")
	p := start(t, first, lives, "exec sleep 1000")
	for _, tree := range []*Tree{dead, frozen} {
		mustWait(t, start(t, first, tree, "exit 0"))
	}
	if err := frozen.Freeze(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkdirat(dead.group.fd, "inner", 0o755); err != nil {
		t.Fatal(err)
	}

	second, err := NewSpawner(testName())
	if err != nil {
		t.Fatal(err)
	}
	if got, want := fmt.Sprint(second.Leftovers()), fmt.Sprintf("[{lives [%d]}]", p.PID()); got != want {
		t.Errorf("got leftovers %s, want %s", got, want)
	}
	for name, group := range map[string]string{"lives": "lives~2", "dead": "dead", "frozen": "frozen"} {
		tree := second.NewTree(name)
		q := start(t, second, tree, "exec sleep 1000")
		if tree.group == nil || tree.group.name != group {
			t.Errorf("%s: got %+v, want cgroup %s", name, tree.group, group)
		}
		wantPIDs(t, tree, 1)
		endTree(t, tree, q)
		if err := tree.Close(); err != nil {
			t.Error(err)
		}
	}
	if err := second.Close(); err != nil {
		t.Error(err)
	}
	wantPIDs(t, lives, 1)
	endTree(t, lives, p)
	// The first one's directories were removed under it: it makes new ones.
	mustWait(t, start(t, first, dead, "exit 0"))
	for _, tree := range []*Tree{lives, dead, frozen} {
		if err := tree.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestRemovedCgroup(t *testing.T) {
	nettest.Need(t, nettest.RealRoot, cgroupV2)
	s := newSpawner(t)
	tree := s.NewTree("web")
	mustWait(t, start(t, s, tree, "exit 0"))
	if err := errors.Join(removeAt(s.groups.fd, "web"), removeAt(s.groups.own, s.groups.name)); err != nil {
		t.Fatal(err)
	}
	p := start(t, s, tree, "exec sleep 1000")
	if tree.group == nil {
		t.Errorf("no cgroup: %s", s.Tracking())
	}
	wantPIDs(t, tree, 1)
	endTree(t, tree, p)
	if err := tree.Close(); err != nil {
		t.Error(err)
	}
}

func TestInnerCgroup(t *testing.T) {
	nettest.Need(t, nettest.RealRoot, cgroupV2)
	s := newSpawner(t)
	tree := s.NewTree("web")
	p := start(t, s, tree, "exec sleep 1000")
	if err := unix.Mkdirat(tree.group.fd, "inner", 0o755); err != nil {
		t.Fatal(err)
	}
	inner := &cgroup{path: tree.group.path + "/inner"}
	var err error
	if inner.fd, err = openDirAt(tree.group.fd, "inner"); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(inner.fd)
	if err := inner.control("cgroup.procs", fmt.Sprint(p.PID())); err != nil {
		t.Fatal(err)
	}
	wantPIDs(t, tree, 1)
	if err := tree.Signal(unix.SIGTERM); err != nil {
		t.Error(err)
	}
	if got := mustWait(t, p); got.Signal != unix.SIGTERM {
		t.Errorf("got %v", got)
	}
	waitEmpty(t, tree)
	if err := tree.Close(); err != nil {
		t.Error(err)
	}
}

func TestNewSpawnerName(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"", "..", "a/b", "a\n"} {
		if s, err := NewSpawner(name); err == nil {
			t.Errorf("%q: accepted", name)
			s.Close()
		}
	}
}

func TestUnifiedDirs(t *testing.T) {
	t.Parallel()
	const v1 = "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
	for name, tc := range map[string]struct{ info, own, want string }{
		"unified":               {"31 23 0:28 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n", "/a/b", "/sys/fs/cgroup/a/b"},
		"root of it":            {"31 23 0:28 / /sys/fs/cgroup rw - cgroup2 none rw\n", "/", "/sys/fs/cgroup"},
		"hybrid":                {v1 + "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n", "/a", "/sys/fs/cgroup/unified/a"},
		"part in a container":   {"31 23 0:28 /docker/1 /sys/fs/cgroup ro - cgroup2 cgroup ro\n", "/docker/1/x", "/sys/fs/cgroup/x"},
		"other part":            {"31 23 0:28 /docker/1 /sys/fs/cgroup ro - cgroup2 cgroup ro\n", "/docker/12", ""},
		"outside the namespace": {"31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup rw\n", "/../x", ""},
		"blanks":                {`31 23 0:28 / /my\040dir\134x rw - cgroup2 cgroup2 rw` + "\n", "/a", `/my dir\x/a`},
		"none":                  {v1, "/", ""},
		"garbage":               {"x - cgroup2\n - \n31 23 0:28 / /x rw -", "/", ""},
	} {
		if got := strings.Join(unifiedDirs([]byte(tc.info), tc.own), " "); got != tc.want {
			t.Errorf("%s: got %q, want %q", name, got, tc.want)
		}
	}
}

func TestParseOwnCgroup(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"0::/\n":                       "/ true",
		"1:cpu:/x\n0::/a.slice/b:c\n":  "/a.slice/b:c true",
		"0::/a (deleted)\n":            "/a true",
		"1:cpu:/x\n9:name=systemd:/\n": " false",
		"":                             " false",
	} {
		p, ok := parseOwnCgroup([]byte(in))
		if got := fmt.Sprint(p, " ", ok); got != want {
			t.Errorf("%q: got %q, want %q", in, got, want)
		}
	}
}

func FuzzUnifiedDirs(f *testing.F) {
	f.Add([]byte("31 23 0:28 / /sys/fs/cgroup rw - cgroup2 none rw\n"), "/a")
	f.Add([]byte(`1 2 3 /\057 /\0400 rw - cgroup2 - cgroup2`), "/")
	f.Fuzz(func(t *testing.T, b []byte, own string) {
		for _, dir := range unifiedDirs(b, own) {
			if dir == "" || filepath.Clean(dir) != dir {
				t.Errorf("got %q", dir)
			}
		}
	})
}

func FuzzParseCgroupFiles(f *testing.F) {
	f.Add([]byte("populated 1\nfrozen 0\n"))
	f.Add([]byte("12\n0\n13"))
	f.Add([]byte("0::/x (deleted)\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if parseEvents(b, "populated") && !strings.Contains(string(b), "populated") {
			t.Error("populated from nothing")
		}
		for _, pid := range parsePIDs(b) {
			if pid <= 0 {
				t.Errorf("got pid %d", pid)
			}
		}
		if p, ok := parseOwnCgroup(b); ok && !strings.HasPrefix(p, "/") {
			t.Errorf("got path %q", p)
		}
	})
}

// Where descriptors run out, a start fails, a frozen tree is let go, and cgroups are not given up.
func TestOutOfDescriptors(t *testing.T) {
	nettest.Need(t, nettest.RealRoot, cgroupV2)
	s := newSpawner(t)
	tree := newTree(t, s)
	p := start(t, s, tree, "exec sleep 1000")
	if err := errors.Join(tree.Freeze(t.Context()), tree.Thaw()); err != nil {
		t.Fatal(err)
	}
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	other := s.NewTree("other")
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 3, Max: was.Max}); err != nil {
		t.Fatal(err)
	}
	_, startErr := s.Start(&Spec{Tree: other, Exec: sh("exit 0"), Stdout: -1, Stderr: -1})
	freezeErr := tree.Freeze(t.Context())
	_, emptyErr := tree.Empty()
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{startErr, freezeErr, emptyErr} {
		if !errors.Is(err, unix.EMFILE) {
			t.Errorf("got %v, want %v", err, unix.EMFILE)
		}
	}
	if frozen, err := tree.group.is("frozen"); frozen || err != nil {
		t.Errorf("frozen: got %v, %v", frozen, err)
	}
	mustWait(t, start(t, s, other, "exit 0"))
	if got := s.Tracking(); got != "cgroup" || other.group == nil {
		t.Errorf("got tracking %q", got)
	}
	if err := other.Close(); err != nil {
		t.Error(err)
	}
	endTree(t, tree, p)
}
