package adopt

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
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

// facts are what a Session knows of its own process: whoever lives in other namespaces has other addresses.
type facts struct {
	network    uint64 // the cookie of the network namespace; 0: not known
	low, high  uint16 // the ports that the kernel chooses from
	users      uint64 // the inode of the user namespace
	privileged uint16 // the first port that anybody may bind
}

func readFacts() facts {
	f := facts{privileged: 1024}
	if fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err == nil {
		f.network = networkOf(fd)
		_ = unix.Close(fd) // it was only asked with
	}
	f.users = namespace("/proc/self/ns/user")
	if b, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range"); err == nil {
		_, _ = fmt.Sscan(string(b), &f.low, &f.high) // else none is taken for one that the kernel chose
	}
	if b, err := os.ReadFile("/proc/sys/net/ipv4/ip_unprivileged_port_start"); err == nil {
		if n, err := strconv.ParseUint(string(bytes.TrimSpace(b)), 10, 16); err == nil {
			f.privileged = uint16(n)
		}
	}
	return f
}

// chosen says whether a port may be one that the kernel chose, and that is another one the next time.
func (f *facts) chosen(a activation.Address) bool {
	return a.Network.IP() && f.low <= a.Port && a.Port <= f.high
}

// networkOf returns the cookie of the network namespace of a socket (SO_NETNS_COOKIE, Linux 5.14; unix(7) sockets have
// it too).
func networkOf(fd int) uint64 {
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil {
		return 0
	}
	return cookie
}

func namespace(path string) uint64 {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		return 0
	}
	return st.Ino
}
