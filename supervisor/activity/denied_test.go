package activity_test

import (
	"context"
	"net"
	"net/netip"
	"strconv"
	"testing"
	"time"

	"hibergate/activation"
	"hibergate/activation/nettest"
	"hibergate/supervisor/activity"
)

// What a socket does not let in is counted, but no activity; what it lets in is.
func TestDenied(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces, nettest.Tool("ip"))
	run(t, "ip", "address", "replace", "fd00::9/128", "dev", "lo", "nodad")
	run(t, "ip", "address", "replace", "fd00::8/128", "dev", "lo", "nodad")
	for name, c := range map[string]struct {
		listen, to    string
		allow, deny   []string
		denied, other string
	}{
		"v4":                {"127.0.0.1:0", "127.0.0.1", nil, []string{"127.0.0.9/32"}, "127.0.0.9", "127.0.0.8"},
		"v4, allowed":       {"127.0.0.1:0", "127.0.0.1", []string{"127.0.0.8/32"}, nil, "127.0.0.9", "127.0.0.8"},
		"v4 wildcard":       {"0.0.0.0:0", "127.0.0.1", []string{"127.0.0.8/32"}, []string{"127.0.0.0/8"}, "127.0.0.7", "127.0.0.8"},
		"v6":                {"[::1]:0", "::1", nil, []string{"fd00::9/128"}, "fd00::9", "fd00::8"},
		"v6, allowed":       {"[::1]:0", "::1", []string{"fd00::8/128"}, nil, "fd00::9", "fd00::8"},
		"dual stack, by v4": {":0", "127.0.0.1", nil, []string{"127.0.0.9/32"}, "127.0.0.9", "127.0.0.8"},
		"dual stack, by v6": {":0", "::1", []string{"fd00::8/128"}, nil, "fd00::9", "fd00::8"},
	} {
		for _, network := range []string{"tcp", "udp"} {
			t.Run(name+", "+network, func(t *testing.T) {
				t.Parallel()
				address, err := activation.ParseAddress(network + "://" + c.listen)
				if err != nil {
					t.Fatal(err)
				}
				access := &activation.Access{Allow: prefixes(c.allow), Deny: prefixes(c.deny)}
				sock, err := activation.Open(activation.Spec{Address: address, Options: activation.Options{Access: access}})
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { sock.Close() })
				tracker := mustTrack(t, activity.Socket{Key: 1, Address: sock.Address(), FD: sock.FD(), Denied: access.Denied()})
				to := net.JoinHostPort(c.to, strconv.Itoa(int(sock.Address().Port)))
				quiet(t, tracker, 1)
				before := look(t, tracker, 1)
				already := time.Since(before.Last)
				knock(t, network, c.denied, to)
				s := eventually(t, tracker, 1, "knocked at", func(s activity.Summary) bool { return s.In.Packets > before.In.Packets })
				// The kernel's ages err by a clock tick each.
				if still := time.Since(s.Last); !s.Exact || still < already-20*time.Millisecond || s.Open+s.Queued != 0 {
					t.Errorf("denied: got %+v, last activity %v ago, want at least %v", s, still, already)
				}
				sent := time.Now()
				knock(t, network, c.other, to)
				eventually(t, tracker, 1, "queued", func(s activity.Summary) bool { return s.Queued == 1 })
				if s := look(t, tracker, 1); !s.Exact || s.Last.Before(sent) {
					t.Errorf("permitted at %v: got %+v", sent, s)
				}
			})
		}
	}
}

// knock sends a datagram, or begins a connection, from a source.
func knock(t *testing.T, network, source, to string) {
	t.Helper()
	from := netip.AddrPortFrom(netip.MustParseAddr(source), 0)
	if network == "udp" {
		c, err := (&net.Dialer{LocalAddr: net.UDPAddrFromAddrPort(from)}).Dial(network, to)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		mustWrite(t, c, "x")
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	t.Cleanup(func() { cancel(); <-done })
	go func() { // where the source is denied, there is no answer
		defer close(done)
		c, err := (&net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(from)}).DialContext(ctx, network, to)
		if err == nil {
			<-ctx.Done()
			c.Close()
		}
	}()
}

func prefixes(texts []string) (all []netip.Prefix) {
	for _, s := range texts {
		all = append(all, netip.MustParsePrefix(s))
	}
	return all
}
