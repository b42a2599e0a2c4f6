package activity_test

import (
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"testing"
	"time"

	"hibergate/activation/nettest"
	"hibergate/supervisor/activity"
)

// quiet waits until the last activity is longer ago than the clock errs.
func quiet(t *testing.T, tracker *activity.Tracker, key uint32) {
	t.Helper()
	nettest.Eventually(t, func() error {
		if s := look(t, tracker, key); time.Since(s.Last) < 50*time.Millisecond {
			return fmt.Errorf("last activity: %v", s.Last)
		}
		return nil
	})
}

func mustDialFrom(t *testing.T, source string, l *listener) net.Conn {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(source)}}
	host := "127.0.0.1"
	if netip.MustParseAddr(source).Is6() {
		host = "::1"
	}
	c, err := d.Dial("tcp", net.JoinHostPort(host, strconv.Itoa(int(l.Address.Port))))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// A source that is ignored may use the service, but neither its connections nor its packets are
// activity; those of others are.
func TestIgnore(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces, nettest.Tool("ip"))
	run(t, "ip", "address", "replace", "fd00::9/128", "dev", "lo", "nodad")
	for name, c := range map[string]struct {
		network, listen string
		ignore          []string
		ignored, other  string
	}{
		"v4 specific":       {"tcp4", "127.0.0.1:0", []string{"127.0.0.9/32"}, "127.0.0.9", "127.0.0.8"},
		"v4 wildcard":       {"tcp4", "0.0.0.0:0", []string{"::/0", "127.0.8.0/22", "127.0.9.0/24"}, "127.0.9.255", "127.0.12.0"},
		"v6 specific":       {"tcp6", "[::1]:0", []string{"127.0.0.0/8", "fd00::/64", "fd00::9/128"}, "fd00::9", "::1"},
		"v6 wildcard":       {"tcp6", "[::]:0", []string{"::1/128"}, "::1", "fd00::9"},
		"dual stack, by v4": {"tcp", ":0", []string{"::/0", "::ffff:127.0.1.0/120"}, "127.0.1.255", "127.0.2.0"},
		"dual stack, by v6": {"tcp", ":0", []string{"0.0.0.0/0", "fd00::9/128"}, "fd00::9", "::1"},
	} {
		for _, accounting := range []activity.Accounting{activity.Auto, activity.SockDiag} {
			t.Run(name+", "+accounting.String(), func(t *testing.T) {
				t.Parallel()
				l := mustListen(t, 1, c.network, c.listen)
				l.Accounting = accounting
				for _, p := range c.ignore {
					l.Ignore = append(l.Ignore, netip.MustParsePrefix(p))
				}
				tracker := mustTrack(t, l.Socket)
				quiet(t, tracker, 1)
				began := time.Now()
				check := func(step string) {
					t.Helper()
					s := look(t, tracker, 1)
					if !s.Known || s.Why != "" || s.Exact != (accounting == activity.Auto) || s.Open+s.Queued != 0 || s.Peers != 0 ||
						!s.Last.Before(began) || !s.LastPayload.IsZero() {
						t.Errorf("%s after %v: got %+v, want nothing", step, began, s)
					}
					if s.Exact && s.In.Packets == 0 {
						t.Errorf("%s: got %+v, want its packets counted", step, s)
					}
				}
				client := mustDialFrom(t, c.ignored, l)
				check("queued")
				if got := waiting(t, tracker, 1); len(got) != 1 || got[0].Remote.Addr() != netip.MustParseAddr(c.ignored) {
					t.Errorf("got %+v waiting, want one from %s", got, c.ignored)
				}
				server := l.mustAccept(t)
				mustWrite(t, client, "hello")
				mustWrite(t, server, "hello")
				check("open")
				server.Close()
				client.Close()
				check("closed")
				began = time.Now()
				mustDialFrom(t, c.other, l)
				if s := look(t, tracker, 1); s.Queued != 1 || s.Exact && s.Last.Before(began) {
					t.Errorf("another source at %v: got %+v, want it queued", began, s)
				}
				l.mustAccept(t)
				if s := look(t, tracker, 1); s.Open != 1 || s.Peers == 0 {
					t.Errorf("another source: got %+v, want it open", s)
				}
			})
		}
	}
}

// What one of two sockets with the same account ignores wakes the other; with a list of its own it is heard.
func TestIgnoreOfSharedAccount(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	l := mustListen(t, 1, "tcp4", "127.0.0.1:0")
	l.Ignore = []netip.Prefix{netip.MustParsePrefix("127.0.0.9/32")}
	twin := l.Socket
	twin.Key, twin.Ignore = 2, nil
	tracker := mustTrack(t, l.Socket, twin)
	quiet(t, tracker, 1)
	began := time.Now()
	mustDialFrom(t, "127.0.0.9", l)
	got := tracker.Look(t.Context(), time.Now(), []uint32{1, 2})
	if got[0].Queued != 0 || got[1].Queued != 1 || got[1].Last.Before(began) {
		t.Errorf("got %+v, want the client at the second, after %v", got, began)
	}
	// Both ignore it.
	twin.Ignore = l.Ignore
	tracker.Add(twin)
	quiet(t, tracker, 2)
	began = time.Now()
	mustDialFrom(t, "127.0.0.9", l)
	if s := look(t, tracker, 2); s.Queued != 0 || !s.Last.Before(began) || s.In.Packets <= got[1].In.Packets {
		t.Errorf("got %+v, want nothing after %v, but counted", s, began)
	}
}
