package storm

import (
	"bufio"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The services that are not written in Go.
var (
	//go:embed service.py
	servicePy []byte
	//go:embed service.js
	serviceJS []byte
)

func writeServices(dir string) error {
	return errors.Join(
		os.WriteFile(filepath.Join(dir, "service.py"), servicePy, 0o600),
		os.WriteFile(filepath.Join(dir, "service.js"), serviceJS, 0o600))
}

// server is a service of the storm: to "ID\n" it answers "ID PID\n", and to its journal
// it appends a line for whatever it does.
type server struct {
	journal *os.File // O_APPEND; one write for each line, so several processes may share it
	pid     int      // in the answers: of the process that hibergated started
}

// service is one of the services in Go: storm service KIND JOURNAL.
func service(args []string) error {
	if len(args) != 2 {
		return errors.New("arguments: KIND JOURNAL")
	}
	f, err := os.OpenFile(args[1], os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o666)
	if err != nil {
		return err
	}
	defer f.Close()
	s := &server{journal: f, pid: os.Getpid()}
	switch args[0] {
	case "graceful":
		return s.graceful()
	case "workers":
		return s.master(args[1])
	case "worker":
		s.pid = os.Getppid()
		return s.graceful()
	case "stdio":
		return s.stdio()
	}
	return fmt.Errorf("unknown kind %q", args[0])
}

func (s *server) note(event string, port uint16, name string) {
	_, err := fmt.Fprintf(s.journal, "%d %d %s %d %s\n", time.Now().UnixMicro(), os.Getpid(), event, port, name)
	if err != nil {
		fmt.Fprintln(os.Stderr, "storm service:", err)
	}
}

// graceful accepts for a random moment after SIGTERM, and finishes what it accepted.
func (s *server) graceful() error {
	ctx, cancel := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer cancel()
	s.note("start", 0, "-")
	f := os.NewFile(3, "listener")
	l, err := net.FileListener(f)
	if err != nil {
		return err
	}
	f.Close()
	go func() {
		<-ctx.Done()
		s.note("term", 0, "-")
		pause(context.WithoutCancel(ctx), rand.N(10*time.Millisecond))
		l.Close()
	}()
	var open sync.WaitGroup
	for {
		c, err := l.Accept()
		if err != nil {
			open.Wait()
			s.note("exit", 0, "-")
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		port := peerPort(c.RemoteAddr())
		s.note("accept", port, "-")
		open.Go(func() { s.serve(c, port) })
	}
}

// master starts two workers on the socket, and passes SIGTERM on.
func (s *server) master(journal string) error {
	ctx, cancel := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer cancel()
	s.note("start", 0, "-")
	listener := os.NewFile(3, "listener")
	var workers sync.WaitGroup
	results := make(chan error, 2)
	for range 2 {
		w := again(ctx, "service", "worker", journal)
		w.Cancel = func() error { return w.Process.Signal(unix.SIGTERM) }
		w.Stderr = os.Stderr
		w.ExtraFiles = []*os.File{listener}
		if err := w.Start(); err != nil {
			told := ctx.Err() != nil
			cancel() // ends the other
			workers.Wait()
			if told {
				return nil
			}
			return err
		}
		workers.Go(func() {
			err := w.Wait()
			if status, ok := w.ProcessState.Sys().(syscall.WaitStatus); ok && status.Signal() == unix.SIGTERM || ctx.Err() != nil {
				err = nil // told to end, maybe before it could listen to that
			}
			results <- err
		})
	}
	workers.Wait()
	s.note("exit", 0, "-")
	return errors.Join(<-results, <-results)
}

// stdio serves the connection that it has as standard input and output.
func (s *server) stdio() error {
	name, err := unix.Getpeername(0)
	if err != nil {
		s.note("drop", 0, "nobody") // reset by the client
		return nil
	}
	var port uint16
	switch a := name.(type) {
	case *unix.SockaddrInet4:
		port = uint16(a.Port)
	case *unix.SockaddrInet6:
		port = uint16(a.Port)
	}
	s.note("accept", port, "-")
	s.serve(struct {
		io.Reader
		io.WriteCloser
	}{os.Stdin, os.Stdout}, port)
	return nil
}

func (s *server) serve(c io.ReadWriteCloser, port uint16) {
	defer c.Close()
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		s.note("drop", port, "unread")
		return
	}
	name := strings.TrimSuffix(line, "\n")
	if _, err := fmt.Fprintf(c, "%s %d\n", name, s.pid); err != nil {
		s.note("drop", port, name)
		return
	}
	// After the write: what says "answer" has been answered.
	s.note("answer", port, name)
}

func peerPort(a net.Addr) uint16 {
	ap, err := netip.ParseAddrPort(a.String())
	if err != nil {
		return 0
	}
	return ap.Port()
}
