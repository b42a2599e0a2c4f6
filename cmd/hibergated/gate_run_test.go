package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
)

// gateStory is one service of `hibergated gate`. Its commands note in a file that they are run.
type gateStory struct {
	tb   testing.TB
	dir  string   // where it runs
	port string   // where it listens
	back *backend // where it leads
	vars map[string]string

	pid   int
	ended chan error
	log   *logBuffer
}

// newGateStory makes a service whose backend is ended when the test ends. Nothing is running yet.
func newGateStory(t *testing.T) *gateStory {
	t.Helper()
	s := &gateStory{tb: t, dir: t.TempDir(), port: strconv.Itoa(18000 + int(gatePorts.Add(1))), back: newBackend(t)}
	s.vars = map[string]string{
		"HIBERGATE_LISTENPORT":   s.port,
		"HIBERGATE_DESTINATION":  s.back.address,
		"HIBERGATE_LAUNCHCMD":    `echo "launch $APP in $(pwd)" >>ran; ` + s.back.launch(),
		"HIBERGATE_READINESSCMD": "kill -0 $(cat " + s.back.pidFile() + ")",
		"HIBERGATE_STOPCMD":      "echo stop >>ran; " + s.back.stop(),
		"HIBERGATE_IDLESECS":     "1",
		"APP":                    "web",
	}
	return s
}

// start runs hibergated, and ends it when the test ends.
func (s *gateStory) start(change map[string]string) {
	s.tb.Helper()
	maps.Copy(s.vars, change)
	cmd := exec.Command(programPath("hibergated"), "gate", "--log-format", "json")
	cmd.Dir, cmd.Env = s.dir, os.Environ()
	for name, value := range s.vars {
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	s.log = &logBuffer{}
	cmd.Stderr = s.log
	if err := cmd.Start(); err != nil {
		s.tb.Fatal(err)
	}
	s.pid = cmd.Process.Pid
	ended := make(chan error, 1)
	s.ended = ended
	go func() { ended <- cmd.Wait() }()
	s.tb.Cleanup(func() {
		if s.ended == ended {
			s.end()
		}
		if s.tb.Failed() {
			s.tb.Logf("log:\n%s", s.log)
		}
	})
	nettest.Eventually(s.tb, func() error {
		if !strings.Contains(s.log.String(), "hibergated started") {
			return errors.New("it has not started")
		}
		return nil
	})
}

// end asks hibergated to end, and checks that it ends well.
func (s *gateStory) end() {
	s.tb.Helper()
	_ = unix.Kill(s.pid, unix.SIGTERM)
	select {
	case err := <-s.ended:
		if err != nil {
			s.tb.Error("hibergated gate:", err)
		}
	case <-time.After(patience):
		s.tb.Error("hibergated gate does not end")
		_ = unix.Kill(s.pid, unix.SIGKILL)
		<-s.ended
	}
	s.ended = nil
}

// ran returns what was run so far.
func (s *gateStory) ran() []string {
	text, _ := os.ReadFile(filepath.Join(s.dir, "ran"))
	return strings.Fields(strings.ReplaceAll(string(text), " web in "+s.dir, ""))
}

func (s *gateStory) wantRan(want ...string) {
	s.tb.Helper()
	if got := s.ran(); !slices.Equal(got, want) {
		s.tb.Errorf("%q were run, want %q", got, want)
	}
}

// untilRan waits until these commands were run, and no others.
func (s *gateStory) untilRan(want ...string) {
	s.tb.Helper()
	nettest.Eventually(s.tb, func() error {
		if got := s.ran(); !slices.Equal(got, want) {
			return fmt.Errorf("%q were run, not yet %q", got, want)
		}
		return nil
	})
}

// dial connects, and returns the connection with a reader that has taken the greeting.
func (s *gateStory) dial() (*net.TCPConn, *bufio.Reader) {
	s.tb.Helper()
	c, err := net.DialTimeout("tcp", "127.0.0.1:"+s.port, patience)
	if err != nil {
		s.tb.Fatal(err)
	}
	s.tb.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		s.tb.Fatal(err)
	}
	r := bufio.NewReader(c)
	if line, err := r.ReadString('\n'); err != nil || !strings.HasPrefix(line, "pid ") {
		s.tb.Fatalf("got greeting %q and error %v", line, err)
	}
	return c.(*net.TCPConn), r
}

