package supervisor

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"hibergate/activation"
	"hibergate/supervisor/activity"
	"hibergate/supervisor/process"
)

var update = flag.Bool("update", false, "rewrite the expected output in testdata/machine")

// TestScenarios plays the stories of testdata/machine to the policies. A script
// is a list of lines: `service KEY=VALUE...` makes the service, `+DURATION EVENT
// [ARGS]` tells it what happened that much later; the lines below that start with
// ">" are the actions that must come of it, and the state and deadline after them.
func TestScenarios(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("../testdata/machine/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scenarios: %v", err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			t.Parallel()
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			got := play(t, string(b))
			if *update {
				if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if diff := cmp.Diff(string(b), got); diff != "" {
				t.Errorf("%s (-want +got):\n%s", file, diff)
			}
		})
	}
}

func play(t *testing.T, script string) string {
	t.Helper()
	var out strings.Builder
	var p policy
	epoch := time.Unix(0, 0)
	now := epoch
	for line := range strings.Lines(script) {
		line = strings.TrimRight(line, "\n")
		if strings.HasPrefix(line, ">") {
			continue
		}
		fmt.Fprintln(&out, line)
		words := strings.Fields(line)
		switch {
		case len(words) == 0 || strings.HasPrefix(line, "#"):
			continue
		case words[0] == "service":
			p = scriptService(t, words[1:], now)
			continue
		}
		d, err := time.ParseDuration(strings.TrimPrefix(words[0], "+"))
		if err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		now = now.Add(d)
		for _, a := range p.step(now, scriptEvent(t, now, words[1:])) {
			fmt.Fprintf(&out, "> %s\n", describe(a))
		}
		l := p.life()
		fmt.Fprintf(&out, "> = %s", l.state)
		if !l.deadline.IsZero() {
			fmt.Fprintf(&out, ", deadline in %s", l.deadline.Sub(now))
		}
		if l.busy != "" {
			fmt.Fprintf(&out, ", busy: %s", l.busy)
		}
		fmt.Fprintln(&out)
	}
	return out.String()
}

