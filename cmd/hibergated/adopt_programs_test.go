package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"hibergate/activation/nettest"
)

// Programs that open their sockets by themselves sleep and wake as others do, without a change to
// them: each goes through cycles of a wake and a stop that clients race, and answers every client. HIBERGATED_CYCLES says how many,
// HIBERGATED_SEED what is random in them. Before, each is alone for a moment, so that what it cannot do anyway is not our failure.
func TestAdopt(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	nothingLeft(t)
	for _, p := range adoptPrograms() {
		t.Run(p.name, func(t *testing.T) {
			t.Parallel()
			p.settle(t)
			var alone waits
			if t.Run("alone", func(t *testing.T) { alone = p.alone(t) }) {
				t.Run("cycles", func(t *testing.T) { p.cycles(t, alone) })
			}
		})
	}
}

func adoptPrograms() []*adoptProgram {
	nginx := []string{programPath("nginx"), "-e", "stderr", "-c", "${DIR}/nginx.conf"}
	redis := []string{programPath("redis-server"), "--port", "${PORT}", "--save", "", "--daemonize", "no", "--dir", "${DIR}", "--bind"}
	python, node := programPath("python3"), programPath("node")
	return []*adoptProgram{
		{
			name: "nginx", files: []string{"nginx.conf"}, with: map[string]string{"LISTEN": "127.0.0.1:${PORT}", "WORKERS": "2"},
			command: nginx, client: getHello,
		},
		{
			name: "nginx-reuseport", files: []string{"nginx.conf"}, with: map[string]string{"LISTEN": "0.0.0.0:${PORT} reuseport", "WORKERS": "2"},
			listen:  `[{ address = "tcp://:${PORT}", family = "ipv4" }]`,
			command: nginx, client: getHello,
		},
		{
			name: "nginx-unix", files: []string{"nginx.conf"}, with: map[string]string{"LISTEN": "unix:${DIR}/nginx.sock", "WORKERS": "1"},
			at: []string{"unix://${DIR}/nginx.sock"}, command: nginx, client: getHello,
		},
		{
			name: "nginx-auto", files: []string{"nginx.conf"}, with: map[string]string{"LISTEN": "127.0.0.1:${PORT}", "WORKERS": "2"},
			listen: `"auto"`, command: nginx, client: getHello,
		},
		{
			name: "apache", files: []string{"httpd.conf", "index.html"}, with: map[string]string{"MODULES": "/usr/lib/apache2/modules"},
			command: notAsRoot(programPath("apache2"), "-DFOREGROUND", "-f", "${DIR}/httpd.conf"), client: getHello,
		},
		{
			name: "postgresql", user: "postgres", prepare: initPostgres,
			toml:    "ready.type = \"notify\"\nready.hold = true\n",
			command: []string{postgresPath("postgres"), "-D", "${DIR}/data", "-p", "${PORT}", "-h", "127.0.0.1", "-F", "-c", "unix_socket_directories="},
			client:  selectOne,
		},
		{name: "redis", command: append(redis, "127.0.0.1"), client: pingRedis},
		{
			name: "redis-localhost", listen: `"tcp://localhost:${PORT}"`, at: bothVersions(),
			command: append(redis, "127.0.0.1", "::1"), client: pingRedis,
		},
		{name: "node", files: []string{"server.js"}, command: []string{node, "${DIR}/server.js", "${PORT}", "127.0.0.1"}, client: getHello},
		{
			name: "node-dual", files: []string{"server.js"}, listen: `"tcp://:${PORT}"`, at: bothVersions(),
			command: []string{node, "${DIR}/server.js", "${PORT}"}, client: getHello,
		},
		{name: "python", files: []string{"index.html"}, command: pythonServer(python), client: getHello},
		{name: "python-nobody", files: []string{"index.html"}, user: "nobody", command: pythonServer(python), client: getHello},
		{name: "python-unix", files: []string{"unix.py"}, at: []string{"unix://${DIR}/echo.sock"}, command: []string{python, "${DIR}/unix.py", "${DIR}/echo.sock"}, client: echoHello},
		{name: "python-two", files: []string{"two.py"}, at: bothVersions(), command: []string{python, "${DIR}/two.py", "${PORT}"}, client: echoHello},
		{name: "go", command: []string{programPath("go-http"), "127.0.0.1:${PORT}"}, client: getHello},
		{
			name: "java", files: []string{"Server.java"}, prepare: compileJava,
			command: []string{programPath("java"), "-Xshare:auto", "-XX:TieredStopAtLevel=1", "-cp", "${DIR}", "Server", "${PORT}"}, client: getHello,
		},
		{
			name: "dnsmasq", need: []nettest.Feature{nettest.Tool("nft")}, // without nftables no UDP service sleeps
			at: []string{"udp://127.0.0.1:${PORT}", "tcp://127.0.0.1:${PORT}"}, client: askDNS,
			command: []string{
				programPath("dnsmasq"), foregroundDNS(), "-p", "${PORT}", "--listen-address=127.0.0.1", "--bind-interfaces", "--no-resolv", "--no-hosts",
				"--address=/test.example/192.0.2.7", "--user=root", "--pid-file=", "--conf-file=/dev/null", "--log-facility=-",
			},
		},
		{name: "i386-socketcall", prepare: buildBinder("386", "bind"), command: []string{"${DIR}/binder", "127.0.0.1:${PORT}"}, client: echoHello},
		{name: "i386-bind", prepare: buildBinder("386", "i386"), command: []string{"${DIR}/binder", "-by", "i386", "127.0.0.1:${PORT}"}, client: echoHello},
		{name: "own-filter", prepare: buildBinder("", "bind"), command: []string{"${DIR}/binder", "-filter", "127.0.0.1:${PORT}"}, client: echoHello},
	}
}

