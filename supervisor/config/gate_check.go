package config

import (
	"slices"
	"strings"

	"hibergate/activation"
	"hibergate/supervisor"
	"hibergate/supervisor/activity"
	"hibergate/supervisor/gate"
	"hibergate/supervisor/gate/forward"
	"hibergate/supervisor/gate/lookup"
)

const (
	forStreams = forTCP | forUnix          // what is relayed as connections
	forGates   = forTCP | forUDP | forUnix // what a gate may listen on
	noGate     = `does not go with handoff = "gate": `
)

// checkGate checks the table gate against the rest, and gives the service its gate.
func (d *decoder) checkGate(since int, keys map[string]any) {
	if !d.gates() {
		if keys["gate"] != nil && !d.failed(since, "handoff") {
			d.wrongKey("gate", `needs handoff = "gate"`)
		}
		return
	}
	d.checkNoProcess(since, keys)
	d.service.Accounting = activity.SockDiag
	d.missing(keys, "gate", "; it says where the connections go")
	table, ok := keys["gate"].(map[string]any)
	if !ok { // told already
		return
	}
	d.path = append(d.path, "gate")
	d.missing(table, "destination", "")
	d.path = d.path[:len(d.path)-1]
	d.checkDestinations(since, table)
	d.checkCommands(since, keys, table)
	d.checkGateReady(since, table)
	d.checkPending(table)
	d.checkStreams(table)
	d.checkForward(since, table)
	d.checkGateLimits(keys)
	settleReady(&d.gate)
	g := d.gate
	d.service.Gate = &g
}

// checkNoProcess refuses what is about a process, or about connections that one accepts: a gate has none.
func (d *decoder) checkNoProcess(since int, keys map[string]any) {
	if d.service.Accept && !d.failed(since, "accept") {
		d.wrongKey("accept", noGate+"connections are relayed, and no process gets one")
	}
	var others []string
	for i := range d.elements {
		if one := kindOf(d.elements[i].spec.Address); one != 0 && !forGates.fit(one) {
			others = append(others, d.elements[i].String())
		}
	}
	if len(others) > 0 {
		d.wrongKey("handoff", `"gate" is for %s, not for %s`, forGates, strings.Join(others, ", "))
	}
	for _, k := range []struct{ table, key, why string }{
		{"", "command", "what starts the destination is gate.launch"},
		{"", "argv0", "there is no program"},
		{"", "ucspi_env", "there is no process for each connection"},
		{"", "accounting", "it knows its own connections"},
		{"", "ready", "when the destination is ready is said by gate.ready"},
		{"stop", "command", "what stops the destination is gate.stop"},
		{"stop", "kill_mode", "there is no process to be signalled; what stops the destination is gate.stop"},
		{"stop", "signal", "there is no process to be signalled; what stops the destination is gate.stop"},
		{"stop", "final_signal", "there is no process to be signalled; what stops the destination is gate.stop"},
		{"limits", "max_connections_per_source", "limits.max_connections bounds all sources together"},
		{"limits", "accept_rate", "limits.max_connections bounds its connections, limits.wake_rate its starts"},
		{"limits", "accept_rate_per_source", "limits.max_connections bounds its connections, limits.wake_rate its starts"},
	} {
		in, name := keys, k.key
		if k.table != "" {
			in, _ = keys[k.table].(map[string]any)
			name = k.table + "." + k.key
		}
		if in[k.key] != nil {
			d.wrongKey(name, "%s", noGate+k.why)
		}
	}
}

// leads says whether a destination is of the kind. One whose address is wrong may have been meant to be.
func (d *decoder) leads(since int, want kinds) bool {
	return d.failed(since, "gate.destination") || len(d.gate.Destinations) == 0 ||
		slices.ContainsFunc(d.gate.Destinations, func(t gate.Destination) bool { return want.fit(kindOf(activation.Address{Network: t.Network})) })
}

// destinationKey is the name of an element of destination, which may be no array.
func (d *decoder) destinationKey(table map[string]any, i int) string {
	if _, single := table["destination"].(string); single {
		return "gate.destination"
	}
	return "gate.destination." + d.index(i)
}

