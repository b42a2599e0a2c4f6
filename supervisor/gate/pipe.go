package gate

import (
	"golang.org/x/sys/unix"
)

// pipe carries bytes from one socket to another without copying them into this process.
type pipe struct {
	read, write int32
	size        int // bytes that fit
	held        int // bytes that are in it
}

const (
	maxPipes  = 32      // of one loop; further bulk transfers are copied
	keptPipes = 4       // of those, how many stay open while nobody uses them
	pipeSize  = 1 << 18 // bytes, where the kernel permits it
)

// borrow gives a side a pipe, and says whether it has one.
func (l *loop) borrow(to *side) bool {
	if to.pipe != nil {
		return true
	}
	if n := len(l.pipes); n > 0 {
		to.pipe, l.pipes = l.pipes[n-1], l.pipes[:n-1]
		return true
	}
	if l.lent == maxPipes {
		return false
	}
	to.pipe = newPipe()
	if to.pipe == nil {
		return false
	}
	l.lent++
	return true
}

// newPipe returns nil where descriptors ran out.
func newPipe() *pipe {
	var fds [2]int
	if unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK) != nil {
		return nil
	}
	p := &pipe{read: int32(fds[0]), write: int32(fds[1])}
	size, err := unix.FcntlInt(uintptr(p.read), unix.F_SETPIPE_SZ, pipeSize)
	if err != nil {
		size, err = unix.FcntlInt(uintptr(p.read), unix.F_GETPIPE_SZ, 0)
	}
	if err != nil {
		size = 1 << 16
	}
	p.size = size
	return p
}

// giveBack takes the pipe from a side for which nothing is in flight.
func (l *loop) giveBack(to *side) {
	if to.pipe == nil {
		return
	}
	if len(l.pipes) < keptPipes {
		l.pipes = append(l.pipes, to.pipe)
	} else {
		l.scrap(to.pipe)
	}
	to.pipe = nil
}

// scrap closes a pipe that is lent, with what is in it.
func (l *loop) scrap(p *pipe) {
	closeFD(p.read)
	closeFD(p.write)
	l.lent--
}

// carryPipe reads once into the pipe of a side, which is empty, and writes once from it. It returns how many bytes were
// read.
func (l *loop) carryPipe(p *pair, from, to *side) int {
	n, e := splice(from.fd, to.pipe.write, to.pipe.size)
	if e == unix.EINVAL {
		from.flags |= rigid
		l.giveBack(to)
		return 0
	}
	if e == unix.EAGAIN {
		from.full = 0
		if from.has(deep) {
			return 0 // splice(2) does not get past a byte that is urgent; recv(2) does
		}
	}
	if e != 0 || n == 0 {
		from.took(n, 0, e)
		return 0
	}
	to.pipe.held = n
	l.drain(p, to)
	return n
}

// drain writes what is in the pipe of a side, and says whether it is empty now.
func (l *loop) drain(p *pair, to *side) bool {
	to.hurry()
	for to.pipe.held > 0 {
		n, e := splice(to.pipe.read, to.fd, to.pipe.held)
		switch {
		case e == unix.EAGAIN:
			l.stall(p, to)
			return false
		case e != 0 || n == 0:
			to.flags |= broken
			return false
		}
		to.pipe.held -= n
	}
	l.unwatchWrite(p, to)
	return true
}
