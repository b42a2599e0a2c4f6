package activity

import (
	"log/slog"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation"
	"hibergate/activation/nettest"
)

func mustOpen(t *testing.T, address string, options activation.Options) *activation.Socket {
	t.Helper()
	a, err := activation.ParseAddress(address)
	if err != nil {
		t.Fatal(err)
	}
	s, err := activation.Open(activation.Spec{Address: a, Options: options})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func mustWatch(t *testing.T, s *activation.Socket, a Accounting) *Tracker {
	t.Helper()
	table := strings.NewReplacer("/", "-", ":", "-", "[", "", "]", "").Replace(t.Name())
	tr := New(Options{Logger: slog.New(slog.DiscardHandler), Table: table}, []Socket{{Key: 7, Address: s.Address(), FD: s.FD(), Accounting: a}})
	t.Cleanup(func() { tr.Close() })
	return tr
}

// Nothing is known about a transparent socket, whoever made it one.
func TestTransparent(t *testing.T) {
	nettest.Need(t, nettest.Namespaces)
	t.Parallel()
	for _, address := range []string{"tcp://127.0.0.1:0", "tcp://[::1]:0", "tcp://:0", "udp://:0"} {
		t.Run(address, func(t *testing.T) {
			t.Parallel()
			s := mustOpen(t, address, activation.Options{})
			tr := mustWatch(t, s, Auto)
			if sum := tr.Look(t.Context(), time.Now(), []uint32{7})[0]; !sum.Known {
				t.Errorf("before: got %+v", sum)
			}
			if err := unix.SetsockoptInt(s.FD(), unix.IPPROTO_IP, unix.IP_TRANSPARENT, 1); err != nil {
				t.Fatal(err)
			}
			const want = "connections of a transparent socket"
			if sum := tr.Look(t.Context(), time.Now(), []uint32{7})[0]; sum.Known || !strings.Contains(sum.Why, want) {
				t.Errorf("got %+v, want it not known because of %s", sum, want)
			}
			if _, why := tr.Flows(t.Context(), 7, nil); !strings.Contains(why, want) {
				t.Errorf("got flows because %q, want %s", why, want)
			}
			made := mustOpen(t, address, activation.Options{Transparent: true})
			if len(made.Warnings()) > 0 {
				t.Fatal(made.Warnings())
			}
			if sum := mustWatch(t, made, SockDiag).Look(t.Context(), time.Now(), []uint32{7})[0]; sum.Known || !strings.Contains(sum.Why, want) {
				t.Errorf("of the options: got %+v, want it not known because of %s", sum, want)
			}
		})
	}
}

// A Unix socket that was shut down is replaced under its descriptor; what waits on the new one is seen.
func TestRevived(t *testing.T) {
	nettest.Need(t, nettest.Namespaces)
	t.Parallel()
	dir := t.TempDir()
	for _, address := range []string{"unix:" + dir + "/stream", "unix:@" + dir, "unixpacket:" + dir + "/packet"} {
		t.Run(address, func(t *testing.T) {
			t.Parallel()
			s := mustOpen(t, address, activation.Options{})
			tr := mustWatch(t, s, Auto)
			if err := unix.Shutdown(s.FD(), unix.SHUT_RDWR); err != nil {
				t.Fatal(err)
			}
			if revived, err := s.Revive(); !revived || err != nil {
				t.Fatalf("got %v, %v from Revive", revived, err)
			}
			sendByNet(t, s.Address())
			if sum := tr.Look(t.Context(), time.Now(), []uint32{7})[0]; !sum.Known || sum.Queued != 1 {
				t.Errorf("got %+v, want one queued", sum)
			}
			if ids, err := tr.Queued(t.Context(), []uint32{7}); len(ids) != 1 || err != nil {
				t.Errorf("got %v, %v, want one identity", ids, err)
			}
		})
	}
}

// A look that had to wait for another one does not make the last packet older.
func TestLookWaitsForLock(t *testing.T) {
	nettest.Need(t, nettest.Namespaces)
	t.Parallel()
	s := mustOpen(t, "udp://127.0.0.1:0", activation.Options{})
	tr := mustWatch(t, s, Auto)
	tr.mu.Lock()
	sent := time.Now()
	sendByNet(t, s.Address())
	done := make(chan Summary)
	calling := make(chan struct{})
	go func() {
		now := time.Now()
		close(calling)
		done <- tr.Look(t.Context(), now, []uint32{7})[0]
	}()
	<-calling
	<-time.After(10 * tick) // ago forgives one
	tr.mu.Unlock()
	if sum := <-done; !sum.Known || !sum.Exact || sum.Last.Before(sent) {
		t.Errorf("got %+v, want last after %v", sum, sent)
	}
}
