package config

import (
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"hibergate/activation"
	"hibergate/supervisor"
)

// What is open becomes a pattern, and what is said a socket, in whatever order the keys are read: that of a map.
func TestPatterns(t *testing.T) {
	t.Parallel()
	want := map[string][]string{
		"any":      {"learn auto any access"},
		"named":    {"learn auto any"},
		"web":      {"learn tcp://:80 web", "learn udp://:80 web", "learn tcp://localhost:8080 web"},
		"proxy":    {"tcp://192.0.2.1:8080 proxy", "unix:///run/proxy proxy", "unix:@proxy proxy", "unixpacket:///run/packets proxy"},
		"versions": {"tcp://[::]:443 versions ipv6", "tcp://0.0.0.0:443 versions", "udp://127.0.0.1:53 versions", "udp://[::]:53 six ipv6"},
		"certain":  {"tcp://:81 certain dual", "udp://[::]:81 certain ipv6", "udp://:81 certain ipv4"},
		"quiet":    {"tcp://[::1]:83 quiet 30s", "learn tcp://:82 quiet 30s"},
		"one":      {"learn tcp://:84 one"},
		"two":      {"tcp://:84 two"},
		"told":     {"tcp://:85 told"},
		"plain":    {"tcp://:86 plain"},
	}
	ready := map[string]supervisor.Ready{
		"any": {Type: supervisor.ReadyBind}, "web": {Type: supervisor.ReadyBind}, "proxy": {Type: supervisor.ReadyBind},
		"versions": {Type: supervisor.ReadyBind}, "certain": {Type: supervisor.ReadyBind}, "quiet": {Type: supervisor.ReadyBind},
		"one": {Type: supervisor.ReadyBind}, "named": {Type: supervisor.ReadyNotify, Hold: true}, "told": {Type: supervisor.ReadyNotify},
	}
	for range 20 {
		c, err := Load(filepath.Join(testdata, "valid", "adopt.toml"))
		if err != nil {
			t.Fatal(err)
		}
		got := map[string][]string{}
		for _, s := range c.Services {
			for i := range s.Sockets {
				got[s.Name] = append(got[s.Name], s.Sockets[i].Address.String()+" "+shown(&s.Sockets[i]))
			}
			for i := range s.Learn {
				got[s.Name] = append(got[s.Name], "learn "+s.Learn[i].Pattern.String()+" "+shown(&s.Learn[i].Spec))
			}
			if s.Ready != ready[s.Name] {
				t.Errorf("%s: got %+v, want %+v", s.Name, s.Ready, ready[s.Name])
			}
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Fatalf("sockets (-want +got):\n%s", diff)
		}
	}
}

// shown is the name of a spec and those options that the configuration of the test may set.
func shown(s *activation.Spec) string {
	text := s.Name
	text += map[activation.Family]string{activation.FamilyDual: " dual", activation.FamilyIPv4: " ipv4", activation.FamilyIPv6: " ipv6"}[s.Options.Family]
	if s.Options.Access != nil {
		text += " access"
	}
	if s.Options.DeferAccept > 0 {
		text += fmt.Sprintf(" %v", s.Options.DeferAccept.Round(time.Second))
	}
	return text
}
