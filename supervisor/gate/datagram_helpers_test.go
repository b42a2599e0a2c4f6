package gate

import (
	"errors"
	"net"
	"net/netip"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation"
)

// mustOpenUDP opens a socket as the configuration of a gate does.
func mustOpenUDP(tb testing.TB, address string) *activation.Socket {
	tb.Helper()
	a, err := activation.ParseAddress(address)
	if err != nil {
		tb.Fatal(err)
	}
	s, err := activation.Open(activation.Spec{Address: a, Options: activation.Options{PacketInfo: true}})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := s.Close(); err != nil {
			tb.Error(err)
		}
	})
	return s
}

// udpBackend answers each datagram with its name, a space, and what it got.
type udpBackend struct {
	name   string
	at     netip.AddrPort
	conn   *net.UDPConn
	served atomic.Int64
	done   chan struct{}
}

// startUDP starts a backend at the address, whose port is 0. It keeps its port while it is stopped.
func startUDP(tb testing.TB, name, address string) *udpBackend {
	tb.Helper()
	keeper := listenUDP(tb, address)
	b := &udpBackend{name: name, at: keeper.LocalAddr().(*net.UDPAddr).AddrPort()}
	// A socket with a peer gets nothing from others.
	raw, err := keeper.SyscallConn()
	if err != nil {
		tb.Fatal(err)
	}
	var nobody unix.Sockaddr = &unix.SockaddrInet4{Addr: [4]byte{127, 9, 9, 9}, Port: 9}
	if b.at.Addr().Is6() {
		nobody = &unix.SockaddrInet6{Addr: netip.IPv6Loopback().As16(), Port: 9}
	}
	if e := raw.Control(func(fd uintptr) { err = unix.Connect(int(fd), nobody) }); e != nil || err != nil {
		tb.Fatal(e, err)
	}
	b.start(tb)
	tb.Cleanup(b.stop)
	return b
}

// listenUDP opens a socket that may share its port.
func listenUDP(tb testing.TB, address string) *net.UDPConn {
	tb.Helper()
	lc := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) (err error) {
		e := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
		return errors.Join(e, err)
	}}
	conn, err := lc.ListenPacket(tb.Context(), "udp", address)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { conn.Close() })
	return conn.(*net.UDPConn)
}

func (b *udpBackend) start(tb testing.TB) {
	tb.Helper()
	b.conn, b.done = listenUDP(tb, b.at.String()), make(chan struct{})
	go b.serve()
}

// stop makes the kernel answer that nobody is there.
func (b *udpBackend) stop() {
	b.conn.Close()
	<-b.done
}

func (b *udpBackend) serve() {
	defer close(b.done)
	buf := make([]byte, maxDatagram)
	for {
		n, from, err := b.conn.ReadFromUDPAddrPort(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // a client has left
		}
		b.served.Add(1)
		answer := buf[:n]
		if b.name != "" {
			answer = append([]byte(b.name+" "), answer...)
		}
		b.conn.WriteToUDPAddrPort(answer, from)
	}
}

func (b *udpBackend) target(index int) Target {
	return Target{Index: index, FD: -1, Address: activation.Address{Network: activation.UDP, IP: b.at.Addr().Unmap(), Port: b.at.Port()}}
}

// udpClient has a socket that is connected to one of ours.
type udpClient struct {
	*net.UDPConn
	tb testing.TB
}

func dialUDP(tb testing.TB, to netip.AddrPort) *udpClient {
	tb.Helper()
	conn, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to))
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { conn.Close() })
	return &udpClient{conn, tb}
}

// portOf returns where ip and the port of the socket lead.
func portOf(s *activation.Socket, ip string) netip.AddrPort {
	return netip.AddrPortFrom(netip.MustParseAddr(ip), s.Address().Port)
}

func (c *udpClient) send(text string) {
	c.tb.Helper()
	if _, err := c.Write([]byte(text)); err != nil {
		c.tb.Fatal(err)
	}
}

func (c *udpClient) receive() string {
	c.tb.Helper()
	b := make([]byte, maxDatagram)
	c.SetReadDeadline(time.Now().Add(30 * time.Second))
	n, err := c.Read(b)
	if err != nil {
		c.tb.Fatal(err)
	}
	return string(b[:n])
}

// ask sends a text and returns the answer.
func (c *udpClient) ask(text string) string {
	c.tb.Helper()
	c.send(text)
	return c.receive()
}

// datagramRig is a relay under test.
type datagramRig struct {
	*datagrams
	socket *activation.Socket
	lost   chan bool    // served, for each call of the hook
	ahead  atomic.Int64 // of the clock, in nanoseconds
}

func newDatagramRig(tb testing.TB, spec *Spec, address string) *datagramRig {
	tb.Helper()
	if spec.SessionTimeout == 0 {
		spec.SessionTimeout = time.Minute
	}
	r := &datagramRig{socket: mustOpenUDP(tb, address), lost: make(chan bool, 100)}
	r.datagrams = newDatagrams(spec, []*activation.Socket{r.socket}, datagramHooks{
		lost: func(err error, served bool) {
			if !errors.Is(err, unix.ECONNREFUSED) {
				tb.Errorf("lost: %v", err)
			}
			r.lost <- served
		},
	})
	start := time.Now()
	r.now = func() time.Time { return start.Add(time.Duration(r.ahead.Load())) }
	tb.Cleanup(r.close)
	return r
}

// later lets time pass for the relay, which else stands still.
func (r *datagramRig) later(d time.Duration) {
	r.ahead.Add(int64(d))
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ring()
}

func (r *datagramRig) mustAdmit(tb testing.TB, backends ...*udpBackend) {
	tb.Helper()
	var targets []Target
	for i, b := range backends {
		targets = append(targets, b.target(i))
	}
	if err := r.admit(targets); err != nil {
		tb.Fatal(err)
	}
}

// awaitLost waits for the hook, and returns what it was told.
func (r *datagramRig) awaitLost(tb testing.TB) bool {
	tb.Helper()
	select {
	case served := <-r.lost:
		return served
	case <-time.After(30 * time.Second):
		tb.Fatal("not lost within 30s")
		return false
	}
}

// ended says whether the goroutine has released everything.
func (r *datagramRig) ended() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.watcher == nil
}
