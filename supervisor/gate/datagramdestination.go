package gate

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation"
)

// A destination that refuses is left alone for retryMin, and for twice as long each further time, up to retryMax.
const (
	retryMin = time.Second
	retryMax = 30 * time.Second
)

// datagramDestination is one destination in one admission. All of it is under datagrams.mu.
type datagramDestination struct {
	index    int // in Spec.Destinations
	address  activation.Address
	sockaddr unix.Sockaddr
	sessions int           // that lead to it
	pause    time.Duration // after the last refusal; 0: it has answered since, or never refused
	until    time.Time     // it is left alone
}

func newDatagramDestination(t *Target) (*datagramDestination, error) {
	a := t.Address
	if a.Network != activation.UDP || !a.IP.IsValid() || a.Port == 0 {
		return nil, fmt.Errorf("send datagrams to %s: not an address of UDP with an IP and a port", a)
	}
	dest := &datagramDestination{index: t.Index, address: a}
	if ip := a.IP.Unmap(); ip.Is4() {
		dest.sockaddr = &unix.SockaddrInet4{Addr: ip.As4(), Port: int(a.Port)}
		return dest, nil
	}
	zone, err := interfaceNumber(a.IP.Zone())
	if err != nil {
		return nil, fmt.Errorf("send datagrams to %s: %w", a, err)
	}
	dest.sockaddr = &unix.SockaddrInet6{Addr: a.IP.As16(), Port: int(a.Port), ZoneId: zone}
	return dest, nil
}

// interfaceNumber turns the zone of an IPv6 address, a name or a number, into a number; 0 for none.
func interfaceNumber(zone string) (uint32, error) {
	if zone == "" {
		return 0, nil
	}
	if n, err := strconv.ParseUint(zone, 10, 32); err == nil {
		return uint32(n), nil
	}
	i, err := net.InterfaceByName(zone)
	if err != nil {
		return 0, err
	}
	return uint32(i.Index), nil
}

func (t *datagramDestination) healthy(now time.Time) bool { return !t.until.After(now) }

// refused leaves the destination alone for a while.
func (t *datagramDestination) refused(now time.Time) {
	if !t.healthy(now) {
		return // many clients hear of the same refusal
	}
	t.pause = min(max(retryMin, 2*t.pause), retryMax)
	t.until = now.Add(t.pause)
}

// answered says that the destination is there.
func (t *datagramDestination) answered() { t.pause, t.until = 0, time.Time{} }

// pick returns the destination for the next session; nil where all are to be left alone.
func (d *datagrams) pick(now time.Time) *datagramDestination {
	var best *datagramDestination
	for range d.destinations {
		t := d.destinations[d.turn%len(d.destinations)]
		d.turn = (d.turn + 1) % len(d.destinations)
		if !t.healthy(now) {
			continue
		}
		if d.spec.Balance == RoundRobin {
			return t
		}
		if best == nil || t.sessions < best.sessions {
			best = t
		}
	}
	if best != nil {
		d.turn = (d.turn + 1) % len(d.destinations) // among equals they take turns
	}
	return best
}

// anyHealthy says whether pick would return one.
func (d *datagrams) anyHealthy(now time.Time) bool {
	return slices.ContainsFunc(d.destinations, func(t *datagramDestination) bool { return t.healthy(now) })
}

// isRefusal says whether an error of a socket that is connected to a destination means that it is not there.
func isRefusal(err error) bool {
	var errno unix.Errno
	if !errors.As(err, &errno) {
		return false
	}
	switch errno { //nolint:exhaustive // the errors of ICMP and of routing, after icmp(7) and udp(7)
	case unix.ECONNREFUSED, unix.ENOPROTOOPT, unix.EHOSTUNREACH, unix.ENETUNREACH, unix.EHOSTDOWN, unix.ENETDOWN, unix.ENONET:
		return true
	}
	return false
}
