package adopt

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"unicode"

	"golang.org/x/sys/unix"

	"hibergate/activation"
	"hibergate/activation/nettest"
)

const mptcp = unix.IPPROTO_MPTCP

// What matches a pattern becomes ours when the program listens, and is the program's all the same.
func TestLearnTCP(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		pattern, bind string // with %d for the port
		domain        int
		v6only        bool
		want          string
		family        activation.Family
	}{
		"IPv4 wildcard":             {"tcp://:%d", "0.0.0.0:%d", unix.AF_INET, false, "tcp://0.0.0.0:%d", activation.FamilyDefault},
		"both versions":             {"tcp://:%d", "[::]:%d", unix.AF_INET6, false, "tcp://[::]:%d", activation.FamilyDual},
		"IPv6 only":                 {"tcp://:%d", "[::]:%d", unix.AF_INET6, true, "tcp://[::]:%d", activation.FamilyIPv6},
		"the IPv6 wildcard":         {"tcp://[::]:%d", "[::]:%d", unix.AF_INET6, false, "tcp://[::]:%d", activation.FamilyDual},
		"the IPv6 wildcard, only":   {"tcp://[::]:%d", "[::]:%d", unix.AF_INET6, true, "tcp://[::]:%d", activation.FamilyIPv6},
		"an address of any":         {"tcp://:%d", "127.0.0.1:%d", unix.AF_INET, false, "tcp://127.0.0.1:%d", activation.FamilyDefault},
		"this machine, IPv4":        {"tcp://localhost:%d", "127.0.0.1:%d", unix.AF_INET, false, "tcp://127.0.0.1:%d", activation.FamilyDefault},
		"this machine, IPv6":        {"tcp://localhost:%d", "[::1]:%d", unix.AF_INET6, false, "tcp://[::1]:%d", activation.FamilyDefault},
		"this machine, mapped":      {"tcp://localhost:%d", "[::ffff:127.0.0.1]:%d", unix.AF_INET6, false, "tcp://127.0.0.1:%d", activation.FamilyDefault},
		"the mapped wildcard":       {"tcp://:%d", "[::ffff:0.0.0.0]:%d", unix.AF_INET6, false, "tcp://0.0.0.0:%d", activation.FamilyDefault},
		"anything":                  {"auto", "127.0.0.1:%d", unix.AF_INET, false, "tcp://127.0.0.1:%d", activation.FamilyDefault},
		"wildcard, not [::]":        {"tcp://[::]:%d", "0.0.0.0:%d", unix.AF_INET, false, "", 0},
		"wildcard, not localhost":   {"tcp://localhost:%d", "0.0.0.0:%d", unix.AF_INET, false, "", 0},
		"a pattern of UDP":          {"udp://:%d", "0.0.0.0:%d", unix.AF_INET, false, "", 0},
		"a pattern of another port": {"tcp://:1", "0.0.0.0:%d", unix.AF_INET, false, "", 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			port := freshPort()
			fill := func(text string) string { return strings.ReplaceAll(text, "%d", fmt.Sprint(port)) }
			p := mustStart(t, start{})
			_, e := p.adopt(Options{Learn: learn(fill(tt.pattern))})
			fd := p.socket(tt.domain, unix.SOCK_STREAM, 0)
			if tt.v6only {
				p.set(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1)
			}
			before := p.cookie(fd)
			p.mustBind(fd, inet(fill(tt.bind)))
			e.want("bind")
			p.mustListen(fd, 17)
			if p.cookie(fd) != before {
				t.Error("it is another socket")
			}
			if tt.want == "" {
				e.want("listen", Event{Kind: Elsewhere, Text: fill("tcp://" + tt.bind)})
				return
			}
			s := e.learned("listen", Listening)
			p.ours(fd, s, true)
			if got := s.Address().String(); got != fill(tt.want) || s.Spec().Name != "learned" || s.Spec().Options.Family != tt.family {
				t.Errorf("got %s, %+v, want %s, family %d", got, s.Spec(), fill(tt.want), tt.family)
			}
			if got := backlogOf(t, s.FD()); got <= 17 {
				t.Errorf("got a backlog of %d, want ours", got)
			}
			client := mustDial(t, s, "hello")
			p.serve(fd)
			if n, err := unix.Read(client, make([]byte, 10)); n != 5 || err != nil {
				t.Errorf("got %d bytes, %v", n, err)
			}
			// The program may end, and clients wait for the next one.
			p.close(fd)
			client = mustDial(t, s, "hello")
			fd = p.socket(tt.domain, unix.SOCK_STREAM, 0)
			if tt.v6only {
				p.set(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1)
			}
			p.mustBind(fd, inet(fill(tt.bind)))
			p.ours(fd, s, true)
			e.want("again", Event{Kind: Bound, Socket: s})
			p.mustListen(fd, 18)
			e.want("again", Event{Kind: Listening, Socket: s})
			p.serve(fd)
			if n, err := unix.Read(client, make([]byte, 10)); n != 5 || err != nil {
				t.Errorf("got %d bytes, %v", n, err)
			}
		})
	}
}

