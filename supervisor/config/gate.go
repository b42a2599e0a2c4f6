package config

import (
	"math"
	"slices"
	"strings"
	"time"

	"hibergate/activation"
	"hibergate/supervisor"
	"hibergate/supervisor/gate"
)

// What a gate does where the configuration says nothing.
const (
	defaultConnectTimeout = 5 * time.Second
	defaultSessionTimeout = time.Minute
	defaultCheckInterval  = 5 * time.Second
	defaultMaxPending     = 1000
	defaultStatus         = 200

	defaultHTTPTimeout    = 5 * time.Second
	defaultCommandTimeout = 10 * time.Second

	// The time between two tries at a destination on this machine, which costs nothing, and elsewhere.
	defaultConnectInterval, defaultConnectIntervalFar = time.Millisecond, 50 * time.Millisecond
	defaultHTTPInterval, defaultHTTPIntervalFar       = 10 * time.Millisecond, 100 * time.Millisecond
	defaultCommandInterval                            = 100 * time.Millisecond
)

const (
	minInterval     = time.Millisecond
	maxBanner       = 4096 // fits into the send buffer of a connection that nothing was sent on
	maxDestinations = 64
	maxHTTPPath     = 2048
)

// defaultGate is a gate of which nothing is said. Of Ready, what depends on the destination is filled in by settleReady.
func defaultGate() gate.Spec {
	return gate.Spec{
		ConnectTimeout: defaultConnectTimeout, SessionTimeout: defaultSessionTimeout, CheckInterval: defaultCheckInterval,
		MaxPending: defaultMaxPending,
	}
}

// gates says whether the service is no child of ours.
func (d *decoder) gates() bool { return d.service.Handoff == supervisor.Gate }

func gateKeys() []key {
	return []key{
		{
			"destination", "address, or array of addresses", "required", "where connections and datagrams go: `tcp://host:port`, `udp://host:port` or `unix:///path`; a host may be a name, which is looked up at each wake", 0,
			(*decoder).destination,
		},
		{
			"launch", "array of strings, or string", "none", "what makes the destination run: a program, as an absolute path, and its arguments, or a line for `/bin/sh -c`; run as `user`", 0,
			func(d *decoder, raw any) { d.commandOrLine(raw, &d.gate.Launch) },
		},
		{
			"stop", "array of strings, or string", "none", "what makes it sleep, in the same form; needs `launch`", 0,
			func(d *decoder, raw any) { d.commandOrLine(raw, &d.gate.Stop) },
		},
		{
			"launch_timeout", "duration", "`start.timeout`", "how long `launch` may take", 0,
			func(d *decoder, raw any) { d.duration(raw, 1, &d.gate.LaunchTimeout) },
		},
		{
			"ready", `"connect", "launched" or table`, `"connect"`, "when the destination is ready: when it accepts a connection, or as soon as `launch` has ended with status 0", 0,
			(*decoder).gateReady,
		},
		{
			"connect_timeout", "duration", `"5s"`, "how long to wait for the destination to accept a connection", 0,
			func(d *decoder, raw any) { d.duration(raw, minInterval, &d.gate.ConnectTimeout) },
		},
		{
			"session_timeout", "duration", `"1m"`, "a client of a udp socket that has sent and got nothing for so long is forgotten", 0,
			func(d *decoder, raw any) { d.duration(raw, minInterval, &d.gate.SessionTimeout) },
		},
		{
			"balance", `"round-robin" or "least-connections"`, `"round-robin"`, "which of several destinations gets the next connection; those that do not accept are left out", 0,
			(*decoder).balance,
		},
		{
			"pending_timeout", "duration", "none", "clients are accepted while the destination wakes, and get `on_timeout` when they have waited for so long; none: they wait in the queue of the kernel for as long as they like", 0,
			func(d *decoder, raw any) { d.duration(raw, 1, &d.gate.PendingTimeout) },
		},
		{
			"max_pending", "integer", "1000", "how many of those there are at most; the others wait in the queue of the kernel; needs `pending_timeout`", 0,
			func(d *decoder, raw any) { d.integer(raw, 1, math.MaxInt32, &d.gate.MaxPending) },
		},
		{
			"on_timeout", `"close", "reset" or text`, `"close"`, "what they get: their connection is closed, or reset; any other text is sent before it is closed; needs `pending_timeout`", 0,
			(*decoder).onTimeout,
		},
		{
			"proxy_protocol", `"v1" or "v2"`, "none", "the version of the PROXY header that tells the destination who its client is", 0,
			(*decoder).proxyProtocol,
		},
		{
			"transparent", "boolean", "false", "true: TCP connections to the destination come from the address of the client; needs CAP_NET_ADMIN, and a way back through this machine", 0,
			func(d *decoder, raw any) { d.boolean(raw, &d.gate.Transparent) },
		},
		{
			"forward", `"relay" or "kernel"`, `"relay"`, "who moves the bytes while the destination is awake: hibergated, or the kernel, past it", 0,
			(*decoder).forward,
		},
		{
			"check_interval", "duration", `"5s"`, "how often the destination is asked whether it is still there; needs `forward = \"kernel\"`", 0,
			func(d *decoder, raw any) { d.duration(raw, minInterval, &d.gate.CheckInterval) },
		},
		{
			"watch_destination", "boolean", "false", "true: TCP connections to the destination that do not come through the gate keep it awake, too", 0,
			func(d *decoder, raw any) { d.boolean(raw, &d.gate.WatchDestination) },
		},
	}
}

