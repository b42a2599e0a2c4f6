package adopt

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"hibergate/activation"
	"hibergate/activation/nettest"
)

// Where the program binds what overlaps a socket that was learned, and is not the same, nobody has said that it may have that.
func TestLearnedIsExact(t *testing.T) {
	t.Parallel()
	port := freshPort()
	wildcard, specific := inet(fmt.Sprintf("0.0.0.0:%d", port)), inet(fmt.Sprintf("127.0.0.1:%d", port))
	s := mustOpen(t, fmt.Sprintf("tcp://0.0.0.0:%d", port), activation.Options{})
	p := mustStart(t, start{})
	released := false
	_, e := p.adopt(Options{
		Have: []Have{{Socket: s, Learned: true}}, Learn: learn("auto"),
		Release: func(*activation.Socket) bool { return released },
	})
	wantErrno(t, "narrower, not released", p.bind(p.tcp4(), specific), unix.EADDRINUSE)
	e.want("narrower", Event{Kind: Refused, Text: fmt.Sprintf("hibergated has tcp://0.0.0.0:%d", port)})
	fd := p.tcp4()
	p.mustBind(fd, wildcard)
	p.ours(fd, s, true)
	e.want("the same", Event{Kind: Bound, Socket: s})
	// One that is configured is what the user wants it to be.
	configured := mustOpen(t, "tcp://0.0.0.0:0", activation.Options{})
	q := mustStart(t, start{})
	_, e = q.adopt(Options{Have: have(configured), Learn: learn("auto")})
	fd = q.tcp4()
	q.mustBind(fd, inet(fmt.Sprintf("127.0.0.1:%d", configured.Address().Port)))
	q.ours(fd, configured, true)
	e.want("narrower", Event{Kind: Bound, Socket: configured})
}

// A port that the kernel has chosen, or might have, is another one the next time.
func TestLearnChosenPort(t *testing.T) {
	t.Parallel()
	b, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range")
	if err != nil {
		t.Skip(err)
	}
	var low, high int
	if _, err := fmt.Sscan(string(b), &low, &high); err != nil {
		t.Fatal(err)
	}
	p := mustStart(t, start{})
	_, e := p.adopt(Options{Learn: append(learn(fmt.Sprintf("tcp://:%d", high)), learn("auto")...)})
	for _, tt := range []struct {
		port  int
		learn bool
	}{{low - 1, true}, {low, false}, {high - 1, false}, {0, false}, {high, true}} { // the last one is told
		fd := p.tcp4()
		p.mustBind(fd, inet(fmt.Sprintf("127.4.4.4:%d", tt.port)))
		p.mustListen(fd, 1)
		if tt.learn {
			e.learned(fmt.Sprint(tt.port), Listening)
		} else if got := e.take(); len(got) != 1 || got[0].Kind != Elsewhere {
			t.Errorf("port %d: got %v, want Elsewhere", tt.port, list(got))
		}
	}
}

// Programs bind UDP to be clients, too: of those, only what cannot be one is learned without being told.
func TestLearnAutoUDP(t *testing.T) {
	t.Parallel()
	p := mustStart(t, start{})
	_, e := p.adopt(Options{Learn: learn("auto")})
	fd := p.socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	p.mustBind(fd, inet(fmt.Sprintf("127.0.0.1:%d", freshPort())))
	e.want("a high port")
	fd = p.socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	p.mustBind(fd, inet("127.5.5.5:53"))
	s := e.learned("a low port")
	p.ours(fd, s, true)
}

// A program that listens on a thousand ports does not cost us a thousand descriptors.
func TestLearnMany(t *testing.T) {
	t.Parallel()
	p := mustStart(t, start{})
	ours := mustOpen(t, "tcp://127.0.0.1:0", activation.Options{})
	_, e := p.adopt(Options{Have: have(ours), Learn: learn("auto")})
	for range MaxSockets + 20 {
		fd := p.tcp4()
		port := freshPort()
		p.mustBind(fd, inet(fmt.Sprintf("127.6.6.6:%d", port)))
		p.mustListen(fd, 1)
	}
	learned, elsewhere := 0, 0
	var last *activation.Socket
	for _, ev := range e.take() {
		switch ev.Kind { //nolint:exhaustive // none of the others
		case Learned:
			learned++
			last = ev.Socket
			e.own(ev.Socket)
		case Elsewhere:
			elsewhere++
		case Listening:
		default:
			t.Errorf("got %v", list([]Event{ev}))
		}
	}
	if learned != MaxSockets-1 || elsewhere != maxElsewhere {
		t.Errorf("learned %d, elsewhere %d, want %d with the one that is there, and %d", learned, elsewhere, MaxSockets-1, maxElsewhere)
	}
	// What is there goes on.
	fd := p.tcp4()
	p.mustBind(fd, address(last))
	p.ours(fd, last, true)
	fd = p.tcp4()
	p.mustBind(fd, address(ours))
	p.ours(fd, ours, true)
	e.want("what is there", Event{Kind: Bound, Socket: last}, Event{Kind: Bound, Socket: ours})
	// Nothing of UDP, either.
	fd = p.socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	p.mustBind(fd, inet("127.6.6.6:53"))
	e.want("UDP")
}

