package activity

import (
	"crypto/rand"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"hibergate/activation"
	"hibergate/activation/nettest"
)

// TestQueued: what waits keeps its identity until it is taken, for every kind of socket.
func TestQueued(t *testing.T) {
	nettest.Need(t, nettest.Namespaces)
	t.Parallel()
	dir := t.TempDir()
	tests := map[string]struct {
		address string
		send    func(t *testing.T, a activation.Address) // one of two that differ
		take    func(fd int) error
	}{
		"tcp":        {"tcp://127.0.0.1:0", sendByNet, takeConnection},
		"tcp6":       {"tcp://[::1]:0", sendByNet, takeConnection},
		"udp":        {"udp://127.0.0.1:0", sendByNet, takeDatagram},
		"unix":       {"unix://" + dir + "/stream", sendByNet, takeConnection},
		"abstract":   {"unix:@hibergated-test-queued", sendByNet, takeConnection},
		"unixpacket": {"unixpacket://" + dir + "/packet", sendByNet, takeConnection},
		"unixgram":   {"unixgram://" + dir + "/gram", sendByNet, takeDatagram},
		"fifo": {"fifo://" + filepath.Join(dir, "fifo"), func(t *testing.T, a activation.Address) {
			t.Helper()
			if err := os.WriteFile(a.Path, []byte("hello"), 0); err != nil {
				t.Fatal(err)
			}
		}, func(fd int) error { _, err := unix.Read(fd, make([]byte, 5)); return err }},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			address, err := activation.ParseAddress(test.address)
			if err != nil {
				t.Fatal(err)
			}
			sock, err := activation.Open(activation.Spec{Address: address})
			if err != nil {
				t.Fatal(err)
			}
			defer sock.Close()
			tr := New(Options{Logger: slog.New(slog.DiscardHandler)}, []Socket{{Key: 7, Address: sock.Address(), FD: sock.FD(), Accounting: SockDiag}})
			defer tr.Close()
			queued := func() []uint64 {
				t.Helper()
				ids, err := tr.Queued(t.Context(), []uint32{7})
				if err != nil {
					t.Fatal(err)
				}
				slices.Sort(ids)
				return ids
			}
			if got := queued(); len(got) != 0 {
				t.Fatalf("got %v in an empty queue", got)
			}
			test.send(t, sock.Address())
			first := queued()
			if len(first) != 1 || !slices.Equal(first, queued()) {
				t.Fatalf("got %v, then %v, want one and the same identity", first, queued())
			}
			test.send(t, sock.Address())
			if err := test.take(sock.FD()); err != nil {
				t.Fatal(err)
			}
			if got := queued(); slices.Equal(got, first) && address.Network != activation.FIFO {
				t.Errorf("got %v after it was taken", got)
			}
		})
	}
}

// A client that sends the same again and again does not hide that one was taken, nor does it look so
// when none was.
func TestQueuedSameAgain(t *testing.T) {
	nettest.Need(t, nettest.Namespaces)
	t.Parallel()
	for text, host := range map[string]string{"udp://127.0.0.1:0": "127.0.0.1", "udp://[::1]:0": "::1", "udp://:0": "127.0.0.1"} {
		for _, stamped := range []int{0, 1} { // by the program itself
			t.Run(fmt.Sprintf("%s %d", text, stamped), func(t *testing.T) {
				t.Parallel()
				s := mustOpen(t, text, activation.Options{})
				tr := mustWatch(t, s, SockDiag)
				if err := unix.SetsockoptInt(s.FD(), unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, stamped); err != nil {
					t.Fatal(err)
				}
				c, err := net.Dial("udp", net.JoinHostPort(host, strconv.Itoa(int(s.Address().Port))))
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				send := func(message string) {
					t.Helper()
					if _, err := c.Write([]byte(message)); err != nil {
						t.Fatal(err)
					}
				}
				queued := func() uint64 {
					t.Helper()
					ids, err := tr.Queued(t.Context(), []uint32{7})
					if err != nil || len(ids) != 1 {
						t.Fatalf("got %v, %v, want one", ids, err)
					}
					return ids[0]
				}
				take := func() {
					t.Helper()
					if err := takeDatagram(s.FD()); err != nil {
						t.Fatal(err)
					}
				}
				nettest.Eventually(t, func() error { // the kernel begins to note the time when it has time
					var ids [2]uint64
					for i := range ids {
						send("probe")
						ids[i] = queued()
						take()
					}
					if ids[0] == ids[1] {
						return fmt.Errorf("got %x twice", ids[0])
					}
					return nil
				})
				for _, message := range []string{"ping", ""} {
					send(message)
					before := queued()
					send(message)
					if got := queued(); got != before {
						t.Errorf("%q: got %x, want %x as before: nothing was taken", message, got, before)
					}
					take()
					if got := queued(); got == before {
						t.Errorf("%q: got %x as before, but one was taken", message, got)
					}
					take()
				}
			})
		}
	}
}

func sendByNet(t *testing.T, a activation.Address) {
	t.Helper()
	to := a.Path
	if a.Network.IP() {
		to = netip.AddrPortFrom(a.IP, a.Port).String()
	}
	c, err := net.Dial(a.Network.String(), to)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if _, err := c.Write([]byte(rand.Text())); err != nil {
		t.Fatal(err)
	}
}

func takeConnection(fd int) error {
	c, _, err := unix.Accept4(fd, unix.SOCK_CLOEXEC)
	if err != nil {
		return err
	}
	return unix.Close(c)
}

func takeDatagram(fd int) error {
	_, err := unix.Read(fd, make([]byte, 100))
	return err
}
