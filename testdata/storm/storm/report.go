package storm

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// report is what is said at the end.
type report struct {
	Failed     bool           `json:"failed"` // a client was lost or refused, something leaked, or there was a problem
	Seed       uint64         `json:"seed"`
	Seconds    float64        `json:"seconds"`
	Kinds      []*kindReport  `json:"kinds"`
	Skipped    []string       `json:"skipped,omitempty"` // kinds that cannot run here
	Before     holdings       `json:"before"`            // when everything slept before the storm, after each service ran twice
	After      holdings       `json:"after"`             // when everything slept after it
	LeakedFDs  int            `json:"leaked_fds"`
	Leaked     []int          `json:"leaked_processes,omitempty"` // while everything slept
	LeftBehind []int          `json:"left_behind,omitempty"`      // processes that outlived hibergated
	Log        map[string]int `json:"log,omitempty"`              // what hibergated logged above INFO
	Printed    []string       `json:"printed,omitempty"`          // lines that the services printed
	Problems   []string       `json:"problems,omitempty"`
	Unanswered []lostClient   `json:"unanswered,omitempty"`

	starts  map[string]uint64 // by service, during the storm; nil where that is not known
	verbose bool
}

// kindReport is about all services of a kind.
type kindReport struct {
	Kind          string `json:"kind"`
	Services      int    `json:"services"`
	Cycles        uint64 `json:"cycles"` // processes started
	Clients       int    `json:"clients"`
	Answered      int    `json:"answered"`
	Reset         int    `json:"reset"`   // clients that reset their connection themselves
	Refused       int    `json:"refused"` // connection refused
	Dropped       int    `json:"dropped"` // accepted by the program and not answered, as its journal proves
	DroppedByHand int    `json:"dropped_by_hand"`
	Lost          int    `json:"lost"` // neither answered nor dropped by the program
	P50           int64  `json:"latency_p50_us"`
	P99           int64  `json:"latency_p99_us"`
	Max           int64  `json:"latency_max_us"`

	latency []time.Duration
}

// lostClient is a client that got no answer, and why as far as is known.
type lostClient struct {
	ID      string    `json:"id"`
	How     string    `json:"how"`
	ByHand  bool      `json:"by_hand"`
	Dropped bool      `json:"dropped_by_program"`
	Begin   time.Time `json:"begin"`
	MS      float64   `json:"ms"`
	Error   string    `json:"error"`
	Journal string    `json:"journal"` // what the program says of its connection
}

func (r *report) problem(err error) {
	if err != nil {
		r.Problems = append(r.Problems, err.Error())
	}
}

// add counts what a lane has to tell.
func (r *report) add(l *lane) error {
	k := r.kind(l.target.kind.name)
	k.Services++
	if starts, known := r.starts[l.target.name]; known {
		k.Cycles += starts
	} else {
		k.Cycles += uint64(l.tally.cycles)
	}
	k.Clients += l.tally.clients
	k.Answered += l.tally.answered
	k.Reset += l.tally.reset
	k.Refused += l.tally.refused
	k.latency = append(k.latency, l.tally.latency...)
	var err error
	if l.tally.handFailed > 0 {
		err = fmt.Errorf("%s: to put it to sleep failed %d times, at last: %w", l.target.name, l.tally.handFailed, l.tally.handErr)
	}
	if len(l.tally.unanswered) == 0 {
		return err
	}
	j, e := readJournal(l.target.journal)
	for i := range l.tally.unanswered {
		lost := describe(&l.tally.unanswered[i], j)
		switch {
		case !lost.Dropped:
			k.Lost++
		case lost.ByHand:
			k.DroppedByHand++
			fallthrough
		default:
			k.Dropped++
		}
		if r.verbose || !lost.Dropped {
			r.Unanswered = append(r.Unanswered, lost)
		}
	}
	return errors.Join(err, e)
}

func (r *report) kind(name string) *kindReport {
	for _, k := range r.Kinds {
		if k.Kind == name {
			return k
		}
	}
	k := &kindReport{Kind: name}
	r.Kinds = append(r.Kinds, k)
	return k
}

func describe(c *client, j journal) lostClient {
	records := j.of(c)
	var story strings.Builder
	for _, rec := range records {
		fmt.Fprintf(&story, "%s %+.1fms by %d; ", rec.event, float64(rec.at.Sub(c.begin).Microseconds())/1000, rec.pid)
	}
	return lostClient{
		ID: c.id, How: c.how.String(), ByHand: c.byHand, Dropped: verdict(records), Begin: c.begin,
		MS: float64(c.end.Sub(c.begin).Microseconds()) / 1000, Error: fmt.Sprint(c.err), Journal: strings.TrimSuffix(story.String(), "; "),
	}
}

