package main

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"hibergate/activation/nettest"
	"hibergate/supervisor"
)

// goHTTP is a web server on the address that is its argument.
func goHTTP() {
	fail(http.ListenAndServe(os.Args[1], http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, "hello")
	})))
}

// storyProgram makes a program of testdata/adopt/story.py, with a place of its own.
func storyProgram(t *testing.T, name string, args ...string) *adoptProgram {
	t.Helper()
	nettest.Need(t, nettest.Namespaces)
	nothingLeft(t)
	p := &adoptProgram{
		name: name, files: []string{"story.py"}, client: echoHello,
		command: append([]string{programPath("python3"), "${DIR}/story.py", name, "${PORT}"}, args...),
	}
	return p
}

// told says a line to the program, and returns the answer.
func (p *adoptProgram) told(t *testing.T, line string) string {
	t.Helper()
	c, err := p.dial(0)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	return strings.TrimSuffix(mustAsk(t, c, line+"\n"), "\n")
}

// reports asks the program for what it has found out.
func (p *adoptProgram) reports(t *testing.T, into any) {
	t.Helper()
	answer := p.told(t, "report")
	if err := json.Unmarshal([]byte(answer), into); err != nil {
		t.Fatalf("%q: %v", answer, err)
	}
}

// lives checks that the program answers at all of its addresses, whatever it does.
func (p *adoptProgram) lives(t *testing.T) {
	t.Helper()
	for where := range p.at {
		if _, err := p.visit(where); err != nil {
			t.Error(err)
		}
	}
}

// is waits until the service is in one of these states.
func (p *adoptProgram) is(t *testing.T, d *hibergated, states ...string) supervisor.Status {
	t.Helper()
	var st supervisor.Status
	nettest.Eventually(t, func() error {
		if st = d.status(p.name); !slices.Contains(states, st.State) {
			return fmt.Errorf("%s is %s: %s", p.name, st.State, st.Error)
		}
		return nil
	})
	return st
}

// A program binds late: one address from another thread, one from a child process.
func TestAdoptLate(t *testing.T) {
	p := storyProgram(t, "late", "${PORT2}")
	p.at = []string{"tcp://127.0.0.1:${PORT}", "tcp://127.0.0.1:${PORT2}"}
	p.settle(t)
	p.cycles(t, nil)
}

// What a program binds beside the addresses of the service is its own.
func TestAdoptOtherSockets(t *testing.T) {
	p := storyProgram(t, "others", "${PORT2}")
	p.settle(t)
	d := p.start(t, "")
	var report map[string]bool
	p.reports(t, &report)
	for _, what := range []string{"beside", "anywhere", "path", "route"} {
		if !report[what] {
			t.Errorf("%s is not as it should be: %v", what, report)
		}
	}
	c, err := net.DialTimeout("tcp", "127.0.0.1:"+p.command[len(p.command)-1], patience)
	if err != nil {
		t.Fatal(err)
	}
	if answer := mustAsk(t, c, "hello\n"); answer != "hello\n" {
		t.Errorf("at the other port: %q", answer)
	}
	c.Close()
	d.sleeps(t, p.name)
}

// A program that has our socket binds the address again: as without us, only sockets that are shared can have it twice.
func TestAdoptTwice(t *testing.T) {
	p := storyProgram(t, "again")
	p.settle(t)
	d := p.start(t, "")
	for range 2 {
		var report struct {
			Alone, Shared string
			Same          bool
		}
		p.reports(t, &report)
		if report.Alone != "EADDRINUSE" || report.Shared != "bound" || !report.Same {
			t.Errorf("got %+v, want EADDRINUSE alone, and shared the same socket", report)
		}
		d.sleeps(t, p.name)
	}
}

// What a program had set on its socket before it binds holds for the socket that it gets.
func TestAdoptFlags(t *testing.T) {
	for _, kind := range []string{"00", "01", "10", "11"} {
		t.Run(kind, func(t *testing.T) {
			p := storyProgram(t, "flags", kind[:1], kind[1:])
			p.settle(t)
			d := p.start(t, "")
			for wake := range 2 {
				var first, second struct{ Before, After, Set, Accepted []int }
				p.reports(t, &first)
				p.reports(t, &second)
				t.Logf("wake %d: of the client who woke it %v, of the next %v", wake, first.Accepted, second.Accepted)
				if !slices.Equal(second.After, second.Before) {
					t.Errorf("flags %#x before bind, %#x after", second.Before, second.After)
				}
				// Who woke it was connected before the program said anything. What it said in its last run holds.
				if wake > 0 && !slices.Equal(first.Accepted, first.Set) || !slices.Equal(second.Accepted, second.Set) {
					t.Errorf("SO_KEEPALIVE, SO_RCVBUF and TCP_NODELAY are %v and %v on what is accepted, want %v", first.Accepted, second.Accepted, second.Set)
				}
				d.sleeps(t, p.name)
			}
		})
	}
}

