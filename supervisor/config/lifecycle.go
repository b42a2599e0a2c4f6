package config

import (
	"math"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/supervisor"
)

// infinity is the word for a duration without an end, as in systemd.
const infinity = "infinity"

func startKeys() []key {
	return []key{
		{
			"timeout", `duration or "infinity"`, `"90s"`, "how long the process may take to be ready, and then to take something of what woke it, before it has failed; with `handoff = \"gate\"` until the destination is ready; needs `accept = false`", 0,
			func(d *decoder, raw any) { d.durationOrInfinity(raw, &d.service.Start.Timeout) },
		},
	}
}

func stopKeys() []key {
	return []key{
		{
			"command", "array of strings", "none", "a program, as an absolute path, and its arguments, that is run first, as the user of the service; the variable `MAINPID` is the pid of the first process", 0,
			func(d *decoder, raw any) { d.command(raw, &d.service.Stop.Command) },
		},
		{
			"kill_mode", `"control-group", "mixed" or "process"`, `"control-group"`,
			"who gets the signals: all processes of the service; `signal` the first one and `final_signal` the others; the first one alone", 0,
			(*decoder).killMode,
		},
		{
			"signal", "signal", `"SIGTERM"`, "what asks the processes to end: a name with or without SIG, or a number", 0,
			func(d *decoder, raw any) { d.signal(raw, &d.service.Stop.Signal) },
		},
		{
			"final_signal", "signal", `"SIGKILL"`, "what those get that are left when `timeout` is over", 0,
			func(d *decoder, raw any) { d.signal(raw, &d.service.Stop.FinalSignal) },
		},
		{
			"timeout", "duration", `"90s"`, "how long `command` may take, and then the processes after `signal`; with `handoff = \"gate\"` how long `gate.stop` may take", 0,
			func(d *decoder, raw any) { d.duration(raw, 1, &d.service.Stop.Timeout) },
		},
	}
}

func restartKeys() []key {
	return []key{
		{
			"delay", "duration", `"1s"`, "how long to wait after a failure; doubled after each one that follows", 0,
			func(d *decoder, raw any) { d.duration(raw, 1, &d.service.Restart.Delay) },
		},
		{
			"max_delay", "duration", `"1m"`, "how long to wait at most", 0,
			func(d *decoder, raw any) { d.duration(raw, 1, &d.service.Restart.MaxDelay) },
		},
		{
			"burst", "integer", "10", "after so many failures within `interval` the service is `failed`; 0: it is tried for ever", 0,
			func(d *decoder, raw any) { d.integer(raw, 0, math.MaxInt32, &d.service.Restart.Burst) },
		},
		{
			"interval", "duration", `"10m"`, "the time in which `burst` counts", 0,
			func(d *decoder, raw any) { d.duration(raw, 1, &d.service.Restart.Interval) },
		},
		{
			"failed_delay", `duration or "infinity"`, `"5m"`, "how long until a `failed` service is tried again; infinity: until `hibergated reset`", 0,
			func(d *decoder, raw any) { d.durationOrInfinity(raw, &d.service.Restart.FailedDelay) },
		},
		{
			"on_failure", `"hold" or "reject"`, `"hold"`, "what happens to clients of a `failed` service: they wait in the queue, or their connections are accepted and closed", 0,
			(*decoder).onFailure,
		},
	}
}

// durationOrInfinity reads a positive duration, or infinity, which becomes 0.
func (d *decoder) durationOrInfinity(raw any, to *time.Duration) {
	if raw == infinity {
		*to = 0
		return
	}
	if s, ok := raw.(string); ok {
		if v, ok := parseDuration(s); !ok || v <= 0 {
			d.wrong(`must be a duration such as "5s", or "infinity", got %q`, s)
			return
		}
	}
	d.duration(raw, 1, to)
}

// killMode reads which processes of a service are ended.
func (d *decoder) killMode(raw any) {
	var word string
	if d.choice(raw, &word, "control-group", "mixed", "process") {
		d.service.Stop.KillMode = map[string]supervisor.KillMode{
			"control-group": supervisor.KillControlGroup, "mixed": supervisor.KillMixed, "process": supervisor.KillProcess,
		}[word]
	}
}

// onFailure reads what clients of a failed service meet.
func (d *decoder) onFailure(raw any) {
	var word string
	if d.choice(raw, &word, "hold", "reject") && word == "reject" {
		d.service.Restart.OnFailure = supervisor.Reject
	}
}

// signal reads "SIGTERM", "TERM" or a number.
func (d *decoder) signal(raw any, to *syscall.Signal) {
	const want = `must be a signal such as "SIGTERM" or a number from 1 to 64`
	switch v := raw.(type) {
	case int64:
		if v < 1 || v > 64 {
			d.wrong("%s, got %d", want, v)
			return
		}
		*to = syscall.Signal(v)
	case string:
		name := "SIG" + strings.TrimPrefix(v, "SIG")
		if n := unix.SignalNum(name); n != 0 {
			*to = n
			return
		}
		var names []string
		for n := syscall.Signal(1); n < 32; n++ {
			names = append(names, unix.SignalName(n))
		}
		if near := nearest(name, names); near != "" {
			d.wrong("unknown signal %q; did you mean %q?", v, near)
			return
		}
		d.wrong("%s, got %q", want, v)
	default:
		d.wrongType(strings.TrimPrefix(want, "must be "), raw)
	}
}

// checkLifecycle checks how the service starts and fails against the rest.
func (d *decoder) checkLifecycle(since int, keys map[string]any) {
	s := d.service
	if start, _ := keys["start"].(map[string]any); start["timeout"] != nil && s.Accept && !d.failed(since, "accept") {
		d.wrongKey("start.timeout", "makes no sense with accept = true: each process has its connection from the start")
	}
	if stop, _ := keys["stop"].(map[string]any); stop["command"] != nil && s.Accept && !d.failed(since, "accept") {
		d.wrongKey("stop.command", "makes no sense with accept = true: there is no one process that it could stop")
	}
	restart, _ := keys["restart"].(map[string]any)
	if r := s.Restart; r.Delay > r.MaxDelay && !d.failed(since, "restart.delay", "restart.max_delay") {
		switch {
		case restart["max_delay"] == nil:
			d.wrongKey("restart.delay", "is more than max_delay, which is %v by default", r.MaxDelay)
		case restart["delay"] == nil:
			d.wrongKey("restart.max_delay", "is less than delay, which is %v by default", r.Delay)
		default:
			d.wrongKey("restart.delay", "is more than max_delay: %v and %v", r.Delay, r.MaxDelay)
		}
	}
	if s.Restart.OnFailure == supervisor.Reject && !d.has(forTCP|forUnix|forUnixpacket) {
		d.wrongKey("restart.on_failure", `"reject" needs a socket with connections (tcp, unix, unixpacket), and there is none`)
	}
}
