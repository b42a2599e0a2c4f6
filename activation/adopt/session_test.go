package adopt

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation"
)

// address is where a socket of ours is, as its program writes it.
func address(s *activation.Socket) []byte {
	a := s.Address()
	if a.Network.Unix() {
		return unixPath(a.Path)
	}
	host := a.IP.String()
	if a.IP.Is6() {
		host = "[" + host + "]"
	}
	return inet(fmt.Sprintf("%s:%d", host, a.Port))
}

// ours fails the test unless a descriptor of the program is a socket of ours.
func (p *program) ours(fd int, s *activation.Socket, want bool) {
	p.t.Helper()
	if got := p.cookie(fd) == s.Cookie(); got != want {
		p.t.Errorf("descriptor %d is %s: got %v, want %v", fd, s.Address(), got, want)
	}
}

// A program that binds what we have gets our socket, with the clients that have come before.
func TestBindOurs(t *testing.T) {
	t.Parallel()
	p := mustStart(t, start{})
	for _, where := range []string{"tcp://127.0.0.1:0", "tcp://0.0.0.0:0", "tcp://[::1]:0", "tcp://[::]:0"} {
		s := mustOpen(t, where, activation.Options{})
		client := mustDial(t, s, "hello")
		q := mustStart(t, start{})
		_, e := q.adopt(Options{Have: have(s)})
		fd := q.tcp4()
		if s.Address().IP.Is6() {
			q.close(fd)
			fd = q.tcp6()
		}
		before := q.cookie(fd)
		q.mustBind(fd, address(s))
		e.want("bind", Event{Kind: Bound, Socket: s})
		q.ours(fd, s, true)
		q.mustListen(fd, 5)
		e.want("listen", Event{Kind: Listening, Socket: s})
		q.serve(fd)
		var b [10]byte
		if n, err := unix.Read(client, b[:]); string(b[:max(n, 0)]) != "hello" {
			t.Errorf("%s: got %q, %v", where, b[:max(n, 0)], err)
		}
		if before == q.cookie(fd) {
			t.Errorf("%s: it still is the program's own", where)
		}
		if got, want := backlogOf(t, s.FD()), 4096; got != want && got != somaxconn(t) {
			t.Errorf("%s: got a backlog of %d, want our own", where, got)
		}
	}
	// Without anything of ours nobody is asked about more than the filter says, and all goes on.
	_, e := p.adopt(Options{})
	fd := p.tcp4()
	p.mustBind(fd, inet("127.0.0.1:0"))
	p.mustListen(fd, 5)
	if got := e.take(); len(got) != 1 || got[0].Kind != Elsewhere {
		t.Errorf("got events %v, want Elsewhere", list(got))
	}
}

func somaxconn(tb testing.TB) int {
	tb.Helper()
	fd := mustSocket(tb, unix.AF_INET, unix.SOCK_STREAM)
	if err := unix.Listen(fd, 1<<30); err != nil {
		tb.Fatal(err)
	}
	return backlogOf(tb, fd)
}

// Flags belong to the descriptor, or to what it refers to; the program has them as it had them.
func TestBindKeepsFlags(t *testing.T) {
	t.Parallel()
	s := mustOpen(t, "tcp://127.0.0.1:0", activation.Options{})
	p := mustStart(t, start{})
	p.adopt(Options{Have: have(s)})
	for _, flags := range []int{0, unix.SOCK_NONBLOCK, unix.SOCK_CLOEXEC, unix.SOCK_NONBLOCK | unix.SOCK_CLOEXEC, 0} {
		fd := p.must("socket", p.do(sys(unix.SYS_SOCKET, unix.AF_INET, unix.SOCK_STREAM|flags, 0)))
		status, own := p.fcntl(fd, unix.F_GETFL), p.fcntl(fd, unix.F_GETFD)
		p.mustBind(fd, address(s))
		p.ours(fd, s, true)
		if got := p.fcntl(fd, unix.F_GETFL); got != status {
			t.Errorf("flags %#o: got status %#o, want %#o", flags, got, status)
		}
		if got := p.fcntl(fd, unix.F_GETFD); got != own {
			t.Errorf("flags %#o: got %#o, want %#o", flags, got, own)
		}
		p.close(fd)
	}
	// A descriptor that another number has too keeps that one's.
	fd := p.tcp4()
	other := p.fcntl(fd, unix.F_DUPFD)
	p.mustBind(fd, address(s))
	p.ours(fd, s, true)
	p.ours(other, s, false)
	if p.fcntl(fd, unix.F_GETFD) != unix.FD_CLOEXEC || p.fcntl(other, unix.F_GETFD) != 0 {
		t.Error("close-on-exec has moved")
	}
}

