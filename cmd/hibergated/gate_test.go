package main

import (
	"context"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"hibergate/activation"
	"hibergate/supervisor"
	"hibergate/supervisor/config"
	"hibergate/supervisor/gate"
)

// gateVars is an environment that hibergate runs with.
func gateVars(change map[string]string) map[string]string {
	vars := map[string]string{
		"HIBERGATE_LISTENPORT":   "8080",
		"HIBERGATE_DESTINATION":  "web.example:80",
		"HIBERGATE_LAUNCHCMD":    "kubectl scale --replicas=1 \"deployment/$APP\"\nsleep 1\t# \\o/",
		"HIBERGATE_STOPCMD":      "kubectl scale --replicas=0 'deployment/web'",
		"HIBERGATE_READINESSCMD": "nc -z web 80",
		"HIBERGATE_IDLESECS":     "300",
	}
	maps.Copy(vars, change)
	return vars
}

func gateText(vars map[string]string) (string, error) {
	lookup := func(name string) (string, bool) {
		value, ok := vars[name]
		return value, ok && value != "MISSING"
	}
	return gateConfig(context.Background(), lookup, func() (string, error) { return "/srv/\x01 \"here\"", nil })
}

// What is printed is a configuration that says what the environment says, and nothing else.
func TestGateConfig(t *testing.T) {
	t.Parallel()
	text, err := gateText(gateVars(nil))
	if err != nil {
		t.Fatal(err)
	}
	golden := filepath.Join("testdata", "gate.toml")
	if *writeDocs {
		if err := os.WriteFile(golden, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), text); diff != "" {
		t.Errorf("configuration (-want +got):\n%s", diff)
	}
	cfg, err := loadGate(text)
	if err != nil {
		t.Fatal(err)
	}
	if len(cfg.Services) != 1 || cfg.Control != "" {
		t.Fatalf("got %d services and control %q", len(cfg.Services), cfg.Control)
	}
	s := cfg.Services[0]
	if s.Handoff != supervisor.Gate || s.Idle.StopAfter != 5*time.Minute || s.Exec.WorkingDirectory != "/srv/\x01 \"here\"" ||
		!cmp.Equal(s.Exec.PassEnvironment, []string{"*"}) || s.Exec.User != "" {
		t.Errorf("got %+v", s)
	}
	if a := s.Sockets[0].Address; len(s.Sockets) != 1 || a != (activation.Address{Network: activation.TCP, Port: 8080}) {
		t.Errorf("got sockets %+v", s.Sockets)
	}
	vars, line := gateVars(nil), func(command string) []string { return []string{"/bin/sh", "-c", command} }
	want2 := &gate.Spec{
		Destinations:   []gate.Destination{{Network: activation.TCP, Host: "web.example", Port: 80}},
		Launch:         line(vars["HIBERGATE_LAUNCHCMD"]),
		Stop:           line(vars["HIBERGATE_STOPCMD"]),
		Ready:          gate.Ready{Type: gate.ReadyCommand, Command: line("nc -z web 80"), Interval: 100 * time.Millisecond, Timeout: time.Minute},
		ConnectTimeout: 5 * time.Second, SessionTimeout: time.Minute, MaxPending: 1000, CheckInterval: 5 * time.Second,
	}
	if diff := cmp.Diff(want2, s.Gate); diff != "" {
		t.Errorf("gate (-want +got):\n%s", diff)
	}
}

// Numbers and destinations are taken in every form that hibergate takes, and commands may be empty.
func TestGateForms(t *testing.T) {
	t.Parallel()
	for change, want := range map[[2]string]string{
		{"HIBERGATE_LISTENPORT", "0x1F90"}:           `"tcp://:8080"`,
		{"HIBERGATE_LISTENPORT", "8_081"}:            `"tcp://:8081"`,
		{"HIBERGATE_IDLESECS", "+1"}:                 `idle_timeout      = "1s"`,
		{"HIBERGATE_DESTINATION", ":81"}:             `"tcp://localhost:81"`,
		{"HIBERGATE_DESTINATION", "0.0.0.0:81"}:      `"tcp://127.0.0.1:81"`,
		{"HIBERGATE_DESTINATION", "[::]:81"}:         `"tcp://[::1]:81"`,
		{"HIBERGATE_DESTINATION", "[2001:db8::1]:5"}: `"tcp://[2001:db8::1]:5"`,
		{"HIBERGATE_DESTINATION", "web:http"}:        `"tcp://web:80"`,
		{"HIBERGATE_STOPCMD", ""}:                    `stop        = ":"`,
		{"HIBERGATE_READINESSCMD", ""}:               `{ command = ":", `,
	} {
		text, err := gateText(gateVars(map[string]string{change[0]: change[1]}))
		if err != nil || !strings.Contains(text, want) {
			t.Errorf("%q: got %s and error %v, want %s", change, text, err, want)
		} else if _, err := loadGate(text); err != nil {
			t.Errorf("%q: %v", change, err)
		}
	}
}

