package adopt

import (
	"encoding/binary"
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"hibergate/activation"
	"hibergate/activation/nettest"
)

// Another thread changes the address while it is looked at. Whatever comes of it, the program has either a socket of ours or
// what it could bind without us, and none of ours is in a place where it was not asked for.
func TestBindChangedMeanwhile(t *testing.T) {
	t.Parallel()
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		t.Skip("the port is in the upper half of the first word")
	}
	s := mustOpen(t, "tcp://127.0.0.1:0", activation.Options{})
	own, foreign := mustOpen(t, "tcp://127.0.0.1:0", activation.Options{}), mustOpen(t, "tcp://127.0.0.1:0", activation.Options{})
	p := mustStart(t, start{})
	_, e := p.adopt(Options{Have: have(s)})
	free := freshPort()
	first := func(port int) int {
		return int(binary.NativeEndian.Uint32(inet(fmt.Sprintf("127.0.0.1:%d", port))))
	}
	const times = 300
	for name, other := range map[string]int{"what somebody has": int(foreign.Address().Port), "what is free": free} {
		p.do(order{Op: "remember", Args: []arg{{Ref: name, Bytes: address(s)}}})
		p.do(order{Op: "flip", Args: []arg{{Ref: name}, {Int: uint64(first(int(s.Address().Port)))}, {Int: uint64(first(other))}}})
		count := map[string]int{}
		for range times {
			fd := p.tcp4()
			mine := p.cookie(fd)
			err := p.do(sys(unix.SYS_BIND, fd, ref(name), lenInet4).on(1)).failure()
			port, cookie := p.port(fd), p.cookie(fd)
			switch {
			case err == nil && cookie == s.Cookie():
				count["ours"]++
			case err == nil && cookie == mine && port == other && other == free:
				count["its own"]++
			case cookie == mine && port == 0 && (err == unix.EADDRINUSE || err == nil && other == free): //nolint:errorlint // it is an Errno
				count["nothing"]++
			default:
				t.Errorf("%s: got %v, port %d, cookie %d (its own %d, ours %d, foreign %d)", name, err, port, cookie, mine, s.Cookie(), foreign.Cookie())
			}
			p.close(fd)
		}
		p.do(order{Op: "still", Args: []arg{{Ref: name}}})
		bound := 0
		for _, ev := range e.take() {
			if ev.Kind != Bound || ev.Socket != s {
				t.Errorf("%s: got event %v", name, list([]Event{ev}))
			}
			bound++
		}
		if bound != count["ours"] {
			t.Errorf("%s: %d times it was said that it has ours, and it had it %d times", name, bound, count["ours"])
		}
		t.Logf("%s: %v", name, count)
	}
	for _, o := range []*activation.Socket{s, own, foreign} { // everybody still listens where he did
		mustDial(t, o, "hello")
	}
}

// port is where a descriptor of the program is bound.
func (p *program) port(fd int) int {
	p.t.Helper()
	r := p.do(sys(unix.SYS_GETSOCKNAME, fd, make([]byte, lenStorage), []byte{lenStorage, 0, 0, 0}))
	p.must("getsockname", r)
	return int(binary.BigEndian.Uint16(r.Bytes[1][2:]))
}

// Another thread changes the port while UDP is learned: what is bound is what was looked at.
func TestLearnChangedMeanwhile(t *testing.T) {
	t.Parallel()
	p := mustStart(t, start{})
	wanted, other := freshPort(), freshPort()
	_, e := p.adopt(Options{Learn: learn(fmt.Sprintf("udp://:%d", wanted))})
	first := func(port int) uint64 {
		return uint64(binary.NativeEndian.Uint32(inet(fmt.Sprintf("127.0.0.1:%d", port))))
	}
	p.do(order{Op: "remember", Args: []arg{{Ref: "a", Bytes: inet(fmt.Sprintf("127.0.0.1:%d", wanted))}}})
	p.do(order{Op: "flip", Args: []arg{{Ref: "a"}, {Int: first(wanted)}, {Int: first(other)}}})
	for range 100 {
		fd := p.socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
		_ = p.do(sys(unix.SYS_BIND, fd, ref("a"), lenInet4).on(1))
		p.close(fd)
	}
	p.do(order{Op: "still", Args: []arg{{Ref: "a"}}})
	var learned *activation.Socket
	for _, ev := range e.take() {
		switch {
		case ev.Kind == Learned && learned == nil:
			learned = ev.Socket
			e.own(learned)
			if got := int(learned.Address().Port); got != wanted {
				t.Errorf("learned port %d, want %d", got, wanted)
			}
		case ev.Kind != Bound || ev.Socket != learned:
			t.Errorf("got event %v", list([]Event{ev}))
		}
	}
}

// Threads that do nothing but bind are all answered, however long that takes.
func TestStorm(t *testing.T) {
	t.Parallel()
	s := mustOpen(t, "tcp://127.0.0.1:0", activation.Options{})
	p := mustStart(t, start{})
	_, e := p.adopt(Options{Have: have(s)})
	const threads, times = 4, 300
	b := inet("127.0.0.1:0")
	var all []<-chan answer
	for i := range threads {
		a := address(s)
		if i%2 == 1 {
			a = b
		}
		all = append(all, p.begin(order{Op: "storm", Thread: i, Times: times, Args: []arg{{Bytes: a}}}))
	}
	for i, c := range all {
		r, ok := p.wait(c)
		if !ok || r.Count[0] != times {
			t.Errorf("thread %d: got %v, %v, want %d without an error", i, r.Count, ok, times)
		}
	}
	if got := len(e.take()); got != threads/2*times {
		t.Errorf("got %d events, want %d", got, threads/2*times)
	}
	fd := p.tcp4()
	p.mustBind(fd, address(s))
	p.ours(fd, s, true)
}

