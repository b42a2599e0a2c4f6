package activity_test

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
)

// What comes through destination NAT counts for the socket that gets it, and the flow
// shows what the client asked for.
func TestDestinationNAT(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces, nettest.Tool("nft"))
	l := mustListen(t, 1, "tcp4", "127.0.0.1:0")
	other := mustListen(t, 2, "tcp4", "127.0.0.1:0")
	asked := other.Listener.Addr().(*net.TCPAddr).AddrPort()
	tracker := mustTrack(t, l.Socket, other.Socket)
	nft(t, fmt.Sprintf("add table ip behind\nadd chain ip behind out { type nat hook output priority -100; }\n"+
		"add rule ip behind out tcp dport %d redirect to :%d", asked.Port(), l.Address.Port))
	t.Cleanup(func() { nft(t, "delete table ip behind") })
	client := mustDial(t, "tcp", asked.String())
	l.mustAccept(t)
	mustWrite(t, client, "hello")
	got := tracker.Look(t.Context(), time.Now(), []uint32{1, 2})
	if got[0].Open != 1 || got[0].In.Packets == 0 || got[1].Open != 0 || got[1].In.Packets != 0 {
		t.Errorf("got %+v, want the connection at the first", got)
	}
	flows, why := tracker.Flows(t.Context(), 1, nil)
	if len(flows) != 1 || why != "" || flows[0].Original != asked || flows[0].Local.Port() != l.Address.Port || !flows[0].Counted {
		t.Errorf("got %+v (%s), want original %v", flows, why, asked)
	}
}

// Flows says the same as conntrack -L and ss, and names the process of a connection.
func TestFlowsAgainstTools(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces, nettest.Tool("conntrack"), nettest.Tool("ss"))
	l := mustListen(t, 1, "tcp4", "127.0.0.1:0")
	tracker := mustTrack(t, l.Socket)
	want := map[string]bool{}
	for range 3 {
		client := mustDial(t, "tcp", l.Addr().String())
		server := l.mustAccept(t)
		mustWrite(t, client, "hello")
		mustWrite(t, server, "hello there")
		want[client.LocalAddr().String()] = true
	}
	flows, why := tracker.Flows(t.Context(), 1, []int{os.Getpid()})
	if why != "" || len(flows) != len(want) {
		t.Fatalf("got %d flows (%s), want %d", len(flows), why, len(want))
	}
	port := strconv.Itoa(int(l.Address.Port))
	table := run(t, "conntrack", "-L", "-p", "tcp", "--orig-port-dst", port)
	sockets := run(t, "ss", "-tnip", "sport", "=", ":"+port)
	for _, f := range flows {
		if !want[f.Peer.String()] {
			t.Errorf("unknown peer in %+v", f)
		}
		line := lineWith(table, fmt.Sprintf("sport=%d dport=%s ", f.Peer.Port(), port))
		for _, part := range []string{f.State, fmt.Sprintf("packets=%d bytes=%d", f.In.Packets, f.In.Bytes), fmt.Sprintf("packets=%d bytes=%d", f.Out.Packets, f.Out.Bytes)} {
			if !strings.Contains(line, part) {
				t.Errorf("%+v: %q is not in conntrack's line %q", f, part, line)
			}
		}
		line = lineWith(sockets, f.Peer.String())
		if !strings.Contains(line, fmt.Sprintf("(%q,pid=%d,", f.Process, f.PID)) || f.PID != os.Getpid() {
			t.Errorf("%+v: got ss line %q", f, line)
		}
	}
}

func lineWith(text, part string) string {
	for line := range strings.Lines(text) {
		if strings.Contains(line, part) {
			return line
		}
	}
	return ""
}

// A Unix client in another network namespace is not in the kernel's list, but the process that
// serves it holds the connection.
func TestHeldAcrossNamespaces(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces, nettest.Tool("socat"))
	path := filepath.Join(t.TempDir(), "s")
	l := mustListen(t, 1, "unix", path)
	tracker := mustTrack(t, l.Socket)
	mustDial(t, "unix", path)
	l.mustAccept(t)
	gone := exec.Command("true")
	if err := gone.Run(); err != nil {
		t.Fatal(err)
	}
	held := func() int {
		n, err := tracker.Held(t.Context(), 1, []int{gone.Process.Pid, os.Getpid(), os.Getpid()})
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	if got := held(); got != 0 {
		t.Errorf("with a client of our namespace: got %d held, want 0, for sock_diag sees it", got)
	}
	client := exec.CommandContext(t.Context(), "socat", "-u", "UNIX-CONNECT:"+path, "STDOUT")
	client.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	if err := client.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Process.Kill(); client.Wait() })
	server := l.mustAccept(t)
	if got := held(); got != 1 {
		t.Errorf("with a client of another namespace: got %d held, want 1", got)
	}
	if s := look(t, tracker, 1); s.Open != 1 {
		t.Errorf("got %d open, want 1: the kernel has changed, and Held is not needed any more", s.Open)
	}
	server.Close()
	if got := held(); got != 0 {
		t.Errorf("after it was closed: got %d held, want 0", got)
	}
}
