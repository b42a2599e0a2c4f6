package activation

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
)

// Nothing waits, not even where another process has cleared O_NONBLOCK.
func TestDiscard(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	for _, address := range []string{"udp://127.0.0.1:0", "unixgram:@hg-discard", "fifo://" + tempPath(t, "f")} {
		s := mustOpen(t, address, Options{})
		if err := unix.SetNonblock(s.FD(), false); err != nil {
			t.Fatal(err)
		}
		if err := s.Discard(); !errors.Is(err, unix.EAGAIN) {
			t.Errorf("%s: got %v, want EAGAIN", address, err)
		}
		for range 2 {
			to := s.FD()
			if s.Address().Network != FIFO {
				to = mustDial(t, s)
			}
			if _, err := unix.Write(to, []byte("something")); err != nil {
				t.Fatal(err)
			}
			if err := s.Discard(); err != nil {
				t.Errorf("%s: %v", address, err)
			}
		}
		if err := s.Discard(); !errors.Is(err, unix.EAGAIN) {
			t.Errorf("%s: got %v, want EAGAIN when all is gone", address, err)
		}
	}
	if err := mustOpen(t, "tcp://127.0.0.1:0", Options{}).Discard(); err == nil {
		t.Error("connections cannot be discarded")
	}
}
