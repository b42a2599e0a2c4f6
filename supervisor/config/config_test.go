package config

import (
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"hibergate/activation"
	"hibergate/activation/adopt"
	"hibergate/supervisor"
	"hibergate/supervisor/activity"
	"hibergate/supervisor/gate"
	"hibergate/supervisor/process"
)

var update = flag.Bool("update", false, "rewrite the golden files")

const testdata = "../../testdata/config"

// Each broken configuration tells one story and has exact messages.
func TestInvalid(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(testdata, "invalid")
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	stories := 0
	for _, e := range entries {
		base, ok := strings.CutSuffix(e.Name(), ".toml")
		if e.IsDir() {
			base, ok = strings.CutSuffix(e.Name(), ".d")
		}
		if !ok {
			continue
		}
		stories++
		t.Run(base, func(t *testing.T) {
			t.Parallel()
			_, err := Load(filepath.Join(dir, e.Name()))
			if _, ok := errors.AsType[Problems](err); !ok {
				t.Fatalf("got error %v, want Problems", err)
			}
			got := strings.ReplaceAll(err.Error()+"\n", dir+"/", "")
			golden := filepath.Join(dir, base+".err")
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), got); diff != "" {
				t.Errorf("problems (-want +got):\n%s", diff)
			}
		})
	}
	if stories < 70 {
		t.Errorf("got %d broken configurations, want at least 70", stories)
	}
}

