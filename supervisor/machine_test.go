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
	live    int  // processes that were started
	left    bool // others of the service live
	frozen  bool
	parked  bool
	up      bool // the destination of a gate, as far as the policy can know
	open    bool // the gate
	cut     bool
	collect bool // clients are accepted, and kept
	given   bool // what rouse or command waits for was given up
	armed   []bool
	pending []event // answers that are under way
	quiet   bool    // the last answer to confirm said so
	seen    map[string]bool
	trace   []any // events and actions, for the report of a failure
}

// setting chooses among the services that a world can have.
type setting uint16

const (
	settingAccept   setting = 1 << iota
	settingMixed            // kill_mode
	settingProcess          // the same; it wins
	settingCommand          // stop.command
	settingReject           // on_failure
	settingUnopened         // the address is not there at the start
	settingLimits           // rates and a limit of connections
	settingReady            // it is not ready at once, and clients are held until it is
	settingLearn            // the same, and nobody knows where it listens
	settingLinger           // final_signal is not SIGKILL
	settingGate             // handoff = "gate"; it wins over all but settingReject, settingUnopened and settingLimits
)

func newWorld(tb testing.TB, set setting) *world {
	tb.Helper()
	svc := &Service{
		Name: "s", Accept: set&settingAccept != 0, Sockets: make([]activation.Spec, 2),
		Idle:    Idle{StopAfter: 10 * time.Second},
		Stop:    Stop{Signal: syscall.SIGTERM, FinalSignal: syscall.SIGKILL, Timeout: 5 * time.Second},
		Start:   Start{Timeout: 4 * time.Second},
		Restart: Restart{Delay: time.Second, MaxDelay: 4 * time.Second, Burst: 2, Interval: time.Hour, FailedDelay: time.Minute},
	}
	switch {
	case set&settingProcess != 0:
		svc.Stop.KillMode = KillProcess
	case set&settingMixed != 0:
		svc.Stop.KillMode = KillMixed
	}
	if set&settingCommand != 0 && !svc.Accept {
		svc.Stop.Command = []string{"/bin/true"}
	}
	if set&settingReject != 0 {
		svc.Restart.OnFailure = Reject
	}
	if set&settingLimits != 0 {
		svc.Limits.WakeRate = Rate{1, 3 * time.Second}
		if svc.Accept {
			svc.Limits = Limits{AcceptRate: Rate{2, 3 * time.Second}, MaxConnections: 2, Overflow: OverflowQueue}
		}
	}
	if set&(settingReady|settingLearn) != 0 && !svc.Accept {
		svc.Ready = Ready{Type: ReadyNotify, Hold: true}
	}
	if set&settingLinger != 0 {
		svc.Stop.FinalSignal = syscall.SIGQUIT
	}
	if set&settingGate != 0 {
		svc.Accept, svc.Handoff, svc.Ready = false, Gate, Ready{}
	}
	w := &world{t: tb, svc: svc, now: time.Unix(1000, 0), armed: []bool{true, true}, seen: map[string]bool{}}
	switch {
	case svc.Handoff == Gate:
		w.p = newGated(svc, w.now)
	case svc.Accept:
		w.p = newPerConnection(svc, w.now)
	default:
		w.p = newSolo(svc, w.now)
	}
	if set&settingUnopened != 0 {
		w.tell(openFailed{errors.New("no such address")})
	}
	if set&settingLearn != 0 && !svc.Accept && svc.Handoff != Gate {
		w.tell(addresses{})
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
		if r, ok := a.(report); ok {
			if r.from != at {
				w.fatalf("reported a change from %s in state %s", r.from, at)
			}
			at = r.to
			w.seen[r.from.String()+" -> "+r.to.String()+" ("+string(r.reason)+")"] = true
			if !w.svc.Accept && r.to == Stopping && r.reason == ReasonIdle && !w.quiet {
				w.fatalf("stopped for idleness without a quiet look")
			}
		}
		w.do(a)
	}
	if at != w.p.life().state {
		w.fatalf("state %s was not reported, only %s", w.p.life().state, at)
	}
	w.check()
}