// Every variable that is wrong is named, all at once.
func TestGateProblems(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		change map[string]string
		want   string
	}{
		"missing": {
			map[string]string{"HIBERGATE_LISTENPORT": "MISSING", "HIBERGATE_STOPCMD": "MISSING", "HIBERGATE_IDLESECS": "MISSING", "HIBERGATE_DESTINATION": "MISSING"},
			"environment: HIBERGATE_LISTENPORT: is missing\nenvironment: HIBERGATE_DESTINATION: is missing\n" +
				"environment: HIBERGATE_STOPCMD: is missing\nenvironment: HIBERGATE_IDLESECS: is missing",
		},
		"numbers": {
			map[string]string{"HIBERGATE_LISTENPORT": "0", "HIBERGATE_IDLESECS": "0"},
			"environment: HIBERGATE_LISTENPORT: must be a whole number from 1 to 65535, got \"0\"\n" +
				"environment: HIBERGATE_IDLESECS: must be a whole number from 1 to 315360000, got \"0\"",
		},
		"no numbers": {
			map[string]string{"HIBERGATE_LISTENPORT": "http", "HIBERGATE_IDLESECS": "5m"},
			"environment: HIBERGATE_LISTENPORT: must be a whole number from 1 to 65535, got \"http\"\n" +
				"environment: HIBERGATE_IDLESECS: must be a whole number from 1 to 315360000, got \"5m\"",
		},
		"no UTF-8":         {map[string]string{"HIBERGATE_LAUNCHCMD": "\xff"}, "environment: HIBERGATE_LAUNCHCMD: is not UTF-8"},
		"no port":          {map[string]string{"HIBERGATE_DESTINATION": "web"}, `environment: HIBERGATE_DESTINATION: must be HOST:PORT, got "web"`},
		"an URL":           {map[string]string{"HIBERGATE_DESTINATION": "http://web/"}, `environment: HIBERGATE_DESTINATION: the port of "http://web/" is neither a number from 1 to 65535 nor the name of a service`},
		"port 0":           {map[string]string{"HIBERGATE_DESTINATION": "web:0"}, `environment: HIBERGATE_DESTINATION: the port of "web:0" is neither a number from 1 to 65535 nor the name of a service`},
		"the port itself":  {map[string]string{"HIBERGATE_DESTINATION": "localhost:8080"}, "environment: HIBERGATE_DESTINATION: tcp://localhost:8080 is what the service itself listens on (tcp://:8080)"},
		"a host like none": {map[string]string{"HIBERGATE_DESTINATION": "my host:80"}, `environment: HIBERGATE_DESTINATION: destination "tcp://my host:80": host "my host" is neither an IP address nor a name`},
	} {
		text, err := gateText(gateVars(test.change))
		if err == nil {
			_, err = loadGate(text)
		}
		if _, ok := errors.AsType[config.Problems](err); !ok || err.Error() != test.want {
			t.Errorf("%s: got\n%v\nwant\n%s", name, err, test.want)
		}
	}
	if _, err := gateConfig(t.Context(), func(name string) (string, bool) { v, ok := gateVars(nil)[name]; return v, ok }, func() (string, error) { return "/\xff", nil }); err == nil {
		t.Error("a working directory that is not UTF-8: got no error")
	}
}

func TestUnknownVariables(t *testing.T) {
	t.Parallel()
	got := unknownVariables([]string{
		"PATH=/bin", "HIBERGATE_STOPCOMMAND=x", "HIBERGATE_IDLESECS=5", "HIBERGATE_DEBUG=", "HIBERGATED_X=1",
		"HIBERGATE_PORT=tcp://10.0.0.1:80", "HIBERGATE_PORT_80_TCP_ADDR=10.0.0.1", "HIBERGATE_SERVICE_HOST=10.0.0.1",
	})
	if diff := cmp.Diff([]string{"HIBERGATE_DEBUG", "HIBERGATE_STOPCOMMAND"}, got); diff != "" {
		t.Errorf("variables (-want +got):\n%s", diff)
	}
}

// Whatever a text has in it, it is read as it was written.
func FuzzTOMLString(f *testing.F) {
	for _, s := range []string{"x", `"\`, "\x01\t\n\r\x7f", "Grüße", `'''"""`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if s == "" || !utf8.ValidString(s) || strings.ContainsRune(s, 0) {
			return
		}
		text := "[service.x]\nlisten = 'tcp://:1'\nhandoff = 'gate'\ngate = { destination = 'tcp://h:1', launch = " + tomlString(s) + " }\n"
		cfg, err := config.Parse("text", text)
		if err != nil {
			t.Fatalf("%q: %v", s, err)
		}
		if got := cfg.Services[0].Gate.Launch[2]; got != s {
			t.Errorf("got %q, want %q", got, s)
		}
	})
}
