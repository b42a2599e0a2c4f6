package adopt

import (
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"hibergate/activation"
)

// Options of a Session.
type Options struct {
	// Have are the sockets that the program may have. They stay the caller's; [Session.Forget] comes before they are closed.
	Have []Have
	// Learn are the patterns of sockets that become ours when the program has bound them.
	Learn []Learn
	// RefuseIOUring makes io_uring_setup(2) fail as on a kernel that does not have it.
	RefuseIOUring bool
	// Held says whether a process of the service has a socket with this inode. It is asked when a program binds an
	// address for the second time. nil: nobody has.
	Held func(inode uint64) bool
	// Release gives a learned socket up that is in the way of what the program wants to bind now: no process has it.
	// It is given to nobody meanwhile. It may block; false: it is still there. nil: never.
	Release func(*activation.Socket) bool
	// Report is told what happened, from the goroutine of the Session. It must not block.
	Report func(Event)
	// Ended is told, from the goroutine of the Session, when nobody is left who could ask, or it was closed.
	Ended func(*Session)
}

// Have is a socket of ours.
type Have struct {
	Socket  *activation.Socket
	Learned bool // a Session before has learned of it
}

// Learn is a pattern, and the name and options of the sockets that come of it.
type Learn struct {
	Pattern Pattern
	Spec    activation.Spec
}

// Event is something that a program did.
type Event struct {
	Kind   Kind
	Socket *activation.Socket // which one it is about, where it is one of ours
	Text   string             // Refused, Incomplete: why; Elsewhere: the address
}

// Kind says what an Event is about.
type Kind uint8

// The kinds.
const (
	Bound      Kind = iota + 1 // the program has our socket
	Listening                  // and has called listen(2)
	Learned                    // Socket is a new one, owned by whoever receives the event; Bound, and Listening where it has connections
	Refused                    // a bind that could not be granted
	Incomplete                 // Socket was given, without all that the program had set on its own
	Elsewhere                  // the program listens on what is not ours
	IOUring                    // the program has set up io_uring, with which it could bind without being asked about it
)

// Session answers for one process that was started with a [Filter] and for all that descend from it.
type Session struct {
	opts     Options
	listener int // owned by run
	stop     int // an eventfd
	done     chan struct{}
	once     sync.Once

	facts facts

	// mu guards owned, and is held while one of them is given away: over a system call that the program may
	// prolong. Forget waits for it.
	mu    sync.Mutex
	owned []*owned

	// Of run alone.
	budget    budget
	given     handOver // a socket was put in place and the answer did not arrive
	elsewhere int
	ioUring   bool
	denied    bool // we may not look into the program; it was reported
}

// owned is a socket that the program may have.
type owned struct {
	sock    *activation.Socket
	bound   bool // in this Session
	learned bool // by a Session, this one or one before
}

// handOver is what was given to whom.
type handOver struct {
	tid    uint32
	cookie uint64
}

const (
	// MaxSockets is how many sockets a Session has at most, unless it was given more: it learns no more than that.
	MaxSockets = 64
	// maxElsewhere is how many other addresses are reported.
	maxElsewhere = 8
	// closeTimeout is how long Close waits for an answer that is under way.
	closeTimeout = time.Second
)

// Start makes a Session that answers on listener, the descriptor that seccomp(2) returned for the
// filter of the process. The Session owns it. After an error the caller still does.
func Start(listener int, opts Options) (*Session, error) {
	stop, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("adopt sockets: eventfd: %w", err)
	}
	s := &Session{opts: opts, listener: listener, stop: stop, done: make(chan struct{}), facts: readFacts(), budget: newBudget(time.Now())}
	for _, h := range opts.Have {
		s.owned = append(s.owned, &owned{sock: h.Socket, learned: h.Learned})
	}
	go s.run()
	return s, nil
}

// Forget has the Session give a socket to nobody from now on. It may wait for a hand-over that is under way.
func (s *Session) Forget(sock *activation.Socket) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.owned = slices.DeleteFunc(s.owned, func(o *owned) bool { return o.sock == sock })
}

// Close ends the Session and waits until it gives nothing away any more. What is asked from then on fails with ENOSYS. The
// error says that a process holds it up; then no socket of the Session may be closed.
func (s *Session) Close() error {
	s.once.Do(func() {
		one := [8]byte{1}
		_, _ = unix.Write(s.stop, one[:]) // room for it there is
	})
	timer := time.NewTimer(closeTimeout)
	defer timer.Stop()
	select {
	case <-s.done:
		return nil
	case <-timer.C:
		return errors.New("adopt sockets: a process holds up an answer to it")
	}
}

// run answers until nobody is left who could ask, or Close.
func (s *Session) run() {
	defer close(s.done)
	runtime.LockOSThread() // it blocks one anyway, and this way its processor time is known
	defer runtime.UnlockOSThread()
	used := threadTime()
	for s.wait() {
		s.next()
		now := threadTime()
		pause := s.budget.spend(time.Now(), now-used)
		if used = now; pause > 0 && !s.pause(pause) {
			break
		}
	}
	_ = unix.Close(s.listener) // from now on they get ENOSYS
	s.once.Do(func() {})       // Close has no use for stop any more, whose number will be another's
	_ = unix.Close(s.stop)
	s.opts.Ended(s)
}

// wait returns true when something is asked, and false at the end.
func (s *Session) wait() bool {
	fds := []unix.PollFd{{Fd: int32(s.listener), Events: unix.POLLIN}, {Fd: int32(s.stop), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, -1)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil, fds[1].Revents != 0:
			return false
		case fds[0].Revents&unix.POLLIN != 0:
			return true
		case n > 0: // POLLHUP: the last process has ended
			return false
		}
	}
}

// pause lets time go by for which nobody is answered. It returns false at the end.
func (s *Session) pause(d time.Duration) bool {
	fds := []unix.PollFd{{Fd: int32(s.stop), Events: unix.POLLIN}}
	_, _ = unix.Poll(fds, int(d/time.Millisecond)+1) // an early return by a signal is no harm
	return fds[0].Revents == 0
}

// next answers one call.
func (s *Session) next() {
	var n notification
	if err := s.ioctl(unix.SECCOMP_IOCTL_NOTIF_RECV, unsafe.Pointer(&n)); err != nil {
		return // the thread has been killed, or interrupted, since
	}
	r := s.answer(&n)
	r.id = n.id
	err := s.ioctl(unix.SECCOMP_IOCTL_NOTIF_SEND, unsafe.Pointer(&r))
	if err == nil || s.given.tid != n.tid {
		s.given = handOver{} // else the thread will ask again
	}
}

func (s *Session) ioctl(request uintptr, arg unsafe.Pointer) error {
	for {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(s.listener), request, uintptr(arg))
		if errno == 0 {
			return nil
		}
		if errno != unix.EINTR {
			return errno
		}
	}
}

// The answers.
func goOn() response    { return response{flags: unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE} }
func success() response { return response{} }
func failWith(errno error) response {
	e := unix.EINVAL
	errors.As(errno, &e)
	return response{err: -int32(e)}
}
