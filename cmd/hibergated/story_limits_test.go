package main

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"syscall"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"
)

// caller is a client that a script does not wait for. It is held like others, so that release
// ends it.
type caller struct {
	net.Conn               // nil as long as it is not connected
	done     chan struct{} // closed once it is connected, or cannot be
	err      error         // why it cannot
	cancel   context.CancelFunc
}

// Close gives it up, whatever it has come to.
func (c *caller) Close() error {
	c.cancel()
	<-c.done
	if c.Conn == nil {
		return nil
	}
	return c.Conn.Close()
}

// call NAME FROM NETWORK ADDRESS [TEXT]: connects from a local address ("-": any) and sends the text, all in
// the background.
func cmdCall(ts *testscript.TestScript, neg bool, args []string) {
	noNeg(ts, neg)
	usage(ts, len(args) == 4 || len(args) == 5, "call NAME FROM NETWORK ADDRESS [TEXT]")
	var dialer net.Dialer
	if args[1] != "-" {
		from := netip.AddrPortFrom(netip.MustParseAddr(args[1]), 0)
		dialer.LocalAddr = net.TCPAddrFromAddrPort(from)
		if args[2] == "udp" {
			dialer.LocalAddr = net.UDPAddrFromAddrPort(from)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	c := &caller{done: make(chan struct{}), cancel: cancel}
	go func() {
		defer close(c.done)
		conn, err := dialer.DialContext(ctx, args[2], args[3])
		if err != nil {
			c.err = err
			return
		}
		c.Conn = conn
		if len(args) == 5 {
			_, c.err = conn.Write([]byte(args[4] + "\n"))
		}
	}()
	storyOf(ts).held[args[0]] = c
}

// answer NAME: prints the next line that a caller gets. With "!" the connection is closed without one.
func cmdAnswer(ts *testscript.TestScript, neg bool, args []string) {
	c := callerOf(ts, args)
	<-c.done
	if c.Conn == nil {
		ts.Fatalf("not connected: %v", c.err)
	}
	line, err := ask(c, "")
	switch {
	case neg && (line != "" || err == nil || isTimeout(err)):
		ts.Fatalf("it got %q, %v", line, err)
	case !neg:
		ts.Check(errors.Join(c.err, err))
		_, err = ts.Stdout().Write([]byte(line))
		ts.Check(err)
	}
}

func isTimeout(err error) bool {
	var e net.Error
	return errors.As(err, &e) && e.Timeout()
}

// silent NAME: a caller has got nothing so far, not even the end of its connection.
func cmdSilent(ts *testscript.TestScript, neg bool, args []string) {
	noNeg(ts, neg)
	c := callerOf(ts, args)
	select {
	case <-c.done:
		ts.Check(c.err)
	default:
		return
	}
	raw, err := c.Conn.(syscall.Conn).SyscallConn()
	ts.Check(err)
	var n int
	var got error
	ts.Check(raw.Control(func(fd uintptr) {
		n, _, got = unix.Recvfrom(int(fd), make([]byte, 64), unix.MSG_PEEK|unix.MSG_DONTWAIT)
	}))
	if !errors.Is(got, unix.EAGAIN) {
		ts.Fatalf("it got %d bytes, %v", n, got)
	}
}

// connected NAME: waits until a caller is.
func cmdConnected(ts *testscript.TestScript, neg bool, args []string) {
	noNeg(ts, neg)
	c := callerOf(ts, args)
	<-c.done
	ts.Check(c.err)
}

func callerOf(ts *testscript.TestScript, args []string) *caller {
	usage(ts, len(args) == 1, "NAME")
	c, ok := storyOf(ts).held[args[0]].(*caller)
	if !ok {
		ts.Fatalf("nobody calls as %s", args[0])
	}
	return c
}