// What a program leaves in the upper half of an int, the kernel does not look at, and neither do we.
func TestBindDescriptorIsAnInt(t *testing.T) {
	t.Parallel()
	s := mustOpen(t, "tcp://127.0.0.1:0", activation.Options{})
	p := mustStart(t, start{})
	_, e := p.adopt(Options{Have: have(s)})
	fd := p.tcp4()
	const high = uint64(0xdeadbeef << 32)
	r := p.do(sys(unix.SYS_BIND, high|uint64(fd), address(s), high|lenInet4))
	wantErrno(t, "bind", r.failure(), 0)
	p.ours(fd, s, true)
	if p.fcntl(fd, unix.F_GETFD) != unix.FD_CLOEXEC {
		t.Error("close-on-exec is lost")
	}
	wantErrno(t, "listen", p.do(sys(unix.SYS_LISTEN, high|uint64(fd), high|5)).failure(), 0)
	e.want("both", Event{Kind: Bound, Socket: s}, Event{Kind: Listening, Socket: s})
}

// What a program sets before it binds, our socket has; the next one that does not set it finds what ours had at first.
func TestBindOptions(t *testing.T) {
	t.Parallel()
	s := mustOpen(t, "tcp://127.0.0.1:0", activation.Options{KeepAlive: true, NoDelay: true})
	type set struct{ level, option, value int }
	own := map[set]int{}
	all := []set{
		{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		{unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
		{unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT, 3},
		{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 17},
		{unix.IPPROTO_IP, unix.IP_TOS, 0x10},
		{unix.IPPROTO_TCP, unix.TCP_FASTOPEN, 5},
	}
	for _, o := range all {
		own[o] = getInt(t, s.FD(), o.level, o.option)
	}
	for _, run := range [][]set{nil, all, nil, all[:2], all[3:], nil} {
		p := mustStart(t, start{})
		p.adopt(Options{Have: have(s)})
		fd := p.tcp4()
		p.set(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) // which ours has
		is := map[set]bool{}
		for _, o := range run {
			p.set(fd, o.level, o.option, o.value)
			is[o] = true
		}
		p.mustBind(fd, address(s))
		p.mustListen(fd, 1)
		for _, o := range all {
			want := own[o]
			if is[o] {
				want = o.value
			}
			if got := p.get(fd, o.level, o.option); got != want {
				t.Errorf("program %v: option %d of level %d: got %d, want %d", run, o.option, o.level, got, want)
			}
		}
		p.end()
	}
	p := mustStart(t, start{})
	p.adopt(Options{Have: have(s)})
	fd := p.tcp4()
	p.set(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 100000)
	want := p.get(fd, unix.SOL_SOCKET, unix.SO_RCVBUF)
	p.mustBind(fd, address(s))
	if got := p.get(fd, unix.SOL_SOCKET, unix.SO_RCVBUF); got != want {
		t.Errorf("got a receive buffer of %d, want %d", got, want)
	}
}

// Those who wait have a right to their place: no program shortens the queue.
func TestListenBacklog(t *testing.T) {
	t.Parallel()
	const own = 100
	s := mustOpen(t, "tcp://127.0.0.1:0", activation.Options{Backlog: own})
	p := mustStart(t, start{})
	_, e := p.adopt(Options{Have: have(s)})
	fd := p.tcp4()
	p.mustBind(fd, address(s))
	e.take()
	for backlog, want := range map[int]int{5: own, 0: own, own: own, -1: own, 200: 200} {
		p.mustListen(fd, backlog)
		if got := backlogOf(t, s.FD()); got != want {
			t.Errorf("listen(%d): got a backlog of %d, want %d", backlog, got, want)
		}
		e.want("listen", Event{Kind: Listening, Socket: s})
	}
}

func TestBindUDP(t *testing.T) {
	t.Parallel()
	s := mustOpen(t, "udp://127.0.0.1:0", activation.Options{PacketInfo: true})
	mustDial(t, s, "early")
	p := mustStart(t, start{})
	_, e := p.adopt(Options{Have: have(s)})
	fd := p.socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	p.mustBind(fd, address(s))
	e.want("bind", Event{Kind: Bound, Socket: s})
	p.ours(fd, s, true)
	r := p.do(sys(unix.SYS_READ, fd, make([]byte, 10), 10))
	if n := p.must("read", r); string(r.Bytes[1][:n]) != "early" {
		t.Errorf("got %q", r.Bytes[1][:n])
	}
	if p.get(fd, unix.IPPROTO_IP, unix.IP_PKTINFO) != 0 {
		t.Error("the program gets what it did not ask for (IP_PKTINFO)")
	}
	// TCP of the same port is not ours.
	tcp := p.tcp4()
	p.mustBind(tcp, address(s))
	p.ours(tcp, s, false)
	e.want("bind of TCP")
}

// A program that binds an address twice, because it has closed the first socket or because it shares the port.
func TestBindAgain(t *testing.T) {
	t.Parallel()
	s := mustOpen(t, "tcp://127.0.0.1:0", activation.Options{})
	for name, tt := range map[string]struct {
		held, share bool
		want        unix.Errno
	}{
		"nobody has it":              {false, false, 0},
		"a process has it":           {true, false, unix.EADDRINUSE},
		"a process has it, shared":   {true, true, 0},
		"nobody has it, and sharing": {false, true, 0},
	} {
		p := mustStart(t, start{})
		var asked []uint64
		_, e := p.adopt(Options{Have: have(s), Held: func(inode uint64) bool { asked = append(asked, inode); return tt.held }})
		first, second := p.tcp4(), p.tcp4()
		p.mustBind(first, address(s))
		e.want(name, Event{Kind: Bound, Socket: s})
		if len(asked) > 0 {
			t.Errorf("%s: asked about the first", name)
		}
		wantErrno(t, name+": the same descriptor", p.bind(first, address(s)), unix.EINVAL)
		e.want(name)
		if tt.share {
			p.set(second, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
		}
		wantErrno(t, name, p.bind(second, address(s)), tt.want)
		p.ours(second, s, tt.want == 0)
		if tt.want == 0 {
			e.want(name, Event{Kind: Bound, Socket: s})
		} else {
			e.want(name)
		}
		if !tt.share && (len(asked) != 1 || asked[0] != s.Inode()) {
			t.Errorf("%s: asked %v, want the inode %d", name, asked, s.Inode())
		}
	}
	// Without anybody to ask, nobody has it: the program closes its socket and binds anew.
	p := mustStart(t, start{})
	_, e := p.adopt(Options{Have: have(s)})
	for range 3 {
		fd := p.tcp4()
		p.mustBind(fd, address(s))
		p.mustListen(fd, 1)
		p.ours(fd, s, true)
		e.want("anew", Event{Kind: Bound, Socket: s}, Event{Kind: Listening, Socket: s})
		p.close(fd)
	}
}

// What is not ours, or not right, is for the kernel to say.
func TestBindNotOurs(t *testing.T) {
	t.Parallel()
	s := mustOpen(t, "tcp://127.0.0.1:0", activation.Options{})
	foreign := mustOpen(t, "tcp://127.0.0.1:0", activation.Options{})
	for _, paths := range []bool{false, true} { // with them, the filter asks about all lengths
		p := mustStart(t, start{paths: paths})
		_, e := p.adopt(Options{Have: have(s)})
		bindNotOurs(t, p, e, s, foreign)
	}
}

func bindNotOurs(t *testing.T, p *program, e *events, s, foreign *activation.Socket) {
	t.Helper()
	ours, theirs := address(s), address(foreign)
	const bad = 1 // no address of memory
	pipe := p.do(sys(unix.SYS_PIPE2, make([]byte, 8), unix.O_CLOEXEC))
	p.must("pipe", pipe)
	for name, tt := range map[string]struct {
		call order
		want unix.Errno
	}{
		"an address that somebody has":  {sys(unix.SYS_BIND, p.tcp4(), theirs, lenInet4), unix.EADDRINUSE},
		"an address that is not here":   {sys(unix.SYS_BIND, p.tcp4(), inet("192.0.2.1:80"), lenInet4), unix.EADDRNOTAVAIL},
		"any port":                      {sys(unix.SYS_BIND, p.tcp4(), inet("127.0.0.1:0"), lenInet4), 0},
		"no such descriptor":            {sys(unix.SYS_BIND, 999, ours, lenInet4), unix.EBADF},
		"a descriptor below 0":          {sys(unix.SYS_BIND, -1, ours, lenInet4), unix.EBADF},
		"no socket":                     {sys(unix.SYS_BIND, int(pipe.Bytes[0][0]), ours, lenInet4), unix.ENOTSOCK},
		"no memory":                     {sys(unix.SYS_BIND, p.tcp4(), bad, lenInet4), unix.EFAULT},
		"a short length":                {sys(unix.SYS_BIND, p.tcp4(), ours, lenInet4-1), unix.EINVAL},
		"the shortest length":           {sys(unix.SYS_BIND, p.tcp4(), ours, 0), unix.EINVAL},
		"a length below 0":              {sys(unix.SYS_BIND, p.tcp4(), padded(ours, 200), -1), unix.EINVAL},
		"a long length":                 {sys(unix.SYS_BIND, p.tcp4(), padded(ours, 200), lenStorage+1), unix.EINVAL},
		"IPv4 on an IPv6 socket":        {sys(unix.SYS_BIND, p.tcp6(), padded(ours, lenInet6), lenInet6), unix.EAFNOSUPPORT},
		"IPv6 on an IPv4 socket":        {sys(unix.SYS_BIND, p.tcp4(), inet("[::1]:80"), lenInet6), unix.EAFNOSUPPORT},
		"an unknown family":             {sys(unix.SYS_BIND, p.tcp4(), append([]byte{99, 0}, ours[2:]...), lenInet4), unix.EAFNOSUPPORT},
		"IPv4 on a Unix socket":         {sys(unix.SYS_BIND, p.socket(unix.AF_UNIX, unix.SOCK_STREAM, 0), ours, lenInet4), unix.EINVAL},
		"netlink":                       {sys(unix.SYS_BIND, p.socket(unix.AF_NETLINK, unix.SOCK_RAW, 0), append([]byte{16, 0}, make([]byte, 10)...), 12), 0},
		"listen of no descriptor":       {sys(unix.SYS_LISTEN, 999, 5), unix.EBADF},
		"listen of no socket":           {sys(unix.SYS_LISTEN, int(pipe.Bytes[0][0]), 5), unix.ENOTSOCK},
		"listen of what cannot":         {sys(unix.SYS_LISTEN, p.socket(unix.AF_INET, unix.SOCK_DGRAM, 0), 5), unix.EOPNOTSUPP},
		"listen of what is bound by it": {sys(unix.SYS_LISTEN, p.tcp4(), 5), 0},
	} {
		wantErrno(t, name, p.do(tt.call).failure(), tt.want)
		e.want(name)
	}
	// And in a structure that is longer, ours is ours.
	fd := p.tcp4()
	p.mustBind(fd, padded(ours, lenStorage))
	p.ours(fd, s, true)
}

// A FIFO among our sockets is nobody's listening socket.
func TestListenIsNotAFIFO(t *testing.T) {
	t.Parallel()
	s := mustOpen(t, "fifo://"+t.TempDir()+"/fifo", activation.Options{})
	p := mustStart(t, start{})
	_, e := p.adopt(Options{Have: have(s)})
	pipe := p.do(sys(unix.SYS_PIPE2, make([]byte, 8), unix.O_CLOEXEC))
	p.must("pipe", pipe)
	wantErrno(t, "listen on a pipe", p.listen(int(pipe.Bytes[0][0]), 1), unix.ENOTSOCK)
	e.want("listen on a pipe")
}

// A program that asks for IPv4 would misread a socket of both versions.
func TestBindRefused(t *testing.T) {
	t.Parallel()
	s := mustOpen(t, "tcp://:0", activation.Options{Family: activation.FamilyDual})
	p := mustStart(t, start{})
	_, e := p.adopt(Options{Have: have(s)})
	fd := p.tcp4()
	wantErrno(t, "IPv4 wildcard", p.bind(fd, inet(fmt.Sprintf("0.0.0.0:%d", s.Address().Port))), unix.EADDRINUSE)
	e.want("IPv4 wildcard", Event{Kind: Refused, Text: fmt.Sprintf(`write "tcp://0.0.0.0:%d" instead`, s.Address().Port)})
	p.ours(fd, s, false)
	for _, host := range []string{"[::]", "[::ffff:127.0.0.1]", "[::1]", "[::ffff:0.0.0.0]"} {
		fd := p.tcp6()
		p.mustBind(fd, inet(fmt.Sprintf("%s:%d", host, s.Address().Port)))
		p.ours(fd, s, true)
		e.want(host, Event{Kind: Bound, Socket: s})
	}
	fd = p.tcp6()
	p.set(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1)
	wantErrno(t, "IPv6 only", p.bind(fd, inet(fmt.Sprintf("[::]:%d", s.Address().Port))), unix.EADDRINUSE)
	e.want("IPv6 only", Event{Kind: Refused, Text: `family = "ipv6"`})
}

// Ours would receive what the program's own would not.
func TestBindDevice(t *testing.T) {
	t.Parallel()
	open, onLo := mustOpen(t, "tcp://127.0.0.1:0", activation.Options{}), mustOpen(t, "tcp://127.0.0.1:0", activation.Options{Device: "lo"})
	p := mustStart(t, start{})
	_, e := p.adopt(Options{Have: have(open, onLo)})
	for _, tt := range []struct {
		s      *activation.Socket
		device bool
		want   unix.Errno
	}{{open, true, unix.EADDRINUSE}, {open, false, 0}, {onLo, true, 0}, {onLo, false, 0}} {
		fd := p.tcp4()
		if tt.device {
			p.must("bind to device", p.do(sys(unix.SYS_SETSOCKOPT, fd, unix.SOL_SOCKET, unix.SO_BINDTODEVICE, []byte("lo\x00"), 3)))
		}
		wantErrno(t, tt.s.Address().String(), p.bind(fd, address(tt.s)), tt.want)
		if tt.want == 0 {
			e.want("bind", Event{Kind: Bound, Socket: tt.s})
		} else {
			e.want("bind", Event{Kind: Refused, Socket: tt.s, Text: `write device = "lo"`})
		}
	}
}

// In another network an address is another one.
func TestBindInOtherNetwork(t *testing.T) {
	t.Parallel()
	s := mustOpen(t, "tcp://127.0.0.1:0", activation.Options{})
	udp := mustOpen(t, "udp://0.0.0.0:0", activation.Options{})
	p := mustStart(t, start{})
	_, e := p.adopt(Options{Have: have(s, udp), Learn: learn("auto")})
	inOther := func(r order) order { return r.on(3) }
	p.must("unshare", p.do(inOther(sys(unix.SYS_UNSHARE, unix.CLONE_NEWNET))))
	fd := p.must("socket", p.do(inOther(sys(unix.SYS_SOCKET, unix.AF_INET, unix.SOCK_STREAM, 0))))
	wildcard := inet(fmt.Sprintf("0.0.0.0:%d", s.Address().Port)) // its loopback interface is down
	wantErrno(t, "bind", p.do(inOther(sys(unix.SYS_BIND, fd, wildcard, len(wildcard)))).failure(), 0)
	wantErrno(t, "listen", p.do(inOther(sys(unix.SYS_LISTEN, fd, 1))).failure(), 0)
	p.ours(fd, s, false)
	dgram := p.must("socket", p.do(inOther(sys(unix.SYS_SOCKET, unix.AF_INET, unix.SOCK_DGRAM, 0))))
	wantErrno(t, "bind of UDP", p.do(inOther(sys(unix.SYS_BIND, dgram, address(udp), lenInet4))).failure(), 0)
	e.want("there")
	fd = p.tcp4() // by a thread that has stayed
	p.mustBind(fd, address(s))
	p.ours(fd, s, true)
}

func TestElsewhere(t *testing.T) {
	t.Parallel()
	s := mustOpen(t, "tcp://127.0.0.1:0", activation.Options{})
	p := mustStart(t, start{paths: true})
	_, e := p.adopt(Options{Have: have(s)})
	port := freshPort()
	fd := p.tcp4()
	p.mustBind(fd, inet(fmt.Sprintf("127.0.0.1:%d", port)))
	e.want("bind")
	p.mustListen(fd, 1)
	e.want("listen", Event{Kind: Elsewhere, Text: fmt.Sprintf("tcp://127.0.0.1:%d", port)})
	fd = p.socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	name := fmt.Sprintf("@hg-elsewhere-%d", port)
	p.mustBind(fd, unixPath(name))
	p.mustListen(fd, 1)
	e.want("listen", Event{Kind: Elsewhere, Text: "unix:" + name})
	for range 2 * maxElsewhere {
		fd := p.tcp4()
		p.mustBind(fd, inet("127.0.0.1:0"))
		p.mustListen(fd, 1)
	}
	if got := len(e.take()); got != maxElsewhere-2 {
		t.Errorf("got %d more, want %d", got, maxElsewhere-2)
	}
}

func TestIOUring(t *testing.T) {
	t.Parallel()
	for _, refuse := range []bool{false, true} {
		p := mustStart(t, start{})
		_, e := p.adopt(Options{RefuseIOUring: refuse})
		for i := range 2 {
			r := p.do(sys(ioUringSetup, 1, make([]byte, 120)))
			if refuse {
				wantErrno(t, "io_uring_setup", r.failure(), unix.ENOSYS)
			} else if r.Errno != 0 {
				t.Logf("the kernel says %v", r.Errno) // where it is switched off
			} else {
				p.close(int(r.R1))
			}
			if i == 0 {
				e.want("the first time", Event{Kind: IOUring})
			} else {
				e.want("the second time")
			}
		}
	}
}

// When the Session has ended, what it would be asked about fails at once.
func TestClose(t *testing.T) {
	t.Parallel()
	s := mustOpen(t, "tcp://127.0.0.1:0", activation.Options{})
	p := mustStart(t, start{})
	session, e := p.adopt(Options{Have: have(s)})
	fd := p.tcp4()
	p.mustBind(fd, address(s))
	e.take()
	for range 3 {
		if err := session.Close(); err != nil {
			t.Fatal(err)
		}
	}
	<-e.ended
	e.want("Close")
	wantErrno(t, "bind", p.bind(p.tcp4(), address(s)), unix.ENOSYS)
	wantErrno(t, "listen", p.listen(fd, 1), unix.ENOSYS)
	p.ours(fd, s, true)
	session.Forget(s)
}

// Who was asked about something that Close finds unanswered hears that it fails.
func TestCloseWhileAnswering(t *testing.T) {
	t.Parallel()
	s := mustOpen(t, "tcp://127.0.0.1:0", activation.Options{})
	p := mustStart(t, start{})
	held := make(chan struct{})
	asked := make(chan struct{})
	session, _ := p.adopt(Options{Have: have(s), Held: func(uint64) bool {
		close(asked)
		<-held
		return false
	}})
	p.mustBind(p.tcp4(), address(s))
	fd := p.tcp4()
	first := p.begin(sys(unix.SYS_BIND, fd, address(s), lenInet4).on(1))
	<-asked
	second := p.begin(sys(unix.SYS_BIND, p.tcp4(), address(s), lenInet4).on(2))
	if err := session.Close(); err == nil || err.Error() != "adopt sockets: a process holds up an answer to it" {
		t.Errorf("got %v, want that it is held up", err)
	}
	close(held)
	if err := session.Close(); err != nil {
		t.Error(err)
	}
	wantErrno(t, "what was begun with", p.result(first), 0)
	wantErrno(t, "what was not", p.result(second), unix.ENOSYS)
	p.ours(fd, s, true)
}

// A Session ends by itself with the last process. Its descriptors are others' then: Close must leave them alone.
func TestEnded(t *testing.T) {
	t.Parallel()
	p := mustStart(t, start{})
	session, e := p.adopt(Options{})
	stop := session.stop
	p.end()
	<-e.ended
	<-session.done
	e.want("the end")
	var taken []int
	for range 1000 {
		fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
		if err != nil {
			t.Fatal(err)
		}
		taken = append(taken, fd)
		if fd >= stop {
			break
		}
	}
	if err := session.Close(); err != nil {
		t.Error(err)
	}
	for _, fd := range taken {
		if n, err := unix.Read(fd, make([]byte, 8)); n > 0 || !errors.Is(err, unix.EAGAIN) {
			t.Errorf("descriptor %d, which was the Session's, was written to by Close", fd)
		}
		unix.Close(fd)
	}
}

// Descendants are asked about too, and the Session lives as long as one of them.
func TestDescendant(t *testing.T) {
	t.Parallel()
	s := mustOpen(t, "tcp://127.0.0.1:0", activation.Options{})
	p := mustStart(t, start{fork: true})
	session, e := p.adopt(Options{Have: have(s)})
	child := p.fork()
	client := mustDial(t, s, "hello")
	fd := child.tcp4()
	child.mustBind(fd, address(s))
	child.mustListen(fd, 1)
	e.want("the child", Event{Kind: Bound, Socket: s}, Event{Kind: Listening, Socket: s})
	child.serve(fd)
	if n, err := unix.Read(client, make([]byte, 10)); n != 5 || err != nil {
		t.Errorf("got %d bytes, %v", n, err)
	}
	own := p.tcp4() // the parent has its own
	p.mustBind(own, address(s))
	p.ours(own, s, true)
	e.want("the parent", Event{Kind: Bound, Socket: s})
	unix.Shutdown(int(p.child.Fd()), unix.SHUT_RDWR)
	p.do(order{Op: "reap"})
	fd = p.tcp4()
	p.mustBind(fd, address(s))
	e.want("the parent, alone", Event{Kind: Bound, Socket: s})
	p.end()
	select {
	case <-e.ended:
	case <-time.After(10 * time.Second):
		t.Error("nobody is left, and the Session goes on")
	}
	if err := session.Close(); err != nil {
		t.Error(err)
	}
}

// The thread that asks need not be the first of its process, which has another id.
func TestBindByThread(t *testing.T) {
	t.Parallel()
	s := mustOpen(t, "tcp://127.0.0.1:0", activation.Options{})
	p := mustStart(t, start{paths: true})
	_, e := p.adopt(Options{Have: have(s)})
	pid := p.must("getpid", p.do(sys(unix.SYS_GETPID)))
	others := 0
	for i := range maxThreads {
		if p.must("gettid", p.do(sys(unix.SYS_GETTID).on(i))) != pid {
			others++
		}
		fd := p.tcp4()
		wantErrno(t, "bind", p.do(sys(unix.SYS_BIND, fd, address(s), lenInet4).on(i)).failure(), 0)
		p.ours(fd, s, true)
		if p.fcntl(fd, unix.F_GETFD) != unix.FD_CLOEXEC {
			t.Error("close-on-exec is lost")
		}
		e.want("bind", Event{Kind: Bound, Socket: s})
		p.close(fd)
	}
	if others < maxThreads-1 {
		t.Errorf("%d threads are not the first", others)
	}
}

// A socket that was forgotten is nobody's.
func TestForget(t *testing.T) {
	t.Parallel()
	s := mustOpen(t, "tcp://127.0.0.1:0", activation.Options{})
	p := mustStart(t, start{})
	session, e := p.adopt(Options{Have: have(s)})
	session.Forget(s)
	session.Forget(s)
	fd := p.tcp4()
	wantErrno(t, "bind", p.bind(fd, address(s)), unix.EADDRINUSE) // the kernel says so
	e.want("bind")
}