// A program that never binds is a failure, which says what it lacks; its clients wait for one that does.
func TestAdoptNeverBinds(t *testing.T) {
	p := storyProgram(t, "plain")
	p.settle(t)
	good := filepath.Join(p.dir, "good")
	p.command = []string{"/bin/sh", "-c", fmt.Sprintf("test -e %q && exec \"$@\"; exec sleep 1000", good), "sh", p.command[0], p.command[1], p.command[2], p.command[3]}
	p.toml = "start.timeout = \"1s\"\nrestart = { delay = \"1h\", max_delay = \"1h\" }\n"
	d := p.start(t, "")
	c, err := p.dial(0)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	st := p.is(t, d, "backoff", "failed")
	if address := strings.TrimPrefix(p.at[0], "tcp://"); !strings.Contains(st.Error, address) {
		t.Errorf("the error does not tell %s: %q", address, st.Error)
	}
	if err := os.WriteFile(good, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := d.client.Reset(t.Context(), p.name); err != nil {
		t.Fatal(err)
	}
	if answer := mustAsk(t, c, "hello\n"); answer != "hello\n" {
		t.Errorf("the client who waited is told %q", answer)
	}
	c.Close()
	d.sleeps(t, p.name)
}

// Programs that bind while they run: each change of their configuration, with clients all the time.
func TestAdoptRebind(t *testing.T) {
	programs := map[string]*adoptProgram{}
	for _, p := range adoptPrograms() {
		programs[p.name] = p
	}
	tests := map[string]func(t *testing.T, p *adoptProgram, d *hibergated, n int){
		// Redis closes its sockets, and binds those that it is to have now.
		"redis": func(t *testing.T, p *adoptProgram, _ *hibergated, n int) {
			t.Helper()
			bind := []string{"127.0.0.1 -::1", "127.0.0.1"}[n%2]
			if answer := p.told(t, fmt.Sprintf("CONFIG SET bind %q\r", bind)); answer != "+OK\r" {
				t.Errorf("CONFIG SET: %q", answer)
			}
		},
		// nginx has a socket for each worker, and three workers and two by turns.
		"nginx-reuseport": func(t *testing.T, p *adoptProgram, d *hibergated, n int) {
			t.Helper()
			path := filepath.Join(p.dir, "nginx.conf")
			text, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			changed := strings.Replace(string(text), fmt.Sprintf("worker_processes %d", 2+n%2), fmt.Sprintf("worker_processes %d", 3-n%2), 1)
			if err := os.WriteFile(path, []byte(changed), 0o644); err != nil {
				t.Fatal(err)
			}
			if out, err := exec.Command(p.command[0], append(p.command[1:], "-s", "reload")...).CombinedOutput(); err != nil {
				t.Errorf("nginx -s reload: %v\n%s", err, out)
			}
			nettest.Eventually(t, func() error { // the master has as many workers as it is told, and those that end
				if now := len(nettest.Children(d.status(p.name).PIDs[0])); now != 3-n%2 {
					return fmt.Errorf("%d workers", now)
				}
				return nil
			})
		},
	}
	for name, rebind := range tests {
		t.Run(name, func(t *testing.T) {
			p := programs[name]
			nettest.Need(t, nettest.Namespaces)
			nothingLeft(t)
			p.settle(t)
			d := p.start(t, "")
			p.lives(t)
			stop := make(chan struct{})
			var clients sync.WaitGroup
			for range 2 {
				clients.Go(func() {
					for !t.Failed() {
						select {
						case <-stop:
							return
						default:
							p.come(t, d, rand.N(2*time.Millisecond))
						}
					}
				})
			}
			for n := range 10 {
				rebind(t, p, d, n)
				time.Sleep(rand.N(20 * time.Millisecond))
			}
			close(stop)
			clients.Wait()
			if st := d.status(p.name); st.Starts != 1 || st.Error != "" {
				t.Errorf("at the end: %+v", st)
			}
			t.Logf("%d clients", p.visits.Load())
			d.sleeps(t, p.name)
			p.lives(t)
		})
	}
}

// What was learned of a program can be shown, and is known to the next hibergated: the program does not run for that.
func TestAdoptLearned(t *testing.T) {
	p := storyProgram(t, "plain")
	p.listen = `"auto"`
	p.settle(t)
	t.Run("first", func(t *testing.T) {
		d := p.start(t, "")
		if st := d.status(p.name); st.Starts != 1 {
			t.Errorf("%d starts, want the one to learn from", st.Starts)
		}
		got := mustRun(t, programPath("hibergated"), "learn", "--control", d.client.Path, p.name)
		if words := strings.Fields(got); !strings.Contains(strings.Join(words, " "), "listen = [ "+strconv.Quote(p.at[0])) {
			t.Errorf("learn prints %q", got)
		}
		p.lives(t)
		d.sleeps(t, p.name)
	})
	t.Run("second", func(t *testing.T) {
		d := startHibergated(t, p.state()+p.service())
		if st := d.status(p.name); st.State != "listening" || st.Starts != 0 || len(st.Sockets) != 1 || st.Sockets[0].Address != p.at[0] {
			t.Errorf("at its start: %+v", st)
		}
		p.lives(t)
		d.sleeps(t, p.name)
		if st := d.status(p.name); st.Starts != 1 {
			t.Errorf("%d starts, want 1", st.Starts)
		}
	})
}
