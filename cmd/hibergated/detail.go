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
	handoff := st.Handoff
	if st.Accept {
		handoff += ", one process per connection"
	}
	row("handoff", "%s", handoff)
	row("processes", "%s", list(st.PIDs))
	row("started", "%s, %s", times(st.Starts), plural(st.Failures, "failure"))
	row("idle", "%s", idle(now, &st))
	for i := range st.Sockets {
		s := &st.Sockets[i]
		out.WriteByte('\n')
		row("socket", "%s (%s)", s.Address, s.Name)
		row("  open", "%s", openCell(s))
		if st.Accept {
			row("  accepted", "%d", s.Accepted)
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
