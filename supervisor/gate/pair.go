package gate

import (
	"net/netip"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// pair is a client and, once it has one, its connection to a destination. It belongs to one loop. It has no buffer;
// what one side could not take yet is all that is kept.
type pair struct {
	prev, next *pair // in the list of its stage
	source     *source
	target     *target
	client     side
	server     side
	in, out    atomic.Uint64 // bytes from the client, and to it
	tried      uint64        // targets, by number, in the admission epoch
	serial     uint64        // order of acceptance
	accepted   int64
	since      int64  // when it got to its stage
	mark       uint64 // bytes from the client when it got to stageHalf
	peer       netip.AddrPort
	epoch      uint32
	slot       uint32 // in the loop
	stage      stage
	placed     bool // it has a slot
	ignored    bool // does not count as activity
	again      bool // in loop.again
	gone       bool // waits, and has left
}

// stage is how far a pair has got. Pairs of one stage are in a list of their loop, in the order in which they got there, and
// most stages end after a time.
type stage uint8

const (
	stageNone       stage = iota // is in no list
	stageWaiting                 // for a destination; ends after Spec.PendingTimeout
	stageConnecting              // ends after Spec.ConnectTimeout
	stageYoung                   // established; ends after youth
	stageSettled                 // established, with keep-alive
	stageHalf                    // the destination has sent all it had; ends after halfTime without a byte from the client, when both have got everything
	stageBroken                  // one side is gone, the other has not got everything; ends after brokenTime
	stageParting                 // refused, and told so; ends after partingTime
	stages
)

// side is one of the two sockets of a pair.
type side struct {
	rest []byte // to be written to it
	pipe *pipe  // the same
	fd   int32  // -1: none
	flags
	full uint8 // reads in a row that filled the buffer
}

// flags say what is known of a side.
type flags uint16

const (
	readable flags = 1 << iota // there may be something to read
	finished                   // the other end will send nothing more
	eof                        // all that it has sent was read
	told                       // it was told that nothing more will be written to it
	broken                     // it was reset, or does not take anything any more
	hungUp                     // a Unix socket whose other end is closed in both directions
	blocked                    // it takes nothing until EPOLLOUT
	watched                    // EPOLLOUT is watched for
	local                      // a Unix socket
	deep                       // a read that does not fill the buffer does not mean that it is empty
	slow                       // it has been blocked: nothing is read for it before it is known to fit
	rigid                      // splice(2) cannot read from it
	written                    // something was written to it
	prompt                     // has TCP_NODELAY
)

func (f flags) has(all flags) bool { return f&all == all }

// inFlight says whether something was read and is not written yet.
func (s *side) inFlight() bool { return len(s.rest) > 0 || s.pipe != nil && s.pipe.held > 0 }

// owed says whether the other end has yet to get something: it was not written, or the kernel still holds it. Where the
// other end is no longer there, keep-alive and retransmission find out.
func (s *side) owed() bool {
	if s.inFlight() || s.has(blocked) {
		return true
	}
	n, err := unix.IoctlGetInt(int(s.fd), unix.SIOCOUTQ)
	return err == nil && n > 0
}

// note notes what epoll_wait(2) says about a side.
func (s *side) note(events uint32) {
	if events&(unix.EPOLLIN|unix.EPOLLRDHUP|unix.EPOLLERR|unix.EPOLLHUP|unix.EPOLLPRI) != 0 {
		s.flags |= readable
	}
	if events&unix.EPOLLPRI != 0 {
		s.flags |= deep // a read ends before the byte that is urgent
	}
	if events&unix.EPOLLRDHUP != 0 {
		s.flags |= finished
	}
	if events&unix.EPOLLERR != 0 {
		s.flags |= broken
	}
	if events&unix.EPOLLHUP != 0 && s.has(local) {
		s.flags |= hungUp
	}
	if events&(unix.EPOLLOUT|unix.EPOLLERR|unix.EPOLLHUP) != 0 {
		s.flags &^= blocked
	}
}

// pump moves what can be moved both ways, and ends the pair where nothing is left to be moved.
func (l *loop) pump(p *pair) {
	c, s := &p.client, &p.server
	l.move(p, c, s)
	l.move(p, s, c)
	if c.has(broken | readable) {
		l.move(p, c, s) // the client did not take what the other move had for it
	}
	switch {
	case c.has(broken|eof) && !s.inFlight():
		l.end(p, s)
	case s.has(broken|eof) && !c.inFlight():
		l.end(p, c)
	case c.has(told|eof) && s.has(told|eof):
		l.end(p, nil)
	case c.has(hungUp|eof) && s.has(told), s.has(hungUp|eof) && c.has(told):
		l.end(p, nil)
	case (c.flags | s.flags).has(broken):
		if p.stage != stageBroken {
			l.enter(p, stageBroken)
		}
	case c.has(told) && p.stage != stageHalf && p.stage != stageConnecting:
		p.mark = p.in.Load()
		l.enter(p, stageHalf)
	}
}

// move moves bytes from one side to the other, as much as both let it, and passes on that there are no more.
func (l *loop) move(p *pair, from, to *side) {
	for turn := 0; ; turn++ {
		switch {
		case to.has(broken):
			l.drop(to)
			to.flags |= readable // what it has sent before, and the error
			return
		case !l.flush(p, to):
			if !to.has(broken) {
				return
			}
			continue
		case from.has(eof):
			if to.flags&told == 0 && from.flags&broken == 0 {
				to.flags |= told
				if !to.has(eof) || !from.has(told) {
					shutdownWrite(to.fd)
				} // else both are closed now, which says the same
			}
			l.giveBack(to)
			return
		case from.flags&readable == 0:
			l.giveBack(to)
			return
		case turn == turns:
			l.later(p)
			return
		}
		n := l.carry(p, from, to)
		if n > 0 {
			l.count(p, from, n)
		}
	}
}

// turns is how many reads one pair may do before others get their turn.
const turns = 8

// count counts payload that was read from one side.
func (l *loop) count(p *pair, from *side, n int) {
	src := p.source
	if from == &p.client {
		p.in.Add(uint64(n))
		src.in.Add(uint64(n))
	} else {
		p.out.Add(uint64(n))
		src.out.Add(uint64(n))
	}
	if !p.ignored {
		src.last.Store(l.now)
		src.lastPayload.Store(l.now)
	}
}

// carry reads once and writes once, and returns how many bytes were read.
func (l *loop) carry(p *pair, from, to *side) int {
	switch {
	case from.full > 0 && from.flags&rigid == 0 && l.borrow(to):
		return l.carryPipe(p, from, to)
	case from.full > 0, to.has(slow), l.s.kept.Load() >= maxKept:
		return l.carryPeek(p, from, to)
	}
	n, e := recv(from.fd, l.buffer[:firstRead], 0)
	if !from.took(n, firstRead, e) {
		return 0
	}
	l.give(p, to, l.buffer[:n], from.flags)
	return n
}

// took notes the outcome of a read, and says whether there is something to write.
func (s *side) took(n, size int, e unix.Errno) bool {
	switch {
	case e == unix.EAGAIN:
		s.flags &^= readable
		return false
	case e != 0:
		s.flags |= eof | broken
		return false
	case n == 0:
		s.flags |= eof
		return false
	case n == size:
		s.full = 1
		return true
	}
	s.full = 0
	if s.flags&(deep|local) == 0 {
		s.flags &^= readable // whatever comes from now on is another event
		if s.has(finished) {
			s.flags |= eof // the end was there before the read, and the read has got to it
		}
	}
	return true
}

// give writes b to a side, and keeps what it does not take.
func (l *loop) give(p *pair, to *side, b []byte, from flags) {
	more := 0
	if from.has(eof) && !from.has(broken) {
		more = unix.MSG_MORE // the end of the stream follows, and can go in the same packet
	}
	n := l.write(p, to, b, more)
	if to.has(blocked) {
		l.keep(to, b[n:])
	}
}

// write writes to a side and returns how much it has taken: everything, or it is blocked, or it is broken.
func (l *loop) write(p *pair, to *side, b []byte, more int) int {
	to.hurry()
	n, e := send(to.fd, b, more)
	switch {
	case e == 0 && n == len(b):
		return n
	case e == 0 || e == unix.EAGAIN:
		l.stall(p, to)
		return max(n, 0)
	}
	to.flags |= broken
	return 0
}

// hurry has the kernel send at once what is written to a destination, from the second write on: the first never waits
// for another, and many connections need no other.
func (s *side) hurry() {
	switch {
	case s.flags&(prompt|local) != 0:
	case s.flags&written == 0:
		s.flags |= written
	default:
		s.flags |= prompt
		_ = setInt(s.fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1) // of a socket that was reset
	}
}

// flush writes what was left over. It says whether nothing is left now.
func (l *loop) flush(p *pair, to *side) bool {
	if to.has(blocked) {
		return false
	}
	if len(to.rest) > 0 {
		n := l.write(p, to, to.rest, 0)
		to.rest = to.rest[n:]
		if len(to.rest) > 0 {
			return false
		}
		l.unkeep(to)
		l.unwatchWrite(p, to)
	}
	return to.pipe == nil || l.drain(p, to)
}
