package adopt

import (
	"slices"

	"golang.org/x/sys/unix"

	"hibergate/activation"
)

// What a Session answers, call by call.

// answer decides about one call.
func (s *Session) answer(n *notification) response {
	c := &caller{session: s, id: n.id, tid: n.tid}
	defer c.close()
	switch call := decode(n, c.read).(type) {
	case bindCall:
		return s.bind(c, call)
	case listenCall:
		return s.listen(c, call)
	case unlinkCall:
		return s.unlink(c, call)
	case ioUringCall:
		if !s.ioUring {
			s.ioUring = true
			s.opts.Report(Event{Kind: IOUring})
		}
		if s.opts.RefuseIOUring {
			return failWith(unix.ENOSYS)
		}
	case otherCall:
	}
	return goOn()
}

// bind gives the program our socket, binds a datagram socket of its for it, or lets it go on.
func (s *Session) bind(c *caller, call bindCall) response {
	if call.length > lenStorage {
		return goOn()
	}
	b := make([]byte, call.length)
	if !c.read(call.addr, b) {
		s.closed(c)
		return goOn()
	}
	addr, ok := parseSockaddr(b)
	if !ok || !c.open(call.fd) || !c.ours(&s.facts) {
		return goOn()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if cookie := activation.Cookie(c.fd); s.has(cookie) {
		if s.given == (handOver{c.tid, cookie}) {
			return success()
		}
		return failWith(unix.EINVAL) // as the kernel says of a socket that is bound
	}
	if addr.family == unix.AF_UNIX {
		return s.bindPath(c, call.fd, addr.path)
	}
	want, ok := c.wants(addr)
	if !ok {
		return goOn()
	}
	for {
		i, problem := s.match(want)
		switch {
		case i < 0:
			return s.learn(c, call.fd, want, b)
		case problem == "":
			return s.give(c, call.fd, s.owned[i])
		case s.pattern(want.address()) == nil || !s.release(i):
			s.opts.Report(Event{Kind: Refused, Text: problem})
			return failWith(unix.EADDRINUSE)
		}
	}
}

// closed reports that we may not look into a program, which its bind() will suffer from.
func (s *Session) closed(c *caller) {
	if c.denied && !s.denied {
		s.denied = true
		s.opts.Report(Event{Kind: Refused, Text: "hibergated may not look into the program, so its bind() finds the address taken: that takes CAP_SYS_PTRACE, or, for an ordinary user, a program that lets itself be traced"})
	}
}

// match finds which of ours is wanted.
func (s *Session) match(want bound) (int, string) {
	all := make([]bound, len(s.owned))
	for i, o := range s.owned {
		all[i] = describe(o.sock)
		all[i].exact = o.learned
	}
	return match(want, all)
}

// has says whether one of ours has the cookie.
func (s *Session) has(cookie uint64) bool {
	return cookie != 0 && slices.ContainsFunc(s.owned, func(o *owned) bool { return o.sock.Cookie() == cookie })
}

// pattern returns what learns of an address, nil where nothing does.
func (s *Session) pattern(a activation.Address) *Learn {
	for i := range s.opts.Learn {
		if s.opts.Learn[i].Pattern.Matches(a) {
			return &s.opts.Learn[i]
		}
	}
	return nil
}

// release gives up a learned socket that this program has not bound. It is called with mu held.
func (s *Session) release(i int) bool {
	o := s.owned[i]
	if !o.learned || o.bound || s.opts.Release == nil {
		return false
	}
	s.mu.Unlock() // nobody else gives it away meanwhile, and Forget need not wait
	released := s.opts.Release(o.sock)
	s.mu.Lock()
	if released {
		s.owned = slices.DeleteFunc(s.owned, func(p *owned) bool { return p == o })
	}
	return released
}

// give puts our socket in the place of the program's.
func (s *Session) give(c *caller, fd uint64, o *owned) response {
	again := o.bound
	if again && !sharesPort(c.fd) && s.opts.Held != nil && s.opts.Held(o.sock.Inode()) {
		return failWith(unix.EADDRINUSE)
	}
	if why := harmful(c.fd, o.sock); why != "" {
		s.opts.Report(Event{Kind: Refused, Socket: o.sock, Text: why})
		return failWith(unix.EADDRINUSE)
	}
	if err := o.sock.Imitate(c.fd); err != nil && !again {
		s.opts.Report(Event{Kind: Incomplete, Socket: o.sock, Text: err.Error()})
	}
	if err := c.put(fd, o.sock.FD()); err != nil {
		return failWith(err)
	}
	s.given = handOver{c.tid, o.sock.Cookie()}
	o.bound = true
	s.opts.Report(Event{Kind: Bound, Socket: o.sock})
	return success()
}

// learn lets a program bind what is not ours, and takes what matches a pattern: a datagram socket at once, others
// when they listen.
func (s *Session) learn(c *caller, fd uint64, want bound, raw []byte) response {
	l := s.pattern(want.address())
	switch {
	case l == nil || want.port == 0 || !c.here(&s.facts) || s.full():
		return goOn()
	case want.network == activation.TCP:
		// What is ours is plain TCP, which can be parked; it serves MPTCP clients by falling back.
		c.replaceMPTCP(fd, want.domain)
		return goOn()
	case !c.mayBind(want.port, &s.facts):
		return goOn()
	}
	if err := bindRaw(c.fd, raw); err != nil {
		return failWith(err)
	}
	sock, err := c.take(l)
	if err != nil {
		s.opts.Report(Event{Kind: Refused, Text: err.Error()})
		return success()
	}
	s.own(sock)
	return success()
}

// full says whether no more can be learned.
func (s *Session) full() bool { return len(s.owned) >= max(MaxSockets, len(s.opts.Have)) }

// own has a socket that was taken be one of ours.
func (s *Session) own(sock *activation.Socket) {
	s.owned = append(s.owned, &owned{sock: sock, bound: true, learned: true})
	s.opts.Report(Event{Kind: Learned, Socket: sock})
}

// bindPath gives the program our socket for a path, or lets it go on. It is called with mu held.
func (s *Session) bindPath(c *caller, fd uint64, path string) response {
	network, ok := c.unixNetwork()
	if !ok {
		return goOn()
	}
	for _, o := range s.owned {
		a := o.sock.Address()
		if a.Network == network && c.samePath(unix.AT_FDCWD, path, a) {
			return s.give(c, fd, o)
		}
	}
	return goOn()
}

// listen notes that one of ours listens, takes what matches a pattern, or lets it go on.
func (s *Session) listen(c *caller, call listenCall) response {
	if !c.open(call.fd) || !c.ours(&s.facts) {
		return goOn()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	cookie := activation.Cookie(c.fd)
	for _, o := range s.owned {
		if cookie != 0 && o.sock.Cookie() == cookie {
			return s.listening(c, o.sock, call.backlog)
		}
	}
	addr, ok := c.address()
	if !ok {
		return goOn()
	}
	l := s.pattern(addr)
	// A second socket of an address that is ours: workers that share the port each have their own.
	if want, ok := c.wants(sockaddr{ip: addr.IP, port: addr.Port}); ok && l != nil && addr.Network.IP() {
		if i, problem := s.match(want); i >= 0 && problem == "" {
			return s.give(c, call.fd, s.owned[i])
		}
	}
	if l == nil || !c.here(&s.facts) || s.full() || l.Pattern == Auto && s.facts.chosen(addr) || !plain(addr) {
		if s.elsewhere++; s.elsewhere <= maxElsewhere {
			s.opts.Report(Event{Kind: Elsewhere, Text: tell(addr)})
		}
		return goOn()
	}
	if addr.Network == activation.TCP {
		if err := unix.Listen(c.fd, int(int32(call.backlog))); err != nil {
			return failWith(err)
		}
	}
	sock, err := c.take(l)
	if err != nil {
		s.opts.Report(Event{Kind: Refused, Text: err.Error()})
		return goOn()
	}
	s.own(sock)
	return s.listening(c, sock, call.backlog)
}

// listening answers for a socket of ours. One that listens keeps its backlog where that is longer: those who wait already
// have a right to it. Unix clients see the credentials of who called listen(2) last (SO_PEERCRED), so that is left
// to the program.
func (s *Session) listening(c *caller, sock *activation.Socket, backlog uint64) response {
	r := goOn()
	if sock.Address().Network == activation.TCP {
		if err := sock.Listen(int(int32(backlog))); err != nil {
			return failWith(err)
		}
		r = success()
	}
	s.opts.Report(Event{Kind: Listening, Socket: sock})
	return r
}

// unlink keeps the path of one of ours.
func (s *Session) unlink(c *caller, call unlinkCall) response {
	path, ok := c.text(call.path)
	if !ok || call.flags != 0 {
		return goOn()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, o := range s.owned {
		a := o.sock.Address()
		if a.Network.Unix() && !a.Abstract() && c.samePath(call.dir, path, a) && isSocket(a.Path) {
			return success()
		}
	}
	return goOn()
}

// isSocket says whether there is a socket at a path.
func isSocket(path string) bool {
	var st unix.Stat_t
	return unix.Lstat(path, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFSOCK
}