func TestValid(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob(filepath.Join(testdata, "valid", "*.toml"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no valid configurations: %v", err)
	}
	for _, f := range files {
		c, err := Load(f)
		if err != nil {
			t.Errorf("load %s:\n%v", f, err)
			continue
		}
		if diff := cmp.Diff([]string{f}, c.Files); diff != "" {
			t.Errorf("files of %s (-want +got):\n%s", f, diff)
		}
	}
}

// The file that uses every key sets every field of a service, so that no key can be
// forgotten; and it has every key of the schema.
func TestEveryKey(t *testing.T) {
	t.Parallel()
	file := filepath.Join(testdata, "valid", "every-key.toml")
	c, err := Load(file)
	if err != nil {
		t.Fatal(err)
	}
	set := map[string]bool{}
	for _, s := range c.Services {
		fields(reflect.ValueOf(*s), "Service", set)
	}
	for field, ok := range set {
		if !ok {
			t.Errorf("no service sets %s", field)
		}
	}
	if len(set) < 40 {
		t.Errorf("only %d fields were looked at", len(set))
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	used := map[string]bool{}
	for path := range indexLines(string(text)) {
		parts := strings.Split(path, pathSeparator)
		used[parts[len(parts)-1]] = true
	}
	for _, table := range newSchema().tables() {
		for _, k := range table.keys {
			if !used[k.name] {
				t.Errorf("%s does not use the key %q of %s", file, k.name, table.title)
			}
		}
	}
}

// Each key goes into its own field.
func TestValues(t *testing.T) {
	t.Parallel()
	c, err := Load(filepath.Join(testdata, "valid", "every-key.toml"))
	if err != nil {
		t.Fatal(err)
	}
	number := func(n int) *int { return &n }
	prefix := netip.MustParsePrefix
	everybody := &activation.Access{Deny: []netip.Prefix{prefix("0.0.0.0/0")}}
	home := &activation.Access{Allow: []netip.Prefix{prefix("127.0.0.0/8")}}
	start := supervisor.Start{Timeout: supervisor.DefaultStartTimeout}
	limits := supervisor.Limits{SourcePrefix: supervisor.DefaultSourcePrefix}
	want := []*supervisor.Service{{
		Name: "inetd",
		Sockets: []activation.Spec{{
			Address: activation.Address{Network: activation.TCP, IP: netip.MustParseAddr("127.0.0.1"), Port: 2000}, Name: "inetd",
			Options: activation.Options{Access: &activation.Access{
				Allow: []netip.Prefix{prefix("192.0.2.0/24"), prefix("2001:db8::/32"), prefix("198.51.100.7/32")},
				Deny:  []netip.Prefix{prefix("192.0.2.128/25"), prefix("::1/128")},
			}},
		}},
		Accept:  true,
		Handoff: supervisor.Stdio,
		Exec: process.Exec{
			Command: []string{"/usr/bin/inetd-style", "--flag", ""}, Argv0: "in.style",
			User: "nobody", Group: "nogroup", SupplementaryGroups: []string{"adm", "1000"},
			WorkingDirectory: "~", Environment: []string{"TERM=dumb", "EMPTY="},
			EnvironmentFiles: []string{"/etc/default/inetd-style", "-/etc/default/inetd-style.local"},
			UCSPIEnv:         true,
		},
		Start:   start,
		Stop:    supervisor.DefaultStop(),
		Restart: supervisor.Restart{Delay: 2 * time.Second, MaxDelay: 48 * time.Hour, Interval: time.Hour, OnFailure: supervisor.Reject},
		Limits: supervisor.Limits{
			MaxConnections: 40, MaxConnectionsPerSource: 5, SourcePrefix: 48, Overflow: supervisor.OverflowQueue,
			AcceptRate: supervisor.Rate{Count: 100, Per: time.Second}, AcceptRatePerSource: supervisor.Rate{Count: 5, Per: 90 * time.Second},
		},
		Accounting: activity.Conntrack,
	}, {
		Name: "every",
		Sockets: []activation.Spec{{
			Address: activation.Address{Network: activation.TCP, Port: 2001}, Name: "web",
			Options: activation.Options{
				Backlog: 128, Family: activation.FamilyDual, Device: "eth0", ReusePort: true, FreeBind: true, Transparent: true,
				KeepAlive: true, KeepAliveTime: time.Minute, KeepAliveInterval: 10 * time.Second, KeepAliveProbes: 3,
				NoDelay: true, DeferAccept: 5 * time.Second, Congestion: "reno", ReceiveBuffer: 1 << 20, SendBuffer: 65536,
				Mark: number(1), Priority: number(6), TOS: number(16), TTL: 64, Access: everybody,
			},
		}, {
			Address: activation.Address{Network: activation.UDP, Port: 2001}, Name: "every",
			Options: activation.Options{Family: activation.FamilyIPv4, Broadcast: true, Mark: number(0), Access: everybody},
		}, {
			Address: activation.Address{Network: activation.Unixpacket, Path: "/run/every/admin.sock"}, Name: "admin",
			Options: activation.Options{
				PassCredentials: true, Mode: 0o660, DirMode: 0o750, Owner: "root", Group: "adm",
				Symlinks: []string{"/run/admin.sock", "/run/every.sock"}, RemoveOnStop: true,
			},
		}, {
			Address: activation.Address{Network: activation.FIFO, Path: "/run/every/fifo"}, Name: "every",
			Options: activation.Options{PipeSize: 64 << 10, Mode: 0o600},
		}},
		Exec:  process.Exec{Command: []string{"/usr/bin/every"}, WorkingDirectory: "/var/lib/every", Environment: []string{"EMPTY=", "LANG=C.UTF-8"}},
		Idle:  supervisor.Idle{When: activity.NoTraffic, StopAfter: time.Minute},
		Start: supervisor.Start{Timeout: time.Minute},
		Stop: supervisor.Stop{
			Command: []string{"/usr/bin/every-ctl", "stop", ""}, KillMode: supervisor.KillMixed,
			Signal: syscall.SIGINT, FinalSignal: syscall.SIGQUIT, Timeout: 20 * time.Second,
		},
		Restart:    supervisor.DefaultRestart(),
		Limits:     supervisor.Limits{SourcePrefix: 64, WakeRate: supervisor.Rate{Count: 3, Per: 10 * time.Second}},
		Accounting: activity.SockDiag,
	}, {
		Name: "short",
		Sockets: []activation.Spec{
			{Address: activation.Address{Network: activation.TCP, IP: netip.MustParseAddr("::1"), Port: 2002}, Name: "short"},
			{Address: activation.Address{Network: activation.Unix, Path: "@short"}, Name: "short"},
		},
		Exec:       process.Exec{Command: []string{"/usr/bin/short"}},
		Idle:       supervisor.Idle{StopAfter: 50 * time.Millisecond},
		Stop:       supervisor.Stop{Signal: syscall.SIGTERM, FinalSignal: syscall.SIGKILL, Timeout: 90 * time.Second, KillMode: supervisor.KillProcess},
		Restart:    supervisor.DefaultRestart(),
		Limits:     limits,
		Accounting: activity.Conntrack,
	}, {
		Name: "quiet",
		Sockets: []activation.Spec{{
			Address: activation.Address{Network: activation.TCP, Port: 2003}, Name: "quiet", Options: activation.Options{DeferAccept: 30 * time.Second},
		}, {
			Address: activation.Address{Network: activation.TCP, Port: 2004}, Name: "quiet", Options: activation.Options{DeferAccept: 5 * time.Second},
		}},
		Exec:       process.Exec{Command: []string{"/usr/bin/quiet"}},
		Wake:       supervisor.Wake{Ignore: []netip.Prefix{prefix("10.0.0.1/32"), prefix("2001:db8::/32")}, MinBytes: 16},
		Start:      start,
		Stop:       supervisor.DefaultStop(),
		Restart:    supervisor.DefaultRestart(),
		Limits:     limits,
		Accounting: activity.Conntrack,
	}, {
		Name: "adopted",
		Sockets: []activation.Spec{{
			Address: activation.Address{Network: activation.UDP, IP: netip.MustParseAddr("127.0.0.1"), Port: 2006}, Name: "adopted",
			Options: activation.Options{PacketInfo: true, Access: home},
		}},
		Learn: []supervisor.Learn{{
			Pattern: adopt.Pattern{Network: activation.TCP, Port: 2005},
			Spec:    activation.Spec{Name: "web", Options: activation.Options{Backlog: 64, ReceiveBuffer: 64 << 10, Access: home}},
		}, {
			Pattern: adopt.Pattern{Network: activation.UDP, Host: adopt.Localhost, Port: 2005},
			Spec:    activation.Spec{Name: "adopted", Options: activation.Options{Access: home}},
		}},
		Handoff:       supervisor.Adopt,
		Exec:          process.Exec{Command: []string{"/usr/bin/adopted"}},
		Start:         start,
		Ready:         supervisor.Ready{Type: supervisor.ReadyNotify, Hold: true},
		Stop:          supervisor.DefaultStop(),
		Restart:       supervisor.DefaultRestart(),
		Limits:        limits,
		Accounting:    activity.Conntrack,
		RefuseIOUring: true,
	}, {
		Name: "gate",
		Sockets: []activation.Spec{
			{Address: activation.Address{Network: activation.TCP, Port: 2007}, Name: "gate"},
			{Address: activation.Address{Network: activation.Unix, Path: "/run/every/gate.sock"}, Name: "gate"},
			{
				Address: activation.Address{Network: activation.UDP, IP: netip.MustParseAddr("::1"), Port: 2007}, Name: "datagrams",
				Options: activation.Options{PacketInfo: true},
			},
		},
		Handoff: supervisor.Gate,
		Exec:    process.Exec{User: "nobody", PassEnvironment: []string{"KUBECONFIG", "HOME"}},
		Gate: &gate.Spec{
			Destinations: []gate.Destination{
				{Network: activation.TCP, Host: "127.0.0.1", Port: 7100},
				{Network: activation.TCP, Host: "backend.example", Port: 7100},
				{Network: activation.UDP, Host: "::1", Port: 7100},
			},
			Balance:       gate.LeastConnections,
			Launch:        []string{"/usr/bin/docker", "start", "web"},
			Stop:          []string{"/bin/sh", "-c", "docker stop web"},
			LaunchTimeout: time.Minute,
			Ready: gate.Ready{
				Type: gate.ReadyHTTP, Path: "/healthz", Status: 204, Interval: 20 * time.Millisecond, Timeout: 2 * time.Second,
			},
			ConnectTimeout: 3 * time.Second, SessionTimeout: 2 * time.Minute,
			MaxPending: 500, PendingTimeout: 30 * time.Second, OnTimeout: gate.Answer{Reset: true},
			MaxConnections: 20, CloseExcess: true,
			ProxyProtocol: gate.ProxyV2, CheckInterval: 5 * time.Second, WatchDestination: true,
		},
		Idle:       supervisor.Idle{StopAfter: 10 * time.Minute},
		Start:      start,
		Stop:       supervisor.DefaultStop(),
		Restart:    supervisor.DefaultRestart(),
		Limits:     supervisor.Limits{SourcePrefix: 64, WakeRate: supervisor.Rate{Count: 1, Per: time.Second}},
		Accounting: activity.SockDiag,
	}, {
		Name:    "forward",
		Sockets: []activation.Spec{{Address: activation.Address{Network: activation.TCP, IP: netip.MustParseAddr("192.0.2.1"), Port: 2008}, Name: "forward"}},
		Handoff: supervisor.Gate,
		Gate: &gate.Spec{
			Destinations:   []gate.Destination{{Network: activation.TCP, Host: "192.0.2.7", Port: 80}},
			Launch:         []string{"/bin/sh", "-c", "virsh start guest"},
			Ready:          gate.Ready{Type: gate.ReadyCommand, Command: []string{"/usr/bin/guest-ready", ""}, Interval: 100 * time.Millisecond, Timeout: 10 * time.Second},
			ConnectTimeout: 5 * time.Second, SessionTimeout: time.Minute,
			MaxPending: 1000, PendingTimeout: time.Minute, OnTimeout: gate.Answer{Banner: "not yet\r\n"},
			Forward: gate.Kernel, CheckInterval: time.Second,
		},
		Start:      start,
		Stop:       supervisor.DefaultStop(),
		Restart:    supervisor.DefaultRestart(),
		Limits:     limits,
		Accounting: activity.SockDiag,
	}, {
		Name:    "through",
		Sockets: []activation.Spec{{Address: activation.Address{Network: activation.TCP, Port: 2009}, Name: "through"}},
		Handoff: supervisor.Gate,
		Gate: &gate.Spec{
			Destinations:   []gate.Destination{{Network: activation.TCP, Host: "2001:db8::1", Port: 80}},
			Ready:          gate.Ready{Interval: 50 * time.Millisecond, Timeout: 5 * time.Second},
			ConnectTimeout: 5 * time.Second, SessionTimeout: time.Minute,
			MaxPending: 1000, PendingTimeout: time.Second, MaxConnections: 5,
			ProxyProtocol: gate.ProxyV1, Transparent: true, CheckInterval: 5 * time.Second,
		},
		Start:      start,
		Stop:       supervisor.DefaultStop(),
		Restart:    supervisor.DefaultRestart(),
		Limits:     limits,
		Accounting: activity.SockDiag,
	}}
	same := cmp.Options{
		cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
		cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
	}
	if diff := cmp.Diff(want, c.Services, same); diff != "" {
		t.Errorf("services (-want +got):\n%s", diff)
	}
	if got, want := c.Global, (supervisor.Global{MaxProcesses: 500, MaxLoad: 7.5}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if c.State != "/var/lib/every" {
		t.Errorf("got state %q", c.State)
	}
}

// fields notes for each field below v whether it is not zero here or was not before.
func fields(v reflect.Value, name string, set map[string]bool) {
	switch {
	case v.Type() == reflect.TypeFor[activation.Address]():
		set[name] = set[name] || !v.IsZero()
	case v.Kind() == reflect.Struct:
		for i := range v.NumField() {
			fields(v.Field(i), name+"."+v.Type().Field(i).Name, set)
		}
	case v.Type() == reflect.TypeFor[*activation.Access]():
		set[name] = set[name] || !v.IsNil()
		if !v.IsNil() {
			fields(v.Elem(), name, set)
		}
	case v.Type() == reflect.TypeFor[*gate.Spec]():
		set[name] = set[name] || !v.IsNil()
		if !v.IsNil() {
			fields(v.Elem(), name, set)
		}
	case v.Kind() == reflect.Slice && v.Type().Elem() == reflect.TypeFor[activation.Spec]():
		for i := range v.Len() {
			fields(v.Index(i), name, set)
		}
	default:
		set[name] = set[name] || !v.IsZero()
	}
}

func TestDirectory(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write(t, dir, "b.toml", "service.two = { listen = 'tcp://:2', command = ['/b'] }\n[service.three]\nlisten = 'tcp://:3'\ncommand = ['/b']")
	write(t, dir, "a.toml", "[service.one]\nlisten = 'tcp://:1'\ncommand = ['/b']\naccounting = 'auto'")
	write(t, dir, "z.toml", "[hibergated]\naccounting = 'sock-diag'\ncontrol = '/c'\nparking = 'off'")
	write(t, dir, ".hidden.toml", "x")
	write(t, dir, "backup.toml~", "x")
	write(t, dir, "other.conf", "x")
	c, err := Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, s := range c.Services {
		got = append(got, fmt.Sprintf("%s %s %d", s.Name, s.Sockets[0].Address, s.Accounting))
	}
	want := []string{"one tcp://:1 0", "two tcp://:2 2", "three tcp://:3 2"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("services (-want +got):\n%s", diff)
	}
	files := []string{filepath.Join(dir, "a.toml"), filepath.Join(dir, "b.toml"), filepath.Join(dir, "z.toml")}
	if diff := cmp.Diff(files, c.Files); diff != "" || c.Control != "/c" || !c.Global.NoParking {
		t.Errorf("control %q, bounds %+v, files (-want +got):\n%s", c.Control, c.Global, diff)
	}
}

// A configuration that is no file: its problems have the name that it is given, and there may be no control socket.
func TestParse(t *testing.T) {
	t.Parallel()
	c, err := Parse("text", "hibergated.control = 'off'\n[service.x]\nlisten = 'unix:///run/x'\ncommand = ['/x']")
	if err != nil || c.Control != "" || len(c.Services) != 1 || c.Files != nil {
		t.Errorf("got %+v and error %v", c, err)
	}
	_, err = Parse("text", "[service.x]\nlisten = 'tcp://:1'")
	if _, ok := errors.AsType[Problems](err); !ok || err.Error() != `text:1: service "x": command: is missing` {
		t.Errorf("got error %v", err)
	}
}

func TestUnreadable(t *testing.T) {
	t.Parallel()
	empty := t.TempDir()
	for name, path := range map[string]string{
		"a directory without files":       empty,
		"a file that does not exist":      filepath.Join(empty, "x.toml"),
		"a directory that does not exist": filepath.Join(empty, "x"),
	} {
		_, err := Load(path)
		_, ok := errors.AsType[Problems](err)
		if err == nil || ok || !strings.HasPrefix(err.Error(), "read configuration: ") {
			t.Errorf("%s: got %v, want an error that is not Problems", name, err)
		}
	}
	large := write(t, empty, "large.toml", "#"+strings.Repeat("x", maxFile))
	deep := write(t, empty, "nested.toml", "x = "+strings.Repeat("[", maxBrackets+1))
	if err := os.Mkdir(filepath.Join(empty, "dir.toml"), 0o755); err != nil {
		t.Fatal(err)
	}
	_, err := Load(empty)
	want := fmt.Sprintf("%s: is a directory\n%s: larger than 4 MiB\n%s: more than 500000 brackets", filepath.Join(empty, "dir.toml"), large, deep)
	if err == nil || err.Error() != want {
		t.Errorf("got:\n%v\nwant:\n%s", err, want)
	}
}

func TestDefaultControl(t *testing.T) {
	t.Setenv("XDG_RUNTIME_DIR", "/run/user/7")
	want := "/run/user/7/hibergated/control.sock"
	if os.Geteuid() == 0 {
		want = "/run/hibergated/control.sock"
	}
	if got := DefaultControl(); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if c, err := Load(write(t, t.TempDir(), "x.toml", "")); err != nil || c.Control != want {
		t.Errorf("got control %v and error %v, want %s", c, err, want)
	}
}

func TestDefaultState(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		uid             int
		home, xdg, want string
	}{
		"root":                     {0, "/root", "/x", "/var/lib/hibergated"},
		"an ordinary user":         {7, "/home/u", "/x", "/x/hibergated"},
		"without the variable":     {7, "/home/u", "", "/home/u/.local/state/hibergated"},
		"with a relative variable": {7, "/home/u", "x", "/home/u/.local/state/hibergated"},
		"without a home":           {7, "", "", ""},
		"without a home of use":    {7, "home", "", ""},
		"with the variable alone":  {7, "", "/x", "/x/hibergated"},
	} {
		env := func(name string) string { return map[string]string{"HOME": c.home, "XDG_STATE_HOME": c.xdg}[name] }
		if got := stateOf(c.uid, env); got != c.want {
			t.Errorf("%s: got %q, want %q", name, got, c.want)
		}
	}
	if c, err := Load(write(t, t.TempDir(), "x.toml", "")); err != nil || c.State != DefaultState() {
		t.Errorf("got %+v and error %v, want state %s", c, err, DefaultState())
	}
}

// The values that the configuration leaves out are the documented ones.
func TestDefaults(t *testing.T) {
	t.Parallel()
	c, err := Load(write(t, t.TempDir(), "x.toml", "[service.web]\nlisten = 'tcp://:80'\ncommand = ['/bin/web', '']"))
	if err != nil {
		t.Fatal(err)
	}
	want := &supervisor.Service{
		Name:    "web",
		Sockets: []activation.Spec{{Address: activation.Address{Network: activation.TCP, Port: 80}, Name: "web"}},
		Start:   supervisor.Start{Timeout: 90 * time.Second},
		Stop:    supervisor.DefaultStop(),
		Restart: supervisor.DefaultRestart(),
		Limits:  supervisor.Limits{SourcePrefix: 64},
	}
	want.Exec.Command = []string{"/bin/web", ""}
	if got := c.Services[0]; !reflect.DeepEqual(want, got) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	if got := c.Global; got != (supervisor.Global{}) {
		t.Errorf("got bounds %+v, want none", got)
	}
}

func TestReference(t *testing.T) {
	t.Parallel()
	text := Reference()
	for _, table := range newSchema().tables()[1:] {
		for _, k := range table.keys {
			if row := fmt.Sprintf("| `%s` | %s |", k.name, k.kind); !strings.Contains(text, row) {
				t.Errorf("the reference has no row %s", row)
			}
			if k.meaning == "" || k.kind == "" {
				t.Errorf("the key %q is not documented", k.name)
			}
		}
	}
}

func write(tb testing.TB, dir, name, text string) string {
	tb.Helper()
	name = filepath.Join(dir, name)
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		tb.Fatal(err)
	}
	return name
}
