package gate

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// loop is one goroutine that moves the bytes of its pairs. Everything in it is its own, but for what says otherwise.
type loop struct {
	s      *streams
	number int
	epoll  int32
	bell   int32 // an eventfd in the epoll set
	events [128]unix.EpollEvent
	buffer []byte // for what is read and written at once
	now    int64  // clock, since the last wait

	pairs     []*pair  // by slot; nil: free
	free      []uint32 // slots
	lists     [stages]list
	postponed []*pair // have more to move
	pipes     []*pipe // that nobody uses
	lent      int     // pipes that exist

	rung  bool    // there may be something in what others write, below
	pause int64   // of the porter: as streams.paused
	burst int     // of the porter: how many connections it accepts at a time
	fresh []*pair // of the porter: accepted or opened under the lock, to be placed after it

	// Guarded by the lock of streams.
	load      int     // pairs
	inbox     []*pair // from other loops
	questions []func()
}

// list is the pairs of one stage, in the order in which they got there.
type list struct{ first, last *pair }

// bufferSize is how much is read at once, in bytes.
const bufferSize = 1 << 16

// Tokens of what is in the epoll set beside pairs. A pair's token is its slot and one bit for the side.
const (
	bellToken   = 1<<32 - 1
	firstSource = 1<<32 - 1<<16 // and the number of the source
)

// newLoop makes a loop that does not run yet. The error says what it lacks; nothing is left behind then.
func newLoop(s *streams, number int) (*loop, error) {
	l := &loop{s: s, number: number, buffer: make([]byte, bufferSize), burst: 1, rung: true}
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("create epoll set: %w", err)
	}
	_ = unix.SetNonblock(epoll, true) // means nothing to epoll; os.NewFile asks for it, see park
	bell, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		_ = unix.Close(epoll) // nothing is in it
		return nil, fmt.Errorf("create eventfd: %w", err)
	}
	l.epoll, l.bell = int32(epoll), int32(bell)
	if e := epollControl(l.epoll, unix.EPOLL_CTL_ADD, l.bell, unix.EPOLLIN|unix.EPOLLET, bellToken, 0); e != 0 {
		l.release()
		return nil, fmt.Errorf("watch eventfd: %w", e)
	}
	return l, nil
}

// release closes the descriptors of the loop itself.
func (l *loop) release() {
	for _, p := range l.pipes {
		l.scrap(p)
	}
	l.pipes = nil
	closeFD(l.bell)
	closeFD(l.epoll)
}

// ring has the loop look at what others have written. It is called with the lock held, so that the loop has not ended.
func (l *loop) ring() {
	one := binary.NativeEndian.AppendUint64(nil, 1)
	_, _ = unix.Write(int(l.bell), one) // it only fails where it is rung already
}

// run is the goroutine.
func (l *loop) run() {
	for {
		n := l.wait()
		l.now = l.s.clock()
		for i := range l.events[:n] {
			l.dispatch(&l.events[i])
		}
		l.resume()
		l.expire()
		if l.rung {
			l.rung = false
			if l.attend() {
				return
			}
		}
	}
}

// dispatch does what an event asks for.
func (l *loop) dispatch(e *unix.EpollEvent) {
	token, generation := uint32(e.Fd), uint32(e.Pad)
	if token >= firstSource {
		if token == bellToken {
			l.rung = true
		} else {
			l.accept(l.s.sources[token-firstSource])
		}
		return
	}
	p := l.pairs[token>>1]
	if p == nil || uint32(p.serial) != generation {
		return // it ended, by an event of the same batch
	}
	side := &p.client
	if token&1 == 1 {
		side = &p.server
	}
	switch p.stage {
	case stageWaiting:
		l.noteWaiting(p, e.Events)
	case stageConnecting:
		l.noteConnecting(p, side, e.Events)
	case stageParting:
		l.part(p, e.Events)
	case stageYoung, stageSettled, stageHalf, stageBroken:
		side.note(e.Events)
		l.pump(p)
	case stageNone, stages:
	}
}

// wait returns how many events there are, as soon as there are any or something else is to be done.
func (l *loop) wait() int {
	if n, _ := l.poll(0); n > 0 {
		return n
	}
	limit := l.limit()
	if limit == 0 {
		return 0
	}
	short := brief
	if limit > 0 {
		short = min(limit, brief)
	}
	if n := l.block(short); n > 0 || short == limit {
		return n
	}
	n, err := l.park(limit)
	if err != nil {
		return l.block(limit)
	}
	return n
}

