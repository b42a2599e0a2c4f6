package activity_test

import (
	"bytes"
	"log/slog"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"hibergate/activation/nettest"
	"hibergate/supervisor/activity"
)

// Sockets of every kind can be added to any others; the accounts of those go on as if nothing had happened.
func TestAdd(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	added := map[string]*listener{}
	first := mustListen(t, 1, "udp4", "127.0.0.1:0")
	tracker := mustTrack(t) // none yet
	tracker.Add(first.Socket)
	mustWrite(t, mustDial(t, "udp", first.udp.LocalAddr().String()), "x")
	quiet(t, tracker, 1)
	before := look(t, tracker, 1)
	began := time.Now()
	key := uint32(1)
	for _, c := range []struct{ name, network, listen, dial string }{
		{"dual stack", "tcp", ":0", "127.0.0.1"},
		{"v4 wildcard", "tcp4", "0.0.0.0:0", "127.0.0.1"},
		{"v6 specific", "tcp6", "[::1]:0", "::1"},
		{"v4 specific", "tcp4", "127.0.0.1:0", "127.0.0.1"},
		{"v4 specific again", "tcp4", "127.0.0.1:0", "127.0.0.1"},
		{"v6 wildcard", "tcp6", "[::]:0", "::1"},
	} {
		key++
		l := mustListen(t, key, c.network, c.listen)
		added[c.name] = l
		tracker.Add(l.Socket)
		if s := look(t, tracker, key); !s.Known || !s.Exact || s.Why != "" || s.In.Packets != 0 || s.Last.Before(began) {
			t.Errorf("%s: at first: got %+v", c.name, s)
		}
		client := mustDial(t, "tcp", net.JoinHostPort(c.dial, strconv.Itoa(int(l.Address.Port))))
		l.mustAccept(t)
		mustWrite(t, client, "hello")
		if s := look(t, tracker, key); !s.Known || !s.Exact || s.Open != 1 || s.In.Packets != 3 || s.LastPayload.Before(began) {
			t.Errorf("%s: got %+v, want one open", c.name, s)
		}
		flows, why := tracker.Flows(t.Context(), key, nil)
		if len(flows) != 1 || !flows[0].Counted || why != "" {
			t.Errorf("%s: got flows %+v (%s), want one, counted", c.name, flows, why)
		}
	}
	if s := look(t, tracker, 1); !s.Known || s.In != before.In || !s.Last.Before(began) {
		t.Errorf("the first: got %+v, want %d packets, last before %v", s, before.In.Packets, began)
	}
	path := filepath.Join(t.TempDir(), "s")
	u := mustListen(t, 100, "unix", path)
	tracker.Add(u.Socket)
	mustDial(t, "unix", path)
	if s := look(t, tracker, 100); !s.Known || s.Queued != 1 {
		t.Errorf("unix: got %+v, want one queued", s)
	}
}

// A socket that is added under a key that is there takes its place; the account of the other ends, unless
// it is the same.
func TestAddReplaces(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces, nettest.Tool("nft"))
	old := mustListen(t, 1, "tcp4", "127.0.0.1:0")
	kept := mustListen(t, 2, "tcp4", "127.0.0.1:0")
	tracker := mustTrack(t, old.Socket, kept.Socket)
	mustDial(t, "tcp", old.Addr().String())
	mustDial(t, "tcp", kept.Addr().String())
	before := look(t, tracker, 2)
	tracker.Add(old.Socket)
	if s := look(t, tracker, 1); s.Queued != 1 || s.In.Packets != 2 {
		t.Errorf("the same again: got %+v, want one queued, 2 packets", s)
	}
	next := mustListen(t, 1, "tcp4", "127.0.0.1:0")
	tracker.Add(next.Socket)
	if s := look(t, tracker, 1); !s.Known || s.Queued != 0 || s.In.Packets != 0 {
		t.Errorf("another address: got %+v, want nothing", s)
	}
	mustDial(t, "tcp", next.Addr().String())
	mustDial(t, "tcp", old.Addr().String())
	if s := look(t, tracker, 1); s.Queued != 1 || s.In.Packets != 2 {
		t.Errorf("another address: got %+v, want one queued, 2 packets", s)
	}
	if s := look(t, tracker, 2); !s.Known || s.In != before.In || s.Queued != 1 {
		t.Errorf("the other socket: got %+v, want as before %+v", s, before)
	}
	table := nft(t, "list table inet "+tableName(t))
	for l, want := range map[*listener]int{old: 0, kept: 3, next: 3} {
		if got := strings.Count(table, ". "+strconv.Itoa(int(l.Address.Port))+" "); got != want {
			t.Errorf("port %d is %d times in the table, want %d:\n%s", l.Address.Port, got, want, table)
		}
	}
	next.Accounting = activity.SockDiag
	tracker.Add(next.Socket)
	if s := look(t, tracker, 1); !s.Known || s.Exact || s.Queued != 1 {
		t.Errorf("without an account: got %+v, want one queued, not exact", s)
	}
}

// A table that was lost is made anew by Add, with the accounts of all.
func TestAddAfterLoss(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces, nettest.Tool("nft"))
	var log lockedBuffer
	one, two := mustListen(t, 1, "tcp4", "127.0.0.1:0"), mustListen(t, 2, "tcp4", "127.0.0.1:0")
	tracker := activity.New(activity.Options{Logger: slog.New(slog.NewTextHandler(&log, nil)), Table: tableName(t)}, []activity.Socket{one.Socket})
	defer tracker.Close()
	mustDial(t, "tcp", one.Addr().String())
	look(t, tracker, 1)
	closeOwner(t, tableName(t))
	tracker.Add(two.Socket)
	if got := log.String(); !strings.Contains(got, "activity begins anew") {
		t.Errorf("got log %q", got)
	}
	mustDial(t, "tcp", one.Addr().String())
	for key, want := range map[uint32]uint64{1: 4, 2: 0} {
		if s := look(t, tracker, key); !s.Known || !s.Exact || s.In.Packets != want {
			t.Errorf("socket %d: got %+v, want %d packets in all", key, s, want)
		}
	}
	if err := tracker.Close(); err != nil {
		t.Error(err)
	}
	tracker.Add(two.Socket)
	if s := look(t, tracker, 2); s.Known {
		t.Errorf("added after Close: got %+v", s)
	}
}

// lockedBuffer is a buffer that a logger may write to while it is read.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}