// checkDestinations checks that each socket leads somewhere, and not to itself, and that something leads to each destination.
func (d *decoder) checkDestinations(since int, table map[string]any) {
	if d.failed(since, "gate.destination", "listen") {
		return
	}
	if table["destination"] != nil {
		for _, k := range []struct {
			from, to kinds
			write    string
		}{{forStreams, forStreams, "tcp or unix"}, {forUDP, forUDP, "udp"}} {
			i := slices.IndexFunc(d.elements, func(e socketDraft) bool { return k.from.fit(kindOf(e.spec.Address)) })
			if i >= 0 && !d.leads(since, k.to) {
				d.wrongKey("gate.destination", "what comes to %s needs a %s destination, and there is none", &d.elements[i], k.write)
			}
		}
	}
	for i := range d.gate.Destinations {
		t := &d.gate.Destinations[i]
		from, named := forStreams, "tcp or unix"
		if t.Network == activation.UDP {
			from, named = forUDP, "udp"
		}
		if !d.has(from) {
			d.wrongKey(d.destinationKey(table, i), "%s gets nothing: there is no %s socket in listen", t, named)
		}
		for e := range d.elements {
			if leadsTo(t, &d.elements[e].spec) {
				d.wrongKey(d.destinationKey(table, i), "%s is what the service itself listens on (%s)", t, &d.elements[e])
				break
			}
		}
	}
}

// checkCommands checks the commands against each other, and against when they are run.
func (d *decoder) checkCommands(since int, keys, table map[string]any) {
	if table["launch"] == nil {
		if table["stop"] != nil {
			d.wrongKey("gate.stop", "needs launch: nothing would start it again")
		}
		if table["launch_timeout"] != nil {
			d.wrongKey("gate.launch_timeout", "needs launch")
		}
	}
	start := d.service.Start.Timeout
	if t := d.gate.LaunchTimeout; start > 0 && t > start && !d.failed(since, "start", "gate.launch_timeout") {
		d.wrongKey("gate.launch_timeout", "is more than start.timeout, which bounds all of the start: %v and %v", t, start)
	}
	idle, _ := keys["idle"].(map[string]any)
	if table["stop"] == nil && !slices.Contains(d.meant, "stop") {
		for name, given := range map[string]bool{"idle_timeout": keys["idle_timeout"] != nil, "idle.stop_after": idle["stop_after"] != nil} {
			if given {
				d.wrongKey(name, "needs stop in the table gate: nothing else can put it to sleep")
			}
		}
		if stop, _ := keys["stop"].(map[string]any); stop["timeout"] != nil {
			d.wrongKey("stop.timeout", "is how long gate.stop may take, and there is none")
		}
	}
}

// checkGateReady checks how the destination is asked whether it is ready.
func (d *decoder) checkGateReady(since int, table map[string]any) {
	ready, isTable := table["ready"].(map[string]any)
	if isTable {
		if ready["http"] != nil && ready["command"] != nil {
			d.wrongKey("gate.ready", "has both http and command; one of them says when the destination is ready")
		}
		if ready["status"] != nil && ready["http"] == nil {
			d.wrongKey("gate.ready.status", "needs http")
		}
	}
	if d.failed(since, "gate.ready") {
		return
	}
	switch {
	case table["ready"] == "launched":
		if table["launch"] == nil {
			d.wrongKey("gate.ready", `"launched" needs launch`)
		}
	case ready["command"] != nil || d.leads(since, forStreams):
	case ready["http"] != nil:
		d.wrongKey("gate.ready.http", "needs a tcp or unix destination, and there is none")
	case table["ready"] == nil:
		d.wrongKey("gate", `needs ready: nobody can tell whether a udp destination is there; write ready = "launched" or { command = ... }`)
	default:
		d.wrongKey("gate.ready", `needs a tcp or unix destination: nobody can tell whether a udp destination is there; write "launched" or { command = ... }`)
	}
}

// checkPending checks what is said of clients that wait.
func (d *decoder) checkPending(table map[string]any) {
	for _, k := range []string{"max_pending", "on_timeout"} {
		if table[k] != nil && table["pending_timeout"] == nil {
			d.wrongKey("gate."+k, "needs pending_timeout: without, clients are not accepted before the destination is ready")
		}
	}
	if table["pending_timeout"] != nil && !d.has(forStreams) {
		d.wrongKey("gate.pending_timeout", "is for %s, and there is none", forStreams)
	}
	if table["session_timeout"] != nil && !d.has(forUDP) {
		d.wrongKey("gate.session_timeout", "is for %s, and there is none", forUDP)
	}
}

