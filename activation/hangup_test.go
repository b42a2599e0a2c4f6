package activation

import (
	"errors"
	"os/exec"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
)

// A process that shares a listening socket may shut it down at any time. Disarmed, that must not wake anybody.
func TestWatcherHangup(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	for _, address := range []string{"tcp://:0", "unix://" + tempPath(t, "s")} {
		w, ready := run(t)
		s := mustOpen(t, address, Options{})
		other, err := unix.FcntlInt(uintptr(s.FD()), unix.F_DUPFD_CLOEXEC, 3) // as a child holds it
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(w.Add(s.FD(), 1), w.Arm(s.FD(), 1), w.Disarm(s.FD(), 1)); err != nil {
			t.Fatal(err)
		}
		if err := unix.Shutdown(other, unix.SHUT_RDWR); err != nil {
			t.Fatal(err)
		}
		expectNothing(t, w, ready)
		if err := w.Arm(s.FD(), 2); err != nil {
			t.Fatal(err)
		}
		expect(t, ready, Ready{Token: 2, Hangup: true})
		expectNothing(t, w, ready) // fired, not disarmed
		if err := w.Remove(s.FD()); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Revive(); err != nil {
			t.Fatal(err)
		}
		if err := w.Arm(s.FD(), 3); err != nil {
			t.Fatal(err)
		}
		expectNothing(t, w, ready)
		mustDial(t, s)
		expect(t, ready, Ready{Token: 3})
		if err := errors.Join(w.Remove(s.FD()), unix.Close(other)); err != nil {
			t.Fatal(err)
		}
	}
}

// What was shut down for receiving only gives no EPOLLHUP.
func TestWatcherReceivingShutDown(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	for _, address := range []string{
		"tcp://:0", "udp://:0", "udp://127.0.0.1:0", "unix:@hg-rdhup", "unix://" + tempPath(t, "s"),
		"unixgram:@hg-rdhup", "unixgram://" + tempPath(t, "s"), "unixpacket:@hg-rdhup",
	} {
		t.Run(address, func(t *testing.T) {
			t.Parallel()
			w, ready := run(t)
			s := mustOpen(t, address, Options{})
			if err := unix.Shutdown(s.FD(), unix.SHUT_RD); err != nil && !errors.Is(err, unix.ENOTCONN) {
				t.Fatal(err)
			}
			if err := w.Arm(s.FD(), 1); err != nil {
				t.Fatal(err)
			}
			expect(t, ready, Ready{Token: 1, Hangup: true})
			if pending, err := s.Pending(); pending || !errors.Is(err, ErrShutDown) {
				t.Errorf("got %v, %v, want ErrShutDown", pending, err)
			}
			if err := w.Remove(s.FD()); err != nil {
				t.Fatal(err)
			}
			if revived, err := s.Revive(); !revived || err != nil {
				t.Fatalf("got %v, %v", revived, err)
			}
			if err := w.Arm(s.FD(), 2); err != nil {
				t.Fatal(err)
			}
			expectNothing(t, w, ready) // it does not spin
			client := mustDial(t, s)
			if !s.Address().Network.Connections() {
				if _, err := unix.Write(client, []byte("x")); err != nil {
					t.Fatal(err)
				}
			}
			expect(t, ready, Ready{Token: 2})
			if err := w.Remove(s.FD()); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// The last writer of a FIFO and a process that ends are no hang-ups.
func TestWatcherNoHangup(t *testing.T) {
	t.Parallel()
	w, ready := run(t)
	s := mustOpen(t, "fifo://"+tempPath(t, "f"), Options{})
	writer, err := unix.Open(s.Address().Path, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Arm(s.FD(), 1); err != nil {
		t.Fatal(err)
	}
	if err := unix.Close(writer); err != nil {
		t.Fatal(err)
	}
	expectNothing(t, w, ready)
	if pending, err := s.Pending(); pending || err != nil {
		t.Errorf("got %v, %v of an empty FIFO", pending, err)
	}
	if _, err := unix.Write(s.FD(), []byte("x")); err != nil {
		t.Fatal(err)
	}
	expect(t, ready, Ready{Token: 1})

	var pidfd int
	child := exec.Command("true")
	child.SysProcAttr = &syscall.SysProcAttr{PidFD: &pidfd}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pidfd)
	if err := w.Arm(pidfd, 2); err != nil {
		t.Fatal(err)
	}
	expect(t, ready, Ready{Token: 2})
	if err := errors.Join(child.Wait(), w.Remove(pidfd), w.Remove(s.FD())); err != nil {
		t.Fatal(err)
	}
}
