package config

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"hibergate/activation"
	"hibergate/activation/adopt"
	"hibergate/supervisor"
	"hibergate/supervisor/activity"
	"hibergate/supervisor/gate"
)

func FuzzLoad(f *testing.F) {
	for _, pattern := range []string{"valid/*.toml", "invalid/*.toml"} {
		files, _ := filepath.Glob(filepath.Join(testdata, pattern))
		for _, name := range files {
			text, err := os.ReadFile(name)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(string(text))
		}
	}
	f.Add("\x02") // the decoder gives position -1
	f.Fuzz(func(t *testing.T, text string) {
		d := newDecoder()
		d.file("f.toml", text, nil)
		d.finish()
		for _, p := range d.problems() {
			if p.Line < 1 || p.Line > 1+strings.Count(text, "\n") {
				t.Errorf("line %d is not in the text: %s", p.Line, p)
			}
			if p.Text == "" {
				t.Errorf("no text in %+v", p)
			}
		}
		for _, s := range d.config.Services {
			if len(d.findings) == 0 && !whole(s) {
				t.Errorf("a service that is not whole: %+v", s)
			}
		}
	})
}

// whole says whether the service has what it cannot be without.
func whole(s *supervisor.Service) bool {
	stop, restart, limits := s.Stop, s.Restart, s.Limits
	for _, l := range s.Learn {
		auto := l.Pattern == adopt.Auto
		if again, ok, err := adopt.ParsePattern(l.Pattern.String()); !ok || err != nil || again != l.Pattern || auto && len(s.Learn)+len(s.Sockets) > 1 ||
			l.Spec.Address != (activation.Address{}) || l.Spec.Name == "" || l.Spec.Options.Family != activation.FamilyDefault {
			return false
		}
	}
	if adopts := s.Handoff == supervisor.Adopt; !adopts && (len(s.Learn) > 0 || s.RefuseIOUring || s.Ready.Hold || s.Ready.Type == supervisor.ReadyBind) ||
		adopts && (s.Accept || s.Ready.Type == supervisor.ReadyExec) || s.Accept && s.Ready.Type == supervisor.ReadyNotify {
		return false
	}
	for _, spec := range s.Sockets {
		if spec.Address.Network == 0 {
			return false
		}
		if a := spec.Options.Access; a != nil && (!spec.Address.Network.IP() || !masked(a.Allow) || !masked(a.Deny) || len(a.Allow)+len(a.Deny) == 0) {
			return false
		}
	}
	for _, r := range []supervisor.Rate{limits.AcceptRate, limits.AcceptRatePerSource, limits.WakeRate} {
		if (r != supervisor.Rate{}) && (r.Count < 1 || r.Per < time.Duration(r.Count)) {
			return false
		}
	}
	if gates := s.Handoff == supervisor.Gate; gates != (s.Gate != nil) || gates == (len(s.Exec.Command) > 0) || gates && !wholeGate(s) {
		return false
	}
	return len(s.Sockets)+len(s.Learn) > 0 && s.Start.Timeout >= 0 &&
		stop.Signal > 0 && stop.FinalSignal > 0 && stop.Timeout > 0 &&
		restart.Delay > 0 && restart.MaxDelay >= restart.Delay && restart.Interval > 0 && restart.FailedDelay >= 0 && restart.Burst >= 0 &&
		limits.SourcePrefix >= 1 && limits.SourcePrefix <= 128 && masked(s.Wake.Ignore) && s.Wake.MinBytes >= 0
}

// wholeGate says the same of a gate.
func wholeGate(s *supervisor.Service) bool {
	g := s.Gate
	for i := range s.Sockets {
		socket := &s.Sockets[i]
		datagrams := socket.Address.Network == activation.UDP
		leads := func(t gate.Destination) bool { return (t.Network == activation.UDP) == datagrams }
		loops := func(t gate.Destination) bool { return leadsTo(&t, socket) }
		if !slices.ContainsFunc(g.Destinations, leads) || slices.ContainsFunc(g.Destinations, loops) || socket.Options.PacketInfo != datagrams {
			return false
		}
	}
	for _, t := range g.Destinations {
		if again, err := parseDestination(t.String()); err != nil || again != t {
			return false
		}
	}
	r := g.Ready
	if (r.Type == gate.ReadyHTTP) != (r.Path != "" && r.Status > 0) || (r.Type == gate.ReadyCommand) != (len(r.Command) > 0) ||
		r.Type == gate.ReadyLaunched && len(g.Launch) == 0 || r.Interval < minInterval || r.Timeout < minInterval {
		return false
	}
	if g.Forward == gate.Kernel && (len(g.Destinations) != 1 || !destinationIP(&g.Destinations[0]).IsValid() || g.MaxConnections > 0 || g.Transparent) {
		return false
	}
	return !s.Accept && s.Accounting == activity.SockDiag && (len(g.Stop) == 0 || len(g.Launch) > 0) && (s.Idle.StopAfter == 0 || len(g.Stop) > 0) &&
		g.ConnectTimeout > 0 && g.SessionTimeout > 0 && g.CheckInterval > 0 && g.MaxPending > 0 && g.LaunchTimeout >= 0 && s.Limits.MaxConnections == 0
}

// masked says whether no prefix has bits that do not count.
func masked(prefixes []netip.Prefix) bool {
	return !slices.ContainsFunc(prefixes, func(p netip.Prefix) bool { return !p.IsValid() || p != p.Masked() || p.Addr().Is4In6() })
}
