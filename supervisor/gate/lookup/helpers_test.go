package lookup_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"hibergate/activation"
	"hibergate/activation/nettest"
	"hibergate/supervisor/gate/lookup"
)

// helper says in the environment of the test binary what it is to be: "serve OPTION... NETWORK ADDRESS", or
// "table LISTEN DESTINATION".
const helper = "HIBERGATED_LOOKUP_HELPER"

func TestMain(m *testing.M) {
	switch words := strings.Fields(os.Getenv(helper)); {
	case len(words) == 0:
		os.Exit(nettest.Main(m))
	case words[0] == "serve":
		runServer(words[1:])
	case words[0] == "table":
		runTable(words[1], words[2])
	}
}

// server answers each line of its clients with its name and the line; "who" it answers with the addresses of both ends. It closes
// the connection after "bye".
type server struct {
	net.Listener
	name    string
	clients atomic.Int64 // so far
	wait    sync.WaitGroup

	mu   sync.Mutex
	open map[net.Conn]bool
}

func serve(name string, l net.Listener) *server {
	s := &server{Listener: l, name: name, open: map[net.Conn]bool{}}
	s.wait.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			s.clients.Add(1)
			s.mu.Lock()
			s.open[c] = true
			s.mu.Unlock()
			s.wait.Go(func() { s.answer(c) })
		}
	})
	return s
}

func (s *server) answer(c net.Conn) {
	defer func() {
		s.mu.Lock()
		delete(s.open, c)
		s.mu.Unlock()
		c.Close()
	}()
	in := bufio.NewReader(c)
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			return
		}
		if line == "who\n" {
			line = c.RemoteAddr().String() + " " + c.LocalAddr().String() + "\n"
		}
		if _, err := c.Write([]byte(s.name + " " + line)); err != nil || line == "bye\n" {
			return
		}
	}
}

// stop ends the server and its connections.
func (s *server) stop() {
	s.Close()
	s.mu.Lock()
	for c := range s.open {
		c.Close()
	}
	s.mu.Unlock()
	s.wait.Wait()
}

// listen opens a socket of plain TCP.
func listen(network, address string, options ...string) (net.Listener, error) {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	set := func(fd int) (err error) {
		for _, o := range options {
			switch name, value, _ := strings.Cut(o, "="); name {
			case "reuseport":
				err = errors.Join(err, unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1))
			case "noreuse":
				err = errors.Join(err, unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 0))
			case "defer":
				err = errors.Join(err, unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT, 30))
			case "device":
				err = errors.Join(err, unix.BindToDevice(fd, value))
			case "mptcp":
				lc.SetMultipathTCP(true)
			}
		}
		return err
	}
	for _, o := range options {
		if o == "mptcp" {
			lc.SetMultipathTCP(true)
		}
	}
	lc.Control = func(_, _ string, raw syscall.RawConn) (err error) {
		return errors.Join(raw.Control(func(fd uintptr) { err = set(int(fd)) }), err)
	}
	return lc.Listen(context.Background(), network, address)
}

// mustGate opens our own listening socket, and serves it.
func mustGate(tb testing.TB, network, address string) *server {
	tb.Helper()
	l, err := listen(network, address)
	if err != nil {
		tb.Fatal(err)
	}
	s := serve("gate", l)
	tb.Cleanup(s.stop)
	return s
}