// finish computes what follows from the rest.
func (r *report) finish() {
	for _, k := range r.Kinds {
		slices.Sort(k.latency)
		k.P50, k.P99, k.Max = percentile(k.latency, 50), percentile(k.latency, 99), percentile(k.latency, 100)
		r.Failed = r.Failed || k.Lost > 0 || k.Refused > 0
	}
	r.LeakedFDs = max(0, r.After.FDs-r.Before.FDs)
	for _, pid := range r.After.Processes {
		if !slices.Contains(r.Before.Processes, pid) {
			r.Leaked = append(r.Leaked, pid)
		}
	}
	r.Failed = r.Failed || r.LeakedFDs > 0 || len(r.Leaked) > 0 || len(r.LeftBehind) > 0 || len(r.Problems) > 0
}

// percentile returns the smallest of the sorted durations that p percent do not exceed, in microseconds.
func percentile(sorted []time.Duration, p int) int64 {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[(len(sorted)*p+99)/100-1].Microseconds()
}

func (r *report) write(w io.Writer, asJSON bool) error {
	if asJSON {
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		return e.Encode(r)
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "kind\tcycles\tclients\tanswered\treset\tdropped\tby hand\tlost\trefused\tp50\tp99\tmax\t")
	var sum kindReport
	for _, k := range r.Kinds {
		k.row(t, k.Kind)
		sum.Cycles += k.Cycles
		sum.Clients += k.Clients
		sum.Answered += k.Answered
		sum.Reset += k.Reset
		sum.Refused += k.Refused
		sum.Dropped += k.Dropped
		sum.DroppedByHand += k.DroppedByHand
		sum.Lost += k.Lost
		sum.latency = append(sum.latency, k.latency...)
	}
	slices.Sort(sum.latency)
	sum.P50, sum.P99, sum.Max = percentile(sum.latency, 50), percentile(sum.latency, 99), percentile(sum.latency, 100)
	sum.row(t, "all")
	if err := t.Flush(); err != nil {
		return err
	}
	fmt.Fprintf(w, "\nhibergated: %d descriptors leaked (%d before, %d after), %d processes leaked, %d left behind at the end, memory %d KB before and %d KB after\n",
		r.LeakedFDs, r.Before.FDs, r.After.FDs, len(r.Leaked), len(r.LeftBehind), r.Before.RSS, r.After.RSS)
	fmt.Fprintf(w, "%.1f s, -seed %d\n", r.Seconds, r.Seed)
	for _, s := range r.Skipped {
		fmt.Fprintln(w, "skipped", s)
	}
	for _, text := range slices.Sorted(maps.Keys(r.Log)) {
		fmt.Fprintf(w, "logged %d times: %s\n", r.Log[text], text)
	}
	some(w, "printed by a service: ", r.Printed, 5)
	some(w, "", r.Unanswered, 20)
	for _, p := range r.Problems {
		fmt.Fprintln(w, "problem:", p)
	}
	return nil
}

// some writes the first of many.
func some[T any](w io.Writer, what string, list []T, most int) {
	for _, v := range list[:min(most, len(list))] {
		fmt.Fprintf(w, "%s%v\n", what, v)
	}
	if n := len(list) - most; n > 0 {
		fmt.Fprintf(w, "... and %d more (-json lists them)\n", n)
	}
}

func (k *kindReport) row(w io.Writer, name string) {
	ms := func(us int64) string { return fmt.Sprintf("%.1fms", float64(us)/1000) }
	fmt.Fprintf(w, "%s\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t%s\t%s\t%s\t\n", name, k.Cycles, k.Clients, k.Answered, k.Reset,
		k.Dropped, k.DroppedByHand, k.Lost, k.Refused, ms(k.P50), ms(k.P99), ms(k.Max))
}

func (c lostClient) String() string {
	what, when := "lost", ""
	if c.Dropped {
		what = "dropped by the program"
	}
	if c.ByHand {
		when = ", stopped by hand"
	}
	said := c.Journal
	if said == "" {
		said = "nothing"
	}
	return fmt.Sprintf("%s: %s (%s%s) at %s, %.1f ms: %s; its journal: %s", what, c.ID, c.How, when, c.Begin.Format("15:04:05.000"), c.MS, c.Error, said)
}
