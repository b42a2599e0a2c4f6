package adopt

import (
	"cmp"
	"strings"
	"testing"

	"hibergate/activation"
)

func TestParsePattern(t *testing.T) {
	t.Parallel()
	const tcp, udp = activation.TCP, activation.UDP
	for text, tt := range map[string]struct {
		want  Pattern
		again string // what String says, where it is another text
	}{
		"auto":                  {Auto, ""},
		"tcp://:8080":           {Pattern{tcp, AnyHost, 8080}, ""},
		"udp://:53":             {Pattern{udp, AnyHost, 53}, ""},
		"tcp://[::]:8080":       {Pattern{tcp, Wildcard6, 8080}, ""},
		"udp://[::]:53":         {Pattern{udp, Wildcard6, 53}, ""},
		"tcp://localhost:80":    {Pattern{tcp, Localhost, 80}, ""},
		"udp://localhost:65535": {Pattern{udp, Localhost, 65535}, ""},
		"tcp://:1":              {Pattern{tcp, AnyHost, 1}, ""},
		"tcp://[0::0]:80":       {Pattern{tcp, Wildcard6, 80}, "tcp://[::]:80"},
		"tcp://:0080":           {Pattern{tcp, AnyHost, 80}, "tcp://:80"},
	} {
		p, ok, err := ParsePattern(text)
		if p != tt.want || !ok || err != nil {
			t.Errorf("%s: got %+v, %v, %v, want %+v", text, p, ok, err, tt.want)
		}
		if want := cmp.Or(tt.again, text); p.String() != want {
			t.Errorf("%s: got %s, want %s", text, p, want)
		}
	}
	// An address, or nothing at all: for somebody else to say.
	for _, text := range []string{
		"", "Auto", "auto ", "automatic", "tcp://127.0.0.1:80", "tcp://0.0.0.0:80", "tcp://[::1]:80", "unix:///run/x", "unix:@name", "fifo:///x",
		"unix://localhost:80", "localhost:80", "tcp:localhost:80", "tcp://localhost", "tcp://localhost:", "tcp://localhost:http", "tcp://localhost:65536",
		"tcp://localhost:-1", "tcp://LOCALHOST:80", "tcp://localhost:[::1]:80", "tcp://localhost:localhost:80", "tcp://localhost:127.0.0.1:80",
		"sctp://localhost:80", "://localhost:80", "tcp://", "tcp://:", "tcp://:x", "tcp://[::]", "tcp://[::%lo]:80", "tcp://[::ffff:0.0.0.0]:80", ":80", "80",
	} {
		if p, ok, err := ParsePattern(text); p != (Pattern{}) || ok || err != nil {
			t.Errorf("%q: got %+v, %v, %v, want nothing", text, p, ok, err)
		}
	}
	for _, text := range []string{"tcp://:0", "udp://[::]:0", "tcp://localhost:0", "tcp://:00"} {
		p, ok, err := ParsePattern(text)
		if p != (Pattern{}) || !ok || err == nil || !strings.Contains(err.Error(), text) || !strings.Contains(err.Error(), "port is needed") {
			t.Errorf("%q: got %+v, %v, %v, want an error about the port", text, p, ok, err)
		}
	}
}

func TestPatternMatches(t *testing.T) {
	t.Parallel()
	addresses := []string{
		"tcp://127.0.0.1:80", "tcp://127.8.8.8:80", "tcp://192.0.2.1:80", "tcp://0.0.0.0:80", "tcp://[::1]:80", "tcp://[::]:80", "tcp://[2001:db8::1]:80",
		"tcp://[fe80::1%2]:80", "tcp://127.0.0.1:81", "tcp://[::]:81", "udp://127.0.0.1:80", "udp://[::]:80",
		"unix:///run/x", "unix:@x", "unixpacket:@x", "unixgram:@x", "fifo:///run/x",
	}
	for pattern, want := range map[string]string{
		"tcp://:80":          "tcp://127.0.0.1:80 tcp://127.8.8.8:80 tcp://192.0.2.1:80 tcp://0.0.0.0:80 tcp://[::1]:80 tcp://[::]:80 tcp://[2001:db8::1]:80 tcp://[fe80::1%2]:80",
		"tcp://localhost:80": "tcp://127.0.0.1:80 tcp://127.8.8.8:80 tcp://[::1]:80",
		"tcp://[::]:80":      "tcp://[::]:80",
		"udp://:80":          "udp://127.0.0.1:80 udp://[::]:80",
		"udp://localhost:80": "udp://127.0.0.1:80",
		"udp://[::]:80":      "udp://[::]:80",
		"tcp://:443":         "",
		"auto":               strings.Join(addresses[:12], " ") + " unix:@x unixpacket:@x",
	} {
		p, ok, err := ParsePattern(pattern)
		if !ok || err != nil {
			t.Fatal(pattern, ok, err)
		}
		var got []string
		for _, text := range addresses {
			a, err := activation.ParseAddress(text)
			if err != nil {
				t.Fatal(err)
			}
			if p.Matches(a) {
				got = append(got, text)
			}
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%s: got %v, want %s", pattern, got, want)
		}
	}
	if (Pattern{}) != Auto {
		t.Error("the zero Pattern is not Auto")
	}
	if Auto.Matches(activation.Address{}) || (Pattern{Network: activation.TCP, Port: 80}).Matches(activation.Address{Port: 80}) {
		t.Error("a pattern matches the zero Address")
	}
}

// FuzzPattern: a pattern that reads writes a text that reads as the same pattern.
func FuzzPattern(f *testing.F) {
	for _, s := range []string{"auto", "tcp://:80", "udp://[::]:53", "tcp://localhost:80", "tcp://localhost:0", "tcp://127.0.0.1:1", "unix://localhost:1", "tcp://[0:0::]:7"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		p, ok, err := ParsePattern(text)
		switch {
		case !ok && (err != nil || p != Pattern{}), err != nil && p != Pattern{}:
			t.Fatalf("got %+v, %v, %v", p, ok, err)
		case !ok || err != nil:
			return
		case p != Auto && (p.Port == 0 || !p.Network.IP() || p.Host > Wildcard6):
			t.Fatalf("got %+v", p)
		}
		again, ok, err := ParsePattern(p.String())
		if again != p || !ok || err != nil {
			t.Errorf("%q is %+v, and %q is %+v, %v, %v", text, p, p, again, ok, err)
		}
		if p.Host == Localhost {
			return // which ParseAddress says that it is a name
		}
		if _, err := activation.ParseAddress(text); p != Auto && err != nil {
			t.Errorf("%q is a pattern, and %v", text, err)
		}
	})
}
