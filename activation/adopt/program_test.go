package adopt

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation"
	"hibergate/activation/nettest"
)

// nextPort are ports below those that the kernel chooses, in a network of our own.
var nextPort atomic.Uint32

func freshPort() int { return 10000 + int(nextPort.Add(1)) }

// program is a process that was started with a filter, and does what the test tells it.
type program struct {
	t        testing.TB
	listener int // -1: of a Session, or a descendant's
	cmd      *exec.Cmd
	control  *os.File
	child    *os.File // the other end of its child; nil: none was asked for

	mu      sync.Mutex
	to      *json.Encoder
	nextID  int
	waiting map[int]chan answer
	gone    bool

	passes sync.Mutex
}

// pass tells the race detector what happens before what, as it knows nothing of what passes through the kernel and the program.
func (p *program) pass() {
	p.passes.Lock()
	p.passes.Unlock() //nolint:staticcheck // there is nothing to guard
}

// start says how a program is to be started.
type start struct {
	paths bool
	flags uintptr  // beside NEW_LISTENER
	fork  bool     // it can have a child
	extra *os.File // becomes its descriptor 4; not with fork
	uid   uint32   // RealRoot only
}

// mustStart starts a program, which ends with the test.
func mustStart(t *testing.T, s start) *program {
	t.Helper()
	nettest.Need(t, asks)
	ours, theirs := pair(t)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), roleEnv+"="+roleFilter, fmt.Sprintf("%s=%d", flagsEnv, s.flags), "GORACE=atexit_sleep_ms=0")
	if s.paths {
		cmd.Env = append(cmd.Env, pathsEnv+"=1")
	}
	var text strings.Builder
	cmd.Stderr = &text
	cmd.ExtraFiles = []*os.File{theirs}
	if s.extra != nil {
		cmd.ExtraFiles = append(cmd.ExtraFiles, s.extra)
	}
	var child *os.File
	if s.fork {
		var theirs *os.File
		child, theirs = pair(t)
		cmd.ExtraFiles = append(cmd.ExtraFiles, theirs)
		defer theirs.Close()
	}
	if s.uid != 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: s.uid, Gid: s.uid}}
	}
	err := cmd.Start()
	theirs.Close()
	if err != nil {
		t.Fatal(err)
	}
	p := newProgram(t, ours, cmd, child)
	p.listener, err = receiveFD(int(ours.Fd()))
	if err != nil {
		cmd.Wait()
		t.Fatal(err, text.String())
	}
	t.Cleanup(func() {
		p.end()
		if p.listener >= 0 {
			unix.Close(p.listener)
		}
		if text.Len() > 0 {
			t.Errorf("the program said %s", text.String())
		}
	})
	go p.receive()
	return p
}

func newProgram(tb testing.TB, control *os.File, cmd *exec.Cmd, child *os.File) *program {
	tb.Helper()
	return &program{t: tb, listener: -1, control: control, cmd: cmd, child: child, to: json.NewEncoder(control), waiting: map[int]chan answer{}}
}

func pair(tb testing.TB) (ours, theirs *os.File) {
	tb.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		tb.Fatal(err)
	}
	ours, theirs = os.NewFile(uintptr(fds[0]), "ours"), os.NewFile(uintptr(fds[1]), "theirs")
	tb.Cleanup(func() {
		ours.Close()
		theirs.Close()
	})
	return ours, theirs
}

// receiveFD takes the listener that comes first of all.
func receiveFD(from int) (int, error) {
	var b [1]byte
	oob := make([]byte, unix.CmsgSpace(4))
	for {
		_, n, _, _, err := unix.Recvmsg(from, b[:], oob, unix.MSG_CMSG_CLOEXEC)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return -1, err
		}
		messages, err := unix.ParseSocketControlMessage(oob[:n])
		if err != nil || len(messages) != 1 {
			return -1, fmt.Errorf("no listener: %d messages, %w", len(messages), errors.Join(err, io.ErrUnexpectedEOF))
		}
		fds, err := unix.ParseUnixRights(&messages[0])
		if err != nil {
			return -1, err
		}
		return fds[0], nil
	}
}

// receive hands the answers to those who wait, until the program is gone.
func (p *program) receive() {
	from := json.NewDecoder(p.control)
	for {
		var r answer
		err := from.Decode(&r)
		p.mu.Lock()
		if err != nil {
			p.gone = true
			for _, c := range p.waiting {
				close(c)
			}
			p.mu.Unlock()
			return
		}
		p.waiting[r.ID] <- r
		delete(p.waiting, r.ID)
		p.mu.Unlock()
	}
}

// end lets the program go, and waits for its end.
func (p *program) end() {
	if p.cmd == nil {
		return
	}
	unix.Shutdown(int(p.control.Fd()), unix.SHUT_RDWR)
	if p.child != nil {
		unix.Shutdown(int(p.child.Fd()), unix.SHUT_RDWR)
	}
	if err := p.cmd.Wait(); err != nil {
		p.t.Errorf("the program: %v", err)
	}
	p.cmd = nil
}

