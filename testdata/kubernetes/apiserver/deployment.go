package apiserver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http" //nolint:depguard // this is a server for tests
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// errConflict says that an object is no longer the one that was read.
var errConflict = errors.New("the object has been modified; please apply your changes to the latest version and try again")

// phase says what the pods are doing. They do it together.
type phase uint8

const (
	absent phase = iota
	starting
	ready
	terminating // after a scale to 0: not ready, but it serves
)

// deployment is the Deployment, its pods, and the Service in front of them.
type deployment struct {
	opts    Options
	address string // of the Service; the same as long as the deployment lives

	// reserved is a socket that is bound to the address, so that nothing else gets it while no pod listens there.
	reserved int

	cancel  context.CancelFunc
	changed chan struct{} // has capacity 1
	done    sync.WaitGroup

	mu        sync.Mutex // for what follows
	state     scaled
	conflicts int

	// Owned by run.
	server *http.Server
	served sync.WaitGroup
}

// scaled is what can be known of a deployment at a time.
type scaled struct {
	replicas int // wanted
	version  int
	phase    phase
	err      error // the last attempt to make pods failed
}

func newDeployment(ctx context.Context, opts Options) (*deployment, error) {
	d := &deployment{opts: opts, changed: make(chan struct{}, 1), state: scaled{version: 1}}
	var err error
	if d.reserved, d.address, err = reserve(opts.Backend); err != nil {
		return nil, fmt.Errorf("the address of the Service: %w", err)
	}
	ctx, d.cancel = context.WithCancel(context.WithoutCancel(ctx))
	d.done.Go(func() { d.run(ctx) })
	if _, err := d.scale("", opts.Replicas); err != nil {
		return nil, errors.Join(err, d.close())
	}
	return d, nil
}

// close returns when no pod is left.
func (d *deployment) close() error {
	d.cancel()
	d.done.Wait()
	return errors.Join(d.get().err, unix.Close(d.reserved))
}

func (d *deployment) get() scaled {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.state
}

func (d *deployment) conflict(n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.conflicts = n
}

// scale sets the replicas that are wanted, if the version is that of the object or empty, and returns what came of it.
func (d *deployment) scale(version string, replicas int) (scaled, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.conflicts > 0 && version != "" {
		d.conflicts--
		d.state.version++
	}
	if version != "" && version != fmt.Sprint(d.state.version) {
		return d.state, errConflict
	}
	if d.state.replicas != replicas {
		d.state.replicas = replicas
		d.state.version++
		select {
		case d.changed <- struct{}{}:
		default:
		}
	}
	return d.state, nil
}

// enter changes the phase if it is the one given.
func (d *deployment) enter(from, to phase, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.state.phase == from {
		d.state.phase, d.state.err = to, err
		d.state.version++
	}
}

// run makes and ends pods until ctx is done.
func (d *deployment) run(ctx context.Context) {
	timer := time.NewTimer(time.Hour)
	timer.Stop()
	for {
		select {
		case <-ctx.Done():
			timer.Stop()
			d.halt()
			return
		case <-d.changed:
			switch s := d.get(); {
			case s.replicas > 0 && (s.phase == absent || s.phase == terminating):
				// A pod that terminates is not coming back: the new one takes its place, and its address.
				d.halt()
				d.enter(s.phase, starting, nil)
				timer.Reset(d.opts.StartDelay)
			case s.replicas == 0 && s.phase == ready:
				d.enter(ready, terminating, nil)
				timer.Reset(d.opts.StopDelay)
			case s.replicas == 0 && s.phase == starting:
				timer.Stop()
				d.enter(starting, absent, nil)
			}
		case <-timer.C:
			if d.get().phase == starting {
				d.enter(starting, ready, d.serve(ctx))
			} else {
				d.halt()
				d.enter(terminating, absent, nil)
			}
		}
	}
}

// serve makes the pod answer at the address of the Service.
func (d *deployment) serve(ctx context.Context) error {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", d.address)
	if err != nil {
		return err
	}
	d.server = &http.Server{ReadHeaderTimeout: 10 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, "hello from "+d.opts.Deployment+" "+r.URL.Path+"\n") // the client may be gone
	})}
	server := d.server
	d.served.Go(func() { _ = server.Serve(l) }) // ErrServerClosed, always
	return nil
}

// halt ends the pod, if there is one, with the connections that it has.
func (d *deployment) halt() {
	if d.server != nil {
		_ = d.server.Close() // what it reports is of no use to anybody
		d.served.Wait()
		d.server = nil
	}
}
