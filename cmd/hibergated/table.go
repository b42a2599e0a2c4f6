package main

import (
	"bytes"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"hibergate/supervisor"
)

// printTable prints one line for each service, and below it what is wrong with it.
func printTable(w io.Writer, now time.Time, list []supervisor.Status) error {
	var table bytes.Buffer
	tw := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "NAME\tSTATE\tSINCE\tPIDS\tOPEN\tIN\tOUT\tLAST-ACTIVITY\tSLEEPS")
	for i := range list {
		st := &list[i]
		t := sum(st)
		fmt.Fprintln(tw, strings.Join([]string{
			st.Name, st.State, span(now.Sub(st.Since)), pids(st.PIDs), t.open, t.in, t.out, ago(now, t.last), sleeps(now, st),
		}, "\t"))
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	// The notes come in between only now: a tabwriter would start its columns anew after each.
	var out bytes.Buffer
	lines := strings.Split(strings.TrimSuffix(table.String(), "\n"), "\n")
	for i, line := range lines {
		fmt.Fprintln(&out, strings.TrimRight(line, " "))
		if i == 0 {
			continue // the heading
		}
		for _, note := range notes(&list[i-1]) {
			fmt.Fprintf(&out, "  %s\n", note)
		}
	}
	_, err := w.Write(out.Bytes())
	return err
}

// totals is a service's traffic, as cells.
type totals struct {
	open, in, out string
	last          *time.Time
}

// sum adds up the sockets of a service. What is not known of one is not known of the sum.
func sum(st *supervisor.Status) totals {
	var open int
	var in, out uint64
	var t totals
	known := true
	for i := range st.Sockets {
		s := &st.Sockets[i]
		known = known && s.Known
		open += s.Open
		in += s.In.Bytes
		out += s.Out.Bytes
		if s.LastActivity != nil && (t.last == nil || s.LastActivity.After(*t.last)) {
			t.last = s.LastActivity
		}
	}
	t.open, t.in, t.out = strconv.Itoa(open), size(in), size(out)
	if !known {
		t.open = "?"
	}
	return t
}

// notes say in words what fails or is missing, each thing once.
func notes(st *supervisor.Status) []string {
	var out []string
	if st.Error != "" {
		out = append(out, "error: "+st.Error)
	}
	seen := map[string]bool{}
	for i := range st.Sockets {
		s := &st.Sockets[i]
		if s.Why == "" || seen[s.Why] {
			continue
		}
		seen[s.Why] = true
		word := "missing"
		if !s.Known {
			word = "traffic not known"
		}
		out = append(out, word+": "+s.Why)
	}
	return out
}

// sleeps says in a few words when a service will sleep.
func sleeps(now time.Time, st *supervisor.Status) string {
	switch {
	case slices.Contains([]string{
		supervisor.Listening.String(), supervisor.Frozen.String(), supervisor.Backoff.String(), supervisor.Failed.String(),
	}, st.State):
		return "-" // idleness does not end these
	case st.Idle.Busy != "":
		return "busy: " + st.Idle.Busy
	case st.Idle.StopsAt != nil:
		if left := st.Idle.StopsAt.Sub(now); left > 0 {
			return "in " + span(left)
		}
		return "now"
	case st.Idle.StopAfter == "":
		return "never"
	default:
		return "-"
	}
}

// pids prints the first few of possibly thousands.
func pids(list []int) string {
	const most = 3
	if len(list) == 0 {
		return "-"
	}
	words := make([]string, 0, most)
	for _, pid := range list[:min(len(list), most)] {
		words = append(words, strconv.Itoa(pid))
	}
	s := strings.Join(words, ",")
	if more := len(list) - most; more > 0 {
		s += fmt.Sprintf("+%d", more)
	}
	return s
}

func ago(now time.Time, t *time.Time) string {
	if t == nil {
		return "-"
	}
	return span(now.Sub(*t)) + " ago"
}

// span prints a duration with two units at most, as exact as is of use: 120ms, 4.2s, 3m12s, 5h40m, 12d3h.
func span(d time.Duration) string {
	switch {
	case d < 0:
		return "0s" // clocks differ a little
	case d < time.Second:
		return d.Truncate(time.Millisecond).String()
	case d < 10*time.Second:
		return d.Truncate(100 * time.Millisecond).String()
	case d < time.Minute:
		return d.Truncate(time.Second).String()
	case d < time.Hour:
		return fmt.Sprintf("%dm%ds", d/time.Minute, d%time.Minute/time.Second)
	case d < 24*time.Hour:
		return fmt.Sprintf("%dh%dm", d/time.Hour, d%time.Hour/time.Minute)
	default:
		return fmt.Sprintf("%dd%dh", d/(24*time.Hour), d%(24*time.Hour)/time.Hour)
	}
}

// size prints a number of bytes with units of 1024, as the configuration reads them.
func size(n uint64) string {
	const units = "KMGTPE"
	if n < 1024 {
		return strconv.FormatUint(n, 10)
	}
	v, unit := float64(n)/1024, 0
	for v >= 999.5 && unit < len(units)-1 {
		v /= 1024
		unit++
	}
	if v < 9.95 {
		return fmt.Sprintf("%.1f%c", v, units[unit])
	}
	return fmt.Sprintf("%.0f%c", v, units[unit])
}
