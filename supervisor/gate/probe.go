package gate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"hibergate/activation"
)

// Runner runs a command to its end; the error says that it did not end well.
type Runner func(ctx context.Context, argv []string) error

// Probe asks once which destinations are ready. It returns all of them, so that the others may be tried too, where at least
// one is; else an error that says what is missing. With ReadyLaunched nobody can tell before the launch: that is an error too.
// The connections that it made belong to the caller, as FD of the targets.
func (s *Spec) Probe(ctx context.Context, run Runner) ([]Target, error) {
	if s.Ready.Type == ReadyLaunched {
		return nil, errNotLaunched
	}
	targets, err := s.resolve(ctx)
	if err != nil {
		return nil, err
	}
	if err := s.ask(ctx, run, targets); err != nil {
		return nil, err
	}
	return targets, nil
}

var errNotLaunched = errors.New("it is ready once the launch command has ended")

// Await asks again and again until a destination is ready or ctx ends. missing is told each time what is lacking; it may
// be nil.
func (s *Spec) Await(ctx context.Context, run Runner, missing func(error)) ([]Target, error) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	var last error // of a try that was not cut short
	for {
		targets, err := s.Probe(ctx, run)
		switch {
		case err == nil:
			return targets, nil
		case ctx.Err() != nil && last != nil:
			return nil, last
		case ctx.Err() != nil:
			return nil, err
		case missing != nil:
			missing(err)
		}
		last = err
		timer.Reset(s.Ready.Interval)
		select {
		case <-timer.C:
		case <-ctx.Done():
			return nil, err
		}
	}
}

// Launched returns the destinations after a launch, where that is all there is to wait for.
func (s *Spec) Launched(ctx context.Context) ([]Target, error) { return s.resolve(ctx) }

// resolve finds the addresses of the destinations. Of a name it takes the first one, which [Spec.ask] may replace. A name
// that is not known leaves its destination out, unless it is the last one.
func (s *Spec) resolve(ctx context.Context) ([]Target, error) {
	targets := make([]Target, 0, len(s.Destinations))
	var failed error
	for i := range s.Destinations {
		d := &s.Destinations[i]
		ips, err := d.lookUp(ctx)
		if err != nil {
			failed = err
			continue
		}
		targets = append(targets, Target{Index: i, Address: d.at(ips[0]), FD: -1})
	}
	if len(targets) == 0 {
		return nil, failed
	}
	return targets, nil
}

// at is the address of a destination, of which one IP is known.
func (d *Destination) at(ip netip.Addr) activation.Address {
	return activation.Address{Network: d.Network, IP: ip, Port: d.Port, Path: d.Path}
}

// lookUpTimeout bounds one look-up of a name.
const lookUpTimeout = 5 * time.Second

// lookUp returns the IP addresses of a destination, at least one; of a Unix socket the zero Addr.
func (d *Destination) lookUp(ctx context.Context) ([]netip.Addr, error) {
	if d.Network == activation.Unix {
		return []netip.Addr{{}}, nil
	}
	if ip, err := netip.ParseAddr(d.Host); err == nil {
		return []netip.Addr{ip}, nil
	}
	ctx, cancel := context.WithTimeout(ctx, lookUpTimeout)
	defer cancel()
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", d.Host)
	switch {
	case err != nil:
		return nil, fmt.Errorf("%s: %w", *d, err)
	case len(ips) == 0:
		return nil, fmt.Errorf("%s: the name has no address", *d)
	}
	for i := range ips {
		ips[i] = ips[i].Unmap()
	}
	return ips, nil
}

// ask whether one of the targets is ready. One that has connections must accept one.
func (s *Spec) ask(ctx context.Context, run Runner, targets []Target) error {
	if s.Ready.Type == ReadyCommand {
		limited, cancel := context.WithTimeout(ctx, s.Ready.Timeout)
		defer cancel()
		if err := run(limited, s.Ready.Command); err != nil {
			return fmt.Errorf("ready: %w", err)
		}
		if !slices.ContainsFunc(targets, func(t Target) bool { return t.Address.Network != activation.UDP }) {
			return nil
		}
		// What the command knows of may be there and not listen yet.
	}
	var failed error
	for i := range targets {
		t := &targets[i]
		if t.Address.Network == activation.UDP {
			continue
		}
		var err error
		if s.Ready.Type == ReadyHTTP {
			err = s.Ready.get(ctx, t.Address)
		} else {
			err = s.connect(ctx, t)
		}
		if err == nil {
			return nil
		}
		failed = errors.Join(failed, fmt.Errorf("%s: %w", s.Destinations[t.Index], err))
	}
	if failed == nil {
		failed = errors.New("none of the destinations has connections")
	}
	return failed
}