// A datagram socket never listens, so it is bound by us, with the rights of the program.
func TestLearnUDP(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		bind   string
		domain int
		want   string
	}{
		"IPv4":          {"127.0.0.1:%d", unix.AF_INET, "udp://127.0.0.1:%d"},
		"IPv4 wildcard": {"0.0.0.0:%d", unix.AF_INET, "udp://0.0.0.0:%d"},
		"both versions": {"[::]:%d", unix.AF_INET6, "udp://[::]:%d"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			port := freshPort()
			fill := func(text string) string { return strings.ReplaceAll(text, "%d", fmt.Sprint(port)) }
			p := mustStart(t, start{})
			_, e := p.adopt(Options{Learn: learn(fill("udp://:%d"))})
			fd := p.socket(tt.domain, unix.SOCK_DGRAM, 0)
			before := p.cookie(fd)
			p.mustBind(fd, inet(fill(tt.bind)))
			s := e.learned("bind")
			if p.cookie(fd) != before {
				t.Error("it is another socket")
			}
			p.ours(fd, s, true)
			if got := s.Address().String(); got != fill(tt.want) {
				t.Errorf("got %s, want %s", got, fill(tt.want))
			}
			mustDial(t, s, "hello")
			r := p.do(sys(unix.SYS_READ, fd, make([]byte, 10), 10))
			if n := p.must("read", r); string(r.Bytes[1][:n]) != "hello" {
				t.Errorf("got %q", r.Bytes[1][:n])
			}
			p.close(fd)
			mustDial(t, s, "again")
			fd = p.socket(tt.domain, unix.SOCK_DGRAM, 0)
			p.mustBind(fd, inet(fill(tt.bind)))
			p.ours(fd, s, true)
			e.want("again", Event{Kind: Bound, Socket: s})
			r = p.do(sys(unix.SYS_READ, fd, make([]byte, 10), 10))
			if n := p.must("read", r); string(r.Bytes[1][:n]) != "again" {
				t.Errorf("got %q", r.Bytes[1][:n])
			}
		})
	}
}

// What the kernel says of a bind by us, the program hears.
func TestLearnUDPFails(t *testing.T) {
	t.Parallel()
	p := mustStart(t, start{})
	foreign := mustOpen(t, "udp://127.0.0.1:0", activation.Options{})
	port := foreign.Address().Port
	_, e := p.adopt(Options{Learn: learn(fmt.Sprintf("udp://:%d", port))})
	fd := p.socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	wantErrno(t, "somebody has it", p.bind(fd, inet(fmt.Sprintf("127.0.0.1:%d", port))), unix.EADDRINUSE)
	wantErrno(t, "it is not here", p.bind(fd, inet(fmt.Sprintf("192.0.2.1:%d", port))), unix.EADDRNOTAVAIL)
	wantErrno(t, "as IPv6", p.bind(fd, inet(fmt.Sprintf("[::1]:%d", port))), unix.EAFNOSUPPORT)
	e.want("none")
	wantErrno(t, "another one", p.bind(fd, inet(fmt.Sprintf("127.0.0.2:%d", port))), 0)
	e.learned("another one")
	wantErrno(t, "twice", p.bind(fd, inet(fmt.Sprintf("127.0.0.2:%d", port))), unix.EINVAL)
	e.want("twice")
}