// brief is how long a loop waits with a thread of its own, in milliseconds. It is woken fastest so. One that has
// nothing to do for longer gives the thread back.
const brief = 20

// block waits for events, at most so many milliseconds, or as long as it takes where limit is -1. The scheduler is told.
func (l *loop) block(limit int) int {
	n, _, e := unix.Syscall6(unix.SYS_EPOLL_PWAIT, uintptr(l.epoll), uintptr(unsafe.Pointer(&l.events[0])), uintptr(len(l.events)), uintptr(limit), 0, 0)
	if e != 0 {
		return 0 // EINTR
	}
	return int(n)
}

// park waits like block, with no thread: in the poller of the runtime. That only knows the epoll set meanwhile, since
// it would be woken for every event.
func (l *loop) park(limit int) (n int, err error) {
	fd, err := unix.FcntlInt(uintptr(l.epoll), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return 0, err
	}
	set := os.NewFile(uintptr(fd), "epoll")
	defer set.Close()
	if limit > 0 {
		if err := set.SetReadDeadline(time.Now().Add(time.Duration(limit) * time.Millisecond)); err != nil {
			return 0, err
		}
	}
	conn, err := set.SyscallConn()
	if err != nil {
		return 0, err
	}
	err = conn.Read(func(uintptr) bool {
		n, _ = l.poll(0)
		return n > 0
	})
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return 0, nil
	}
	return n, err
}

// poll fetches events without waiting.
func (l *loop) poll(limit int) (int, unix.Errno) {
	n, _, e := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(l.epoll), uintptr(unsafe.Pointer(&l.events[0])), uintptr(len(l.events)), uintptr(limit), 0, 0)
	if e != 0 {
		return 0, e
	}
	return int(n), 0
}

// limit returns how many milliseconds the loop may wait; -1: as long as it takes.
func (l *loop) limit() int {
	if l.rung || len(l.postponed) > 0 {
		return 0
	}
	next := l.pause
	for i := range l.lists {
		if p := l.lists[i].first; p != nil {
			if end := l.deadline(p); end != 0 && (next == 0 || end < next) {
				next = end
			}
		}
	}
	if next == 0 {
		return -1
	}
	left := time.Duration(next - l.s.clock())
	return int(max(0, (left+time.Millisecond-1)/time.Millisecond))
}

// later has a pair go on after all others had their turn.
func (l *loop) later(p *pair) {
	if !p.again {
		p.again = true
		l.postponed = append(l.postponed, p)
	}
}

// resume lets those go on that have more to move.
func (l *loop) resume() {
	n := len(l.postponed)
	for _, p := range l.postponed[:n] {
		p.again = false
		if p.stage != stageNone {
			l.pump(p)
		}
	}
	l.postponed = append(l.postponed[:0], l.postponed[n:]...)
}

// each calls f for the pairs, until it returns false.
func (l *loop) each(f func(p *pair) bool) {
	for i := range l.lists {
		for p := l.lists[i].first; p != nil; p = p.next {
			if !f(p) {
				return
			}
		}
	}
}

// attend looks at what others have written, and lets in whom it may. It says whether the loop has ended.
func (l *loop) attend() bool {
	s := l.s
	var count [8]byte
	_, _ = unix.Read(int(l.bell), count[:]) // it is edge-triggered; this keeps it from overflowing
	s.mu.Lock()
	inbox, questions := l.inbox, l.questions
	l.inbox, l.questions = nil, nil
	s.mu.Unlock()
	for _, p := range inbox {
		l.receive(p)
	}
	for _, f := range questions {
		f()
	}
	if l.number == 0 {
		l.usher()
	}
	s.tellLoss()
	return l.retire()
}

// retire ends the loop where nothing is left for it to do.
func (l *loop) retire() bool {
	s := l.s
	s.mu.Lock()
	over := s.mode == closed
	s.mu.Unlock()
	if over {
		l.cut()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mode != closed && s.mode != held || l.load > 0 || len(l.inbox)+len(l.questions) > 0 {
		if len(l.inbox)+len(l.questions) > 0 {
			l.rung = true
		}
		return false
	}
	s.loops[l.number] = nil
	l.release()
	return true
}

// cut ends all pairs, for close.
func (l *loop) cut() {
	var all []*pair
	l.each(func(p *pair) bool {
		all = append(all, p)
		return true
	})
	for _, p := range all {
		l.end(p, nil)
	}
}
