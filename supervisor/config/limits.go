package config

import (
	"math"
	"strconv"
	"strings"
	"time"

	"hibergate/supervisor"
)

const (
	maxProcesses   = 1 << 22   // PID_MAX_LIMIT, include/linux/threads.h
	maxRateCount   = 1_000_000 // so that one of a rate never takes less than a nanosecond
	minRatePer     = time.Millisecond
	maxConnections = math.MaxInt32
)

func limitsKeys() []key {
	const accept = "; needs `accept = true`"
	limits := func(d *decoder) *supervisor.Limits { return &d.service.Limits }
	return []key{
		{
			"max_connections", "integer", "no limit", "how many connections are served at a time; needs `accept = true` or `handoff = \"gate\"`", 0,
			func(d *decoder, raw any) { d.integer(raw, 1, maxConnections, &limits(d).MaxConnections) },
		},
		{
			"overflow", `"close" or "queue"`, `"close"`, "what happens to connections above `max_connections`: they are accepted and closed, or wait in the queue", 0,
			(*decoder).overflow,
		},
		{
			"max_connections_per_source", "integer", "no limit", "how many connections of one source are served at a time; more are accepted and closed" + accept, 0,
			func(d *decoder, raw any) { d.integer(raw, 1, maxConnections, &limits(d).MaxConnectionsPerSource) },
		},
		{
			"source_prefix", "integer", "64", "how many leading bits of an IPv6 address are one source; with IPv4 an address is one, with Unix sockets a user", 0,
			func(d *decoder, raw any) { d.integer(raw, 1, 128, &limits(d).SourcePrefix) },
		},
		{
			"accept_rate", "rate", "no limit", "how many connections are accepted; more wait in the queue" + accept, 0,
			func(d *decoder, raw any) { d.rate(raw, &limits(d).AcceptRate) },
		},
		{
			"accept_rate_per_source", "rate", "no limit", "how many connections of one source are served; more are accepted and closed" + accept, 0,
			func(d *decoder, raw any) { d.rate(raw, &limits(d).AcceptRatePerSource) },
		},
		{
			"wake_rate", "rate", "no limit", "how often the service is started; meanwhile clients wait in the queue; needs `accept = false`", 0,
			func(d *decoder, raw any) { d.rate(raw, &limits(d).WakeRate) },
		},
	}
}

// maxLoad reads a load average, which is a float for everybody but who has a whole one.
func (d *decoder) maxLoad(raw any) {
	var load float64
	switch v := raw.(type) {
	case int64:
		load = float64(v)
	case float64:
		load = v
	default:
		d.wrongType("a number", raw)
		return
	}
	if !(load > 0) || math.IsInf(load, 0) { // which not-a-number is neither
		d.wrong("must be a positive number, got %v", raw)
		return
	}
	d.config.Global.MaxLoad = load
}

// parking reads whether connections are parked while a service stops.
func (d *decoder) parking(raw any) {
	var word string
	if d.choice(raw, &word, "auto", "off") {
		d.config.Global.NoParking = word == "off"
	}
}

// overflow reads what happens to a connection above the limit.
func (d *decoder) overflow(raw any) {
	var word string
	if d.choice(raw, &word, "close", "queue") && word == "queue" {
		d.service.Limits.Overflow = supervisor.OverflowQueue
	}
}

// rate reads so many in such a time.
func (d *decoder) rate(raw any, to *supervisor.Rate) {
	s, ok := raw.(string)
	if !ok {
		d.wrongType(`a rate such as "100/1s"`, raw)
		return
	}
	r, ok := parseRate(s)
	switch {
	case !ok:
		d.wrong(`must be a rate such as "100/1s" or "5/m", got %q`, s)
	case r.Count < 1 || r.Count > maxRateCount:
		d.wrong("must count from 1 to %d, got %s", maxRateCount, s)
	case r.Per < minRatePer:
		d.wrong("must be for at least %v, got %s", minRatePer, s)
	default:
		*to = r
	}
}

// parseRate reads "100/1s", "5/1m30s" or "100/s", which is once the unit.
func parseRate(s string) (supervisor.Rate, bool) {
	count, per, found := strings.Cut(s, "/")
	n, err := strconv.ParseUint(count, 10, 31)
	if !found || err != nil {
		return supervisor.Rate{}, false
	}
	if per != "" && isLetter(per[0]) {
		per = "1" + per
	}
	v, ok := parseDuration(per)
	return supervisor.Rate{Count: int(n), Per: v}, ok
}

// checkLimits checks the limits against the rest: one that would do nothing is a mistake.
func (d *decoder) checkLimits(since int, keys map[string]any) {
	limits, _ := keys["limits"].(map[string]any)
	if !d.failed(since, "accept") && !d.gates() { // what a gate has no use for is told of it
		for _, k := range []string{"max_connections", "max_connections_per_source", "accept_rate", "accept_rate_per_source"} {
			if limits[k] != nil && !d.service.Accept {
				d.wrongKey("limits."+k, "needs accept = true; with accept = false the service itself accepts")
			}
		}
		if limits["wake_rate"] != nil && d.service.Accept {
			d.wrongKey("limits.wake_rate", "needs accept = false; with accept = true it is accept_rate")
		}
	}
	if limits["overflow"] != nil && limits["max_connections"] == nil {
		d.wrongKey("limits.overflow", "needs max_connections")
	}
	if limits["source_prefix"] != nil && limits["max_connections_per_source"] == nil && limits["accept_rate_per_source"] == nil {
		d.wrongKey("limits.source_prefix", "needs max_connections_per_source or accept_rate_per_source")
	}
}
