package storm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// run runs the storm in dir and reports. An error says that there was no storm; what went
// wrong in it is in the report.
func run(ctx context.Context, o *options, dir string, stderr io.Writer) (*report, error) {
	if err := writeServices(dir); err != nil {
		return nil, err
	}
	targets := o.plan(ctx, dir)
	d, err := startDaemon(ctx, o, targets, dir)
	if err != nil {
		return nil, err
	}
	r := &report{Seed: o.seed, Skipped: o.missing, verbose: o.verbose}
	lanes := newLanes(o, d, targets)
	err = storm(ctx, o, d, lanes, r, stderr)
	r.problem(err)
	r.problem(d.stop())
	ctx = context.WithoutCancel(ctx) // tidying up is done even after an interrupt
	r.LeftBehind = d.killLeft(ctx)
	if d.group != nil {
		r.problem(d.group.remove(ctx))
	}
	r.Log, r.Printed, err = d.complaints()
	r.problem(err)
	for _, l := range lanes {
		r.problem(r.add(l))
	}
	r.finish()
	return r, nil
}

func newLanes(o *options, d *daemon, targets []*target) []*lane {
	cycles := new(atomic.Int64)
	quota := (o.cycles + len(targets) - 1) / len(targets)
	if o.duration > 0 {
		quota = 0
	}
	var lanes []*lane
	for i, t := range targets {
		lanes = append(lanes, &lane{
			o: o, target: t, control: d.control, quota: quota, cycles: cycles,
			random: rand.New(rand.NewPCG(o.seed, uint64(i))),
		})
	}
	return lanes
}

// storm is what happens between the start of hibergated and its end.
func storm(ctx context.Context, o *options, d *daemon, lanes []*lane, r *report, stderr io.Writer) error {
	if err := warmUp(ctx, o, lanes); err != nil {
		return err
	}
	before, err := d.asleep(ctx, o.patience)
	if err != nil {
		return err
	}
	r.Before = d.settled(ctx, holdings{FDs: 1 << 30})
	end, err := press(ctx, o, d)
	if err != nil {
		return err
	}
	begin := time.Now()
	err = blow(ctx, o, d, lanes, stderr)
	r.Seconds = time.Since(begin).Seconds()
	err = errors.Join(err, end())
	if d.gone() {
		return err
	}
	// What follows is looked at even after an interrupt.
	ctx = context.WithoutCancel(ctx)
	after, e := d.asleep(ctx, 2*o.patience)
	r.starts = map[string]uint64{}
	for _, st := range after {
		r.starts[st.Name] = st.Starts
		for _, b := range before {
			if b.Name == st.Name {
				r.starts[st.Name] -= b.Starts
			}
		}
	}
	r.After = d.settled(ctx, r.Before)
	return errors.Join(err, e)
}

// settled waits a moment for what is only just being closed.
func (d *daemon) settled(ctx context.Context, before holdings) holdings {
	var h holdings
	until(ctx, 5*time.Second, func() bool {
		h = d.holdings()
		return h.FDs <= before.FDs && !slices.ContainsFunc(h.Processes, func(pid int) bool { return !slices.Contains(before.Processes, pid) })
	})
	return h
}

// warmUp lets every service run twice, so that hibergated has opened what it keeps.
func warmUp(ctx context.Context, o *options, lanes []*lane) error {
	var all sync.WaitGroup
	errs := make([]error, len(lanes))
	for i, l := range lanes {
		all.Go(func() {
			for n := range 2 {
				c := client{id: fmt.Sprintf("%s.warm%d", l.target.name, n), pieces: []string{fmt.Sprintf("%s.warm%d\n", l.target.name, n)}, gaps: []time.Duration{0}}
				c.run(ctx, l.target.address, o.patience)
				if c.outcome != answered {
					errs[i] = errors.Join(errs[i], fmt.Errorf("%s does not work: %w", l.target.name, c.err))
				}
				if !l.target.kind.accept {
					l.sleep(ctx)
				}
			}
		})
	}
	all.Wait()
	return errors.Join(errs...)
}

// blow runs the lanes until each has had its cycles, the time is over, ctx ends or hibergated does.
func blow(ctx context.Context, o *options, d *daemon, lanes []*lane, stderr io.Writer) error {
	interrupted := ctx
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stopped := ctx
	if o.duration > 0 {
		var stop context.CancelFunc
		stopped, stop = context.WithTimeout(ctx, o.duration)
		defer stop()
	}
	var all sync.WaitGroup
	errs := make([]error, len(lanes))
	for i, l := range lanes {
		all.Go(func() { errs[i] = l.run(ctx, stopped) })
	}
	done := make(chan struct{})
	go func() {
		all.Wait()
		close(done)
	}()
	progress := time.NewTicker(10 * time.Second)
	defer progress.Stop()
	for {
		select {
		case <-progress.C:
			fmt.Fprintf(stderr, "storm: %d cycles\n", lanes[0].cycles.Load())
		case <-d.ended:
			cancel()
			<-done
			return errors.Join(errs...)
		case <-done:
			if interrupted.Err() != nil {
				errs = append(errs, errors.New("interrupted"))
			}
			return errors.Join(errs...)
		}
	}
}
