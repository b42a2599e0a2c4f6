package config

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/BurntSushi/toml"

	"hibergate/supervisor"
)

const (
	maxFile     = 4 << 20 // bytes of one file
	maxBrackets = 500_000 // "[" and "{" in one file
)

// Config is everything a configuration says. It is not changed after Load.
type Config struct {
	Control  string                // path of the control socket; empty: there is none
	State    string                // path of the directory that keeps what was learned; empty: nothing is kept
	Global   supervisor.Global     // what bounds all services together
	Services []*supervisor.Service // in the order of Files and, within a file, of appearance
	Files    []string              // the files that were read, sorted by name; none after Parse
}

// DefaultControl is the path of the control socket where the configuration names
// none: in /run for root, in $XDG_RUNTIME_DIR for everybody else, and where that is
// not set in the place it usually has.
func DefaultControl() string {
	dir := "/run"
	if uid := os.Geteuid(); uid != 0 {
		dir = os.Getenv("XDG_RUNTIME_DIR")
		if !filepath.IsAbs(dir) {
			dir = filepath.Join("/run/user", strconv.Itoa(uid))
		}
	}
	return filepath.Join(dir, "hibergated", "control.sock")
}

// DefaultState is the path of the directory that keeps what was learned, where the configuration
// names none: in /var/lib for root, in $XDG_STATE_HOME for everybody else, and where that is not set in the place it
// usually has. It is empty for somebody without a home.
func DefaultState() string { return stateOf(os.Geteuid(), os.Getenv) }

// stateOf is DefaultState of a user and an environment.
func stateOf(uid int, env func(string) string) string {
	dir := "/var/lib"
	if uid != 0 {
		dir = env("XDG_STATE_HOME")
		if home := env("HOME"); !filepath.IsAbs(dir) && filepath.IsAbs(home) {
			dir = filepath.Join(home, ".local/state")
		}
		if !filepath.IsAbs(dir) {
			return ""
		}
	}
	return filepath.Join(dir, "hibergated")
}

// Load reads a file, or all files of a directory that are called *.toml, in the
// order of their names and without the hidden ones. The error is of type [Problems]
// when path could be read and says something that is wrong; all of it is told at once.
func Load(path string) (*Config, error) {
	names, err := list(path)
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	d := newDecoder()
	for _, name := range names {
		text, err := read(name)
		var pathErr *fs.PathError
		switch {
		case errors.As(err, &pathErr) && name == path:
			return nil, fmt.Errorf("read configuration: %w", err)
		case errors.As(err, &pathErr):
			err = pathErr.Err // the problem names the file itself
		}
		d.config.Files = append(d.config.Files, name)
		d.file(name, text, err)
	}
	d.finish()
	if len(d.findings) > 0 {
		return nil, d.problems()
	}
	return d.config, nil
}

// Parse reads a configuration that is no file. name is what the problems call it; the error is of type [Problems].
func Parse(name, text string) (*Config, error) {
	d := newDecoder()
	d.file(name, text, nil)
	d.finish()
	if len(d.findings) > 0 {
		return nil, d.problems()
	}
	return d.config, nil
}

// list returns the files that path stands for.
func list(path string) ([]string, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.IsDir() {
		return []string{path}, nil
	}
	entries, err := os.ReadDir(path) // sorted
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if n := e.Name(); strings.HasSuffix(n, ".toml") && n[0] != '.' {
			names = append(names, filepath.Join(path, n))
		}
	}
	if len(names) == 0 {
		return nil, fmt.Errorf("%s: no *.toml files", path)
	}
	return names, nil
}

// read returns the text of a file. It does not trust the size that stat tells: the
// file may be a pipe.
func read(name string) (string, error) {
	f, err := os.Open(name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	var b strings.Builder
	if info, err := f.Stat(); err == nil && info.Mode().IsRegular() {
		b.Grow(int(min(info.Size(), maxFile) + 1))
	}
	if _, err := io.Copy(&b, io.LimitReader(f, maxFile+1)); err != nil {
		return "", err
	}
	text := b.String()
	if len(text) > maxFile {
		return "", errors.New("larger than 4 MiB")
	}
	// The TOML decoder recurses for each nested array or table, and a stack that
	// overflows cannot be recovered from.
	if strings.Count(text, "[")+strings.Count(text, "{") > maxBrackets {
		return "", fmt.Errorf("more than %d brackets", maxBrackets)
	}
	return text, nil
}

// parse decodes TOML without interpreting it. keys are in the order of the text.
func parse(text string) (tree map[string]any, keys []toml.Key, err error) {
	meta, err := toml.Decode(text, &tree)
	return tree, meta.Keys(), err
}
