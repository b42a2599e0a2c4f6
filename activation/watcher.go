package activation

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Watcher waits for many descriptors in one epoll set. A descriptor is armed or
// not; an armed one is reported once, as soon as it is ready, and is then
// disarmed. Between reports nothing happens: no timer, no wake-up.
//
// All methods but Run and Close may be called from any goroutine at any time. A
// report may still be on its way when Disarm or Remove returns, so callers put a
// generation into the token and drop reports of an old one.
//
// A registration belongs to the open file description (epoll(7)): it outlives the
// descriptor where another process shares it. So call Remove before a descriptor is closed.
type Watcher struct {
	fd   int      // the epoll set
	file *os.File // owns fd; waits for it in the runtime's poller, so that no thread sleeps in epoll_wait(2)
}

// Ready is the report of one descriptor.
type Ready struct {
	Token  uint64 // as given to Arm
	Hangup bool   // EPOLLHUP or EPOLLERR: shut down, or an error waits on it ([Socket.Revive])
}

// readyBatch is how many reports are fetched at a time. What does not fit stays in
// the kernel, which takes turns among the descriptors.
const readyBatch = 256

// NewWatcher makes an empty epoll set. The caller closes it.
func NewWatcher() (*Watcher, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("create epoll set: %w", err)
	}
	// An epoll set can be waited for like any other descriptor. os.NewFile only hands it to the
	// runtime's poller when it is marked non-blocking, which means nothing to epoll itself.
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, errors.Join(fmt.Errorf("create epoll set: %w", err), unix.Close(fd))
	}
	return &Watcher{fd: fd, file: os.NewFile(uintptr(fd), "epoll")}, nil
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
	const events = unix.EPOLLIN | unix.EPOLLONESHOT
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

// Run sends reports until ctx ends, and returns its error. Only one Run may be
// active. ready should be unbuffered: a batch may be used until the next one is
// received, when its memory is used again. While the receiver is busy, reports stay
// in the kernel.
func (w *Watcher) Run(ctx context.Context, ready chan<- []Ready) error {
	conn, err := w.file.SyscallConn()
	if err != nil {
		return fmt.Errorf("wait for descriptors: %w", err)
	}
	// A deadline in the past ends a Read that waits; one that ended another Run must go first.
	if err := w.file.SetReadDeadline(time.Time{}); err != nil {
		return fmt.Errorf("wait for descriptors: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = w.file.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()

	b := &batches{fd: w.fd} // all the memory that Run ever takes
	for {
		if err := conn.Read(b.fetch); err != nil {
			if ctx.Err() != nil {
				return ctx.Err() //nolint:wrapcheck // the caller knows its own context
			}
			return fmt.Errorf("wait for descriptors: %w", err)
		}
		if b.err != nil {
			return fmt.Errorf("wait for descriptors: %w", b.err)
		}
		select {
		case ready <- b.take():
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Close frees the epoll set. Run must have returned, and no other method may be
// called any more.
func (w *Watcher) Close() error { return w.file.Close() }

// batches fetches reports into two slices by turns: one is the receiver's, the other
// is filled.
type batches struct {
	fd     int
	events [readyBatch]unix.EpollEvent
	n      int
	err    error
	ready  [2][readyBatch]Ready
	turn   int
}

// fetch reads what is ready, without waiting. False makes the runtime call it
// again when there is something.
func (b *batches) fetch(uintptr) bool {
	for {
		b.n, b.err = unix.EpollWait(b.fd, b.events[:], 0)
		if !errors.Is(b.err, syscall.EINTR) {
			return b.err != nil || b.n > 0
		}
	}
}

// take turns what was fetched into the batch whose turn it is.
func (b *batches) take() []Ready {
	out := b.ready[b.turn][:b.n]
	b.turn = 1 - b.turn
	for i := range out {
		e := &b.events[i]
		out[i] = Ready{
			Token:  uint64(uint32(e.Fd)) | uint64(uint32(e.Pad))<<32,
			Hangup: e.Events&(unix.EPOLLHUP|unix.EPOLLERR) != 0,
		}
	}
	return out
}