// visit is a client that says a line, gets it back, and goes.
func (s *gateStory) visit() {
	s.tb.Helper()
	c, r := s.dial()
	defer c.Close()
	if _, err := io.WriteString(c, "hello\n"); err != nil {
		s.tb.Fatal(err)
	}
	if line, err := r.ReadString('\n'); err != nil || line != "hello\n" {
		s.tb.Fatalf("got %q and error %v", line, err)
	}
}

// The first clients, however many, have the backend launched once, with the environment and the directory of hibergated. It is
// stopped when they have left, and launched again by the next one.
func TestGateRun(t *testing.T) {
	s := newGateStory(t)
	s.start(nil)
	var clients sync.WaitGroup
	for range 20 {
		clients.Go(func() {
			c, err := net.DialTimeout("tcp", "127.0.0.1:"+s.port, patience)
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			if line, err := ask(c, ""); err != nil || !strings.HasPrefix(line, "pid ") {
				t.Errorf("got %q and error %v", line, err)
			}
		})
	}
	clients.Wait()
	s.untilRan("launch", "stop")
	s.visit()
	s.untilRan("launch", "stop", "launch", "stop")
}

// An open connection keeps the backend awake, and so does one that its client has half closed. Both ends learn of the end of what
// the other one sends.
func TestGateRunHalfClose(t *testing.T) {
	s := newGateStory(t)
	s.start(nil)
	c, r := s.dial()
	if _, err := io.WriteString(c, "one\ntwo\n"); err != nil {
		t.Fatal(err)
	}
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if rest, err := io.ReadAll(r); err != nil || string(rest) != "one\ntwo\n" {
		t.Errorf("got %q and error %v", rest, err)
	}
	c.Close()
	s.untilRan("launch", "stop")
}

// A backend that has died is launched again by the next client. The original never noticed.
func TestGateRunCrash(t *testing.T) {
	s := newGateStory(t)
	s.start(map[string]string{"HIBERGATE_IDLESECS": "1000"})
	s.visit()
	s.back.kill()
	nettest.Eventually(t, func() error { // who dies may still be connected to
		c, err := net.DialTimeout("tcp", s.back.address, patience)
		if err == nil {
			c.Close()
			return errors.New("the backend still listens")
		}
		return nil
	})
	s.visit()
	s.wantRan("launch", "launch")
}

// A launch that fails is no launch: the client waits for the next one.
func TestGateRunLaunchFails(t *testing.T) {
	s := newGateStory(t)
	s.start(map[string]string{
		"HIBERGATE_LAUNCHCMD": `if mkdir tried; then echo fail >>ran; exit 3; fi; ` + s.vars["HIBERGATE_LAUNCHCMD"],
		"HIBERGATE_IDLESECS":  "1000",
	})
	s.visit()
	s.wantRan("fail", "launch")
	if !strings.Contains(s.log.String(), "status 3") {
		t.Error("the log does not tell of the exit status")
	}
}

// What was up already is neither launched nor forgotten: it is stopped when it is idle.
func TestGateRunAlreadyUp(t *testing.T) {
	s := newGateStory(t)
	mustRun(t, "/bin/sh", "-c", s.back.launch())
	nettest.Eventually(t, func() error {
		c, err := net.DialTimeout("tcp", s.back.address, patience)
		if err == nil {
			c.Close()
		}
		return err
	})
	s.start(nil)
	s.visit()
	s.untilRan("stop")
}

// What runs when hibergated ends is left as it is, and the next hibergated leads to it.
func TestGateRunAgain(t *testing.T) {
	s := newGateStory(t)
	s.start(map[string]string{"HIBERGATE_IDLESECS": "1000"})
	s.visit()
	s.end()
	if err := unix.Kill(s.back.pid(), 0); err != nil {
		t.Errorf("the backend does not run any more: %v", err)
	}
	s.wantRan("launch")
	s.start(map[string]string{"HIBERGATE_IDLESECS": "1"})
	s.visit()
	s.untilRan("launch", "stop")
}

// Several run beside each other, also for a user who may write nowhere.
func TestGateRunTwo(t *testing.T) {
	nowhere := map[string]string{"HOME": "/nonexistent", "XDG_RUNTIME_DIR": "/nonexistent", "XDG_STATE_HOME": "/nonexistent"}
	one, two := newGateStory(t), newGateStory(t)
	one.start(nowhere)
	two.start(nowhere)
	one.visit()
	two.visit()
	one.untilRan("launch", "stop")
	two.untilRan("launch", "stop")
	if _, err := os.Stat("/nonexistent"); !errors.Is(err, os.ErrNotExist) {
		t.Error("something was written into /nonexistent:", err)
	}
}