func (w *world) do(a action) {
	w.t.Helper()
	switch a := a.(type) {
	case open:
		w.pending = append(w.pending, opened{})
	case arm:
		w.armed[0], w.armed[1] = true, true
		if w.collect {
			w.fatalf("armed while clients are accepted")
		}
	case armOne:
		w.armed[a.socket] = true
	case disarm:
		w.armed[0], w.armed[1] = false, false
	case launch:
		if w.live > 0 || w.left && w.svc.Stop.KillMode != KillProcess || slices.ContainsFunc(w.pending, isLaunch) {
			w.fatalf("a second process")
		}
		if w.parked {
			w.fatalf("a start while new connections are parked")
		}
		w.parked = a.hold
		w.pending = append(w.pending, launched{})
	case serve:
		if a.room == 0 && !a.refuse {
			w.fatalf("nothing to serve")
		}
		w.pending = append(w.pending, served{socket: a.socket, started: a.room})
	case refuse:
		if w.p.life().state != Failed {
			w.fatalf("refused in %s", w.p.life().state)
		}
		w.armed[a.socket] = true
	case look:
		w.pending = append(w.pending, looked{})
	case readQueue:
		w.pending = append(w.pending, queueRead{})
	case confirm:
		w.pending = append(w.pending, confirmed{})
		w.parked, w.quiet = w.svc.Handoff != Gate, false
		w.frozen = w.alive()
		w.open = false
	case rouse:
		if w.open || has[roused](w) || has[commandEnded](w) {
			w.fatalf("launched with the gate open, or with another command at work")
		}
		w.collect = true
		w.pending = append(w.pending, roused{launched: !w.up})
	case giveUp:
		w.given = true
	case admit:
		if w.cut {
			w.fatalf("admitted at the end")
		}
		w.open, w.collect = true, false
	case shut:
		w.open, w.collect = false, false
	case cut:
		w.open, w.cut, w.collect = false, true, false
	case freeze:
		w.pending = append(w.pending, frozen{})
		w.frozen = w.alive()
	case drain:
		w.pending = append(w.pending, drained{})
		w.parked = w.svc.Handoff != Gate
		w.open = false
	case unpark:
		w.parked = false
	case command:
		if w.open {
			w.fatalf("stopped with the gate open")
		}
		w.given = false
		w.pending = append(w.pending, commandEnded{})
	case thaw:
		w.frozen = false
	case signal, forget, drop, limited, report:
	}
}

func (w *world) alive() bool { return w.live > 0 || w.left }

func isLaunch(ev event) bool { _, ok := ev.(launched); return ok }