// checkStreams checks what is about connections to the destination.
func (d *decoder) checkStreams(table map[string]any) {
	count := map[activation.Network]int{}
	for i := range d.gate.Destinations {
		count[d.gate.Destinations[i].Network]++
	}
	known := len(d.gate.Destinations) > 0
	if table["proxy_protocol"] != nil && known && count[activation.TCP]+count[activation.Unix] == 0 {
		d.wrongKey("gate.proxy_protocol", "needs a tcp or unix destination, and there is none")
	}
	if d.gate.WatchDestination && known && count[activation.TCP] == 0 {
		d.wrongKey("gate.watch_destination", "needs a tcp destination, and there is none")
	}
	switch {
	case !d.gate.Transparent:
	case !d.has(forTCP):
		d.wrongKey("gate.transparent", "is for %s, and there is none", forTCP)
	case count[activation.Unix] > 0:
		d.wrongKey("gate.transparent", "does not go with a unix destination, which sees no addresses")
	case known && count[activation.TCP] == 0:
		d.wrongKey("gate.transparent", "needs a tcp destination, and there is none")
	}
}

// checkForward checks whether the kernel can send connections to the destination. What only this machine can tell is seen
// when it is tried.
func (d *decoder) checkForward(since int, table map[string]any) {
	if d.gate.Forward != gate.Kernel {
		if table["check_interval"] != nil && !d.failed(since, "gate.forward") {
			d.wrongKey("gate.check_interval", `needs forward = "kernel": connections that are relayed tell by themselves`)
		}
		return
	}
	no := func(format string, args ...any) { d.wrongKey("gate.forward", `"kernel" `+format, args...) }
	for _, k := range []struct {
		given bool
		why   string
	}{
		{table["proxy_protocol"] != nil, "does not go with proxy_protocol: nobody could send the header"},
		{d.gate.Transparent, "does not go with transparent: whose address the destination sees is for the kernel to decide"},
		{d.service.Limits.MaxConnections > 0, "does not go with limits.max_connections: nobody counts the connections as they come"},
		{d.access.Allow != nil || d.access.Deny != nil, "does not go with access, which sockets enforce that the connections do not come to"},
		{d.service.Wake.Ignore != nil, "does not go with wake.ignore: nobody tells whose connections keep it awake"},
	} {
		if k.given {
			no("%s", k.why)
		}
	}
	if d.failed(since, "gate.destination", "listen", "handoff") || len(d.gate.Destinations) == 0 {
		return
	}
	var others []string
	for i := range d.elements {
		if e := &d.elements[i]; e.spec.Address.Network != activation.TCP {
			others = append(others, e.String())
		}
	}
	if len(others) > 0 {
		no("needs %s, not %s", forTCP, strings.Join(others, ", "))
	}
	t := &d.gate.Destinations[0]
	ip := destinationIP(t)
	switch {
	case len(d.gate.Destinations) > 1:
		no("needs one destination, and there are %d", len(d.gate.Destinations))
	case t.Network != activation.TCP:
		no("needs a tcp destination, not %s", t)
	case !ip.IsValid():
		no("needs a destination with an IP address, not %s", t)
	case ip.Zone() != "":
		no("cannot lead to %s: a rule has no zone", t)
	case len(others) == 0:
		d.checkForwarded(t)
	}
}

// checkForwarded checks for each TCP socket whether its clients can be led to a destination with an IP address, in one of the ways that the
// kernel has. Which of them this machine has is not for the configuration to say.
func (d *decoder) checkForwarded(t *gate.Destination) {
	to := activation.Address{Network: t.Network, IP: destinationIP(t), Port: t.Port}
	for i := range d.elements {
		s := &d.elements[i].spec
		err := lookup.Possible(*s, to)
		if err != nil {
			err = forward.Check(*s, to)
		}
		if err != nil {
			d.wrongKey("gate.forward", `"kernel" cannot lead clients of %s to %s: %v`, s.Address, t, err)
		}
	}
}

// checkGateLimits moves the limit on connections to the gate, which is what counts them.
func (d *decoder) checkGateLimits(keys map[string]any) {
	l := &d.service.Limits
	if limits, _ := keys["limits"].(map[string]any); limits["max_connections"] != nil && !d.has(forStreams) {
		d.wrongKey("limits.max_connections", "is for %s, and there is none", forStreams)
	}
	d.gate.MaxConnections, d.gate.CloseExcess = l.MaxConnections, l.MaxConnections > 0 && l.Overflow == supervisor.OverflowClose
	l.MaxConnections, l.Overflow = 0, supervisor.OverflowClose
}