// connect tries all addresses of a target, and keeps the connection.
func (s *Spec) connect(ctx context.Context, t *Target) error {
	d := &s.Destinations[t.Index]
	ips, err := d.lookUp(ctx)
	if err != nil {
		return err
	}
	// The one that was found first comes first.
	slices.SortStableFunc(ips, func(a, b netip.Addr) int {
		switch {
		case a == t.Address.IP && b != a:
			return -1
		case b == t.Address.IP && a != b:
			return 1
		}
		return 0
	})
	var failed error
	for _, ip := range ips {
		at := d.at(ip)
		fd, err := dial(ctx, at, s.Ready.Timeout)
		if err == nil {
			t.Address, t.FD = at, fd
			return nil
		}
		failed = errors.Join(failed, err)
	}
	return failed
}

// maxBody is how much of an answer is read before the connection is given up.
const maxBody = 64 << 10

// get asks by HTTP.
func (r *Ready) get(ctx context.Context, at activation.Address) error {
	ctx, cancel := context.WithTimeout(ctx, r.Timeout)
	defer cancel()
	network, address, host := "unix", at.Path, "localhost"
	if at.Network == activation.TCP {
		network, address = "tcp", netip.AddrPortFrom(at.IP, at.Port).String()
		host = address
	}
	transport := &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, network, address)
		},
		MaxResponseHeaderBytes: maxBody,
	}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+host+r.Path, nil)
	if err != nil {
		return err
	}
	req.Header.Set("User-Agent", "hibergated")
	client := http.Client{
		Transport:     transport,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	resp, err := client.Do(req)
	if err != nil {
		return errors.New(legible(strings.TrimPrefix(err.Error(), "Get ")))
	}
	_, _ = io.CopyN(io.Discard, resp.Body, maxBody) // what matters has come
	if err := resp.Body.Close(); err != nil {
		return err
	}
	if resp.StatusCode != r.Status {
		return fmt.Errorf("GET %s: %s, not %d", r.Path, legible(resp.Status), r.Status)
	}
	return nil
}

// maxLegible bounds what a destination can have people read, in bytes.
const maxLegible = 200

// legible makes a text that a destination has had its hands in fit for a terminal.
func legible(text string) string {
	if len(text) > maxLegible {
		text = text[:maxLegible] + "..."
	}
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) && r != utf8.RuneError {
			return r
		}
		return '?'
	}, text)
}

// endTimeout is how long a destination that is being stopped gets to answer whether it is still there.
const endTimeout = time.Second

// AwaitEnd waits until no destination is ready any more, or accepts connections. The error is that of ctx.
func (s *Spec) AwaitEnd(ctx context.Context, run Runner) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		if !s.there(ctx, run) {
			return nil
		}
		timer.Reset(max(s.Ready.Interval, minEndInterval))
		select {
		case <-timer.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// minEndInterval is how often it is asked at most whether a destination is still there.
const minEndInterval = 5 * time.Millisecond

// there says whether a destination may still be up.
func (s *Spec) there(ctx context.Context, run Runner) bool {
	targets, err := s.resolve(ctx)
	if err != nil {
		return ctx.Err() != nil
	}
	accepts, streams := false, false
	for _, t := range targets {
		if t.Address.Network == activation.UDP {
			continue
		}
		streams = true
		if fd, err := dial(ctx, t.Address, endTimeout); err == nil {
			letGo(fd)
			accepts = true
		}
	}
	switch {
	case ctx.Err() != nil:
		return true
	case streams && !accepts:
		return false
	case s.Ready.Type == ReadyConnect || s.Ready.Type == ReadyLaunched:
		return accepts // of datagrams alone nobody can tell
	}
	defer Abandon(targets)
	return s.ask(ctx, run, targets) == nil
}