func (s *server) addrPort() netip.AddrPort {
	a := s.Addr().(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}

func (s *server) address() activation.Address {
	return activation.Address{Network: activation.TCP, IP: s.addrPort().Addr(), Port: s.addrPort().Port()}
}

// at is an address of the gate where it listens on all of them.
func (s *server) at(host string) string {
	return netip.AddrPortFrom(netip.MustParseAddr(host), s.addrPort().Port()).String()
}

// destination is a server in a process of its own, called "destination" if nothing else is said.
type destination struct {
	cmd    *exec.Cmd
	stdin  io.WriteCloser
	stdout *bufio.Reader
	to     netip.AddrPort
	ended  bool
}

// mustStart starts a destination. The last two words are network and address.
func mustStart(tb testing.TB, words ...string) *destination {
	tb.Helper()
	d, err := start("serve " + strings.Join(words, " "))
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(d.stop)
	if d.to, err = netip.ParseAddrPort(d.line()); err != nil {
		tb.Fatal(err)
	}
	return d
}

func start(what string) (*destination, error) {
	d := &destination{cmd: exec.Command("/proc/self/exe")}
	d.cmd.Env = append(os.Environ(), helper+"="+what, "GORACE=atexit_sleep_ms=0")
	d.cmd.Stderr = os.Stderr
	out, err := d.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if d.stdin, err = d.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	d.stdout = bufio.NewReader(out)
	return d, d.cmd.Start()
}

// line is the next one that it says.
func (d *destination) line() string {
	line, _ := d.stdout.ReadString('\n')
	return strings.TrimSpace(line)
}

// tell has it do something: "close" its listening socket, "shutdown" it, "listen" again with another one.
func (d *destination) tell(tb testing.TB, what string) {
	tb.Helper()
	fmt.Fprintln(d.stdin, what)
	if got := d.line(); got != what {
		tb.Fatalf("destination is to %s: got %q", what, got)
	}
}

// stop ends it in good order, kill does not; both wait for its end.
func (d *destination) stop() {
	if !d.ended {
		d.stdin.Close()
		d.cmd.Wait()
		d.ended = true
	}
}

func (d *destination) kill() {
	d.cmd.Process.Kill()
	d.stop()
}

// runServer is the process of a destination.
func runServer(words []string) {
	name, n := "destination", len(words)
	for _, w := range words {
		if value, ok := strings.CutPrefix(w, "name="); ok {
			name = value
		}
	}
	l, err := listen(words[n-2], words[n-1], words...)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println(l.Addr())
	var all []*server
	run := func(l net.Listener) {
		if words[0] != "idle" { // who does not accept
			all = append(all, serve(name, l))
		}
	}
	run(l)
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		switch in.Text() {
		case "close":
			l.Close()
		case "shutdown":
			if raw, err := l.(*net.TCPListener).SyscallConn(); err == nil {
				raw.Control(func(fd uintptr) { unix.Shutdown(int(fd), unix.SHUT_RDWR) })
			}
		case "listen":
			l, err = listen(words[n-2], l.Addr().String(), words...)
			if err != nil {
				fmt.Println(err)
				continue
			}
			run(l)
		}
		fmt.Println(in.Text())
	}
	l.Close()
	for _, s := range all {
		s.stop()
	}
}

// runTable is the process of another table, with one gate.
func runTable(from, to string) {
	t, err := lookup.Open()
	if err == nil {
		listen := netip.MustParseAddrPort(from)
		err = t.Add(1, activation.Address{Network: activation.TCP, IP: listen.Addr(), Port: listen.Port()}, activation.FamilyDefault, "", netip.MustParseAddrPort(to))
	}
	fmt.Println(err)
	io.Copy(io.Discard, os.Stdin)
}

func mustOpen(tb testing.TB) *lookup.Table {
	tb.Helper()
	nettest.Need(tb, nettest.Namespaces, nettest.RealRoot)
	t, err := lookup.Open()
	if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EPERM) || errors.Is(err, unix.EINVAL) {
		nettest.Need(tb, func() error { return err })
	}
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := t.Close(); err != nil {
			tb.Error(err)
		}
	})
	return t
}

func mustAdd(tb testing.TB, t *lookup.Table, key uint32, from *server, to netip.AddrPort) {
	tb.Helper()
	if err := t.Add(key, from.address(), activation.FamilyDefault, "", to); err != nil {
		tb.Fatal(err)
	}
}

func mustRemove(tb testing.TB, t *lookup.Table, key uint32) {
	tb.Helper()
	if err := t.Remove(key); err != nil {
		tb.Fatal(err)
	}
}

