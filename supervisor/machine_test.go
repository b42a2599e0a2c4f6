package supervisor

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"hibergate/activation"
	"hibergate/supervisor/activity"
	"hibergate/supervisor/process"
)

// world is the least that a policy's actions need to be carried out: it keeps
// count of processes and armed sockets, and fails when an invariant of doc.go does
// not hold. It makes only events that can happen.
type world struct {
	t       testing.TB
	p       policy
	svc     *Service
	now     time.Time
	live    int
	frozen  bool
	armed   []bool
	pending []event // answers that are under way
	quiet   bool    // the last answer to confirm said so
	seen    map[string]bool
	trace   []any // events and actions, for the report of a failure
}

func newWorld(tb testing.TB, accept bool) *world {
	tb.Helper()
	svc := &Service{
		Name: "s", Accept: accept, Sockets: make([]activation.Spec, 2),
		Idle: Idle{StopAfter: 10 * time.Second}, Stop: Stop{Signal: syscall.SIGTERM, Timeout: 5 * time.Second},
	}
	w := &world{t: tb, svc: svc, now: time.Unix(1000, 0), armed: []bool{true, true}, seen: map[string]bool{}}
	if accept {
		w.p = newPerConnection(svc, w.now)
	} else {
		w.p = newSolo(svc, w.now)
	}
	return w
}

// tell the policy something, and do what it wants.
func (w *world) tell(ev event) {
	w.t.Helper()
	before := w.p.life().state
	w.trace = append(w.trace, before, ev)
	at := before
	for _, a := range w.p.step(w.now, ev) {
		w.trace = append(w.trace, a)
		switch a := a.(type) {
		case report:
			if a.from != at {
				w.fatalf("reported a change from %s in state %s", a.from, at)
			}
			at = a.to
			w.seen[a.from.String()+" -> "+a.to.String()+" ("+string(a.reason)+")"] = true
			if !w.svc.Accept && a.to == Stopping && a.reason == ReasonIdle && !w.quiet {
				w.fatalf("stopped for idleness without a quiet look")
			}
		case arm:
			w.armed[0], w.armed[1] = true, true
		case armOne:
			w.armed[a.socket] = true
		case disarm:
			w.armed[0], w.armed[1] = false, false
		case launch:
			if w.live > 0 || slices.ContainsFunc(w.pending, isLaunch) {
				w.fatalf("a second process")
			}
			w.pending = append(w.pending, launched{})
		case serve:
			w.pending = append(w.pending, served{socket: a.socket, started: 1})
		case look:
			w.pending = append(w.pending, looked{})
		case confirm:
			w.pending = append(w.pending, confirmed{})
			w.frozen, w.quiet = w.live > 0, false
		case thaw:
			w.frozen = false
		case signal:
		}
	}
	if at != w.p.life().state {
		w.fatalf("state %s was not reported, only %s", w.p.life().state, at)
	}
	w.check()
}

func isLaunch(ev event) bool { _, ok := ev.(launched); return ok }

func (w *world) fatalf(format string, args ...any) {
	w.t.Helper()
	for _, x := range w.trace {
		w.t.Logf("%T%+v", x, x)
	}
	w.t.Fatalf(format, args...)
}

// check holds the invariants that doc.go states.
func (w *world) check() {
	w.t.Helper()
	l := w.p.life()
	switch l.state {
	case Stopping, Backoff:
		if l.deadline.IsZero() {
			w.fatalf("no deadline in %s", l.state)
		}
	case Listening, Stopped, Starting, Confirming, Killing:
		if !l.deadline.IsZero() {
			w.fatalf("a deadline in %s", l.state)
		}
	case Running:
		looks := slices.ContainsFunc(w.pending, func(ev event) bool { _, ok := ev.(looked); return ok })
		if !w.svc.Accept && l.deadline.IsZero() && !looks {
			w.fatalf("running without a deadline")
		}
	}
	anyArmed := w.armed[0] || w.armed[1]
	mayArm := l.state == Listening || w.svc.Accept && l.state == Running
	if anyArmed && !mayArm {
		w.fatalf("armed in %s", l.state)
	}
	if l.state == Listening && !w.svc.Accept && (!w.armed[0] || !w.armed[1]) {
		w.fatalf("listening with a disarmed socket")
	}
	if w.frozen && l.state != Confirming && l.state != Killing {
		w.fatalf("left frozen in %s", l.state)
	}
	if l.state == Stopped && (w.live > 0 || len(w.pending) > 0 && w.svc.Accept) {
		w.fatalf("stopped with something left")
	}
}

