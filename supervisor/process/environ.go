package process

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// defaultPath is what systemd gives to its services.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin"

// maxEnvironmentFile bounds what is read of one file; exec takes less anyway.
const maxEnvironmentFile = 1 << 20

// Environ builds the environment of a process. Later wins: PATH; our own LANG; what
// PassEnvironment names; USER, LOGNAME, HOME and SHELL where the Exec names a user; Environment;
// EnvironmentFiles, which are read now; extra. Nothing else of the supervisor's
// own environment is passed on.
func (x *Exec) Environ(id *Identity, extra []string) ([]string, error) {
	env := make(environment, 0, 8+len(x.Environment)+len(extra))
	env.set("PATH=" + defaultPath)
	if lang := os.Getenv("LANG"); lang != "" {
		env.set("LANG=" + lang)
	}
	env.set(x.passed(os.Environ())...)
	if id != nil && id.Name != "" {
		env.set("USER="+id.Name, "LOGNAME="+id.Name)
		if id.Home != "" {
			env.set("HOME=" + id.Home)
		}
		if id.Shell != "" {
			env.set("SHELL=" + id.Shell)
		}
	}
	env.set(x.Environment...)
	for _, pattern := range x.EnvironmentFiles {
		vars, err := readEnvironmentFiles(pattern)
		if err != nil {
			return nil, err
		}
		env.set(vars...)
	}
	env.set(extra...)
	return env, nil
}

// passed returns those variables of the environment own that PassEnvironment names. What systemd told the supervisor of
// its sockets and where to report is about no other process.
func (x *Exec) passed(own []string) []string {
	if len(x.PassEnvironment) == 0 {
		return nil
	}
	all := slices.Contains(x.PassEnvironment, "*")
	var vars []string
	for _, v := range own {
		name, _, _ := strings.Cut(v, "=")
		if strings.HasPrefix(name, "LISTEN_") || strings.HasPrefix(name, "WATCHDOG_") || name == "NOTIFY_SOCKET" {
			continue
		}
		if all || slices.Contains(x.PassEnvironment, name) {
			vars = append(vars, v)
		}
	}
	return vars
}

// environment is a list of "NAME=value" in which each name occurs once.
type environment []string

func (e *environment) set(vars ...string) {
	for _, v := range vars {
		name, _, _ := strings.Cut(v, "=")
		i := slices.IndexFunc(*e, func(old string) bool { return len(old) > len(name) && old[len(name)] == '=' && old[:len(name)] == name })
		if i >= 0 {
			(*e)[i] = v
		} else {
			*e = append(*e, v)
		}
	}
}

// readEnvironmentFiles reads one entry of EnvironmentFiles: a path, maybe with
// the wildcards of path/filepath, maybe with a "-" before it that allows for its absence.
func readEnvironmentFiles(pattern string) ([]string, error) {
	path, optional := strings.CutPrefix(pattern, "-")
	paths := []string{path}
	if strings.ContainsAny(path, "*?[") {
		var err error
		paths, err = filepath.Glob(path) // sorted
		if err == nil && len(paths) == 0 && !optional {
			err = fs.ErrNotExist
		}
		if err != nil {
			return nil, fmt.Errorf("read environment file %s: %w", path, err)
		}
	}
	var vars []string
	for _, path := range paths {
		b, err := readBounded(path)
		if optional && errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read environment file %s: %w", path, err)
		}
		v, err := parseEnvironmentFile(b)
		if err != nil {
			return nil, fmt.Errorf("read environment file %s: %w", path, err)
		}
		vars = append(vars, v...)
	}
	return vars, nil
}

// readBounded reads a whole file that may not be larger than maxEnvironmentFile. It
// does not wait for what is not a file: a FIFO, put there by somebody, would be
// opened for ever. Its errors leave the file's name to the caller.
func readBounded(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, withoutPath(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, withoutPath(err)
	}
	if !info.Mode().IsRegular() {
		return nil, errors.New("not a regular file")
	}
	b, err := io.ReadAll(io.LimitReader(f, maxEnvironmentFile+1))
	if err != nil {
		return nil, withoutPath(err)
	}
	if len(b) > maxEnvironmentFile {
		return nil, fmt.Errorf("larger than %d bytes", maxEnvironmentFile)
	}
	return b, nil
}

func withoutPath(err error) error {
	if pathErr := (*fs.PathError)(nil); errors.As(err, &pathErr) {
		return pathErr.Err
	}
	return err
}
