package gate

import (
	"golang.org/x/sys/unix"
)

// firstRead is how much is read at once from a side that was empty before, in bytes, and the most that is kept of it
// where the other side does not take it. Of bigger transfers nothing is kept, but for what is in pipes.
const firstRead = 1 << 14

// maxKept is how many sides something is kept for at most. Above that nothing is read before it is written, which takes
// one more system call.
const maxKept = 512

// keep has a copy of b written to a side later.
func (l *loop) keep(to *side, b []byte) {
	to.rest = append([]byte(nil), b...)
	l.s.kept.Add(1)
}

// unkeep forgets what keep has kept.
func (l *loop) unkeep(to *side) {
	if to.rest != nil {
		to.rest = nil
		l.s.kept.Add(-1)
	}
}

// carryPeek reads without taking anything away, writes, and then takes away what was written. So nothing has to be kept
// for a side that is slow, and what it does not take stays in the socket of the other one.
func (l *loop) carryPeek(p *pair, from, to *side) int {
	before := from.flags
	n, e := recv(from.fd, l.buffer, unix.MSG_PEEK)
	if !from.took(n, len(l.buffer), e) {
		return 0
	}
	written := l.write(p, to, l.buffer[:n], 0)
	if written < n {
		from.flags = before // it is not empty yet
	} else {
		l.unwatchWrite(p, to)
	}
	for left := written; left > 0; {
		n, e := recv(from.fd, l.buffer[:left], unix.MSG_TRUNC) // which does not copy what comes by TCP
		if e != 0 || n <= 0 {
			break // it cannot be: they are there
		}
		left -= n
	}
	return written
}

// stall notes that a side takes nothing for now, and has the kernel say when it does.
func (l *loop) stall(p *pair, to *side) {
	to.flags |= blocked | slow
	if to.flags&watched == 0 {
		to.flags |= watched
		if !l.watch(p, to, unix.EPOLL_CTL_MOD) {
			to.flags |= broken // it would never be heard of again
		}
	}
}

// unwatchWrite ends the reports of a Unix socket that it can be written to: it sends one for each read at the other
// end. TCP sends one after a write that did not fit.
func (l *loop) unwatchWrite(p *pair, to *side) {
	if to.has(local|watched) && to.flags&blocked == 0 {
		to.flags &^= watched
		_ = l.watch(p, to, unix.EPOLL_CTL_MOD) // at worst it goes on reporting
	}
}

// drop forgets what was to be written to a side.
func (l *loop) drop(to *side) {
	l.unkeep(to)
	if to.pipe != nil {
		l.scrap(to.pipe)
		to.pipe = nil
	}
}
