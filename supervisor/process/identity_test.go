package process

import (
	"fmt"
	"os"
	"os/user"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"hibergate/activation/nettest"
)

func TestResolve(t *testing.T) {
	t.Parallel()
	groups, err := ownGroups()
	if err != nil {
		t.Fatal(err)
	}
	entry, err := user.Lookup("root")
	if err != nil {
		t.Skip(err)
	}
	root := &Identity{Name: "root", Home: entry.HomeDir, Shell: loginShell("root")}
	gids, err := entry.GroupIds()
	if err != nil {
		t.Fatal(err)
	}
	for _, gid := range gids {
		n, _ := number(gid)
		root.Groups = append(root.Groups, uint32(n))
	}
	slices.Sort(root.Groups)
	rootAnd9 := append(slices.Clone(root.Groups), 9)
	slices.Sort(rootAnd9)
	with := func(gids ...uint32) []uint32 {
		all := slices.Concat(groups, gids)
		slices.Sort(all)
		return slices.Compact(all)
	}
	for name, tc := range map[string]struct {
		exec Exec
		want *Identity
	}{
		"nothing":             {Exec{}, nil},
		"name":                {Exec{User: "root"}, root},
		"number":              {Exec{User: "0"}, root},
		"group by number":     {Exec{Group: "12345"}, &Identity{UID: os.Getuid(), GID: 12345, Groups: groups}},
		"group by name":       {Exec{Group: "root"}, &Identity{UID: os.Getuid(), GID: 0, Groups: groups}},
		"supplementary alone": {Exec{SupplementaryGroups: []string{"77", "root", "77"}}, &Identity{UID: os.Getuid(), GID: os.Getgid(), Groups: with(0, 77)}},
		"user and all groups": {
			Exec{User: "root", Group: "5", SupplementaryGroups: []string{"9"}},
			&Identity{GID: 5, Groups: slices.Compact(rootAnd9), Name: "root", Home: root.Home, Shell: root.Shell},
		},
		"unknown number": {Exec{User: "54321", Group: "7"}, &Identity{UID: 54321, GID: 7}},
	} {
		got, err := tc.exec.Resolve()
		if diff := cmp.Diff(tc.want, got); diff != "" || err != nil {
			t.Errorf("%s: %v (-want +got):\n%s", name, err, diff)
		}
	}
	for want, x := range map[string]Exec{
		"look up user no-such-user: user: unknown user no-such-user":             {User: "no-such-user"},
		"look up group no-such-group: group: unknown group no-such-group":        {Group: "no-such-group"},
		"look up group none: group: unknown group none":                          {User: "root", SupplementaryGroups: []string{"none"}},
		"look up user 54321: not in the user database, so a group is needed too": {User: "54321"},
		"look up user 4294967295: user: unknown user 4294967295":                 {User: "4294967295"}, // (uid_t)-1
	} {
		if _, err := x.Resolve(); err == nil || err.Error() != want {
			t.Errorf("got %v, want %s", err, want)
		}
	}
}

const showIdentity = `exec /bin/busybox grep -E '^(Uid|Gid|Groups)' /proc/self/status`

func TestIdentityOfChild(t *testing.T) {
	nettest.Need(t, nettest.RealRoot, nettest.Tool("/bin/busybox"))
	nobody, err := user.Lookup("nobody")
	if err != nil {
		t.Skip(err)
	}
	for way, noClone3 := range bothClones() {
		t.Run(way, func(t *testing.T) {
			s := newSpawner(t)
			s.noClone3.Store(noClone3)
			x := sh(showIdentity)
			x.User, x.SupplementaryGroups = "nobody", []string{"777", "778"}
			id, err := x.Resolve()
			if err != nil {
				t.Fatal(err)
			}
			u, g := nobody.Uid, nobody.Gid
			want := fmt.Sprintf("Uid: %s %s %s %s Gid: %s %s %s %s Groups: 777 778 %s", u, u, u, u, g, g, g, g, g)
			out, _ := output(t, s, &Spec{Exec: x, Identity: id})
			if got := strings.Join(strings.Fields(out), " "); got != want {
				t.Errorf("got %q, want %q", got, want)
			}

			// No group of root's stays where none is asked for.
			x.User, x.Group, x.SupplementaryGroups = "54321", "7", nil
			if id, err = x.Resolve(); err != nil {
				t.Fatal(err)
			}
			out, _ = output(t, s, &Spec{Exec: x, Identity: id})
			want = "Uid: 54321 54321 54321 54321 Gid: 7 7 7 7 Groups:"
			if got := strings.Join(strings.Fields(out), " "); got != want {
				t.Errorf("got %q, want %q", got, want)
			}

			// The directory is entered as the user, and so is the program's.
			private := t.TempDir()
			if err := os.Chmod(private, 0o700); err != nil {
				t.Fatal(err)
			}
			x.WorkingDirectory = private
			_, err = s.Start(&Spec{Exec: x, Identity: id, Stdout: -1, Stderr: -1})
			if want := "chdir " + private + ": permission denied"; err == nil || err.Error() != want {
				t.Errorf("got %v, want %s", err, want)
			}
		})
	}
}

// A supervisor without privilege can name its own user.
func TestOwnIdentity(t *testing.T) {
	s := newSpawner(t)
	groups, err := ownGroups()
	if err != nil {
		t.Fatal(err)
	}
	out, _ := output(t, s, &Spec{Exec: sh("echo fine"), Identity: &Identity{UID: os.Getuid(), GID: os.Getgid(), Groups: groups}})
	if out != "fine\n" {
		t.Errorf("got %q", out)
	}
}

func TestHomeDirectory(t *testing.T) {
	s := newSpawner(t)
	x := sh("pwd")
	x.WorkingDirectory = "~"
	home := t.TempDir()
	groups, err := ownGroups()
	if err != nil {
		t.Fatal(err)
	}
	id := &Identity{UID: os.Getuid(), GID: os.Getgid(), Groups: groups, Home: home}
	if out, _ := output(t, s, &Spec{Exec: x, Identity: id}); out != home+"\n" {
		t.Errorf("got %q, want %q", out, home)
	}
	if _, err := s.Start(&Spec{Exec: x, Identity: &Identity{UID: 54321}}); err == nil || err.Error() != "chdir ~: the user has no home directory" {
		t.Errorf("got %v", err)
	}
}
