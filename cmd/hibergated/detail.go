package main

import (
	"bytes"
	"fmt"
	"io"
	"net/netip"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"hibergate/supervisor"
	"hibergate/supervisor/activity"
)

// printService prints everything about one service.
func printService(w io.Writer, now time.Time, st supervisor.Status) error {
	var out bytes.Buffer
	row := func(key, format string, args ...any) {
		fmt.Fprintf(&out, "%-15s  %s\n", key, fmt.Sprintf(format, args...))
	}
	row("service", "%s", st.Name)
	row("state", "%s for %s: %s", st.State, span(now.Sub(st.Since)), st.Reason)
	if st.Error != "" {
		row("error", "%s", st.Error)
	}
	if text := retry(now, &st); text != "" {
		row("tried again", "%s", text)
	}
	if st.WaitsFor != "" {
		row("waits for", "%s", st.WaitsFor)
	}
	handoff := st.Handoff
	if st.Accept {
		handoff += ", one process per connection"
	}
	row("handoff", "%s", handoff)
	if st.Gate == nil {
		row("processes", "%s", list(st.PIDs))
	} else {
		for _, what := range gateRows(st.Gate) {
			row(what[0], "%s", what[1])
		}
	}
	row("started", "%s, %s", times(st.Starts), plural(st.Failures, "failure"))
	row("idle", "%s", idle(now, &st))
	for _, what := range refusals(&st.Refused) {
		row(what[0], "%s", what[1])
	}
	if st.Tracking != "" && st.Tracking != "cgroup" {
		row("tracking", "%s", st.Tracking)
	}
	if strings.HasPrefix(st.Parking, "off") {
		row("parking", "%s", st.Parking)
	}
	for _, note := range st.Notes {
		row("note", "%s", note)
	}
	for i := range st.Sockets {
		s := &st.Sockets[i]
		out.WriteByte('\n')
		row("socket", "%s (%s)", s.Address, s.Name)
		row("  open", "%s", openCell(s))
		if st.Accept {
			row("  accepted", "%d", s.Accepted)
		}
		if s.Dropped > 0 {
			row("  dropped", "%s: no access, or the queue was full", plural(s.Dropped, "packet"))
		}
		row("  in", "%s", counters(s.In))
		row("  out", "%s", counters(s.Out))
		row("  last activity", "%s", ago(now, s.LastActivity))
		if s.Why != "" {
			word := "  missing"
			if !s.Known {
				word = "  not known"
			}
			row(word, "%s", s.Why)
		}
		if s.FlowsWhy != "" {
			row("  flows", "%s", s.FlowsWhy)
		}
		if len(s.Flows) > 0 {
			if err := printFlows(&out, s.Flows); err != nil {
				return err
			}
		}
	}
	_, err := w.Write(trimLines(out.Bytes()))
	return err
}

func printFlows(w io.Writer, flows []activity.Flow) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "  PROTO\tPEER\tASKED-FOR\tSTATE\tIN\tOUT\tPROCESS")
	for i := range flows {
		f := &flows[i]
		in, out := "?", "?"
		if f.Counted {
			in, out = size(f.In.Bytes), size(f.Out.Bytes)
		}
		asked := "-"
		if f.Original != f.Local {
			asked = endpoint(f.Original)
		}
		process := "-"
		if f.PID != 0 {
			process = strings.TrimSpace(strconv.Itoa(f.PID) + " " + f.Process)
		}
		fmt.Fprintln(tw, "  "+strings.Join([]string{
			f.Protocol, endpoint(f.Peer), asked, orDash(f.State), in, out, process,
		}, "\t"))
	}
	return tw.Flush()
}

// gateRows are rows of where a gate leads.
func gateRows(g *supervisor.GateStatus) (rows [][2]string) {
	for _, d := range g.Destinations {
		text := fmt.Sprintf("%s, %d open, %d in all", d.Destination, d.Open, d.Total)
		if !d.Healthy {
			text += ", refuses connections"
		}
		rows = append(rows, [2]string{"destination", text})
	}
	rows = append(rows, [2]string{"forwarded by", g.Forward})
	if g.Pending > 0 {
		rows = append(rows, [2]string{"waiting", plural(uint64(g.Pending), "client")})
	}
	if g.TimedOut > 0 {
		rows = append(rows, [2]string{"waited too long", plural(g.TimedOut, "client")})
	}
	return rows
}

// idle says what counts as idle and what that means just now.
func idle(now time.Time, st *supervisor.Status) string {
	if st.Idle.StopAfter == "" {
		if st.Accept {
			return "each process ends with its connection"
		}
		return "never put to sleep"
	}
	s := fmt.Sprintf("sleeps after %s of %s", st.Idle.StopAfter, st.Idle.When)
	switch word := sleeps(now, st); word {
	case "-":
		return s
	default:
		return s + "; " + word
	}
}

// retry says when a service that does not run for a reason will be tried again.
func retry(now time.Time, st *supervisor.Status) string {
	failed := st.State == supervisor.Failed.String()
	switch {
	case st.RetryAt != nil && failed:
		return fmt.Sprintf("in %s, or by hibergated reset", span(st.RetryAt.Sub(now)))
	case st.RetryAt != nil:
		return "in " + span(st.RetryAt.Sub(now))
	case failed:
		return "by hibergated reset only"
	default:
		return ""
	}
}

// refusals are rows of what clients did not get.
func refusals(r *supervisor.Refused) (rows [][2]string) {
	row := func(key, text string) {
		if text != "" {
			rows = append(rows, [2]string{key, text})
		}
	}
	var over []string
	for _, c := range []struct {
		n   uint64
		why string
	}{
		{r.Access, "by access"},
		{r.MaxConnections, "over max_connections"},
		{r.PerSource, "over max_connections_per_source"},
		{r.SourceRate, "over accept_rate_per_source"},
		{r.Failed, "while failed"},
	} {
		if c.n > 0 {
			over = append(over, fmt.Sprintf("%d %s", c.n, c.why))
		}
	}
	row("refused", strings.Join(over, ", "))
	if r.Datagrams > 0 {
		row("dropped", plural(r.Datagrams, "datagram")+" that no process took")
	}
	if r.Ignored > 0 {
		row("ignored", plural(r.Ignored, "client")+" that left without waking it")
	}
	if r.Pauses > 0 {
		row("paused", times(r.Pauses)+" for want of resources")
	}
	return rows
}

func openCell(s *supervisor.SocketStatus) string {
	if !s.Known {
		return "?"
	}
	if s.Queued > 0 {
		return fmt.Sprintf("%d, and %d waiting", s.Open, s.Queued)
	}
	return strconv.Itoa(s.Open)
}

func counters(c activity.Counters) string {
	return fmt.Sprintf("%s bytes in %s", size(c.Bytes), plural(c.Packets, "packet"))
}

func endpoint(a netip.AddrPort) string {
	if !a.IsValid() {
		return "-"
	}
	return a.String()
}

func list(pids []int) string {
	words := make([]string, len(pids))
	for i, pid := range pids {
		words[i] = strconv.Itoa(pid)
	}
	return orDash(strings.Join(words, " "))
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func plural(n uint64, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

func times(n uint64) string {
	if n == 1 {
		return "once"
	}
	return plural(n, "time")
}

// trimLines removes the spaces that a tabwriter leaves at the ends of lines.
func trimLines(text []byte) []byte {
	lines := bytes.Split(text, []byte("\n"))
	for i, line := range lines {
		lines[i] = bytes.TrimRight(line, " ")
	}
	return bytes.Join(lines, []byte("\n"))
}