func has[T event](w *world) bool {
	return slices.ContainsFunc(w.pending, func(ev event) bool { _, ok := ev.(T); return ok })
}

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
	m, solo := w.p.(*solo)
	if g, ok := w.p.(*gated); ok {
		w.checkGate(g)
		return
	}
	freezing := solo && m.freezing
	mayArm := l.state == Listening || w.svc.Accept && l.state == Running || l.state == Frozen && !freezing ||
		l.state == Failed && w.svc.Restart.OnFailure == Reject
	switch l.state {
	case Backoff:
		if l.deadline.IsZero() && !has[opened](w) {
			w.fatalf("no deadline in %s", l.state)
		}
	case Stopping, Killing, Failed:
		if l.deadline.IsZero() {
			w.fatalf("no deadline in %s", l.state)
		}
	case Stopped, Confirming, Frozen:
		if !l.deadline.IsZero() {
			w.fatalf("a deadline in %s", l.state)
		}
	case Listening:
		if !l.deadline.IsZero() && solo {
			w.fatalf("a deadline in %s", l.state)
		}
	case Running:
		if solo && l.deadline.IsZero() && !has[looked](w) {
			w.fatalf("running without a deadline")
		}
	case Starting:
		if l.deadline.IsZero() && (m.awaiting || !has[launched](w)) && w.live > 0 {
			w.fatalf("starting without a deadline")
		}
	}
	if (w.armed[0] || w.armed[1]) && !mayArm {
		w.fatalf("armed in %s", l.state)
	}
	if mayArm && solo && (!w.armed[0] || !w.armed[1]) && l.state != Failed && (l.state != Frozen || w.alive()) {
		w.fatalf("%s with a disarmed socket", l.state)
	}
	if w.frozen && l.state != Confirming && l.state != Frozen && l.state != Killing {
		w.fatalf("left frozen in %s", l.state)
	}
	if w.parked && l.state != Confirming && l.state != Stopping && l.state != Killing && (l.state != Starting || !w.svc.Ready.Hold) {
		w.fatalf("left parked in %s", l.state)
	}
	if w.left && w.live == 0 && solo && w.svc.Stop.KillMode != KillProcess && (l.state == Listening || l.state == Backoff || l.state == Failed || l.state == Stopped) {
		w.fatalf("processes left in %s", l.state)
	}
	if l.state == Stopped && (w.live > 0 || has[served](w)) {
		w.fatalf("stopped with something left")
	}
	if c, ok := w.p.(*perConnection); ok && w.svc.Limits.MaxConnections > 0 && c.live > w.svc.Limits.MaxConnections {
		w.fatalf("%d connections", c.live)
	}
}

// checkGate holds the same of gates.
func (w *world) checkGate(m *gated) {
	w.t.Helper()
	mayArm := m.state == Listening || m.state == Failed && w.svc.Restart.OnFailure == Reject
	if (w.armed[0] || w.armed[1]) && !mayArm {
		w.fatalf("armed in %s", m.state)
	}
	if m.state == Listening && (!w.armed[0] || !w.armed[1]) {
		w.fatalf("%s with a disarmed socket", m.state)
	}
	if w.open != (m.state == Running) {
		w.fatalf("open is %v in %s", w.open, m.state)
	}
	switch m.state {
	case Starting:
		if !has[roused](w) {
			w.fatalf("nothing ends %s", m.state)
		}
		if m.deadline.IsZero() && !w.given {
			w.fatalf("no deadline in %s", m.state)
		}
	case Running:
		if m.deadline.IsZero() && !has[looked](w) {
			w.fatalf("running without a deadline")
		}
	case Confirming:
		if !has[confirmed](w) {
			w.fatalf("nothing ends %s", m.state)
		}
	case Stopping:
		if !has[drained](w) && !has[commandEnded](w) {
			w.fatalf("nothing ends %s", m.state)
		}
		if !m.draining && m.deadline.IsZero() && !w.given {
			w.fatalf("no deadline in %s", m.state)
		}
	case Backoff:
		if m.deadline.IsZero() && !has[opened](w) {
			w.fatalf("no deadline in %s", m.state)
		}
	case Failed:
		if m.deadline.IsZero() {
			w.fatalf("no deadline in %s", m.state)
		}
	case Stopped:
		if !w.cut {
			w.fatalf("connections left in %s", m.state)
		}
	case Listening:
	case Frozen, Killing:
		w.fatalf("in %s", m.state)
	}
}

// gateEvent is what can happen to a gate by itself.
func (w *world) gateEvent(detail int) {
	w.t.Helper()
	switch {
	case detail == 3:
		w.up = w.up || w.p.life().state == Listening
		w.tell(upAlready{})
	case w.open || has[confirmed](w):
		w.up = detail%2 == 0 // it may have ended, or just refuse
		w.open = false
		w.tell(lost{errors.New("refused"), detail%3 == 1, detail%5 == 4})
	}
}

// kinds is how many kinds of things act knows.
const kinds = 15