// act makes one of the things happen that can happen now; b chooses.
func (w *world) act(b byte) {
	w.t.Helper()
	kind, detail := b%12, int(b/12)
	switch kind {
	case 0, 1:
		if s := int(kind); w.armed[s] {
			w.armed[s] = false // one-shot
			if detail == 6 {
				w.tell(socketBroken{errors.New("no")})
			} else {
				w.tell(socketReady{s})
			}
		}
	case 2, 3, 4: // an answer arrives, well or badly
		if len(w.pending) == 0 {
			return
		}
		ev := w.pending[0]
		w.pending = w.pending[1:]
		w.tell(w.answer(ev, detail))
	case 5:
		if w.live == 0 || slices.ContainsFunc(w.pending, isLaunch) {
			return
		}
		w.live--
		if w.live == 0 {
			w.frozen = false
		}
		status := [...]process.ExitStatus{{}, {Code: 1}, {Signal: syscall.SIGTERM}, {Signal: syscall.SIGSEGV}}[detail%4]
		w.tell(exited{status, [...][]uint64{nil, {1}, {1, 2}}[detail%3]})
	case 6:
		if d := w.p.life().deadline; !d.IsZero() && w.now.Before(d) {
			w.now = d
		}
		w.tell(deadlinePassed{})
	case 7:
		w.now = w.now.Add(time.Duration(detail) * time.Second)
		w.tell(deadlinePassed{})
	case 8:
		if !w.svc.Accept {
			w.tell(wakeRequested{})
		}
	case 9:
		w.tell(sleepRequested{})
	case 10:
		if detail > 16 {
			w.tell(shutdownRequested{})
		}
	case 11:
		if detail > 18 {
			w.tell(shutdownRequested{now: true})
		}
	}
}

// answer fills in what came of an action.
func (w *world) answer(ev event, detail int) event {
	bad := detail%3 == 2
	sum := activity.Summary{Known: true, Exact: detail%2 == 0, Last: w.now.Add(-time.Hour)}
	switch detail % 7 {
	case 1:
		sum.Open = 1
	case 3:
		sum.Queued = 1
	case 5:
		sum.Known = false
	}
	sums := []activity.Summary{sum, {Known: true, Exact: true}}
	switch ev := ev.(type) {
	case launched:
		if bad {
			return launchFailed{errors.New("no")}
		}
		w.live++
		return launched{[]uint64{1}}
	case served:
		if bad {
			ev.started, ev.err, ev.pause = 0, errors.New("no"), detail%2 == 0
		}
		w.live += ev.started
		return ev
	case looked:
		return looked{sums}
	case confirmed:
		if bad {
			w.frozen = false
			return confirmed{err: errors.New("cannot freeze")}
		}
		w.quiet = sum.Known && sum.Open == 0 && sum.Queued == 0
		return confirmed{sums: sums}
	case socketReady, socketBroken, launchFailed, exited, deadlinePassed, wakeRequested, sleepRequested, shutdownRequested:
	}
	return ev
}

// finish ends the service from wherever it is.
func (w *world) finish() {
	w.t.Helper()
	w.tell(shutdownRequested{})
	for range 200 {
		if w.p.life().state == Stopped && len(w.pending) == 0 {
			return
		}
		w.act(2)
		w.act(5)
	}
	w.fatalf("does not come to an end")
}

func FuzzPolicy(f *testing.F) {
	f.Add(false, []byte{0, 2, 6, 2, 2, 5})
	f.Add(false, []byte{0, 26, 6, 0, 2, 6, 2, 38, 5})
	f.Add(true, []byte{0, 2, 1, 2, 5, 5, 9, 26, 6})
	f.Fuzz(func(t *testing.T, accept bool, script []byte) {
		if len(script) > 300 {
			return
		}
		w := newWorld(t, accept)
		for _, b := range script {
			w.act(b)
		}
		w.finish()
	})
}

// TestDiagram compares the transitions that policies make under all short
// scripts with those that doc.go tells of.
func TestDiagram(t *testing.T) {
	t.Parallel()
	want := readDiagram(t)
	for i, accept := range []bool{false, true} {
		got := map[string]bool{}
		explore(t, accept, got)
		if diff := cmp.Diff(slices.Sorted(maps.Keys(want[i])), slices.Sorted(maps.Keys(got))); diff != "" {
			t.Errorf("accept = %v: doc.go and the policy differ (-doc +policy):\n%s", accept, diff)
		}
	}
}

