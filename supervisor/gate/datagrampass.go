package gate

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// readSocket moves what clients have sent. An edge was reported, so it reads until nothing is left, or has itself reported
// again when its turn is over.
func (d *datagrams) readSocket(i int, now time.Time) {
	fd, failed := d.sockets[i].FD(), 0
	for range socketTurn {
		if !d.reading {
			return
		}
		n, err := d.message.receive(fd, d.buffer)
		switch {
		case err == nil:
			d.forward(datagramKey{d.message.path(), i}, d.buffer[:n], now)
		case errors.Is(err, unix.EAGAIN):
			return
		default:
			failed++ // an error of an earlier datagram of ours, which is over with this call
		}
	}
	if d.reading && failed < socketTurn { // else it is no socket that can be read
		d.rearm(fd, uint64(i))
	}
}

// readSession moves what a destination has answered.
func (d *datagrams) readSession(s *datagramSession, now time.Time) {
	failed := 0
	for range sessionTurn {
		n, err := d.message.receive(s.fd, d.buffer)
		switch {
		case err == nil:
			d.reply(s, d.buffer[:n], now)
		case errors.Is(err, unix.EAGAIN):
			return
		case isRefusal(err):
			d.refused(s, err, now)
			return
		default:
			failed++
		}
	}
	if failed < sessionTurn {
		d.rearm(s.fd, s.id)
	}
}

// rearm has a socket reported again if something is there.
func (d *datagrams) rearm(fd int, token uint64) {
	if err := d.watcher.ArmEdge(fd, token); err != nil { // what is in the set already needs no memory
		d.hooks.log.Warn("socket not watched", slog.Any("err", err))
	}
}

// forward sends what a client has sent on to its destination. The filter of the socket has dropped what may not
// come in; that a list stays in force does not hang on it alone.
func (d *datagrams) forward(key datagramKey, b []byte, now time.Time) {
	s := d.sessions[key]
	if s == nil {
		if !d.sockets[key.socket].Spec().Options.Access.Permits(key.client.Addr()) {
			d.totals.Denied++
			return
		}
		if s = d.begin(key, now); s == nil {
			d.totals.Dropped++
			return
		}
	}
	d.used(s, true, len(b), now)
	s.kept = d.kept.put(b, now)
	d.pass(s, b, now)
}

// pass sends b, which is s.kept, to the destination of the session, or to another one when that refuses. When all do, the
// sockets are read no more, and b is sent in the next admission. It ends: each turn but the last finds one more
// destination that is to be left alone.
func (d *datagrams) pass(s *datagramSession, b []byte, now time.Time) {
	s.again = false
	for {
		to, err := s.to, error(nil)
		if to == nil {
			if to = d.pick(now); to == nil {
				s.again = true
				d.lose()
				return
			}
			err = d.connect(s, to)
		}
		if err == nil {
			s.kept.at = now
			if err = d.message.send(s.fd, b); err == nil {
				return
			}
		}
		switch {
		case isRefusal(err):
			d.blame(s, to, err, now)
		case s.fd < 0: // no descriptor, no memory, no port
			d.shortOf(err)
			d.end(s)
			return
		default: // the queue of the device is full, a firewall does not let it out, it is too large
			d.totals.Dropped++
			s.kept = keptDatagram{}
			return
		}
	}
}

// blame takes the socket of a session away and leaves its destination alone.
func (d *datagrams) blame(s *datagramSession, to *datagramDestination, err error, now time.Time) {
	d.totals.Refused++
	d.refusal = fmt.Errorf("send datagram to %s: %w", to.address, err)
	d.disconnect(s)
	to.refused(now)
}

// refused is called when the destination of a session has reported that it is not there. What it has refused goes
// elsewhere, or waits for the next admission.
func (d *datagrams) refused(s *datagramSession, err error, now time.Time) {
	d.blame(s, s.to, err, now)
	s.again = d.resendable(s, now)
	switch {
	case d.reading && s.again:
		d.pass(s, d.kept.read(s.kept, d.buffer), now)
		return
	case d.reading && !d.anyHealthy(now):
		d.lose()
	}
	if !s.again {
		d.end(s)
	}
}

// resendable says whether the last datagram of a session is still there and so new that a refusal is probably about it.
func (d *datagrams) resendable(s *datagramSession, now time.Time) bool {
	return d.kept.holds(s.kept) && now.Sub(s.kept.at) <= keptTime
}

// lose stops to read the sockets because every destination refuses.
func (d *datagrams) lose() {
	if d.reading {
		d.lost = d.refusal
	}
	d.stopReading()
}

// shortOf counts a datagram that was dropped because its session could not have a socket. The log gets
// the first one of an admission.
func (d *datagrams) shortOf(err error) {
	d.totals.Dropped++
	if !d.short {
		d.short = true
		d.hooks.log.Warn("datagram dropped", slog.Any("err", err))
	}
}

// reply sends what the destination has answered back to the client.
func (d *datagrams) reply(s *datagramSession, b []byte, now time.Time) {
	d.used(s, false, len(b), now)
	s.replied, s.kept, d.served = true, keptDatagram{}, true
	s.to.answered()
	fd := d.sockets[s.key.socket].FD()
	err := d.message.answer(fd, b, &s.path)
	if errors.Is(err, unix.EINVAL) && s.path.local.IsValid() { // no address of ours, or no more
		s.path.local = netip.Addr{}
		err = d.message.answer(fd, b, &s.path)
	}
	if err != nil {
		d.totals.Dropped++
	}
}