func scriptService(t *testing.T, words []string, now time.Time) policy {
	t.Helper()
	svc := Service{
		Name: "s", Stop: Stop{Signal: syscall.SIGTERM, FinalSignal: syscall.SIGKILL, Timeout: 5 * time.Second},
		Restart: DefaultRestart(),
	}
	number := func(v string) int {
		n, err := strconv.Atoi(v)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	duration := func(v string) time.Duration {
		d, err := time.ParseDuration(v)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	rate := func(v string) Rate {
		count, per, _ := strings.Cut(v, "/")
		return Rate{number(count), duration(per)}
	}
	for _, w := range words {
		k, v, _ := strings.Cut(w, "=")
		switch k {
		case "stop_after":
			svc.Idle.StopAfter = duration(v)
		case "when":
			if v == "no-traffic" {
				svc.Idle.When = activity.NoTraffic
			}
		case "accept": // how many sockets
			svc.Accept, svc.Sockets = true, make([]activation.Spec, number(v))
		case "start_timeout":
			svc.Start.Timeout = duration(v)
		case "ready":
			svc.Ready.Type = map[string]ReadyType{"bind": ReadyBind, "notify": ReadyNotify}[v]
		case "hold":
			svc.Ready.Hold = true
		case "kill_mode":
			svc.Stop.KillMode = map[string]KillMode{"mixed": KillMixed, "process": KillProcess}[v]
		case "final_signal":
			svc.Stop.FinalSignal = syscall.Signal(number(v))
		case "command":
			svc.Stop.Command = []string{v}
		case "burst":
			svc.Restart.Burst = number(v)
		case "interval":
			svc.Restart.Interval = duration(v)
		case "on_failure":
			svc.Restart.OnFailure = map[string]OnFailure{"reject": Reject}[v]
		case "gate":
			svc.Handoff = Gate
		case "max_connections":
			svc.Limits.MaxConnections = number(v)
		case "overflow":
			svc.Limits.Overflow = map[string]Overflow{"queue": OverflowQueue}[v]
		case "accept_rate":
			svc.Limits.AcceptRate = rate(v)
		case "wake_rate":
			svc.Limits.WakeRate = rate(v)
		default:
			t.Fatalf("unknown word %q", w)
		}
	}
	switch {
	case svc.Handoff == Gate:
		return newGated(&svc, now)
	case svc.Accept:
		return newPerConnection(&svc, now)
	}
	return newSolo(&svc, now)
}

func scriptEvent(t *testing.T, now time.Time, words []string) event {
	t.Helper()
	args := map[string]string{}
	for _, w := range words[1:] {
		k, v, _ := strings.Cut(w, "=")
		args[k] = v
	}
	number := func(k string) int {
		if args[k] == "" {
			return 0
		}
		n, err := strconv.Atoi(args[k])
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	var failure error
	if args["err"] != "" {
		failure = errors.New(args["err"])
	}
	var queued []uint64
	for w := range strings.SplitSeq(args["queued"], ",") {
		if n, err := strconv.ParseUint(w, 10, 64); err == nil {
			queued = append(queued, n)
		} else if w == "?" {
			queued = append(queued, unidentified)
		}
	}
	ago := func(k string) time.Time {
		if args[k] == "" {
			return time.Time{}
		}
		d, err := time.ParseDuration(args[k])
		if err != nil {
			t.Fatal(err)
		}
		return now.Add(-d)
	}
	given := func(k string) bool { _, ok := args[k]; return ok }
	_, polled := args["polled"]
	_, unseen := args["unseen"]
	sum := activity.Summary{
		Known: args["unknown"] == "", Why: args["unknown"],
		Open: number("open"), Queued: number("waiting"), Peers: uint64(number("peers")),
		Last: ago("last"), LastPayload: ago("payload"), Exact: !polled, PayloadUnseen: unseen,
	}
	switch words[0] {
	case "socketReady":
		return socketReady{number("socket")}
	case "socketBroken":
		return socketBroken{failure}
	case "launched":
		return launched{queued}
	case "readiness":
		return readiness{lacks: args["lacks"], spare: given("spare")}
	case "addresses":
		return addresses{known: given("known")}
	case "launchFailed":
		return launchFailed{failure, given("pause")}
	case "served":
		return served{socket: number("socket"), started: number("started"), err: failure, pause: given("pause"), held: given("held")}
	case "exited":
		return exited{process.ExitStatus{Code: number("code"), Signal: syscall.Signal(number("signal"))}, queued, given("left")}
	case "emptied":
		return emptied{queued}
	case "opened":
		return opened{}
	case "openFailed":
		return openFailed{failure}
	case "addressAppeared":
		return addressAppeared{}
	case "resourcesFreed":
		return resourcesFreed{}
	case "queueRead":
		return queueRead{queued, []activity.Summary{sum}}
	case "frozen":
		return frozen{failure}
	case "drained":
		return drained{}
	case "commandEnded":
		return commandEnded{failure}
	case "upAlready":
		return upAlready{}
	case "roused":
		return roused{launched: given("launched"), pause: given("pause"), err: failure}
	case "lost":
		return lost{failure, given("served"), given("pause")}
	case "restart":
		return restartRequested{}
	case "freeze":
		return freezeRequested{}
	case "thaw":
		return thawRequested{}
	case "reset":
		return resetRequested{}
	case "looked":
		return looked{[]activity.Summary{sum}}
	case "confirmed":
		return confirmed{[]activity.Summary{sum}, failure}
	case "deadlinePassed":
		return deadlinePassed{}
	case "wake":
		return wakeRequested{}
	case "sleep":
		return sleepRequested{}
	case "shutdown":
		return shutdownRequested{}
	case "killNow":
		return shutdownRequested{now: true}
	}
	t.Fatalf("unknown event %q", words[0])
	return nil
}

func describe(a action) string {
	switch a := a.(type) {
	case report:
		s := fmt.Sprintf("%s -> %s (%s)", a.from, a.to, a.reason)
		if a.err != nil {
			s += ": " + a.err.Error()
		}
		return s
	case armOne:
		return fmt.Sprintf("arm socket %d", a.socket)
	case serve:
		s := fmt.Sprintf("serve socket %d, room for %d", a.socket, a.room)
		if a.refuse {
			s += ", close the rest"
		}
		return s
	case refuse:
		return fmt.Sprintf("refuse on socket %d", a.socket)
	case launch:
		switch {
		case a.queue:
			return "launch, and see what waits"
		case a.hold:
			return "launch, and hold who waits"
		}
		return "launch"
	case signal:
		if a.whom == started {
			return "signal " + a.signal.String() + ", those that were started"
		}
		return "signal " + a.signal.String()
	case rouse:
		if a.socket == nobody {
			return fmt.Sprintf("rouse (%s)", a.reason)
		}
		return fmt.Sprintf("rouse (%s on socket %d)", a.reason, a.socket)
	case open, arm, disarm, forget, drop, look, readQueue, confirm, freeze, thaw, drain, unpark, command, giveUp, admit, shut, cut, limited:
	}
	return strings.TrimPrefix(fmt.Sprintf("%T", a), "supervisor.")
}