// explore walks breadth first over all scripts, going on from each new situation once.
func explore(t *testing.T, accept bool, got map[string]bool) {
	t.Helper()
	situations := map[string]bool{}
	next := [][]byte{{}}
	for depth := 0; depth < 20 && len(next) > 0; depth++ {
		var scripts [][]byte
		for _, script := range next {
			for b := range 12 * 20 {
				if detail := b / 12; detail > 6 && detail < 19 {
					continue // act makes nothing new of these
				}
				w := newWorld(t, accept)
				for _, c := range script {
					w.act(c)
				}
				w.act(byte(b))
				maps.Copy(got, w.seen)
				l := w.p.life()
				key := fmt.Sprint(l.state, l.reason, w.live, w.armed, len(w.pending))
				if m, ok := w.p.(*solo); ok {
					key += fmt.Sprint(m.wanted, m.looking, w.now.Sub(m.idle.since) >= m.spec.Idle.StopAfter, min(m.stuck.inRow, 3), m.stuck.bracket)
				}
				if !situations[key] {
					situations[key] = true
					scripts = append(scripts, append(slices.Clone(script), byte(b)))
				}
			}
		}
		next = scripts
	}
}

// readDiagram returns the transitions of the two tables in doc.go.
func readDiagram(t *testing.T) (tables [2]map[string]bool) {
	t.Helper()
	b, err := os.ReadFile("doc.go")
	if err != nil {
		t.Fatal(err)
	}
	tables[0], tables[1] = map[string]bool{}, map[string]bool{}
	first, second, _ := strings.Cut(string(b), "With accept = true")
	row := regexp.MustCompile(`(?m)^//\t(\w+) +-> (\w+) +(.+)$`)
	for i, text := range []string{first, second} {
		for _, m := range row.FindAllStringSubmatch(text, -1) {
			for reason := range strings.SplitSeq(m[3], ", ") {
				tables[i][fmt.Sprintf("%s -> %s (%s)", m[1], m[2], reason)] = true
			}
		}
	}
	return tables
}

// TestEveryEventInEveryState tells each policy each event in each state, also
// those that cannot come: late answers must mean nothing, and nothing may panic.
func TestEveryEventInEveryState(t *testing.T) {
	t.Parallel()
	events := []event{
		socketReady{},
		launched{},
		launchFailed{errors.New("no")},
		served{},
		exited{},
		looked{make([]activity.Summary, 2)},
		confirmed{sums: make([]activity.Summary, 2)},
		deadlinePassed{},
		wakeRequested{},
		sleepRequested{},
		shutdownRequested{},
		shutdownRequested{now: true},
	}
	now := time.Unix(1000, 0)
	for state := Listening; state <= Stopped; state++ {
		for _, ev := range events {
			for _, accept := range []bool{false, true} {
				w := newWorld(t, accept)
				l := w.p.life()
				l.state = state
				if c, ok := w.p.(*perConnection); ok {
					c.live, c.serving[0] = 1, true
				}
				for _, a := range w.p.step(now, ev) {
					if r, ok := a.(report); ok && r.to == Stopped && r.reason != ReasonShutdown {
						t.Errorf("%s, %T: stopped for %s", state, ev, r.reason)
					}
				}
			}
		}
		if strings.Contains(state.String(), "unknown") {
			t.Errorf("state %d has no name", state)
		}
	}
}

// A packet on a socket with the kernel's clock does not hide what changed on one without.
func TestMixedEvidence(t *testing.T) {
	t.Parallel()
	start := time.Unix(1000, 0)
	i := idleness{spec: &Idle{StopAfter: 2 * time.Second}}
	i.begin(start)
	look := func(after time.Duration, last time.Duration, read uint64) string {
		_, busy := i.judge(start.Add(after), []activity.Summary{
			{Known: true, Exact: true, Last: start.Add(last)},
			{Known: true, Peers: read},
		})
		return busy
	}
	look(900*time.Millisecond, 0, 1)
	look(1800*time.Millisecond, 910*time.Millisecond, 2) // something was read since the last look
	if busy := look(2950*time.Millisecond, 910*time.Millisecond, 2); busy == "" {
		t.Error("idle 1.15 s after the last look that found activity")
	}
	if busy := look(3800*time.Millisecond, 910*time.Millisecond, 2); busy != "" {
		t.Errorf("got %q 2 s after the last look that found activity, want idle", busy)
	}
}