func bothVersions() []string { return []string{"tcp://127.0.0.1:${PORT}", "tcp://[::1]:${PORT}"} }

func pythonServer(python string) []string {
	return []string{python, "-m", "http.server", "${PORT}", "--bind", "127.0.0.1", "--directory", "${DIR}"}
}

// notAsRoot is for programs that refuse to serve as root. Where root is the only user, it makes another one.
func notAsRoot(command ...string) []string {
	if nettest.RealRoot() == nil {
		return command
	}
	return append([]string{programPath("unshare"), "--user", "--map-user=65534", "--map-group=65534"}, command...)
}

// foregroundDNS keeps dnsmasq in the foreground. Where there is no other user, it must not want to become one either.
func foregroundDNS() string {
	if nettest.RealRoot() == nil {
		return "--keep-in-foreground"
	}
	return "--no-daemon"
}

// postgresPath finds a program of PostgreSQL, which Debian keeps beside those of other versions.
func postgresPath(name string) string {
	if found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/" + name); len(found) > 0 {
		return found[len(found)-1]
	}
	return programPath(name)
}

func initPostgres(t *testing.T, p *adoptProgram) {
	t.Helper()
	data := filepath.Join(p.dir, "data")
	if err := errors.Join(os.Mkdir(data, 0o700), os.Chown(data, int(p.identity.Uid), int(p.identity.Gid))); err != nil {
		t.Fatal(err)
	}
	p.run(t, postgresPath("initdb"), "-D", data, "-A", "trust", "-N", "--no-instructions", "--locale=C")
}

func compileJava(t *testing.T, p *adoptProgram) {
	t.Helper()
	installed(t, programPath("javac"))
	p.run(t, programPath("javac"), "-d", p.dir, filepath.Join(p.dir, "Server.java"))
}

// buildBinder builds testdata/adopt/binder for an architecture, and checks whether what it is to do can be done here.
func buildBinder(arch, by string) func(*testing.T, *adoptProgram) {
	return func(t *testing.T, p *adoptProgram) {
		t.Helper()
		installed(t, programPath("go"))
		binary := filepath.Join(p.dir, "binder")
		build := exec.Command(programPath("go"), "build", "-trimpath", "-buildvcs=false", "-o", binary, "./testdata/adopt/binder")
		build.Dir = filepath.Join("..", "..")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if arch != "" {
			build.Env = append(build.Env, "GOARCH="+arch)
		}
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", build, err, out)
		}
		nettest.Need(t, func() error {
			return exec.Command(binary, "-by", by, "-check", "127.0.0.1:0").Run()
		})
	}
}