// A program without the right to a port does not get it from us.
func TestLearnUDPPrivileged(t *testing.T) {
	t.Parallel()
	nettest.Need(t, asks, nettest.RealRoot)
	p := mustStart(t, start{uid: 65534})
	_, e := p.adopt(Options{Learn: learn("udp://:53", "tcp://:53")})
	for kind := range map[int]bool{unix.SOCK_DGRAM: true, unix.SOCK_STREAM: true} {
		fd := p.socket(unix.AF_INET, kind, 0)
		wantErrno(t, "bind", p.bind(fd, inet("127.0.0.1:53")), unix.EACCES)
	}
	e.want("bind")
	root := mustStart(t, start{})
	_, e = root.adopt(Options{Learn: learn("udp://:53")})
	fd := root.socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	root.mustBind(fd, inet("127.0.0.1:53"))
	e.learned("bind")
	// What is ours it gets though: that is what we are for.
	s := mustOpen(t, "udp://127.0.0.2:53", activation.Options{})
	p = mustStart(t, start{uid: 65534})
	p.adopt(Options{Have: have(s)})
	fd = p.socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	p.mustBind(fd, address(s))
	p.ours(fd, s, true)
}

// Sockets of another user's program can be parked when they are ours.
func TestLearnOfOtherUser(t *testing.T) {
	t.Parallel()
	nettest.Need(t, asks, nettest.RealRoot, func() error { _, err := activation.AllowParking(); return err })
	p := mustStart(t, start{uid: 65534})
	port := freshPort()
	_, e := p.adopt(Options{Learn: learn(fmt.Sprintf("tcp://:%d", port))})
	fd := p.tcp4()
	p.mustBind(fd, inet(fmt.Sprintf("127.0.0.1:%d", port)))
	p.mustListen(fd, 1)
	s := e.learned("listen", Listening)
	for range 3 {
		if err := s.Park(); err != nil {
			t.Fatal(err)
		}
		client := mustDial(t, s, "hello")
		if err := s.Unpark(); err != nil {
			t.Fatal(err)
		}
		p.serve(fd)
		if n, err := unix.Read(client, make([]byte, 10)); n != 5 || err != nil {
			t.Errorf("got %d bytes, %v", n, err)
		}
	}
}

// An abstract name can be learned. A path is the program's alone: root would make it again wherever it leads by then.
func TestLearnPath(t *testing.T) {
	t.Parallel()
	dir := shortDir(t)
	p := mustStart(t, start{paths: true})
	_, e := p.adopt(Options{Learn: learn("auto")})
	path := dir + "/s"
	own := p.socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	p.mustBind(own, unixPath(path))
	p.mustListen(own, 3)
	e.want("a path", Event{Kind: Elsewhere, Text: "unix://" + path})
	wantErrno(t, "unlink", p.unlink(path), 0)
	if exists(path) {
		t.Error("its path is still there")
	}
	name := fmt.Sprintf("@hg-learn-%d", freshPort())
	fd := p.socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	p.mustBind(fd, unixPath(name))
	p.mustListen(fd, 3)
	s := e.learned("abstract", Listening)
	if got := s.Address().String(); got != "unix:"+name {
		t.Errorf("got %s", got)
	}
	fd = p.socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	p.mustBind(fd, unixPath(name))
	p.ours(fd, s, true)
	e.want("again", Event{Kind: Bound, Socket: s})
}