func gateReadyKeys() []key {
	ready := func(d *decoder) *gate.Ready { return &d.gate.Ready }
	return []key{
		{
			"http", "string", "none", "the path of a GET request that the destination answers with `status` when it is ready", 0,
			(*decoder).httpPath,
		},
		{
			"status", "integer", "200", "the status of that answer", 0,
			func(d *decoder, raw any) { d.integer(raw, 100, 599, &ready(d).Status) },
		},
		{
			"command", "array of strings, or string", "none", "a command, in the form of `launch`, that ends with status 0 when the destination is ready", 0,
			func(d *decoder, raw any) { d.commandOrLine(raw, &ready(d).Command) },
		},
		{
			"interval", "duration", "1ms; with `http` 10ms; with `command`, and with `http` and a destination on another machine, 100ms; else with such a destination 50ms", "the time between two tries", 0,
			func(d *decoder, raw any) { d.duration(raw, minInterval, &ready(d).Interval) },
		},
		{
			"timeout", "duration", "`connect_timeout`; with `http` 5s, with `command` 10s", "how long one try may take", 0,
			func(d *decoder, raw any) { d.duration(raw, minInterval, &ready(d).Timeout) },
		},
	}
}

// destination reads where the gate leads.
func (d *decoder) destination(raw any) {
	one := func(raw any) {
		var text string
		if !d.str(raw, &text) {
			return
		}
		t, err := parseDestination(text)
		switch {
		case err != nil:
			d.wrong("%v", err)
		case slices.Contains(d.gate.Destinations, t):
			d.wrong("%s is given twice", t)
		default:
			d.gate.Destinations = append(d.gate.Destinations, t)
		}
	}
	if text, ok := raw.(string); ok {
		one(text)
		return
	}
	d.each(raw, "an address or an array of addresses", one)
	if all, _ := raw.([]any); len(all) > maxDestinations {
		d.wrong("has %d destinations, at most %d are possible", len(all), maxDestinations)
	}
}

// commandOrLine reads a command, or a line that becomes one of the shell.
func (d *decoder) commandOrLine(raw any, to *[]string) {
	if _, ok := raw.(string); !ok {
		if _, ok := raw.([]any); !ok {
			d.wrongType("an array of strings, or a string for the shell", raw)
			return
		}
		d.command(raw, to)
		return
	}
	var line string
	if d.text(raw, &line) {
		*to = []string{"/bin/sh", "-c", line}
	}
}

// gateReady reads when the destination is ready.
func (d *decoder) gateReady(raw any) {
	if m, ok := raw.(map[string]any); ok {
		d.table(&d.schema.gateReady, m)
		return
	}
	if _, ok := raw.(string); !ok {
		d.wrongType(`"connect", "launched" or a table`, raw)
		return
	}
	var word string
	if d.choice(raw, &word, "connect", "launched") && word == "launched" {
		d.gate.Ready.Type = gate.ReadyLaunched
	}
}

// httpPath reads what a destination is asked for: it becomes a line of a request.
func (d *decoder) httpPath(raw any) {
	var path string
	if !d.str(raw, &path) {
		return
	}
	switch {
	case path[0] != '/':
		d.wrong(`must be a path such as "/healthz", got %q`, path)
	case strings.ContainsFunc(path, func(r rune) bool { return r <= ' ' || r > '~' }):
		d.wrong("must be of printable ASCII without blanks, got %q", path)
	case len(path) > maxHTTPPath:
		d.wrong("is %d bytes long, more than the %d that are possible", len(path), maxHTTPPath)
	default:
		d.gate.Ready.Path = path
		d.keep(&d.gate.Ready.Path)
	}
}

// balance reads which destination gets the next connection.
func (d *decoder) balance(raw any) {
	var word string
	if d.choice(raw, &word, "round-robin", "least-connections") && word == "least-connections" {
		d.gate.Balance = gate.LeastConnections
	}
}

// onTimeout reads what clients get that have waited too long.
func (d *decoder) onTimeout(raw any) {
	var text string
	if !d.text(raw, &text) {
		return
	}
	switch {
	case text == "close":
	case text == "reset":
		d.gate.OnTimeout.Reset = true
	case len(text) > maxBanner:
		d.wrong("is %d bytes long, at most %d are sent", len(text), maxBanner)
	default:
		d.gate.OnTimeout.Banner = text
	}
}

// proxyProtocol reads a version of the PROXY header.
func (d *decoder) proxyProtocol(raw any) {
	var word string
	if d.choice(raw, &word, "v1", "v2") {
		d.gate.ProxyProtocol = map[string]gate.ProxyProtocol{"v1": gate.ProxyV1, "v2": gate.ProxyV2}[word]
	}
}

// forward reads who moves the bytes.
func (d *decoder) forward(raw any) {
	var word string
	if d.choice(raw, &word, "relay", "kernel") && word == "kernel" {
		d.gate.Forward = gate.Kernel
	}
}

// settleReady fills in how the destination is asked, where the configuration does not say it.
func settleReady(g *gate.Spec) {
	near := !slices.ContainsFunc(g.Destinations, func(t gate.Destination) bool { return t.Network != activation.UDP && !isLocal(&t) })
	interval, timeout := defaultConnectInterval, g.ConnectTimeout
	if !near {
		interval = defaultConnectIntervalFar
	}
	switch r := &g.Ready; {
	case r.Path != "":
		r.Type = gate.ReadyHTTP
		interval, timeout = defaultHTTPInterval, defaultHTTPTimeout
		if !near {
			interval = defaultHTTPIntervalFar
		}
		if r.Status == 0 {
			r.Status = defaultStatus
		}
	case len(r.Command) > 0:
		r.Type = gate.ReadyCommand
		interval, timeout = defaultCommandInterval, defaultCommandTimeout
	}
	if g.Ready.Interval == 0 {
		g.Ready.Interval = interval
	}
	if g.Ready.Timeout == 0 {
		g.Ready.Timeout = timeout
	}
}
