package process

import (
	"errors"
	"os"
	"os/exec"
	"reflect"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
)

func mustNotify(t *testing.T) *Notify {
	t.Helper()
	n, err := NewNotify()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	return n
}

// say sends one message, with descriptors.
func say(to, text string, fds ...int) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	return unix.Sendmsg(fd, []byte(text), oob, &unix.SockaddrUnix{Name: to}, 0)
}

// next is the message that is there, released.
func next(t *testing.T, n *Notify) Notification {
	t.Helper()
	m, ok := n.Receive()
	if !ok {
		t.Fatal("no message")
	}
	m.Release()
	return m
}

// ours is a message of this process.
func ours(ready bool) Notification {
	return Notification{PID: os.Getpid(), UID: os.Getuid(), Ready: ready}
}

func TestNotify(t *testing.T) {
	t.Parallel()
	n := mustNotify(t)
	for text, ready := range map[string]bool{
		"READY=1":                            true,
		"READY=1\n":                          true,
		"STATUS=at work\nREADY=1":            true,
		"READY=1\nSTATUS=at work\n":          true,
		"\n\nREADY=1\n\n":                    true,
		"MAINPID=7\nREADY=1\nX=y":            true,
		"RELOADING=1\nREADY=0\nREADY=1":      true,
		"READY=0":                            false,
		"READY=10":                           false,
		"READY=1 ":                           false,
		"READY=1\r\n":                        false,
		" READY=1":                           false,
		"ready=1":                            false,
		"NOTREADY=1":                         false,
		"STATUS=READY=1":                     false,
		"READY=":                             false,
		"READY":                              false,
		"STOPPING=1":                         false,
		"":                                   false,
		"\n":                                 false,
		"READY=1\x00":                        false,
		strings.Repeat("X=y\n", 1000):        false,
		strings.Repeat("X", maxNotification): false,
		strings.Repeat("X=y\n", maxNotification/4-2) + "READY=1": true,
	} {
		if err := say(n.Address(), text); err != nil {
			t.Fatal(err)
		}
		if got, want := next(t, n), ours(ready); !reflect.DeepEqual(got, want) {
			t.Errorf("%.40q: got %+v, want %+v", text, got, want)
		}
	}
}

// A message that is too long is no message, whatever it says at first, and those after it come in their order.
func TestNotifyTooLong(t *testing.T) {
	t.Parallel()
	n := mustNotify(t)
	long := "READY=1\n" + strings.Repeat("X", maxNotification-7)
	for _, text := range []string{long, "READY=1", long, long + long, "READY=0", "READY=1"} {
		if err := say(n.Address(), text); err != nil {
			t.Fatal(err)
		}
	}
	for i, ready := range []bool{true, false, true} {
		if got := next(t, n); !reflect.DeepEqual(got, ours(ready)) {
			t.Errorf("message %d: got %+v, want %+v", i, got, ours(ready))
		}
	}
}

