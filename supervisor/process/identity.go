package process

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/user"
	"slices"
	"strconv"
	"strings"
)

// Identity is who a process runs as. The ids are those of the machine's user
// database at the time of Resolve.
type Identity struct {
	UID, GID int
	Groups   []uint32 // supplementary groups, sorted; GID may be among them
	// From the user database; empty where the Exec names no user, or one that is
	// a number without an entry there.
	Name, Home, Shell string
}

// Resolve looks up the user and the groups that the Exec names, as they are now.
// It returns nil where it names none. The groups are those that the user is in
// (initgroups(3)) and the SupplementaryGroups.
func (x *Exec) Resolve() (*Identity, error) {
	if x.User == "" && x.Group == "" && len(x.SupplementaryGroups) == 0 {
		return nil, nil //nolint:nilnil // no identity is not an error, and the documented answer
	}
	id := &Identity{UID: os.Getuid(), GID: os.Getgid()}
	var err error
	if x.User != "" {
		err = id.setUser(x.User, x.Group != "")
	} else {
		id.Groups, err = ownGroups()
	}
	if err != nil {
		return nil, err
	}
	if x.Group != "" {
		if id.GID, err = lookupGroup(x.Group); err != nil {
			return nil, err
		}
	}
	for _, name := range x.SupplementaryGroups {
		gid, err := lookupGroup(name)
		if err != nil {
			return nil, err
		}
		id.Groups = append(id.Groups, uint32(gid))
	}
	slices.Sort(id.Groups)
	id.Groups = slices.Compact(id.Groups)
	return id, nil
}

// setUser fills in everything that the user database knows about a user.
func (id *Identity) setUser(name string, haveGroup bool) error {
	u, err := lookupUser(name)
	if uid, ok := number(name); ok && errors.As(err, new(user.UnknownUserIdError)) {
		// Any number may own files and processes; but which group goes with it?
		if !haveGroup {
			return fmt.Errorf("look up user %s: not in the user database, so a group is needed too", name)
		}
		id.UID = uid
		return nil
	}
	if err != nil {
		return fmt.Errorf("look up user %s: %w", name, err)
	}
	id.Name, id.Home = u.Username, u.HomeDir
	id.Shell = loginShell(u.Username)
	var okUID, okGID bool
	id.UID, okUID = number(u.Uid)
	id.GID, okGID = number(u.Gid)
	if !okUID || !okGID {
		return fmt.Errorf("look up user %s: uid %q, gid %q: not a number", name, u.Uid, u.Gid)
	}
	gids, err := u.GroupIds()
	if err != nil {
		return fmt.Errorf("look up groups of user %s: %w", name, err)
	}
	for _, s := range gids {
		if gid, ok := number(s); ok {
			id.Groups = append(id.Groups, uint32(gid))
		}
	}
	return nil
}

// lookupUser takes what is a number for a uid, as systemd does.
func lookupUser(name string) (*user.User, error) {
	if _, ok := number(name); ok {
		return user.LookupId(name)
	}
	return user.Lookup(name)
}

func lookupGroup(name string) (int, error) {
	if gid, ok := number(name); ok {
		return gid, nil // needs no entry
	}
	g, err := user.LookupGroup(name)
	if err != nil {
		return 0, fmt.Errorf("look up group %s: %w", name, err)
	}
	gid, ok := number(g.Gid)
	if !ok {
		return 0, fmt.Errorf("look up group %s: gid %q: not a number", name, g.Gid)
	}
	return gid, nil
}

// number parses a uid or gid. The highest one means "no change" to the kernel
// and is nobody's.
func number(s string) (int, bool) {
	n, err := strconv.ParseUint(s, 10, 32)
	return int(n), err == nil && n != 1<<32-1
}

// loginShell reads the last field of the user's line in passwd(5), which package
// os/user leaves out. Empty where the user comes from elsewhere (LDAP).
func loginShell(name string) string {
	f, err := os.Open("/etc/passwd")
	if err != nil {
		return ""
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		fields := strings.Split(lines.Text(), ":")
		if len(fields) == 7 && fields[0] == name {
			return fields[6]
		}
	}
	return ""
}

// ownGroups returns the supplementary groups of this process.
func ownGroups() ([]uint32, error) {
	gids, err := os.Getgroups()
	if err != nil {
		return nil, fmt.Errorf("get own groups: %w", err)
	}
	var out []uint32
	for _, gid := range gids {
		out = append(out, uint32(gid))
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}

// inGroups says whether exactly these (sorted) are our supplementary groups.
func inGroups(groups []uint32) bool {
	own, err := ownGroups()
	return err == nil && slices.Equal(own, groups)
}