// act makes one of the things happen that can happen now; b chooses.
func (w *world) act(b byte) {
	w.t.Helper()
	kind, detail := b%kinds, int(b/kinds)
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
		n := int(kind - 2)
		if n >= len(w.pending) {
			return
		}
		ev := w.pending[n]
		w.pending = slices.Delete(w.pending, n, n+1)
		w.tell(w.answer(ev, detail))
	case 5:
		w.exit(detail)
	case 6:
		if d := w.p.life().deadline; !d.IsZero() && w.now.Before(d) {
			w.now = d
		}
		w.tell(deadlinePassed{})
	case 7:
		w.now = w.now.Add(time.Duration(detail) * time.Second)
		w.tell(deadlinePassed{})
	case 8:
		w.request(detail)
	case 9:
		w.tell(sleepRequested{})
	case 10:
		if detail > 14 {
			w.tell(shutdownRequested{})
		}
	case 11:
		if detail > 15 {
			w.tell(shutdownRequested{now: true})
		}
	case 12:
		if w.left && w.live == 0 {
			w.left = false
			w.unfreeze()
			if w.svc.Stop.KillMode != KillProcess {
				w.tell(emptied{[...][]uint64{nil, {1}, {1, 2}}[detail%3]})
			}
		}
	case 13:
		if detail%2 == 0 {
			w.tell(addressAppeared{})
		} else {
			w.tell(resourcesFreed{})
		}
	case 14:
		switch {
		case w.svc.Handoff == Gate:
			w.gateEvent(detail)
		case !w.alive() || w.svc.Ready.Type == ReadyExec || slices.ContainsFunc(w.pending, isLaunch):
		case detail == 3:
			w.tell(addresses{known: true})
		default:
			w.tell(readiness{lacks: [...]string{"", "much", "a little"}[detail%3], spare: detail%3 == 2})
		}
	}
}

// exit ends a process.
func (w *world) exit(detail int) {
	w.t.Helper()
	if w.live == 0 || slices.ContainsFunc(w.pending, isLaunch) {
		return
	}
	w.live--
	if w.live == 0 {
		w.left = w.left || detail >= 3 && detail < 6
	}
	w.unfreeze()
	status := [...]process.ExitStatus{{}, {Code: 1}, {Signal: syscall.SIGTERM}, {Signal: syscall.SIGSEGV}}[detail%4]
	w.tell(exited{status, [...][]uint64{nil, {1}, {1, 2}}[detail%3], w.left && w.live == 0})
}

// unfreeze drops the answer to a freeze that is under way: the supervisor tells that something has ended
// in its place, when it is over.
func (w *world) unfreeze() {
	freezing := len(w.pending)
	w.pending = slices.DeleteFunc(w.pending, func(ev event) bool {
		switch ev.(type) {
		case confirmed, frozen:
			return true
		default:
			return false
		}
	})
	w.frozen = w.alive() && (w.frozen || len(w.pending) < freezing)
}

func (w *world) request(detail int) {
	w.t.Helper()
	if w.svc.Accept && detail%5 < 3 || w.svc.Handoff == Gate && (detail%5 == 1 || detail%5 == 2) {
		return // refused before it comes to the policy
	}
	switch detail % 5 {
	case 0:
		w.tell(wakeRequested{})
	case 1:
		w.tell(freezeRequested{})
	case 2:
		w.tell(thawRequested{})
	case 3:
		w.tell(restartRequested{})
	case 4:
		w.tell(resetRequested{})
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
	case opened:
		if bad {
			return openFailed{errors.New("no such address")}
		}
		return opened{}
	case launched:
		if bad {
			return launchFailed{errors.New("no"), detail%2 == 0}
		}
		w.live++
		return launched{[]uint64{1}}
	case served:
		if ev.started = min(ev.started, 1+detail%2); bad {
			ev.started, ev.err, ev.pause, ev.held = 0, errors.New("no"), detail%2 == 0, true
		}
		w.live += ev.started
		return ev
	case roused:
		switch {
		case !bad && (!w.given || detail%2 == 0):
			w.up = true
			return ev
		case detail == 2 && ev.launched:
			w.up = true // and not ready
			return roused{launched: true, err: errors.New("no")}
		}
		return roused{err: errors.New("no"), pause: detail == 5}
	case commandEnded:
		if ev.err = nil; bad {
			ev.err = errors.New("no")
		}
		w.up = w.up && bad
		return ev
	case looked:
		return looked{sums}
	case queueRead:
		return queueRead{[...][]uint64{nil, {1}, {1, 2}}[detail%3], sums}
	case frozen:
		if bad {
			w.frozen = false
			return frozen{errors.New("cannot freeze")}
		}
		w.frozen = w.alive()
		return ev
	case confirmed:
		if bad {
			w.frozen = false
			return confirmed{err: errors.New("cannot freeze")}
		}
		w.frozen = w.alive()
		w.quiet = sum.Known && sum.Open == 0 && sum.Queued == 0
		return confirmed{sums: sums}
	default:
		return ev
	}
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
		w.act(12)
	}
	w.fatalf("does not come to an end")
}

