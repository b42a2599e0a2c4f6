package forward_test

import (
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
	"hibergate/supervisor/gate/forward"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

func mustOpen(tb testing.TB) *forward.Table {
	tb.Helper()
	nettest.Need(tb, nettest.Namespaces)
	t, err := forward.Open(strings.NewReplacer("/", "-", "#", "-").Replace(tb.Name()))
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

// server answers each line of its clients with its name and the line. It closes the connection after "bye\n", and resets it after "reset\n".
type server struct {
	net.Listener
	name    string
	clients atomic.Int64 // so far
	wait    sync.WaitGroup

	mu   sync.Mutex
	open map[net.Conn]bool
}

// mustServe starts a server on an address such as "127.0.0.1:0".
func mustServe(tb testing.TB, name, address string) *server {
	tb.Helper()
	l, err := net.Listen("tcp", address)
	if err != nil {
		tb.Fatal(err)
	}
	return serve(tb, name, l)
}

func serve(tb testing.TB, name string, l net.Listener) *server {
	tb.Helper()
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
	tb.Cleanup(s.stop)
	return s
}

func (s *server) answer(c net.Conn) {
	defer func() {
		s.mu.Lock()
		delete(s.open, c)
		s.mu.Unlock()
		c.Close()
	}()
	b := make([]byte, 256)
	for {
		n, err := c.Read(b)
		if err != nil {
			return
		}
		if _, err := c.Write(append([]byte(s.name+" "), b[:n]...)); err != nil {
			return
		}
		switch string(b[:n]) {
		case "reset\n":
			c.(*net.TCPConn).SetLinger(0)
			return
		case "bye\n":
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

func (s *server) address() activation.Address {
	a := s.Addr().(*net.TCPAddr).AddrPort()
	if a.Addr().IsUnspecified() {
		return activation.Address{Network: activation.TCP, Port: a.Port()}
	}
	return activation.Address{Network: activation.TCP, IP: a.Addr().Unmap(), Port: a.Port()}
}

func (s *server) addrPort() netip.AddrPort {
	a := s.Addr().(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}

// ask sends a line and returns the name of who answers.
func ask(c net.Conn) (string, error) { return say(c, "hello\n") }

func say(c net.Conn, what string) (string, error) {
	if _, err := c.Write([]byte(what)); err != nil {
		return "", err
	}
	b := make([]byte, 256)
	n, err := c.Read(b)
	if err != nil {
		return "", err
	}
	name, line, _ := strings.Cut(string(b[:n]), " ")
	if line != what {
		return "", fmt.Errorf("got %q", b[:n])
	}
	return name, nil
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

// visit connects, asks, and closes first.
func visit(address string) (string, error) {
	c, err := net.Dial("tcp", address)
	if err != nil {
		return "", err
	}
	defer c.Close()
	return ask(c)
}

func expect(tb testing.TB, address, want string) {
	tb.Helper()
	if got, err := visit(address); err != nil || got != want {
		tb.Errorf("%s: got answer of %q, %v, want that of %s", address, got, err, want)
	}
}

func expectOn(tb testing.TB, c net.Conn, want string) {
	tb.Helper()
	if got, err := ask(c); err != nil || got != want {
		tb.Errorf("%v to %v: got answer of %q, %v, want that of %s", c.LocalAddr(), c.RemoteAddr(), got, err, want)
	}
}

func mustAdd(tb testing.TB, t *forward.Table, key uint32, from *server, to netip.AddrPort) {
	tb.Helper()
	if err := t.Add(key, from.address(), activation.FamilyDefault, "", to); err != nil {
		tb.Fatal(err)
	}
}

func mustRemove(tb testing.TB, t *forward.Table, key uint32) {
	tb.Helper()
	if err := t.Remove(key); err != nil {
		tb.Fatal(err)
	}
}

func mustFlows(tb testing.TB, t *forward.Table, from *server, to netip.AddrPort) forward.Account {
	tb.Helper()
	a, err := t.Flows(tb.Context(), from.address(), to)
	if err != nil {
		tb.Fatal(err)
	}
	return a
}

func run(tb testing.TB, name string, args ...string) string {
	tb.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		tb.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// machine is another network namespace, one cable away.
type machine struct {
	work chan func()
	ns   string // path of its namespace
	done sync.WaitGroup
}

// mustBoot makes a machine with an interface eth0 and the addresses, each such as "10.1.0.2/24"; ours are the ends of the cable here.
func mustBoot(tb testing.TB, link string, ours, theirs []string) *machine {
	tb.Helper()
	nettest.Need(tb, nettest.Namespaces, nettest.Tool("ip"))
	m := &machine{work: make(chan func())}
	ready := make(chan error)
	m.done.Go(func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		m.ns = fmt.Sprintf("/proc/%d/task/%d/ns/net", os.Getpid(), unix.Gettid())
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
	run(tb, "ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", m.ns)
	tb.Cleanup(func() { exec.Command("ip", "link", "del", link).Run() })
	for _, a := range ours {
		run(tb, "ip", "addr", "add", a, "dev", link, "nodad")
	}
	run(tb, "ip", "link", "set", link, "up")
	m.run(tb, "ip", "link", "set", "lo", "up")
	for _, a := range theirs {
		m.run(tb, "ip", "addr", "add", a, "dev", "eth0", "nodad")
	}
	m.run(tb, "ip", "link", "set", "eth0", "up")
	return m
}

// run runs a program on the machine.
func (m *machine) run(tb testing.TB, name string, args ...string) {
	tb.Helper()
	var out []byte
	var err error
	m.do(func() { out, err = exec.Command(name, args...).CombinedOutput() })
	if err != nil {
		tb.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
}

// do runs f on the machine, in which the sockets are that f opens itself. f must not end the test.
func (m *machine) do(f func()) {
	done := make(chan struct{})
	m.work <- func() {
		defer close(done)
		f()
	}
	<-done
}

// serve starts a server there.
func (m *machine) serve(tb testing.TB, name, address string) *server {
	tb.Helper()
	var l net.Listener
	var err error
	m.do(func() { l, err = net.Listen("tcp", address) })
	if err != nil {
		tb.Fatal(err)
	}
	return serve(tb, name, l)
}

// dial connects from there.
func (m *machine) dial(tb testing.TB, address string) net.Conn {
	tb.Helper()
	var c net.Conn
	var err error
	m.do(func() { c, err = dialHere(netip.MustParseAddrPort(address), netip.AddrPort{}, false) })
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { c.Close() })
	return c
}

func (m *machine) visit(address string) (name string, err error) {
	var c net.Conn
	m.do(func() { c, err = dialHere(netip.MustParseAddrPort(address), netip.AddrPort{}, false) })
	if err != nil {
		return "", err
	}
	defer c.Close()
	return ask(c)
}

func (m *machine) expect(tb testing.TB, address, want string) {
	tb.Helper()
	if got, err := m.visit(address); err != nil || got != want {
		tb.Errorf("%s: got answer of %q, %v, want that of %s", address, got, err, want)
	}
}

// dialHere connects in the namespace of this thread, from a port if from is one. reset has its close reset the connection.
func dialHere(to, from netip.AddrPort, reset bool) (net.Conn, error) {
	domain := unix.AF_INET
	if to.Addr().Is6() {
		domain = unix.AF_INET6
	}
	fd, err := unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "socket")
	defer f.Close()
	unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	if reset {
		unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	}
	if from.IsValid() {
		if err := unix.Bind(fd, sockaddr(from)); err != nil {
			return nil, fmt.Errorf("bind: %w", err)
		}
	}
	for {
		if err = unix.Connect(fd, sockaddr(to)); !errors.Is(err, syscall.EINTR) {
			break
		}
	}
	if err != nil {
		return nil, fmt.Errorf("connect: %w", err)
	}
	return net.FileConn(f)
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
}

// isReset says that the other end is not there any more.
func isReset(c net.Conn) bool {
	_, err := ask(c)
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, io.EOF)
}

func splitAddress(a net.Addr) (host, port string) {
	host, port, _ = net.SplitHostPort(a.String())
	return host, port
}

func split(s *server) (host, port string) { return splitAddress(s.Addr()) }

// mustForward makes this machine a router.
func mustForward(tb testing.TB) {
	tb.Helper()
	nettest.Need(tb, nettest.Namespaces)
	for _, path := range []string{"/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding"} {
		if err := os.WriteFile(path, []byte("1\n"), 0); err != nil {
			tb.Fatal(err)
		}
	}
}
