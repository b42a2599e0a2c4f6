package gate

import (
	"errors"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/supervisor/activity"
)

const (
	// defaultSessions is how many clients a gate knows at a time where max_connections sets no limit: sources are
	// easily forged, and each costs a descriptor.
	defaultSessions = 4096
	// evictAfter is how long a client must have been silent to be forgotten in favour of a new one. It protects those that
	// are being served from a flood of others.
	evictAfter = 5 * time.Second
)

// datagramKey tells the sessions of a gate apart.
type datagramKey struct {
	datagramPath
	socket int
}

// datagramSession is what is known about one client of one address of ours. It owns the socket that leads to
// its destination. All of it is under datagrams.mu.
type datagramSession struct {
	key        datagramKey
	id         uint64 // the token of its socket
	path       datagramPath
	fd         int                  // connected to the destination; -1: not, or not yet
	to         *datagramDestination // nil where fd is -1
	ignored    bool                 // what it does is no activity
	replied    bool                 // the destination has answered at least once
	kept       keptDatagram         // the last one to the destination, until there is a reply
	again      bool                 // kept was refused, and is to be sent after the next admission
	last       time.Time            // the last datagram either way
	in, out    activity.Counters
	prev, next *datagramSession // in the order of last
}

// datagramList is a list of sessions, the one that was used least recently first. The zero value is empty.
type datagramList struct{ first, last *datagramSession }

func (l *datagramList) append(s *datagramSession) {
	s.prev, s.next = l.last, nil
	if l.last != nil {
		l.last.next = s
	} else {
		l.first = s
	}
	l.last = s
}

func (l *datagramList) remove(s *datagramSession) {
	if s.prev != nil {
		s.prev.next = s.next
	} else {
		l.first = s.next
	}
	if s.next != nil {
		s.next.prev = s.prev
	} else {
		l.last = s.prev
	}
	s.prev, s.next = nil, nil
}

// begin makes a session without a socket; nil where there is no room for another one.
func (d *datagrams) begin(key datagramKey, now time.Time) *datagramSession {
	limit := d.spec.MaxConnections
	if limit <= 0 {
		limit = defaultSessions
	}
	if len(d.sessions) >= limit {
		oldest := d.order.first
		if now.Sub(oldest.last) < evictAfter {
			return nil
		}
		d.end(oldest)
	}
	d.lastID++
	s := &datagramSession{key: key, id: d.lastID, path: key.datagramPath, fd: -1, last: now}
	s.ignored = d.hooks.ignore != nil && d.hooks.ignore(key.client.Addr())
	d.sessions[key], d.byID[s.id] = s, s
	d.order.append(s)
	return s
}

// end forgets a session.
func (d *datagrams) end(s *datagramSession) {
	d.disconnect(s)
	delete(d.sessions, s.key)
	delete(d.byID, s.id)
	d.order.remove(s)
}

// expire forgets the sessions that were silent for too long, and returns when the next one will be; the zero
// Time where there is none.
func (d *datagrams) expire(now time.Time) time.Time {
	for s := d.order.first; s != nil; s = d.order.first {
		if at := s.last.Add(d.spec.SessionTimeout); at.After(now) {
			return at
		}
		d.end(s)
	}
	return time.Time{}
}

// used notes that a session had a datagram of n bytes, either way.
func (d *datagrams) used(s *datagramSession, in bool, n int, now time.Time) {
	s.last = now
	if d.order.last != s {
		d.order.remove(s)
		d.order.append(s)
	}
	socket := &d.accounts[s.key.socket]
	if !s.ignored {
		socket.last = now
	}
	own, all := &s.out, &socket.out
	if in {
		own, all = &s.in, &socket.in
	}
	for _, c := range []*activity.Counters{own, all} {
		c.Packets++
		c.Bytes += uint64(n)
	}
}

// connect gives a session a socket of its own that leads to a destination. So the kernel sorts the replies, and
// reports a refusal to the session that it is for. The error is a unix.Errno, or of the Watcher.
func (d *datagrams) connect(s *datagramSession, to *datagramDestination) error {
	domain := unix.AF_INET
	if _, six := to.sockaddr.(*unix.SockaddrInet6); six {
		domain = unix.AF_INET6
	}
	fd, err := unix.Socket(domain, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err = unix.Connect(fd, to.sockaddr); err == nil {
		err = d.watcher.ArmEdge(fd, s.id)
	}
	if err != nil {
		return errors.Join(err, unix.Close(fd))
	}
	s.fd, s.to = fd, to
	to.sessions++
	return nil
}

// disconnect takes the socket of a session away, if it has one.
func (d *datagrams) disconnect(s *datagramSession) {
	if s.fd < 0 {
		return
	}
	_ = d.watcher.Remove(s.fd) // closing does the same, where nobody else has the socket
	_ = unix.Close(s.fd)       // close(2) releases it whatever it returns
	s.to.sessions--
	s.fd, s.to = -1, nil
}
