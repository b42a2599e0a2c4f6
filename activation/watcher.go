package activation

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Watcher waits for many descriptors in one epoll set. A descriptor is armed or
// not; an armed one is reported once, as soon as it is ready, and is then
// disarmed, but for those of ArmEdge. Between reports nothing happens: no timer, no wake-up.
//
// One goroutine calls Wait; all other methods but Close may be called from any
// goroutine at any time. A report may still be on its way when Disarm or Remove
// returns, so callers put a generation into the token and drop reports of an old one.
//
// A registration belongs to the open file description (epoll(7)): it outlives the
// descriptor where another process shares it. So call Remove before a descriptor is closed.
type Watcher struct {
	fd   int      // the epoll set
	file *os.File // owns fd; waits for it in the runtime's poller, so that no thread sleeps in epoll_wait(2)
	conn syscall.RawConn
	bell int // an eventfd in the set, for Wake

	// Owned by the goroutine that calls Wait.
	deadline time.Time // of file
	events   [readyBatch]unix.EpollEvent
	n        int
	err      error
	ready    [readyBatch]Ready
}

// Ready is the report of one descriptor.
type Ready struct {
	Token  uint64 // as given to Arm
	Hangup bool   // EPOLLHUP, EPOLLRDHUP or EPOLLERR: shut down, or an error waits on it ([Socket.Revive])
}

// readyBatch is how many reports are fetched at a time. What does not fit stays in
// the kernel, which takes turns among the descriptors.
const readyBatch = 256

// bellToken is the token of the eventfd. No caller's token has all bits set.
const bellToken = 1<<64 - 1

// NewWatcher makes an empty epoll set. The caller closes it.
func NewWatcher() (*Watcher, error) {
	w := &Watcher{fd: -1, bell: -1}
	err := w.open()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("create epoll set: %w", err), w.Close())
	}
	return w, nil
}

func (w *Watcher) open() (err error) {
	if w.bell, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return err
	}
	if w.fd, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return err
	}
	// An epoll set can be waited for like any other descriptor. os.NewFile only hands it to the
	// runtime's poller when it is marked non-blocking, which means nothing to epoll itself.
	if err = unix.SetNonblock(w.fd, true); err != nil {
		return err
	}
	w.file = os.NewFile(uintptr(w.fd), "epoll")
	if w.conn, err = w.file.SyscallConn(); err != nil {
		return err
	}
	// Edge-triggered: each write is one report, and nobody has to read it away.
	return w.control(unix.EPOLL_CTL_ADD, w.bell, unix.EPOLLIN|unix.EPOLLET, bellToken)
}

// Add says whether fd can be watched, and leaves it disarmed. It keeps nothing: an
// entry in the set, even one without events, would report a hang-up.
func (w *Watcher) Add(fd int, token uint64) error {
	if err := w.control(unix.EPOLL_CTL_ADD, fd, 0, token); err != nil {
		return fmt.Errorf("watch descriptor %d: %w", fd, err)
	}
	return w.Remove(fd)
}

// Arm asks for one report when fd is readable or hung up, at once if it is
// already. An armed descriptor may be armed again, with another token.
func (w *Watcher) Arm(fd int, token uint64) error {
	// EPOLLHUP comes unasked, but only when both directions are shut down.
	return w.arm(fd, unix.EPOLLIN|unix.EPOLLRDHUP|unix.EPOLLONESHOT, token)
}

// ArmEdge asks for a report when fd is readable or hung up, at once if it is already, and for another
// one whenever something more arrives, also while what came before still waits, until
// Disarm or Remove, or Arm. What arrives before Wait looks is one report.
func (w *Watcher) ArmEdge(fd int, token uint64) error {
	return w.arm(fd, unix.EPOLLIN|unix.EPOLLRDHUP|unix.EPOLLET, token)
}

