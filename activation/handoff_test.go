package activation

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestHandoff(t *testing.T) {
	t.Parallel()
	socket := func(fd int, name string) *Socket { return &Socket{fd: fd, spec: &Spec{Name: name}} }
	v4 := Peer{Remote: netip.MustParseAddrPort("192.0.2.7:4711"), Local: netip.MustParseAddrPort("192.0.2.1:80")}
	v6 := Peer{Remote: netip.MustParseAddrPort("[fe80::7%eth0]:4711")}
	tests := map[string]struct{ got, want Handoff }{
		"listening sockets": {
			ListenFDs([]*Socket{socket(10, "web"), socket(20, ""), socket(15, "admin")}),
			Handoff{FDs: []int{10, 20, 15}, First: 3, Env: []string{"LISTEN_FDS=3", "LISTEN_FDNAMES=web:unknown:admin"}, PIDEnv: "LISTEN_PID"},
		},
		"connection": {
			ListenConnection(9, v4),
			Handoff{FDs: []int{9}, First: 3, PIDEnv: "LISTEN_PID", Env: []string{
				"LISTEN_FDS=1", "LISTEN_FDNAMES=connection",
				"REMOTE_ADDR=192.0.2.7", "REMOTE_PORT=4711", "REMOTE_HOST=192.0.2.7",
			}},
		},
		"socket on stdio": {StdioSocket(socket(10, "web")), Handoff{FDs: []int{10, 10}}},
		"connection on stdio": {
			StdioConnection(9, v6),
			Handoff{FDs: []int{9, 9}, Env: []string{"REMOTE_ADDR=fe80::7%eth0", "REMOTE_PORT=4711", "REMOTE_HOST=fe80::7%eth0"}},
		},
		"Unix client with a path":    {StdioConnection(9, Peer{Path: "@x", Known: true}), Handoff{FDs: []int{9, 9}, Env: []string{"REMOTE_ADDR=@x"}}},
		"Unix client without a path": {StdioConnection(9, Peer{Known: true}), Handoff{FDs: []int{9, 9}}},
	}
	for name, test := range tests {
		if diff := cmp.Diff(test.want, test.got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

func TestUCSPI(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		peer    Peer
		network Network
		want    string
	}{
		"TCP": {
			Peer{Remote: netip.MustParseAddrPort("192.0.2.7:4711"), Local: netip.MustParseAddrPort("192.0.2.1:80")},
			TCP,
			"PROTO=TCP TCPLOCALIP=192.0.2.1 TCPLOCALPORT=80 TCPLOCALHOST=192.0.2.1 TCPREMOTEIP=192.0.2.7 TCPREMOTEPORT=4711 TCPREMOTEHOST=192.0.2.7",
		},
		"TCP, ends unknown": {Peer{}, TCP, "PROTO=TCP"},
		"Unix": {
			Peer{UID: 1, GID: 2, PID: 3, Known: true, Path: "/c"},
			Unixpacket,
			"PROTO=UNIX UNIXREMOTEEUID=1 UNIXREMOTEEGID=2 UNIXREMOTEPID=3 IPCREMOTEEUID=1 IPCREMOTEEGID=2 UNIXREMOTEPATH=/c IPCREMOTEPATH=/c",
		},
		"Unix, client unknown": {Peer{}, Unix, "PROTO=UNIX"},
		"UDP":                  {Peer{}, UDP, ""},
	}
	for name, test := range tests {
		if got := strings.Join(UCSPI(test.peer, test.network), " "); got != test.want {
			t.Errorf("%s:\ngot  %s\nwant %s", name, got, test.want)
		}
	}
}

func TestCheckName(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]string{
		"web.socket":             "",
		"a b~!":                  "",
		strings.Repeat("x", 255): "",
		"":                       "name is empty",
		strings.Repeat("x", 256): "name is 256 bytes long, more than 255",
		"a:b":                    `name "a:b" contains a colon, which separates names`,
		"a\nb":                   `name "a\nb" contains what is not printable ASCII`,
		"ä":                      `name "ä" contains what is not printable ASCII`,
	} {
		got := ""
		if err := CheckName(name); err != nil {
			got = err.Error()
		}
		if got != want {
			t.Errorf("CheckName(%q): got %q, want %q", name, got, want)
		}
	}
}
