package activity_test

import (
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"hibergate/activation/nettest"
	"hibergate/supervisor/activity"
)

// A socket that was removed is not known any more, and the accounts of the others go on.
func TestRemove(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces, nettest.Tool("nft"))
	gone, kept, udp := mustListen(t, 1, "tcp4", "127.0.0.1:0"), mustListen(t, 2, "tcp4", "127.0.0.1:0"), mustListen(t, 3, "udp4", "127.0.0.1:0")
	local := mustListen(t, 4, "unix", filepath.Join(t.TempDir(), "s"))
	tracker := mustTrack(t, gone.Socket, kept.Socket, udp.Socket, local.Socket)
	mustDial(t, "tcp", gone.Addr().String())
	mustDial(t, "tcp", kept.Addr().String())
	mustDial(t, "unix", local.Addr().String())
	mustWrite(t, mustDial(t, "udp", udp.udp.LocalAddr().String()), "x")
	before := look(t, tracker, 2)
	if s := look(t, tracker, 1); !s.Known || s.Queued != 1 {
		t.Fatalf("got %+v, want one queued", s)
	}
	in := func(l *listener) int {
		port := strconv.Itoa(int(l.Address.Port))
		return strings.Count(nft(t, "list table inet "+tableName(t)), ". "+port+" ")
	}
	if in(gone) != 3 || in(udp) != 3 {
		t.Errorf("ports are %d and %d times in the table, want 3 each", in(gone), in(udp))
	}
	tracker.Remove(1)
	tracker.Remove(3)
	tracker.Remove(4)
	tracker.Remove(4)  // again
	tracker.Remove(99) // nobody
	for _, key := range []uint32{1, 3, 4, 99} {
		if s := look(t, tracker, key); s.Known || s.Why != "the socket is not watched" {
			t.Errorf("socket %d: got %+v, want that it is not watched", key, s)
		}
		if flows, why := tracker.Flows(t.Context(), key, nil); len(flows) > 0 || why == "" {
			t.Errorf("socket %d: got flows %v (%q)", key, flows, why)
		}
	}
	if in(gone) != 0 || in(udp) != 0 || in(kept) != 3 {
		t.Errorf("ports are %d, %d and %d times in the table, want 0, 0 and 3", in(gone), in(udp), in(kept))
	}
	mustDial(t, "tcp", gone.Addr().String()) // nobody counts it
	if s := look(t, tracker, 2); !s.Known || s.In != before.In || s.Queued != 1 {
		t.Errorf("the other socket: got %+v, want as before %+v", s, before)
	}
	mustDial(t, "tcp", kept.Addr().String())
	if s := look(t, tracker, 2); s.In.Packets != before.In.Packets+2 || s.Queued != 2 {
		t.Errorf("the other socket: got %+v, want two packets more than %+v", s, before)
	}
}

// An account that two sockets have stays as long as one of them wants it.
func TestRemoveShared(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces, nettest.Tool("nft"))
	one := mustListen(t, 1, "tcp4", "127.0.0.1:0")
	other := one.Socket
	other.Key = 2
	tracker := mustTrack(t, one.Socket, other)
	mustDial(t, "tcp", one.Addr().String())
	count := func() int {
		return strings.Count(nft(t, "list table inet "+tableName(t)), ". "+strconv.Itoa(int(one.Address.Port))+" ")
	}
	before := look(t, tracker, 2)
	tracker.Remove(1)
	if s := look(t, tracker, 2); !s.Known || s.In != before.In || count() != 3 {
		t.Errorf("got %+v, %d times in the table, want as before %+v", s, count(), before)
	}
	tracker.Remove(2)
	if count() != 0 {
		t.Errorf("it is %d times in the table, want 0", count())
	}
}

// A socket that comes again begins anew: what was counted before was of another one.
func TestRemoveAndAdd(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	l := mustListen(t, 1, "tcp4", "127.0.0.1:0")
	tracker := mustTrack(t, l.Socket)
	for range 3 {
		mustDial(t, "tcp", l.Addr().String())
		if s := look(t, tracker, 1); !s.Known || !s.Exact || s.In.Packets != 2 {
			t.Errorf("got %+v, want two packets", s)
		}
		tracker.Remove(1)
		if s := look(t, tracker, 1); s.Known {
			t.Errorf("got %+v after Remove", s)
		}
		tracker.Add(l.Socket)
		if s := look(t, tracker, 1); !s.Known || !s.Exact || s.In.Packets != 0 {
			t.Errorf("got %+v after Add, want nothing counted", s)
		}
	}
	l.Accounting = activity.SockDiag
	tracker.Add(l.Socket) // without an account there is nothing to settle
	tracker.Remove(1)
	if s := look(t, tracker, 1); s.Known {
		t.Errorf("got %+v after Remove", s)
	}
}

// A descriptor of a socket that was removed is not used any more, and may be closed at once; looks go on meanwhile.
func TestRemoveWhileLooking(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	kept := mustListen(t, 1, "tcp4", "127.0.0.1:0")
	tracker := mustTrack(t, kept.Socket)
	stop := make(chan struct{})
	var looks sync.WaitGroup
	looks.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			for key := range uint32(4) {
				if s := look(t, tracker, key+1); key == 0 && !s.Known {
					t.Errorf("the other socket: got %+v", s)
				} else if key > 0 && !s.Known && s.Why != "the socket is not watched" {
					t.Errorf("socket %d: got %+v", key+1, s)
				}
			}
		}
	})
	for i := range 20 {
		l := mustListen(t, uint32(2+i%3), "tcp4", "127.0.0.1:0")
		tracker.Add(l.Socket)
		mustDial(t, "tcp", l.Addr().String())
		tracker.Remove(l.Key)
		l.Close()
	}
	close(stop)
	looks.Wait()
}

// After Close, and where the table was lost, Remove does no harm.
func TestRemoveAfterClose(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	one, two := mustListen(t, 1, "tcp4", "127.0.0.1:0"), mustListen(t, 2, "tcp4", "127.0.0.1:0")
	tracker := mustTrack(t, one.Socket, two.Socket)
	closeOwner(t, tableName(t))
	tracker.Remove(1)
	if s := look(t, tracker, 2); !s.Known {
		t.Errorf("after the table was lost: got %+v", s)
	}
	if err := tracker.Close(); err != nil {
		t.Error(err)
	}
	tracker.Remove(2)
	if s := look(t, tracker, 2); s.Known {
		t.Errorf("after Close: got %+v", s)
	}
}