// arm sets the events of fd, whether it is in the set or not. Either way what is ready is reported.
func (w *Watcher) arm(fd int, events uint32, token uint64) error {
	// After its report the entry is still in the set, so this is the common case.
	err := w.control(unix.EPOLL_CTL_MOD, fd, events, token)
	if errors.Is(err, unix.ENOENT) {
		err = w.control(unix.EPOLL_CTL_ADD, fd, events, token)
	}
	if err != nil {
		return fmt.Errorf("arm descriptor %d: %w", fd, err)
	}
	return nil
}

// Disarm takes an Arm back, whichever token it had. It does nothing to a descriptor
// that is not armed.
func (w *Watcher) Disarm(fd int, _ uint64) error {
	if err := w.forget(fd); err != nil {
		return fmt.Errorf("disarm descriptor %d: %w", fd, err)
	}
	return nil
}

// Remove makes the Watcher forget fd, which may be closed after that.
func (w *Watcher) Remove(fd int) error {
	if err := w.forget(fd); err != nil {
		return fmt.Errorf("stop watching descriptor %d: %w", fd, err)
	}
	return nil
}

// forget takes the entry out of the set. To set its events to none would not do:
// the kernel adds EPOLLHUP and EPOLLERR to any (epoll_ctl(2)).
func (w *Watcher) forget(fd int) error {
	if err := w.control(unix.EPOLL_CTL_DEL, fd, 0, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	return nil
}

// control is epoll_ctl(2), which may be called while another thread waits in the set.
func (w *Watcher) control(op, fd int, events uint32, token uint64) error {
	// The kernel's 64 bits of user data are these two fields.
	return unix.EpollCtl(w.fd, op, fd, &unix.EpollEvent{Events: events, Fd: int32(uint32(token)), Pad: int32(uint32(token >> 32))})
}

// Wake makes the present or the next Wait return. Several calls may count as one.
func (w *Watcher) Wake() error {
	one := binary.NativeEndian.AppendUint64(nil, 1)
	for {
		_, err := unix.Write(w.bell, one)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("wake watcher: %w", err)
		}
	}
}

// Wait returns what is ready, as soon as anything is: an empty batch after Wake, or
// at the deadline (the zero Time: none). At a deadline that has passed already it still
// returns what is ready. The batch may be used until the next Wait. What does not
// fit into it stays in the kernel.
func (w *Watcher) Wait(deadline time.Time) ([]Ready, error) {
	if !deadline.Equal(w.deadline) {
		if err := w.file.SetReadDeadline(deadline); err != nil {
			return nil, fmt.Errorf("wait for descriptors: %w", err)
		}
		w.deadline = deadline
	}
	err := w.conn.Read(w.fetch)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		// The runtime looks at the deadline first. Callers whose deadlines are always overdue would
		// never hear of a descriptor.
		w.fetch(0)
		err = nil
	}
	if err != nil {
		return nil, fmt.Errorf("wait for descriptors: %w", err)
	}
	if w.err != nil {
		return nil, fmt.Errorf("wait for descriptors: %w", w.err)
	}
	batch := w.ready[:0]
	for i := range w.events[:w.n] {
		e := &w.events[i]
		if token := uint64(uint32(e.Fd)) | uint64(uint32(e.Pad))<<32; token != bellToken {
			batch = append(batch, Ready{Token: token, Hangup: e.Events&(unix.EPOLLHUP|unix.EPOLLRDHUP|unix.EPOLLERR) != 0})
		}
	}
	return batch, nil
}

// fetch reads what is ready, without waiting. False makes the runtime call it
// again when there is something.
func (w *Watcher) fetch(uintptr) bool {
	for {
		w.n, w.err = unix.EpollWait(w.fd, w.events[:], 0)
		if !errors.Is(w.err, syscall.EINTR) {
			return w.err != nil || w.n > 0
		}
	}
}

// Close frees the epoll set. No other method may be called any more.
func (w *Watcher) Close() error {
	var err error
	switch {
	case w.file != nil:
		err = w.file.Close()
	case w.fd >= 0:
		err = unix.Close(w.fd)
	}
	if w.bell >= 0 {
		err = errors.Join(err, unix.Close(w.bell))
	}
	w.fd, w.bell, w.file = -1, -1, nil
	return err
}