// What could not be found, or made again, from its address is the program's alone.
func TestLearnPathNotOurs(t *testing.T) {
	t.Parallel()
	dir := shortDir(t)
	if err := os.Mkdir(dir+"/d", 0o755); err != nil {
		t.Fatal(err)
	}
	port := freshPort()
	for name, b := range map[string][]byte{
		"a relative path":               unixPath("rel"),
		"a path that is not short":      unixPath(dir + "/d/../s"),
		"a path with two slashes":       unixPath(dir + "//t"),
		"a name with a NUL in it":       unixPath(fmt.Sprintf("@hg-%d\x00x", port)),
		"a name in a whole sockaddr_un": padded(unixPath(fmt.Sprintf("@hg-whole-%d", port)), 110),
		"a path with a line break":      unixPath(dir + "/a\nb"),
		"a name with a line break":      unixPath(fmt.Sprintf("@hg-%d\n", port)),
		"a path that is no text":        unixPath(dir + "/\xff"),
		"the longest path":              unixPath(dir + "/" + strings.Repeat("x", 107-len(dir)))[:110],
	} {
		p := mustStart(t, start{paths: true})
		_, e := p.adopt(Options{Learn: learn("auto")})
		p.chdir(dir)
		fd := p.socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
		wantErrno(t, name, p.bind(fd, b), 0)
		p.mustListen(fd, 1)
		got := e.take()
		if len(got) != 1 || got[0].Kind != Elsewhere {
			t.Errorf("%s: got %q, want Elsewhere", name, list(got))
		} else if strings.ContainsFunc(got[0].Text, unicode.IsControl) {
			t.Errorf("%s: got %q: a terminal would do what it says", name, got[0].Text)
		}
		for _, ev := range got {
			if ev.Kind == Learned {
				e.own(ev.Socket)
			}
		}
	}
	p := mustStart(t, start{paths: true})
	_, e := p.adopt(Options{Learn: learn("auto")})
	p.mustBind(p.socket(unix.AF_UNIX, unix.SOCK_DGRAM, 0), unixPath(dir+"/gram"))
	e.want("datagrams, which clients bind too")
}

// Go asks for MPTCP, which cannot be parked: it becomes plain TCP when it is learned, and stays as it is elsewhere.
func TestLearnMPTCP(t *testing.T) {
	t.Parallel()
	nettest.Need(t, asks, func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, mptcp)
		if err == nil {
			unix.Close(fd)
		}
		return err
	})
	s := mustOpen(t, "tcp://127.0.0.1:0", activation.Options{})
	p := mustStart(t, start{})
	port := freshPort()
	_, e := p.adopt(Options{Have: have(s), Learn: learn(fmt.Sprintf("tcp://:%d", port))})
	protocol := func(fd int) int { return p.get(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL) }
	for _, domain := range []int{unix.AF_INET, unix.AF_INET6} {
		b := inet(fmt.Sprintf("127.0.0.1:%d", port))
		if domain == unix.AF_INET6 {
			b = inet(fmt.Sprintf("[::1]:%d", port))
		}
		fd := p.must("socket", p.do(sys(unix.SYS_SOCKET, domain, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, mptcp)))
		p.set(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
		p.set(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1)
		p.set(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 100000)
		if domain == unix.AF_INET6 {
			p.set(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1)
		}
		size, flags := p.get(fd, unix.SOL_SOCKET, unix.SO_RCVBUF), p.fcntl(fd, unix.F_GETFL)
		p.mustBind(fd, b)
		if got := protocol(fd); got != unix.IPPROTO_TCP {
			t.Errorf("got protocol %d, want TCP", got)
		}
		p.mustListen(fd, 5)
		e.learned("listen", Listening)
		if p.get(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR) != 1 || p.get(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE) != 1 || p.get(fd, unix.SOL_SOCKET, unix.SO_RCVBUF) != size {
			t.Error("options are lost")
		}
		if domain == unix.AF_INET6 && p.get(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY) != 1 {
			t.Error("IPV6_V6ONLY is lost")
		}
		if got := p.fcntl(fd, unix.F_GETFL); got != flags || p.fcntl(fd, unix.F_GETFD) != unix.FD_CLOEXEC {
			t.Errorf("got flags %#o, want %#o and close-on-exec", got, flags)
		}
	}
	fd := p.socket(unix.AF_INET, unix.SOCK_STREAM, mptcp)
	p.mustBind(fd, address(s)) // ours is plain TCP
	p.ours(fd, s, true)
	if got := protocol(fd); got != unix.IPPROTO_TCP {
		t.Errorf("ours: got protocol %d, want TCP", got)
	}
	fd = p.socket(unix.AF_INET, unix.SOCK_STREAM, mptcp)
	p.mustBind(fd, inet("127.0.0.1:0"))
	if got := protocol(fd); got != mptcp {
		t.Errorf("elsewhere: got protocol %d, want MPTCP", got)
	}
}

