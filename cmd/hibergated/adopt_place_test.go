package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"hibergate/activation"
	"hibergate/activation/nettest"
)

// adoptProgram is a program that knows nothing of hibergated. ${DIR} in it is a directory of its own, ${PORT} and ${PORT2}
// are ports that nothing else has, and ${NAME} is what with says. So it is in its files.
type adoptProgram struct {
	name    string // of the service too
	need    []nettest.Feature
	files   []string // of testdata/adopt
	with    map[string]string
	prepare func(*testing.T, *adoptProgram) // more than files
	user    string                          // empty: that of the tests; needs the root of the machine
	command []string
	at      []string // where its clients come, in turn; by default ${PORT} of 127.0.0.1
	listen  string   // in TOML, where that is not the same
	toml    string   // more keys of the service
	client  func(net.Conn) error

	dir      string
	identity *syscall.Credential // of user
	visits   atomic.Int64
}

// adoptIdle is the idle timeout of the services.
const adoptIdle = 200 * time.Millisecond

// adoptPorts counts ports. They are not those of the scripts, and below net.ipv4.ip_local_port_range.
var adoptPorts atomic.Int32

// settle gives the program a place, and skips the test where something is missing.
func (p *adoptProgram) settle(t *testing.T) {
	t.Helper()
	nettest.Need(t, p.need...)
	installed(t, p.command...)
	p.dir = t.TempDir()
	if p.user != "" {
		nettest.Need(t, nettest.RealRoot)
		u, err := user.Lookup(p.user)
		if err != nil {
			t.Fatal(err)
		}
		uid, err1 := strconv.ParseUint(u.Uid, 10, 32)
		gid, err2 := strconv.ParseUint(u.Gid, 10, 32)
		if err := errors.Join(err1, err2); err != nil {
			t.Fatal(err)
		}
		p.identity = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
	}
	if nettest.RealRoot() == nil {
		if err := openToOthers(p.dir); err != nil {
			t.Fatal(err)
		}
	}
	if p.at == nil {
		p.at = []string{"tcp://127.0.0.1:${PORT}"}
	}
	if p.listen == "" {
		p.listen = stringList(p.at)
	}
	pairs := []string{"${DIR}", p.dir, "${PORT}", nextPort(), "${PORT2}", nextPort()}
	places := strings.NewReplacer(pairs...)
	for name, value := range p.with {
		pairs = append(pairs, "${"+name+"}", places.Replace(value))
	}
	all := strings.NewReplacer(pairs...)
	p.listen, p.toml, p.command, p.at = all.Replace(p.listen), all.Replace(p.toml), slices.Clone(p.command), slices.Clone(p.at)
	for _, texts := range [][]string{p.command, p.at} {
		for i := range texts {
			texts[i] = all.Replace(texts[i])
		}
	}
	for _, name := range p.files {
		text, err := os.ReadFile(filepath.Join("..", "..", "testdata", "adopt", name))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(p.dir, name), []byte(all.Replace(string(text))), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if p.prepare != nil {
		p.prepare(t, p)
	}
}

func nextPort() string { return fmt.Sprint(10000 + adoptPorts.Add(1)%9000) }

// installed skips the test where programPath did not find one of the words.
func installed(tb testing.TB, words ...string) {
	tb.Helper()
	nettest.Need(tb, func() error {
		for _, word := range words {
			if name, ok := strings.CutPrefix(word, "/missing/"); ok {
				return fmt.Errorf("program %s not found", name)
			}
		}
		return nil
	})
}

// stringList writes strings as TOML and JSON both do.
func stringList(of []string) string {
	text, _ := json.Marshal(of)
	return string(text)
}

// service is the program in the configuration.
func (p *adoptProgram) service() string {
	who := ""
	if p.user != "" {
		who = fmt.Sprintf("user = %q\n", p.user)
	}
	return fmt.Sprintf("[service.%s]\nlisten = %s\ncommand = %s\nhandoff = \"adopt\"\nidle_timeout = %q\n%s%s",
		p.name, p.listen, stringList(p.command), adoptIdle, who, p.toml)
}

// state is the line that makes a hibergated keep its state beside the files of the program.
func (p *adoptProgram) state() string {
	return fmt.Sprintf("hibergated.state = %q\n", filepath.Join(p.dir, "state"))
}

// start runs hibergated with the program, and services that are beside it, and waits until the program sleeps.
func (p *adoptProgram) start(t *testing.T, beside string) *hibergated {
	t.Helper()
	d := startHibergated(t, p.state()+p.service()+beside)
	d.sleeps(t, p.name) // where addresses are learned, it does not from the beginning
	return d
}

// cmd is the program, or another one that belongs to it, run by the test itself in an environment as small as that of a service.
func (p *adoptProgram) cmd(words ...string) *exec.Cmd {
	cmd := exec.Command(words[0], words[1:]...)
	cmd.Dir, cmd.Env = "/", []string{"PATH=" + os.Getenv("PATH")}
	if p.identity != nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: p.identity}
	}
	return cmd
}

func (p *adoptProgram) run(t *testing.T, words ...string) {
	t.Helper()
	if out, err := p.cmd(words...).CombinedOutput(); err != nil {
		t.Fatalf("%q: %v\n%s", words, err, out)
	}
}

// visitor is a client, who looks at the clock when the first byte comes.
type visitor struct {
	net.Conn
	first time.Time
}

func (v *visitor) Read(b []byte) (int, error) {
	n, err := v.Conn.Read(b)
	if n > 0 && v.first.IsZero() {
		v.first = time.Now()
	}
	return n, err
}

func (v *visitor) CloseWrite() error { return v.Conn.(interface{ CloseWrite() error }).CloseWrite() }

// visit makes a client come and go. It returns how long it took from the connect to the first byte.
func (p *adoptProgram) visit(where int) (time.Duration, error) { return p.visitFor(where, patience) }

// visitFor is visit by a client who waits no longer than so.
func (p *adoptProgram) visitFor(where int, most time.Duration) (time.Duration, error) {
	began := time.Now()
	c, err := p.dialFor(where, most)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	v := &visitor{Conn: c}
	if err := p.client(v); err != nil {
		return 0, fmt.Errorf("at %s: %w", p.at[where], err)
	}
	return v.first.Sub(began), nil
}

func (p *adoptProgram) dial(where int) (net.Conn, error) { return p.dialFor(where, patience) }

// dialFor returns a connection whose answer is not waited for longer than so.
func (p *adoptProgram) dialFor(where int, most time.Duration) (net.Conn, error) {
	a, err := activation.ParseAddress(p.at[where])
	if err != nil {
		return nil, err
	}
	to := a.Path
	if a.Network.IP() {
		to = netip.AddrPortFrom(a.IP, a.Port).String()
	}
	c, err := net.DialTimeout(a.Network.String(), to, patience)
	if err != nil {
		return nil, err
	}
	return c, c.SetDeadline(time.Now().Add(most))
}