// begin has the program do something, and returns where the answer comes. A closed channel means that it is gone.
func (p *program) begin(r order) <-chan answer {
	p.pass()
	p.mu.Lock()
	defer p.mu.Unlock()
	c := make(chan answer, 1)
	if p.gone {
		close(c)
		return c
	}
	p.nextID++
	r.ID = p.nextID
	p.waiting[r.ID] = c
	if err := p.to.Encode(r); err != nil {
		p.t.Error(err)
	}
	return c
}

// wait returns false where the program ends instead.
func (p *program) wait(c <-chan answer) (answer, bool) {
	p.t.Helper()
	select {
	case out, ok := <-c:
		p.pass()
		return out, ok
	case <-time.After(time.Minute):
		p.t.Fatal("no answer for a minute")
		return answer{}, false
	}
}

func (p *program) do(r order) answer {
	p.t.Helper()
	out, ok := p.wait(p.begin(r))
	if !ok {
		p.t.Fatal("the program has ended")
	}
	if out.Err != "" {
		p.t.Fatal("the program: ", out.Err)
	}
	return out
}

// ref is memory of the program, by its name.
type ref string

// sys puts a system call into a order. Arguments are numbers, bytes, and refs.
func sys(nr uintptr, args ...any) order {
	r := order{NR: nr}
	for _, a := range args {
		switch a := a.(type) {
		case int:
			r.Args = append(r.Args, arg{Int: uint64(a)})
		case uint64:
			r.Args = append(r.Args, arg{Int: a})
		case []byte:
			r.Args = append(r.Args, arg{Bytes: a})
		case ref:
			r.Args = append(r.Args, arg{Ref: string(a)})
		default:
			panic(fmt.Sprintf("%T", a))
		}
	}
	return r
}

// result is the error of a call that was begun.
func (p *program) result(c <-chan answer) error {
	p.t.Helper()
	r, ok := p.wait(c)
	if !ok {
		p.t.Fatal("the program has ended")
	}
	return r.failure()
}

func (r answer) failure() error {
	if r.Errno != 0 {
		return r.Errno
	}
	return nil
}

// on has a thread of its own do it.
func (r order) on(thread int) order {
	r.Thread = thread
	return r
}

// The system calls. Those that must not fail end the test.

func (p *program) must(what string, r answer) int {
	p.t.Helper()
	if r.Errno != 0 {
		p.t.Fatalf("%s: %v", what, r.Errno)
	}
	return int(r.R1)
}

func (p *program) socket(domain, kind, protocol int) int {
	p.t.Helper()
	return p.must("socket", p.do(sys(unix.SYS_SOCKET, domain, kind|unix.SOCK_CLOEXEC, protocol)))
}

func (p *program) tcp4() int { p.t.Helper(); return p.socket(unix.AF_INET, unix.SOCK_STREAM, 0) }
func (p *program) tcp6() int { p.t.Helper(); return p.socket(unix.AF_INET6, unix.SOCK_STREAM, 0) }

func (p *program) bind(fd int, address []byte) error {
	p.t.Helper()
	return p.do(sys(unix.SYS_BIND, fd, address, len(address))).failure()
}

func (p *program) mustBind(fd int, address []byte) {
	p.t.Helper()
	if err := p.bind(fd, address); err != nil {
		p.t.Fatalf("bind: %v", err)
	}
}

func (p *program) listen(fd, backlog int) error {
	p.t.Helper()
	return p.do(sys(unix.SYS_LISTEN, fd, backlog)).failure()
}

func (p *program) mustListen(fd, backlog int) {
	p.t.Helper()
	if err := p.listen(fd, backlog); err != nil {
		p.t.Fatalf("listen: %v", err)
	}
}

func (p *program) close(fd int) { p.t.Helper(); p.must("close", p.do(sys(unix.SYS_CLOSE, fd))) }

func (p *program) fcntl(fd, cmd int) int {
	p.t.Helper()
	return p.must("fcntl", p.do(sys(unix.SYS_FCNTL, fd, cmd, 0)))
}

func (p *program) set(fd, level, option, value int) {
	p.t.Helper()
	b := binary.NativeEndian.AppendUint32(nil, uint32(value))
	p.must(fmt.Sprintf("set option %d of level %d", option, level), p.do(sys(unix.SYS_SETSOCKOPT, fd, level, option, b, len(b))))
}

func (p *program) get(fd, level, option int) int {
	p.t.Helper()
	r := p.do(sys(unix.SYS_GETSOCKOPT, fd, level, option, make([]byte, 4), []byte{4, 0, 0, 0}))
	p.must(fmt.Sprintf("get option %d of level %d", option, level), r)
	return int(int32(binary.NativeEndian.Uint32(r.Bytes[3])))
}