// A Session that makes a program wait, because it was busy, ends at once all the same.
func TestCloseWhileStorm(t *testing.T) {
	t.Parallel()
	s := mustOpen(t, "tcp://127.0.0.1:0", activation.Options{})
	p := mustStart(t, start{})
	bound := make(chan struct{}, 1)
	session, _ := p.adopt(Options{Have: have(s), Report: func(Event) {
		select {
		case bound <- struct{}{}:
		default:
		}
	}})
	const times = 100000
	c := p.begin(order{Op: "storm", Times: times, Args: []arg{{Bytes: address(s)}}})
	for range 100 {
		<-bound
	}
	if err := session.Close(); err != nil {
		t.Error(err)
	}
	if r, _ := p.wait(c); r.Count[0]+r.Count[unix.ENOSYS] != times || r.Count[0] < 100 || r.Count[unix.ENOSYS] == 0 {
		t.Errorf("got %v, want no error until Close, and ENOSYS from then on", r.Count)
	}
}

// A program that is killed while it waits for an answer costs nobody else his.
func TestKilledWhileAsking(t *testing.T) {
	t.Parallel()
	s := mustOpen(t, "tcp://127.0.0.1:0", activation.Options{})
	p := mustStart(t, start{fork: true})
	var child int
	_, e := p.adopt(Options{Have: have(s), Held: func(uint64) bool {
		if err := unix.Kill(child, unix.SIGKILL); err != nil {
			t.Error(err)
		}
		nettest.Eventually(t, func() error { return gone(child) })
		return false
	}})
	c := p.fork()
	child = c.must("getpid", c.do(sys(unix.SYS_GETPID)))
	c.mustBind(c.tcp4(), address(s))
	e.want("bind", Event{Kind: Bound, Socket: s})
	if r, ok := c.wait(c.begin(sys(unix.SYS_BIND, c.tcp4(), address(s), lenInet4))); ok {
		t.Errorf("got %v of a dead program", r.Errno)
	}
	p.do(order{Op: "reap"})
	e.take()
	// The parent is answered all the same, also as one that has the id of nobody any more.
	own := mustOpen(t, "tcp://127.0.0.1:0", activation.Options{})
	q := mustStart(t, start{})
	q.adopt(Options{Have: have(own)})
	q.mustBind(q.tcp4(), address(own))
	fd := p.tcp4()
	p.mustBind(fd, inet("127.0.0.1:0"))
	p.mustListen(fd, 1)
}

// gone returns nil when a process is dead, reaped or not.
func gone(pid int) error {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil //nolint:nilerr // it is not there any more
	}
	if _, state, _ := strings.Cut(string(b), ") "); !strings.HasPrefix(state, "Z") {
		return fmt.Errorf("process %d lives: %s", pid, state)
	}
	return nil
}

// On kernels that let a signal interrupt a bind that has been begun with, the program asks again, and has the socket already.
func TestBindInterrupted(t *testing.T) {
	t.Parallel()
	dir := shortDir(t)
	for _, where := range []string{"tcp://127.0.0.1:0", "unix://" + dir + "/s", "udp://127.0.0.1:0"} {
		s := mustOpen(t, where, activation.Options{})
		p := mustStart(t, start{paths: true})
		var tid int
		interrupted := 0
		_, e := p.adopt(Options{
			Have: have(s),
			Held: func(uint64) bool { return true }, // by this very thread
			Report: func(ev Event) {
				if ev.Kind != Bound || interrupted > 0 {
					return
				}
				interrupted++
				interrupt(t, p.cmd.Process.Pid, tid)
			},
		})
		const thread = 2
		tid = p.must("gettid", p.do(sys(unix.SYS_GETTID).on(thread)))
		kind := getInt(t, s.FD(), unix.SOL_SOCKET, unix.SO_TYPE)
		fd := p.socket(getInt(t, s.FD(), unix.SOL_SOCKET, unix.SO_DOMAIN), kind, 0)
		b := address(s)
		wantErrno(t, where, p.do(sys(unix.SYS_BIND, fd, b, len(b)).on(thread)).failure(), 0)
		p.ours(fd, s, true)
		if interrupted != 1 {
			t.Errorf("%s: interrupted %d times", where, interrupted)
		}
		if got := e.take(); len(got) == 0 || got[0].Kind != Bound {
			t.Errorf("%s: got events %v", where, list(got))
		}
		// It is not a licence for the next time.
		wantErrno(t, where+" again", p.do(sys(unix.SYS_BIND, fd, b, len(b)).on(thread)).failure(), unix.EINVAL)
		other := p.socket(getInt(t, s.FD(), unix.SOL_SOCKET, unix.SO_DOMAIN), kind, 0)
		wantErrno(t, where+" by another", p.do(sys(unix.SYS_BIND, other, b, len(b)).on(thread)).failure(), unix.EADDRINUSE)
	}
}

// interrupt sends a thread a signal that means nothing to it (SIGURG), and returns when it has taken that: then
// it asks no more, and is about to ask again.
func interrupt(t *testing.T, pid, tid int) {
	t.Helper()
	if err := unix.Tgkill(pid, tid, unix.SIGURG); err != nil {
		t.Error(err)
		return
	}
	nettest.Eventually(t, func() error {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/status", pid, tid))
		if err != nil {
			return err
		}
		_, pending, _ := strings.Cut(string(b), "\nSigPnd:\t")
		pending, _, _ = strings.Cut(pending, "\n")
		var set uint64
		if _, err := fmt.Sscanf(pending, "%x", &set); err != nil || set&(1<<(unix.SIGURG-1)) != 0 {
			return fmt.Errorf("pending %q: %w", pending, err)
		}
		return nil
	})
}
