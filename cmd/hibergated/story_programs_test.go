package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"unsafe"

	"github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/sys/unix"
)

// echoServer is a service that takes its sockets by LISTEN_FDS and can be of any kind. To
// each connection or datagram it says its pid first, then sends back what it gets. A signal
// ends it at once, as it ends a C program that does not care.
func echoServer() {
	for _, sig := range []syscall.Signal{unix.SIGTERM, unix.SIGHUP, unix.SIGINT} {
		if err := defaultAction(sig); err != nil {
			fail(err)
		}
	}
	files := activation.Files(true)
	if len(files) == 0 {
		fail(fmt.Errorf("no sockets: LISTEN_FDS=%q LISTEN_PID=%q, pid %d", os.Getenv("LISTEN_FDS"), os.Getenv("LISTEN_PID"), os.Getpid()))
	}
	for _, f := range files {
		if l, err := net.FileListener(f); err == nil {
			go echoConnections(l)
		} else if p, err := net.FilePacketConn(f); err == nil {
			go echoDatagrams(p)
		} else {
			fail(err)
		}
	}
	select {}
}

// defaultAction undoes what the Go runtime did at its start.
func defaultAction(sig syscall.Signal) error {
	var action struct { // struct kernel_sigaction, all zero: SIG_DFL
		handler, flags, restorer uintptr
		mask                     uint64
	}
	_, _, errno := unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(sig), uintptr(unsafe.Pointer(&action)), 0, unsafe.Sizeof(action.mask), 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

func echoConnections(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			fail(err)
		}
		go func() {
			defer c.Close()
			fmt.Fprintf(c, "pid %d from %s\n", os.Getpid(), c.RemoteAddr())
			io.Copy(c, c)
		}()
	}
}

func echoDatagrams(p net.PacketConn) {
	buf := make([]byte, 64<<10)
	for {
		n, from, err := p.ReadFrom(buf)
		if err != nil {
			fail(err)
		}
		if _, err := p.WriteTo(fmt.Appendf(nil, "pid %d: %s\n", os.Getpid(), buf[:n]), from); err != nil {
			fail(err)
		}
	}
}

// slowToDie serves as echoServer does, and ignores every polite signal.
func slowToDie() {
	signal.Ignore(syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	l, err := activation.Listeners()
	if err != nil || len(l) == 0 {
		fail(errors.Join(errors.New("no sockets"), err))
	}
	echoConnections(l[0])
}

// fifoReader appends what it reads from its FIFO to the file that is its argument.
func fifoReader() {
	out, err := os.OpenFile(os.Args[1], os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o666)
	if err != nil {
		fail(err)
	}
	fifo := activation.Files(true)[0]
	if _, err := fmt.Fprintf(out, "reader of %s\n", strings.TrimPrefix(fifo.Name(), "LISTEN_FD_")); err != nil {
		fail(err)
	}
	if _, err := io.Copy(out, fifo); err != nil {
		fail(err)
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, os.Args[0]+":", err)
	os.Exit(1)
}