// Of sockets that share a port and are bound before one of them is learned, the last of the many is given it, too.
func TestLearnManyShared(t *testing.T) {
	t.Parallel()
	p := mustStart(t, start{})
	_, e := p.adopt(Options{Learn: learn("auto")})
	b := inet(fmt.Sprintf("127.7.7.7:%d", freshPort()))
	var fds []int
	for range 2 {
		fd := p.tcp4()
		p.set(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
		p.mustBind(fd, b)
		fds = append(fds, fd)
	}
	p.mustListen(fds[0], 1)
	s := e.learned("the first", Listening)
	for range MaxSockets - 1 {
		fd := p.tcp4()
		p.mustBind(fd, inet(fmt.Sprintf("127.7.7.7:%d", freshPort())))
		p.mustListen(fd, 1)
		e.learned("another", Listening)
	}
	wantErrno(t, "the second", p.listen(fds[1], 1), 0)
	p.ours(fds[1], s, true)
	e.want("the second", Event{Kind: Bound, Socket: s})
}

// Where the kernel does not let the program listen, nothing is learned, and it hears why.
func TestLearnListenFails(t *testing.T) {
	t.Parallel()
	p := mustStart(t, start{})
	_, e := p.adopt(Options{Learn: learn("auto")})
	port := freshPort()
	foreign, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.SetsockoptInt(foreign, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		t.Fatal(err)
	}
	if err := unix.Bind(foreign, &unix.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	fd := p.tcp4()
	p.set(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	p.mustBind(fd, inet(fmt.Sprintf("127.0.0.1:%d", port))) // as nobody listens yet
	if err := unix.Listen(foreign, 1); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		wantErrno(t, "listen", p.listen(fd, 1), unix.EADDRINUSE)
		for _, ev := range e.take() {
			t.Errorf("got %v, want nothing", list([]Event{ev}))
			if ev.Kind == Learned {
				e.own(ev.Socket)
			}
		}
	}
	closeNow(foreign)
	p.mustListen(fd, 1)
	e.learned("later", Listening)
}

// restricted runs a test by itself, in a process that lacks capabilities.
func restricted(t *testing.T, caps []uintptr, files ...*os.File) {
	t.Helper()
	nettest.Need(t, asks)
	var out []byte
	err := make(chan error)
	go func() {
		runtime.LockOSThread() // and never back: what the thread has lost, it cannot have again
		for _, c := range caps {
			if e := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); e != nil {
				err <- e
				return
			}
		}
		cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v")
		cmd.Env = append(os.Environ(), restrictedEnv+"=1", "HIBERGATED_NETTEST=none") // which are ours: it may not make any
		cmd.ExtraFiles = files
		var e error
		out, e = cmd.CombinedOutput()
		err <- e
	}()
	if err := <-err; err != nil {
		t.Errorf("%v:\n%s", err, out)
	} else if strings.Contains(string(out), "--- SKIP") {
		t.Skipf("%s", out)
	}
}

const restrictedEnv = "HIBERGATED_TEST_RESTRICTED"

// A program that does not let itself be looked into finds its address taken, and the user hears why.
func TestBindUndumpable(t *testing.T) {
	if os.Getenv(restrictedEnv) == "" {
		t.Parallel()
		restricted(t, []uintptr{unix.CAP_SYS_PTRACE})
		return
	}
	s := mustOpen(t, "tcp://127.0.0.1:0", activation.Options{})
	p := mustStart(t, start{})
	_, e := p.adopt(Options{Have: have(s)})
	fd := p.tcp4()
	p.mustBind(fd, address(s))
	p.ours(fd, s, true)
	e.take()
	p.must("prctl", p.do(sys(unix.SYS_PRCTL, unix.PR_SET_DUMPABLE, 0, 0, 0, 0)))
	for i := range 2 {
		wantErrno(t, "bind", p.bind(p.tcp4(), address(s)), unix.EADDRINUSE)
		if i == 0 {
			e.want("the first time", Event{Kind: Refused, Text: "may not look into the program"})
		} else {
			e.want("the second time")
		}
	}
	// The socket that it has it keeps, and others go on.
	wantErrno(t, "listen", p.listen(fd, 1), 0)
	wantErrno(t, "any port", p.bind(p.tcp4(), inet("127.0.0.1:0")), 0)
}

// What the program was permitted to set, and we are not, it misses, and the user hears of it.
func TestBindIncomplete(t *testing.T) {
	if os.Getenv(restrictedEnv) == "" {
		t.Parallel()
		nettest.Need(t, asks)
		marked := mustSocket(t, unix.AF_INET, unix.SOCK_STREAM)
		if err := unix.SetsockoptInt(marked, unix.SOL_SOCKET, unix.SO_MARK, 7); err != nil {
			t.Skip(err)
		}
		fd, err := unix.FcntlInt(uintptr(marked), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		f := os.NewFile(uintptr(fd), "marked")
		defer f.Close()
		restricted(t, []uintptr{unix.CAP_NET_ADMIN, unix.CAP_NET_RAW}, f)
		return
	}
	s := mustOpen(t, "tcp://127.0.0.1:0", activation.Options{})
	const inherited, theirs = 3, 4
	p := mustStart(t, start{extra: os.NewFile(inherited, "marked")})
	_, e := p.adopt(Options{Have: have(s)})
	p.set(theirs, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	p.mustBind(theirs, address(s))
	e.want("bind", Event{Kind: Incomplete, Socket: s, Text: fmt.Sprintf("socket option %d of level 1", unix.SO_MARK)}, Event{Kind: Bound, Socket: s})
	p.ours(theirs, s, true)
	if p.get(theirs, unix.IPPROTO_TCP, unix.TCP_NODELAY) != 1 {
		t.Error("the others are missing, too")
	}
}