// Workers that share a port have a socket each, and get one of ours.
func TestLearnReusePort(t *testing.T) {
	t.Parallel()
	p := mustStart(t, start{})
	port := freshPort()
	b := inet(fmt.Sprintf("127.0.0.1:%d", port))
	_, e := p.adopt(Options{Learn: learn("auto"), Held: func(uint64) bool { return true }})
	var fds []int
	for range 3 {
		fd := p.tcp4()
		p.set(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
		p.mustBind(fd, b)
		fds = append(fds, fd)
	}
	e.want("bind")
	p.mustListen(fds[0], 5)
	s := e.learned("listen", Listening)
	for _, fd := range fds[1:] {
		p.mustListen(fd, 5)
		e.want("the others", Event{Kind: Bound, Socket: s})
	}
	late := p.tcp4() // after the first one listens
	p.set(late, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
	p.mustBind(late, b)
	p.mustListen(late, 5)
	e.want("a late one", Event{Kind: Bound, Socket: s}, Event{Kind: Listening, Socket: s})
	for _, fd := range append(fds, late) {
		p.ours(fd, s, true)
	}
	for _, fd := range append(fds, late) { // whoever accepts gets the next client
		client := mustDial(t, s, "hello")
		p.serve(fd)
		if n, err := unix.Read(client, make([]byte, 10)); n != 5 || err != nil {
			t.Errorf("got %d bytes, %v", n, err)
		}
	}
	stranger := mustSocket(t, unix.AF_INET, unix.SOCK_STREAM)
	err := unix.SetsockoptInt(stranger, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
	if err == nil {
		err = unix.Bind(stranger, &unix.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}})
	}
	wantErrno(t, "a stranger", err, unix.EADDRINUSE)
}

// A learned socket that is in the way of what the program binds now is given up.
func TestLearnRelease(t *testing.T) {
	t.Parallel()
	nettest.Need(t, asks)
	for name, tt := range map[string]struct {
		released, bound, learned, pattern bool
		want                              unix.Errno
	}{
		"released":            {true, false, true, true, 0},
		"not released":        {false, false, true, true, unix.EADDRINUSE},
		"bound by this one":   {true, true, true, true, unix.EADDRINUSE},
		"not learned":         {true, false, false, true, unix.EADDRINUSE},
		"of no pattern":       {true, false, true, false, unix.EADDRINUSE},
		"nobody releases any": {false, false, true, true, unix.EADDRINUSE},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			port := freshPort()
			s := mustOpen(t, fmt.Sprintf("tcp://:%d", port), activation.Options{Family: activation.FamilyDual})
			wildcard, dual := inet(fmt.Sprintf("0.0.0.0:%d", port)), inet(fmt.Sprintf("[::]:%d", port))
			p := mustStart(t, start{})
			pattern := fmt.Sprintf("tcp://:%d", port)
			if !tt.pattern {
				pattern = "tcp://:1"
			}
			opts := Options{Have: []Have{{Socket: s, Learned: tt.learned}}, Learn: learn(pattern)}
			asked := 0
			var session *Session
			if name != "nobody releases any" {
				opts.Release = func(got *activation.Socket) bool {
					asked++
					if got != s {
						t.Errorf("asked for %v", got)
					}
					if tt.released {
						session.Forget(s) // which does not have to wait for us
						if err := s.Close(); err != nil {
							t.Error(err)
						}
					}
					return tt.released
				}
			}
			session, e := p.adopt(opts)
			if tt.bound {
				p.mustBind(p.tcp6(), dual)
				e.want("first", Event{Kind: Bound, Socket: s})
			}
			fd := p.tcp4()
			wantErrno(t, "bind", p.bind(fd, wildcard), tt.want)
			if want := map[bool]int{true: 1}[tt.learned && !tt.bound && tt.pattern && opts.Release != nil]; asked != want {
				t.Errorf("asked %d times, want %d", asked, want)
			}
			if tt.want != 0 {
				e.want("bind", Event{Kind: Refused, Text: "both IP versions"})
				p.mustBind(p.tcp6(), dual)
				e.want("what is there", Event{Kind: Bound, Socket: s})
				return
			}
			e.want("bind")
			p.mustListen(fd, 1)
			e.learned("listen", Listening)
		})
	}
}