// say sends a line and returns the answer: who gives it, and what it says.
func say(c net.Conn, line string) (name, answer string, err error) {
	if _, err := c.Write([]byte(line + "\n")); err != nil {
		return "", "", err
	}
	b := make([]byte, 256)
	n, err := c.Read(b)
	if err != nil {
		return "", "", err
	}
	name, answer, _ = strings.Cut(strings.TrimSpace(string(b[:n])), " ")
	return name, answer, nil
}

// visit connects, asks, and closes first.
func visit(address string) (string, error) {
	c, err := net.Dial("tcp", address)
	if err != nil {
		return "", err
	}
	defer c.Close()
	name, _, err := say(c, "hello")
	return name, err
}

func expect(tb testing.TB, address, want string) {
	tb.Helper()
	if got, err := visit(address); err != nil || got != want {
		tb.Errorf("%s: got answer of %q, %v, want that of %s", address, got, err, want)
	}
}

func expectOn(tb testing.TB, c net.Conn, want string) {
	tb.Helper()
	if got, _, err := say(c, "hello"); err != nil || got != want {
		tb.Errorf("%v to %v: got answer of %q, %v, want that of %s", c.LocalAddr(), c.RemoteAddr(), got, err, want)
	}
}

func dial(tb testing.TB, address string) net.Conn {
	tb.Helper()
	c, err := net.Dial("tcp", address)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { c.Close() })
	return c
}

func run(tb testing.TB, name string, args ...string) {
	tb.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		tb.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
}

// machine is another network namespace, one cable away.
type machine struct {
	work chan func()
	done sync.WaitGroup
}

// mustBoot makes a machine; ours and theirs are the ends of the cable, such as "10.1.0.2/24".
func mustBoot(tb testing.TB, link string, ours, theirs []string) *machine {
	tb.Helper()
	nettest.Need(tb, nettest.Namespaces, nettest.RealRoot, nettest.Tool("ip"))
	m := &machine{work: make(chan func())}
	ready := make(chan error)
	var ns string
	m.done.Go(func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		ns = fmt.Sprintf("/proc/%d/task/%d/ns/net", os.Getpid(), unix.Gettid())
		ready <- err
		for f := range m.work {
			f()
		}
	})
	tb.Cleanup(func() {
		close(m.work)
		m.done.Wait()
	})
	if err := <-ready; err != nil {
		tb.Fatal(err)
	}
	run(tb, "ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", ns)
	tb.Cleanup(func() { exec.Command("ip", "link", "del", link).Run() })
	for _, a := range ours {
		run(tb, "ip", "addr", "add", a, "dev", link, "nodad")
	}
	run(tb, "ip", "link", "set", link, "up")
	m.do(func() {
		for _, a := range theirs {
			run(tb, "ip", "addr", "add", a, "dev", "eth0", "nodad")
		}
		run(tb, "ip", "link", "set", "eth0", "up")
	})
	return m
}

// do runs f on the machine, in which the sockets are that f opens itself.
func (m *machine) do(f func()) {
	done := make(chan struct{})
	m.work <- func() {
		defer close(done)
		f()
	}
	<-done
}

// visit is a visit from there.
func (m *machine) expect(tb testing.TB, address, want string) {
	tb.Helper()
	to := netip.MustParseAddrPort(address)
	var fd int
	var err error
	m.do(func() {
		domain, sockaddr := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Addr: [4]byte(to.Addr().AsSlice()), Port: int(to.Port())})
		if to.Addr().Is6() {
			domain, sockaddr = unix.AF_INET6, &unix.SockaddrInet6{Addr: to.Addr().As16(), Port: int(to.Port())}
		}
		if fd, err = unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return
		}
		for err = unix.Connect(fd, sockaddr); errors.Is(err, unix.EINTR); {
			err = unix.Connect(fd, sockaddr)
		}
	})
	if err != nil {
		tb.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "socket")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		tb.Fatal(err)
	}
	defer c.Close()
	expectOn(tb, c, want)
}