func FuzzPolicy(f *testing.F) {
	f.Add(uint16(0), []byte{0, 2, 6, 2, 2, 5})
	f.Add(uint16(0), []byte{0, 30, 6, 0, 2, 6, 2, 38, 5})
	f.Add(uint16(settingAccept|settingLimits), []byte{0, 2, 1, 2, 5, 5, 9, 30, 6})
	f.Add(uint16(settingMixed|settingCommand), []byte{0, 2, 9, 2, 2, 47, 12})
	f.Add(uint16(settingGate), []byte{0, 2, 6, 2, 32, 2, 59, 2, 30, 9})
	f.Add(uint16(settingUnopened|settingReject), []byte{6, 30, 13, 2, 0, 30, 6, 0, 30})
	f.Fuzz(func(t *testing.T, set uint16, script []byte) {
		if len(script) > 300 {
			return
		}
		w := newWorld(t, setting(set))
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
	for i, kind := range []setting{0, settingAccept, settingGate} {
		got := map[string]bool{}
		for _, set := range []setting{0, settingMixed | settingCommand | settingReject, settingProcess | settingLinger | settingUnopened, settingLimits, settingReady, settingLearn, settingLearn | settingUnopened} {
			explore(t, set|kind, got)
		}
		if diff := cmp.Diff(slices.Sorted(maps.Keys(want[i])), slices.Sorted(maps.Keys(got))); diff != "" {
			t.Errorf("table %d: doc.go and the policy differ (-doc +policy):\n%s", i+1, diff)
		}
	}
}

// explore walks breadth first over all scripts, going on from each new situation once.
func explore(t *testing.T, set setting, got map[string]bool) {
	t.Helper()
	situations := map[string]bool{}
	next := []*world{newWorld(t, set)}
	maps.Copy(got, next[0].seen)
	for depth := 0; depth < 20 && len(next) > 0; depth++ {
		var found []*world
		for _, from := range next {
			for b := range kinds * 17 { // what a byte can say
				if !from.may(b%kinds, b/kinds) {
					continue
				}
				w := from.clone()
				w.act(byte(b))
				maps.Copy(got, w.seen)
				if key := w.situation(); !situations[key] {
					situations[key] = true
					found = append(found, w)
				}
			}
		}
		next = found
	}
}

// may says whether act can make something of this that it makes of nothing else.
func (w *world) may(kind, detail int) bool {
	switch kind {
	case 0, 1:
		return w.armed[kind] && (detail == 0 || detail == 6)
	case 2, 3, 4:
		return kind-2 < len(w.pending) && detail <= 6
	case 5:
		return w.live > 0 && detail <= 6
	case 7:
		return detail <= 6
	case 8:
		return detail < 5
	case 10, 11:
		return detail == 16
	case 12:
		return w.left && w.live == 0 && detail < 3
	case 13:
		return detail < 2
	case 14:
		return detail < 4
	}
	return detail == 0
}

// clone returns a world that goes its own way from here.
func (w *world) clone() *world {
	c := *w
	c.armed, c.pending, c.trace = slices.Clone(w.armed), slices.Clone(w.pending), slices.Clone(w.trace)
	c.seen = map[string]bool{}
	switch m := w.p.(type) {
	case *solo:
		p := *m
		p.recent = slices.Clone(m.recent)
		c.p = &p
	case *gated:
		p := *m
		p.recent = slices.Clone(m.recent)
		c.p = &p
	case *perConnection:
		p := *m
		p.recent, p.sockets = slices.Clone(m.recent), slices.Clone(m.sockets)
		c.p = &p
	}
	return &c
}

// situation is what a policy's next steps depend on, roughly.
func (w *world) situation() string {
	l := w.p.life()
	key := fmt.Sprint(l.state, l.reason == ReasonResources, min(w.live, 2), w.left, w.armed[0] || w.armed[1], min(len(w.pending), 2), l.unopened, len(l.recent))
	switch m := w.p.(type) {
	case *solo:
		key += fmt.Sprint(m.awaiting, m.unknown, m.lacks.spare, m.wanted, m.freezing, m.ending, m.failing != nil, m.take.before != nil, m.stuck.inRow >= firstBracket, w.now.Sub(m.idle.since) >= m.spec.Idle.StopAfter)
	case *gated:
		key += fmt.Sprint(m.wanted, m.draining, m.failing != nil, m.gone != nil, w.up, w.given, m.looking, w.now.Sub(m.idle.since) >= m.spec.Idle.StopAfter)
	case *perConnection:
		key += fmt.Sprint(m.wanted, m.sockets[0].serving, m.sockets[0].held, m.sockets[0].waits, m.left)
	}
	return key
}

// readDiagram returns the transitions of the three tables in doc.go.
func readDiagram(t *testing.T) (tables [3]map[string]bool) {
	t.Helper()
	b, err := os.ReadFile("doc.go")
	if err != nil {
		t.Fatal(err)
	}
	first, second, _ := strings.Cut(string(b), "With accept = true")
	second, third, _ := strings.Cut(second, "With handoff = \"gate\"")
	row := regexp.MustCompile(`(?m)^//\t(\w+) +-> (\w+) +(.+)$`)
	for i, text := range []string{first, second, third} {
		tables[i] = map[string]bool{}
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
		opened{},
		openFailed{errors.New("no")},
		addressAppeared{},
		socketReady{},
		socketBroken{errors.New("no")},
		addresses{},
		addresses{known: true},
		launched{},
		readiness{},
		readiness{lacks: "much"},
		launchFailed{errors.New("no"), false},
		launchFailed{errors.New("no"), true},
		served{},
		exited{},
		exited{left: true},
		emptied{},
		looked{make([]activity.Summary, 2)},
		queueRead{},
		confirmed{sums: make([]activity.Summary, 2)},
		frozen{},
		drained{},
		commandEnded{},
		commandEnded{errors.New("no")},
		upAlready{},
		roused{},
		roused{err: errors.New("no")},
		roused{launched: true, err: errors.New("no")},
		lost{errors.New("no"), false, false},
		lost{errors.New("no"), true, false},
		lost{errors.New("no"), false, true},
		deadlinePassed{},
		resourcesFreed{},
		wakeRequested{},
		sleepRequested{},
		restartRequested{},
		freezeRequested{},
		thawRequested{},
		resetRequested{},
		shutdownRequested{},
		shutdownRequested{now: true},
	}
	for state := Listening; state <= Stopped; state++ {
		for _, ev := range events {
			for set := range settingLinger + 1 { // all but settingLinger, which changes nothing here
				if set == settingLinger {
					set = settingGate
				}
				p := newWorld(t, set).p
				l := p.life()
				l.state = state
				if c, ok := p.(*perConnection); ok {
					c.live, c.sockets[0].serving = 1, true
				}
				for _, a := range p.step(time.Unix(1000, 0), ev) {
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
