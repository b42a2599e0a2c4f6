package main

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
)

// alone runs the program without hibergated a few times. It returns how long each took from its start to
// the first byte to a client that asks all the time.
func (p *adoptProgram) alone(t *testing.T) waits {
	t.Helper()
	var all waits
	for range 3 + cyclesWanted(0)/20 {
		var out logBuffer
		cmd := p.cmd(p.command...)
		cmd.Stdout, cmd.Stderr, cmd.WaitDelay = &out, &out, patience
		began := time.Now()
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		err := p.answers(began, &all)
		for where := range p.at {
			if err == nil {
				_, err = p.visit(where)
			}
		}
		if err := cmd.Process.Signal(unix.SIGTERM); err != nil {
			t.Error(err)
		}
		told := time.Now()
		tooLong := time.AfterFunc(patience, func() { cmd.Process.Kill() })
		ended := cmd.Wait()
		if !tooLong.Stop() {
			t.Error("it does not end on SIGTERM")
		}
		for _, at := range p.at {
			if path, ok := strings.CutPrefix(at, "unix://"); ok {
				os.Remove(path)
			}
		}
		if err != nil {
			t.Fatalf("alone: %v\n%s", err, &out)
		}
		if len(all) == 1 {
			t.Logf("ends %v after SIGTERM: %v", time.Since(told).Round(time.Millisecond), ended) // nil: exit status 0
		}
	}
	return all
}

// hurry is how long a client waits who asks again anyway: a program that has bound a UDP socket may forget what comes
// before it is ready.
const hurry = 200 * time.Millisecond

// answers waits for the first answer of a program that began to start.
func (p *adoptProgram) answers(began time.Time, all *waits) error {
	for {
		tried := time.Now()
		wait, err := p.visitFor(0, hurry)
		switch {
		case err == nil:
			*all = append(*all, tried.Sub(began)+wait)
			return nil
		case time.Since(began) > patience:
			return err
		}
		time.Sleep(100 * time.Microsecond)
	}
}

func cyclesWanted(byDefault int) int {
	if n, err := strconv.Atoi(os.Getenv("HIBERGATED_CYCLES")); err == nil {
		return n
	}
	return byDefault
}

// cycles runs the program under hibergated.
func (p *adoptProgram) cycles(t *testing.T, alone waits) {
	t.Helper()
	cycles := cyclesWanted(5)
	seed := rand.Uint64()
	if n, err := strconv.ParseUint(os.Getenv("HIBERGATED_SEED"), 10, 64); err == nil {
		seed = n
	}
	random := rand.New(rand.NewPCG(seed, 0))
	upTo := func(d time.Duration) time.Duration { return time.Duration(random.Int64N(int64(d))) }
	d := p.start(t, "")
	before := d.status(p.name).Starts
	starts := func() int { return int(d.status(p.name).Starts - before) }
	var waking waits
	for round := range cycles {
		if t.Failed() {
			break
		}
		// Some cycles begin with the service as it happens to be, but not more than there were stops beside those waited for.
		asleep := starts() <= round || random.IntN(4) > 0
		if asleep {
			d.sleeps(t, p.name)
		}
		first := p.come(t, d, 0, upTo(20*time.Millisecond))
		if asleep {
			waking = append(waking, first[0])
		}
		// Two at a time come before, at and after the next stop, which takes some milliseconds, and into the start that they make.
		for _, around := range []time.Duration{75 * time.Millisecond, 20 * time.Millisecond} {
			time.Sleep(adoptIdle - around/5 + upTo(around))
			p.come(t, d, 0, upTo(2*time.Millisecond))
		}
	}
	if !t.Failed() {
		d.sleeps(t, p.name)
	}
	st := d.status(p.name)
	busy, during, _ := races(d.log.changes(t))
	t.Logf("seed %d: %d clients, %d starts; the last look found a client %d times, one came during the stop %d times", seed, p.visits.Load(), starts(), busy, during)
	t.Logf("first byte: of the waking client %v; alone, from its start, %v", waking, alone)
	if st.Failures != 0 || st.Error != "" || starts() < cycles {
		t.Errorf("at the end of %d cycles: %+v", cycles, st)
	}
	for _, note := range st.Notes {
		t.Log("note:", note)
	}
	for line := range strings.Lines(d.log.String()) {
		if strings.HasPrefix(line, `{"time"`) && !strings.Contains(line, `"level":"INFO"`) {
			t.Log("in the log:", line)
		}
	}
}

// come makes clients come, each after its delay and to the next of the addresses. None may be lost.
func (p *adoptProgram) come(t *testing.T, d *hibergated, after ...time.Duration) waits {
	t.Helper()
	took := make(waits, len(after))
	var all sync.WaitGroup
	for i, delay := range after {
		n := p.visits.Add(1)
		all.Go(func() {
			time.Sleep(delay)
			came := time.Now()
			var err error
			if took[i], err = p.visit(int(n) % len(p.at)); err != nil {
				t.Errorf("client %d, who came at %s: %v", n, came.Format(time.RFC3339Nano), err)
			}
		})
	}
	all.Wait()
	if t.Failed() {
		t.Logf("status: %+v", d.status(p.name))
	}
	return took
}

// waits are times that clients waited.
type waits []time.Duration

func (w waits) String() string {
	if len(w) == 0 {
		return "unknown"
	}
	sorted := slices.Sorted(slices.Values(w))
	at := func(percent int) time.Duration {
		return sorted[min(len(sorted)*percent/100, len(sorted)-1)].Round(10 * time.Microsecond)
	}
	return fmt.Sprintf("p50 %v, p99 %v (of %d)", at(50), at(99), len(w))
}

// nothingLeft checks, when the test has ended, that it left no process in our network namespace.
func nothingLeft(t *testing.T) {
	t.Helper()
	before := neighbours()
	t.Cleanup(func() {
		nettest.Eventually(t, func() error {
			for pid, command := range neighbours() {
				if _, known := before[pid]; !known {
					return fmt.Errorf("process %s was left behind: %q", pid, command)
				}
			}
			return nil
		})
	})
}

// neighbours are the processes of our network namespace, with their command lines.
func neighbours() map[string]string {
	ours, _ := os.Readlink("/proc/self/ns/net")
	found := map[string]string{}
	links, _ := filepath.Glob("/proc/[0-9]*/ns/net")
	for _, link := range links {
		if theirs, err := os.Readlink(link); err == nil && theirs == ours {
			pid := strings.Split(link, "/")[2]
			command, _ := os.ReadFile("/proc/" + pid + "/cmdline")
			found[pid] = string(command)
		}
	}
	return found
}
