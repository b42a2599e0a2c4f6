package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
	"hibergate/supervisor/control"
)

var scriptCommands = map[string]func(ts *testscript.TestScript, neg bool, args []string){
	"need":     cmdNeed,
	"dial":     cmdDial,
	"hold":     cmdHold,
	"release":  cmdRelease,
	"field":    cmdField,
	"until":    cmdUntil,
	"signal":   cmdSignal,
	"notified": cmdNotified,

	"call":      cmdCall,
	"connected": cmdConnected,
	"answer":    cmdAnswer,
	"silent":    cmdSilent,
}

// patience bounds every wait for something that has to happen.
const patience = 30 * time.Second

// story is what belongs to one script.
type story struct {
	tb     testing.TB
	held   map[string]net.Conn
	notify *net.UnixConn // $WORK/notify.sock, where the script has NOTIFY_SOCKET
}

type storyKey struct{}

func newStory(env *testscript.Env) *story {
	s := &story{tb: env.T().(testing.TB), held: map[string]net.Conn{}}
	env.Defer(func() {
		for _, c := range s.held {
			c.Close()
		}
		if s.notify != nil {
			s.notify.Close()
		}
	})
	return s
}

func storyOf(ts *testscript.TestScript) *story { return ts.Value(storyKey{}).(*story) }

// need WHAT...: without one of these programs, or "root" (of the machine), there is nothing to tell.
func cmdNeed(ts *testscript.TestScript, neg bool, args []string) {
	noNeg(ts, neg)
	for _, what := range args {
		feature := func() error {
			if strings.HasPrefix(programPath(what), "/missing/") {
				return fmt.Errorf("program %s not found", what)
			}
			return nil
		}
		if what == "root" {
			feature = nettest.RealRoot
		}
		nettest.Need(storyOf(ts).tb, feature)
	}
}

// dial NETWORK ADDRESS [TEXT]: connects as net.Dial does, sends the text and prints the
// first line of the answer.
func cmdDial(ts *testscript.TestScript, neg bool, args []string) {
	c, err := connect(ts, args)
	if err == nil {
		c.Close()
	}
	check(ts, neg, err)
}

// hold NAME NETWORK ADDRESS [TEXT]: as dial; the connection stays open until release NAME.
func cmdHold(ts *testscript.TestScript, neg bool, args []string) {
	noNeg(ts, neg)
	usage(ts, len(args) >= 3, "hold NAME NETWORK ADDRESS [TEXT]")
	c, err := connect(ts, args[1:])
	ts.Check(err)
	storyOf(ts).held[args[0]] = c
}

func connect(ts *testscript.TestScript, args []string) (net.Conn, error) {
	usage(ts, len(args) == 2 || len(args) == 3, "NETWORK ADDRESS [TEXT]")
	c, err := net.DialTimeout(args[0], args[1], patience)
	if err != nil {
		return nil, err
	}
	line, err := ask(c, strings.Join(args[2:], "")+"\n")
	if err != nil {
		c.Close()
		return nil, err
	}
	_, err = ts.Stdout().Write([]byte(line))
	return c, err
}

// ask sends text, and returns what comes back up to the end of a line or datagram.
func ask(c net.Conn, text string) (string, error) {
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return "", err
	}
	if text != "" {
		if _, err := c.Write([]byte(text)); err != nil {
			return "", err
		}
	}
	var answer []byte
	one := 1 // byte at a time leaves what follows the line to the next call
	if kind := c.LocalAddr().Network(); kind == "udp" || kind == "unixpacket" {
		one = 64 << 10
	}
	for buf := make([]byte, one); !bytes.HasSuffix(answer, []byte("\n")); {
		n, err := c.Read(buf)
		if answer = append(answer, buf[:n]...); err != nil {
			return string(answer), err
		}
	}
	return string(answer), nil
}

func cmdRelease(ts *testscript.TestScript, neg bool, args []string) {
	noNeg(ts, neg)
	usage(ts, len(args) == 1, "release NAME")
	c := storyOf(ts).held[args[0]]
	if c == nil {
		ts.Fatalf("nothing is held as %s", args[0])
	}
	ts.Check(c.Close())
}