// cookie says which socket a descriptor of the program is.
func (p *program) cookie(fd int) uint64 {
	p.t.Helper()
	r := p.do(sys(unix.SYS_GETSOCKOPT, fd, unix.SOL_SOCKET, unix.SO_COOKIE, make([]byte, 8), []byte{8, 0, 0, 0}))
	p.must("read cookie", r)
	return binary.NativeEndian.Uint64(r.Bytes[3])
}

// serve accepts one client and answers what it says.
func (p *program) serve(fd int) {
	p.t.Helper()
	conn := p.must("accept", p.do(sys(unix.SYS_ACCEPT4, fd, 0, 0, unix.SOCK_CLOEXEC)))
	r := p.do(sys(unix.SYS_READ, conn, make([]byte, 100), 100))
	n := p.must("read", r)
	p.must("write", p.do(sys(unix.SYS_WRITE, conn, r.Bytes[1][:n], n)))
	p.close(conn)
}

// fork makes a child of the program, which the test tells what to do from then on.
func (p *program) fork() *program {
	p.t.Helper()
	p.do(order{Op: "fork"})
	c := newProgram(p.t, p.child, nil, nil)
	go c.receive()
	return c
}

// events are what a Session has reported.
type events struct {
	t       testing.TB
	session *Session
	mu      sync.Mutex
	all     []Event
	ended   chan struct{}
}

func (e *events) report(ev Event) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.all = append(e.all, ev)
}

// take returns what has been reported since the last time. What a call has brought about is there when it returns.
func (e *events) take() []Event {
	e.mu.Lock()
	defer e.mu.Unlock()
	out := e.all
	e.all = nil
	return out
}

// want fails the test unless exactly this was reported since the last time. A Text is looked for in the other.
func (e *events) want(what string, want ...Event) {
	e.t.Helper()
	got := e.take()
	ok := len(got) == len(want)
	for i := 0; ok && i < len(got); i++ {
		ok = got[i].Kind == want[i].Kind && got[i].Socket == want[i].Socket && strings.Contains(got[i].Text, want[i].Text)
	}
	if !ok {
		e.t.Errorf("%s: got events %v, want %v", what, list(got), list(want))
	}
}

// learned takes the one event that a socket was learned, and then those that are wanted of it.
func (e *events) learned(what string, then ...Kind) *activation.Socket {
	e.t.Helper()
	got := e.take()
	ok := len(got) == 1+len(then) && got[0].Kind == Learned && got[0].Socket != nil
	for i := 0; ok && i < len(then); i++ {
		ok = got[i+1].Kind == then[i] && got[i+1].Socket == got[0].Socket
	}
	if !ok {
		e.t.Fatalf("%s: got events %v, want Learned and %v", what, list(got), then)
	}
	e.own(got[0].Socket)
	return got[0].Socket
}

// own closes a socket that was learned, which is whoever's was told of it.
func (e *events) own(s *activation.Socket) {
	e.t.Helper()
	e.t.Cleanup(func() {
		e.session.Forget(s)
		if err := s.Close(); err != nil {
			e.t.Error(err)
		}
	})
}

func list(all []Event) []string {
	out := []string{}
	for _, e := range all {
		s := []string{"", "Bound", "Listening", "Learned", "Refused", "Incomplete", "Elsewhere", "IOUring"}[e.Kind]
		if e.Socket != nil {
			s += " " + e.Socket.Address().String()
		}
		if e.Text != "" {
			s += fmt.Sprintf(" %q", e.Text)
		}
		out = append(out, s)
	}
	return out
}

// adopt starts a Session for the program, which ends with the test.
func (p *program) adopt(opts Options) (*Session, *events) {
	p.t.Helper()
	e := &events{t: p.t, ended: make(chan struct{})}
	report, held, release := opts.Report, opts.Held, opts.Release
	opts.Report = func(ev Event) {
		p.pass()
		e.report(ev)
		if report != nil {
			report(ev)
		}
		p.pass()
	}
	if held != nil {
		opts.Held = func(inode uint64) bool {
			p.pass()
			defer p.pass()
			return held(inode)
		}
	}
	if release != nil {
		opts.Release = func(s *activation.Socket) bool {
			p.pass()
			defer p.pass()
			return release(s)
		}
	}
	opts.Ended = func(*Session) { close(e.ended) }
	s, err := Start(p.listener, opts)
	if err != nil {
		p.t.Fatal(err)
	}
	e.session = s
	p.listener = -1
	p.t.Cleanup(func() {
		if err := s.Close(); err != nil {
			p.t.Error(err)
		}
	})
	return s, e
}

// have are sockets of ours as Options take them.
func have(all ...*activation.Socket) (out []Have) {
	for _, s := range all {
		out = append(out, Have{Socket: s})
	}
	return out
}

// learn are patterns as Options take them.
func learn(all ...string) (out []Learn) {
	for _, text := range all {
		p, ok, err := ParsePattern(text)
		if !ok || err != nil {
			panic(text)
		}
		out = append(out, Learn{Pattern: p, Spec: activation.Spec{Name: "learned"}})
	}
	return out
}
