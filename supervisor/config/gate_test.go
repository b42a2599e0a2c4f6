package config

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"hibergate/activation"
	"hibergate/supervisor/gate"
)

// How often, and for how long, a destination is asked depends on where it is, and on how it is asked; in whatever order the
// keys are read: that of a map.
func TestGateReady(t *testing.T) {
	t.Parallel()
	const ms = time.Millisecond
	line := func(command string) []string { return []string{"/bin/sh", "-c", command} }
	want := map[string]gate.Ready{
		"up":       {Interval: 50 * ms, Timeout: 5 * time.Second},
		"named":    {Interval: 5 * ms, Timeout: 5 * time.Second},
		"local":    {Type: gate.ReadyHTTP, Path: "/", Status: 200, Interval: 10 * ms, Timeout: 5 * time.Second},
		"far":      {Type: gate.ReadyHTTP, Path: "/x?y=z", Status: 200, Interval: 100 * ms, Timeout: 5 * time.Second},
		"dns":      {Type: gate.ReadyLaunched, Interval: ms, Timeout: 5 * time.Second},
		"asked":    {Type: gate.ReadyCommand, Command: line("true"), Interval: 100 * ms, Timeout: 10 * time.Second},
		"versions": {Interval: ms, Timeout: 5 * time.Second},
		"kernel":   {Interval: ms, Timeout: 5 * time.Second},
		"both":     {Interval: 50 * ms, Timeout: 5 * time.Second},
		"ignores":  {Interval: ms, Timeout: 5 * time.Second},
	}
	for range 20 {
		c, err := Load(filepath.Join(testdata, "valid", "gate.toml"))
		if err != nil {
			t.Fatal(err)
		}
		got := map[string]gate.Ready{}
		for _, s := range c.Services {
			got[s.Name] = s.Gate.Ready
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Fatalf("ready (-want +got):\n%s", diff)
		}
	}
}

func TestDestination(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]gate.Destination{
		"tcp://127.0.0.1:80":      {Network: activation.TCP, Host: "127.0.0.1", Port: 80},
		"udp://[2001:DB8::1]:53":  {Network: activation.UDP, Host: "2001:db8::1", Port: 53},
		"tcp://[fe80::1%eth0]:80": {Network: activation.TCP, Host: "fe80::1%eth0", Port: 80},
		"tcp://localhost:80":      {Network: activation.TCP, Host: "localhost", Port: 80},
		"tcp://my_db.local.:5432": {Network: activation.TCP, Host: "my_db.local.", Port: 5432},
		"tcp://3com:1":            {Network: activation.TCP, Host: "3com", Port: 1},
		"unix:///run/x.sock":      {Network: activation.Unix, Path: "/run/x.sock"},
	} {
		got, err := parseDestination(text)
		if err != nil || got != want {
			t.Errorf("%s: got %+v and error %v, want %+v", text, got, err, want)
		}
		if again, err := parseDestination(got.String()); err != nil || again != got {
			t.Errorf("%s: printed as %s, which is %+v and error %v", text, got, again, err)
		}
	}
	long := strings.Repeat("a", 63) + "."
	for _, host := range []string{strings.Repeat(long, 4), "a" + long, "a..b", ".", "ä"} {
		if got, err := parseDestination("tcp://" + host + ":80"); err == nil {
			t.Errorf("%s: got %+v, want an error", host, got)
		}
	}
}

func TestTooManyDestinations(t *testing.T) {
	t.Parallel()
	list := make([]string, maxDestinations+1)
	for i := range list {
		list[i] = fmt.Sprintf("'tcp://h:%d'", i+1)
	}
	text := func(n int) string {
		return "[service.x]\nlisten = 'tcp://:1'\nhandoff = 'gate'\ngate.destination = [" + strings.Join(list[:n], ", ") + "]"
	}
	if _, err := Parse("text", text(maxDestinations)); err != nil {
		t.Error(err)
	}
	const want = `text:4: service "x": gate.destination: has 65 destinations, at most 64 are possible`
	if _, err := Parse("text", text(maxDestinations+1)); err == nil || err.Error() != want {
		t.Errorf("got error %v, want %s", err, want)
	}
}

func FuzzDestination(f *testing.F) {
	for _, text := range []string{"tcp://127.0.0.1:80", "udp://[::1]:53", "tcp://name.:1", "unix:///run/x", "unix:@x", "tcp://:80", "tcp://[fe80::1%eth0]:80"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		got, err := parseDestination(text)
		if err != nil {
			return
		}
		if again, err := parseDestination(got.String()); err != nil || again != got {
			t.Errorf("%q is %+v, printed as %s, which is %+v and error %v", text, got, got, again, err)
		}
		if !slices.Contains([]activation.Network{activation.TCP, activation.UDP, activation.Unix}, got.Network) {
			t.Errorf("%q: got network %s", text, got.Network)
		}
	})
}