// field SERVICE PATH [VARIABLE]: prints a field of the status, as .sockets[0].in.bytes; a variable gets it too.
func cmdField(ts *testscript.TestScript, neg bool, args []string) {
	noNeg(ts, neg)
	usage(ts, len(args) == 2 || len(args) == 3, "field SERVICE PATH [VARIABLE]")
	value, err := field(ts, args[0], args[1])
	ts.Check(err)
	fmt.Fprintln(ts.Stdout(), value)
	if len(args) == 3 {
		ts.Setenv(args[2], value)
	}
}

// until SERVICE PATH REGEXP: waits until the whole of a field is as the expression says.
func cmdUntil(ts *testscript.TestScript, neg bool, args []string) {
	noNeg(ts, neg)
	usage(ts, len(args) == 3, "until SERVICE PATH REGEXP")
	want, err := regexp.Compile("^(" + args[2] + ")$")
	ts.Check(err)
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		value, err := field(ts, args[0], args[1])
		if err == nil && want.MatchString(value) {
			return
		}
		if time.Now().After(deadline) { // Fatalf of the script shows what the programs have said
			ts.Fatalf("after %v: %q, %v", patience, value, err)
		}
	}
}

// field asks the supervisor at $CONTROL, or $WORK/c.sock.
func field(ts *testscript.TestScript, service, path string) (string, error) {
	socket := ts.Getenv("CONTROL")
	if socket == "" {
		socket = ts.MkAbs("c.sock")
	}
	ctx, stop := context.WithTimeout(context.Background(), patience)
	defer stop()
	body, err := control.Client{Path: socket}.StatusJSON(ctx, service, true)
	if err != nil {
		return "", err
	}
	var value any
	if err := json.Unmarshal(body, &value); err != nil {
		return "", err
	}
	for step := range strings.FieldsFuncSeq("[0]"+path, func(r rune) bool { return r == '.' || r == '[' || r == ']' }) {
		switch v := value.(type) {
		case map[string]any:
			value = v[step]
		case []any:
			if i, err := strconv.Atoi(step); err == nil && i < len(v) {
				value = v[i]
			} else {
				value = nil
			}
		default:
			value = nil
		}
	}
	if text, ok := value.(string); ok {
		return text, nil
	}
	text, err := json.Marshal(value)
	return string(text), err
}

// signal SIGNAL WORD: to the background commands with this word among their arguments.
func cmdSignal(ts *testscript.TestScript, neg bool, args []string) {
	noNeg(ts, neg)
	usage(ts, len(args) == 2, "signal SIGNAL WORD")
	sig := unix.SignalNum("SIG" + args[0])
	found := false
	for _, cmd := range ts.BackgroundCmds() {
		if slices.Contains(cmd.Args, args[1]) {
			found = true
			ts.Check(cmd.Process.Signal(sig))
		}
	}
	if sig == 0 || !found {
		ts.Fatalf("no such signal or background command")
	}
}

// notified REGEXP...: the next messages on $WORK/notify.sock, each matched by one
// expression, others between them aside. Without one, it opens the socket.
func cmdNotified(ts *testscript.TestScript, neg bool, args []string) {
	noNeg(ts, neg)
	s := storyOf(ts)
	if s.notify == nil {
		var err error
		s.notify, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(ts.Getenv("WORK"), "notify.sock"), Net: "unixgram"})
		ts.Check(err)
	}
	ts.Check(s.notify.SetReadDeadline(time.Now().Add(patience)))
	buf := make([]byte, 4096)
	for _, want := range args {
		expr, err := regexp.Compile(want)
		ts.Check(err)
		for matched := false; !matched; {
			n, err := s.notify.Read(buf)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				ts.Fatalf("no message matches %s", want)
			}
			ts.Check(err)
			fmt.Fprintf(ts.Stdout(), "%s\n", buf[:n])
			matched = expr.Match(buf[:n])
		}
	}
}

func check(ts *testscript.TestScript, neg bool, err error) {
	switch {
	case err != nil && !neg:
		ts.Fatalf("%v", err)
	case err == nil && neg:
		ts.Fatalf("it worked")
	case err != nil:
		fmt.Fprintln(ts.Stderr(), err)
	}
}

func noNeg(ts *testscript.TestScript, neg bool) {
	if neg {
		ts.Fatalf("cannot be negated")
	}
}

func usage(ts *testscript.TestScript, ok bool, text string) {
	if !ok {
		ts.Fatalf("usage: %s", text)
	}
}