// The kernel says who it was.
func TestNotifySender(t *testing.T) {
	const to = "NOTIFY_SOCKET_OF_TEST"
	if address := os.Getenv(to); address != "" {
		if err := say(address, "READY=1"); err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Parallel()
	n := mustNotify(t)
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^TestNotifySender$")
	cmd.Env = append(os.Environ(), to+"="+n.Address())
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v:\n%s", err, out)
	}
	if got, want := next(t, n), (Notification{PID: cmd.Process.Pid, UID: os.Getuid(), Ready: true}); !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

// Who says that he is somebody else is not heard, or is refused by the kernel.
func TestNotifyOtherSender(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.RealRoot)
	n := mustNotify(t)
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	as := func(pid int32, uid uint32) error {
		return unix.Sendmsg(fd, []byte("READY=1"), unix.UnixCredentials(&unix.Ucred{Pid: pid, Uid: uid, Gid: uid}), &unix.SockaddrUnix{Name: n.Address()}, 0)
	}
	if err := as(1<<30, 0); !errors.Is(err, unix.ESRCH) { // also as root
		t.Errorf("got %v, want ESRCH", err)
	}
	if err := as(1, 65534); err != nil { // as root
		t.Fatal(err)
	}
	if got, want := next(t, n), (Notification{PID: 1, UID: 65534, Ready: true}); !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

// Descriptors that come along are closed by Release and not before, as the sender may wait for that; those of a message that is
// none, at once. It is not parallel: a process that another test starts has a copy of every descriptor until its exec.
func TestNotifyDescriptors(t *testing.T) {
	n := mustNotify(t)
	for text, heard := range map[string]bool{"READY=1": true, "BARRIER=1": true, "FDSTORE=1\nFDNAME=x": true, "": true, strings.Repeat("X", 2*maxNotification): false} {
		for _, many := range []int{1, 3, 250} {
			r, w := blockingPipe(t)
			closed := func() bool {
				poll := []unix.PollFd{{Fd: int32(r.Fd()), Events: unix.POLLIN}}
				if _, err := unix.Poll(poll, 0); err != nil {
					t.Fatal(err)
				}
				return poll[0].Revents&unix.POLLHUP != 0
			}
			var fds []int
			for range many {
				fds = append(fds, int(w.Fd()))
			}
			if err := say(n.Address(), text, fds...); err != nil {
				t.Fatal(err)
			}
			if err := say(n.Address(), "READY=1"); err != nil {
				t.Fatal(err)
			}
			w.Close() // what is left of it is in the message
			if closed() {
				t.Errorf("%.20q with %d descriptors: they are closed before it is read", text, many)
			}
			m, ok := n.Receive()
			if !ok {
				t.Fatal("no message")
			}
			if heard {
				if closed() {
					t.Errorf("%.20q with %d descriptors: they are closed before Release", text, many)
				}
				for _, fd := range m.fds {
					if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
						t.Errorf("%.20q: descriptor %d: got flags %#x, %v, want close-on-exec", text, fd, flags, err)
					}
				}
				m.Release()
				m.Release()
				next(t, n)
			}
			if !closed() {
				t.Errorf("%.20q with %d descriptors: somebody has one of them", text, many)
			}
			r.Close()
		}
	}
}

// Whoever waits in Receive hears of Stop, also where messages are there, and from then on.
func TestNotifyStop(t *testing.T) {
	t.Parallel()
	n := mustNotify(t)
	ended := make(chan bool)
	go func() {
		_, ok := n.Receive()
		ended <- ok
	}()
	n.Stop()
	if <-ended {
		t.Error("got a message of nobody")
	}
	if err := say(n.Address(), "READY=1"); err != nil {
		t.Fatal(err)
	}
	n.Stop() // again
	for range 2 {
		if m, ok := n.Receive(); ok {
			t.Errorf("got %+v after Stop", m)
		}
	}
}

// Whoever waits in Receive hears of each message.
func TestNotifyWaits(t *testing.T) {
	t.Parallel()
	n := mustNotify(t)
	heard := make(chan Notification)
	go func() {
		defer close(heard)
		for {
			m, ok := n.Receive()
			if !ok {
				return
			}
			m.Release()
			heard <- m
		}
	}()
	for i := range 100 {
		text, want := "READY=0", ours(false)
		if i%2 == 1 {
			text, want = "READY=1", ours(true)
		}
		if err := say(n.Address(), text); err != nil {
			t.Fatal(err)
		}
		if got := <-heard; !reflect.DeepEqual(got, want) {
			t.Errorf("got %+v, want %+v", got, want)
		}
	}
	n.Stop()
	if m, ok := <-heard; ok {
		t.Errorf("got %+v of nobody", m)
	}
}

// The name cannot be guessed, and is nobody's when the socket is closed.
func TestNotifyClose(t *testing.T) {
	t.Parallel()
	n, err := NewNotify()
	if err != nil {
		t.Fatal(err)
	}
	other := mustNotify(t)
	if a, b := n.Address(), other.Address(); a == b || len(a) < len("@")+32 || a[0] != '@' {
		t.Errorf("got %s and %s", a, b)
	}
	for _, fd := range []int{n.fd, n.stop} {
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
			t.Errorf("got flags %#x, %v, want close-on-exec", flags, err)
		}
	}
	address := n.Address()
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	if err := say(address, "READY=1"); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("got %v, want ECONNREFUSED", err)
	}
}

// BenchmarkFilter is what a filter costs a start.
func BenchmarkFilter(b *testing.B) {
	nettest.Need(b, canFilter)
	for name, filter := range map[string][]unix.SockFilter{"with": niceFilter(), "without": nil} {
		b.Run(name, func(b *testing.B) {
			s := newSpawner(b)
			for b.Loop() {
				p, err := s.Start(&Spec{Exec: &Exec{Command: []string{"/bin/true"}}, Filter: filter, Stdout: -1, Stderr: -1})
				if err != nil {
					b.Fatal(err)
				}
				mustWait(b, p)
			}
		})
	}
}