// A socket that was forgotten while it was to be released, and was not, is nobody's.
func TestForgetDuringRelease(t *testing.T) {
	t.Parallel()
	port := freshPort()
	s := mustOpen(t, fmt.Sprintf("tcp://:%d", port), activation.Options{Family: activation.FamilyDual})
	p := mustStart(t, start{})
	var session *Session
	session, e := p.adopt(Options{
		Have: []Have{{Socket: s, Learned: true}}, Learn: learn("auto"),
		Release: func(*activation.Socket) bool { session.Forget(s); return false },
	})
	wantErrno(t, "IPv4", p.bind(p.tcp4(), inet(fmt.Sprintf("0.0.0.0:%d", port))), unix.EADDRINUSE)
	e.take()
	wantErrno(t, "both versions", p.bind(p.tcp6(), inet(fmt.Sprintf("[::]:%d", port))), unix.EADDRINUSE) // the kernel says so
	e.want("both versions")
}

// Clients bind, too: who does not listen is not learned.
func TestLearnNoClient(t *testing.T) {
	t.Parallel()
	server := mustOpen(t, "tcp://127.0.0.1:0", activation.Options{})
	dir := shortDir(t)
	p := mustStart(t, start{paths: true})
	_, e := p.adopt(Options{Learn: learn("auto")})
	fd := p.tcp4()
	p.mustBind(fd, inet(fmt.Sprintf("127.0.0.1:%d", freshPort())))
	p.must("connect", p.do(sys(unix.SYS_CONNECT, fd, address(server), lenInet4)))
	fd = p.socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	p.mustBind(fd, unixPath(dir+"/client"))
	for _, kind := range []int{unix.SOCK_STREAM, unix.SOCK_DGRAM} { // with a port of the kernel's
		fd := p.socket(unix.AF_INET, kind, 0)
		p.mustBind(fd, inet("127.0.0.1:0"))
	}
	fd = p.tcp4()
	p.mustListen(fd, 1) // without an address of its own
	e.want("clients")
}

// A session of the next program has what the one before has learned.
func TestLearnedBefore(t *testing.T) {
	t.Parallel()
	port := freshPort()
	b := inet(fmt.Sprintf("127.0.0.1:%d", port))
	p := mustStart(t, start{})
	_, e := p.adopt(Options{Learn: learn("auto")})
	fd := p.tcp4()
	p.mustBind(fd, b)
	p.mustListen(fd, 5)
	s := e.learned("listen", Listening)
	p.end()
	client := mustDial(t, s, "hello")
	p = mustStart(t, start{})
	_, e = p.adopt(Options{Have: []Have{{Socket: s, Learned: true}}, Learn: learn("auto"), Held: func(uint64) bool { return true }})
	fd = p.tcp4()
	p.mustBind(fd, b)
	p.mustListen(fd, 7)
	e.want("the next", Event{Kind: Bound, Socket: s}, Event{Kind: Listening, Socket: s})
	p.serve(fd)
	if n, err := unix.Read(client, make([]byte, 10)); n != 5 || err != nil {
		t.Errorf("got %d bytes, %v", n, err)
	}
}
