package main

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"hibergate/activation/nettest"
	"hibergate/testdata/storm/storm"
)

// Scripts, and the other tests here, run these programs by name: each is this test
// binary under another name. hibergated is the whole program.
var programs = map[string]func(){
	"hibergated":  main,
	"echo-server": echoServer,
	"slow-to-die": slowToDie,
	"fifo-reader": fifoReader,

	"accept-and-fork": acceptAndFork,
	"hostile":         hostile,
	"go-http":         goHTTP,
	"bind-storm":      bindStorm,
	"call-meter":      callMeter,
	"gate-backend":    gateBackend,

	"storm": func() { os.Exit(storm.Main(os.Args, os.Stdout, os.Stderr)) },
}

func TestMain(m *testing.M) { testscript.Main(inNamespaces{m}, programs) }

// inNamespaces runs the tests in namespaces of their own. The programs never come here.
type inNamespaces struct{ *testing.M }

func (m inNamespaces) Run() int { return nettest.Main(m.M) }

// The stories of ../../testdata/script, each a whole life: services sleep, wake, serve and
// sleep again under the real program, and other people's programs are their clients and services.
// Beside what testscript itself knows, scripts have the commands of scriptCommands, and
// ${PORT1} to ${PORT9}, which are no other script's.
//
// In the files of a script, ${WORK}, the ports, and ${bin:NAME}, the path of a program,
// are replaced.
func TestScript(t *testing.T) {
	nettest.Need(t, nettest.Namespaces)
	testscript.Run(t, testscript.Params{
		Dir:                 filepath.Join("..", "..", "testdata", "script"),
		Cmds:                scriptCommands,
		WorkdirRoot:         t.TempDir(), // testscript itself leaves an empty directory behind when it runs a few scripts only
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(env *testscript.Env) error {
			env.Values[storyKey{}] = newStory(env)
			base := 20000 + 10*int(scripts.Add(1)) // below net.ipv4.ip_local_port_range
			for i := 1; i <= 9; i++ {
				env.Setenv(fmt.Sprintf("PORT%d", i), fmt.Sprint(base+i))
			}
			if nettest.RealRoot() == nil {
				if err := openToOthers(env.WorkDir); err != nil {
					return err
				}
			}
			return fillIn(env)
		},
	})
}

// scripts counts scripts over all runs of TestScript: the kernel remembers the flows of a port for a while.
var scripts atomic.Int32

var placeholder = regexp.MustCompile(`\$\{(WORK|PORT[1-9]|bin:[a-z0-9-]+)\}`)

// fillIn replaces the placeholders in the files of a script.
func fillIn(env *testscript.Env) error {
	return filepath.WalkDir(env.WorkDir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return os.WriteFile(path, placeholder.ReplaceAllFunc(text, func(m []byte) []byte {
			name := string(m[2 : len(m)-1])
			if program, ok := strings.CutPrefix(name, "bin:"); ok {
				return []byte(programPath(program))
			}
			return []byte(env.Getenv(name))
		}), 0o666)
	})
}

// programPath returns where a program is. For one that is not there, which
// the script has to tell by need, it is a path of nothing.
func programPath(name string) string {
	dirs := []string{"/usr/bin", "/bin", "/usr/sbin", "/sbin", "/usr/lib/systemd", "/lib/systemd"}
	if programs[name] != nil {
		dirs = nil
	}
	for _, dir := range dirs { // before $PATH, where wrappers may be
		if path := filepath.Join(dir, name); isFile(path) {
			return path
		}
	}
	if path, err := exec.LookPath(name); err == nil {
		return path
	}
	return "/missing/" + name
}

func isFile(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular()
}

// openToOthers lets other users reach the files of a script and the programs.
func openToOthers(workDir string) error {
	for _, leaf := range []string{workDir, filepath.Dir(programPath("hibergated"))} {
		for dir := leaf; dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) {
			info, err := os.Stat(dir)
			if err != nil {
				return err
			}
			if err := os.Chmod(dir, info.Mode().Perm()|0o055); err != nil {
				return err
			}
		}
	}
	return nil
}
