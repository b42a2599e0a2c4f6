package lookup

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"hibergate/activation"
	"hibergate/supervisor/activity/sockdiag"
)

// Table is a BPF program with its map of sockets, at work in the network namespace of the thread that opened it. It is safe for
// concurrent use, but no two calls may be about the same gate.
type Table struct {
	sockets *sockdiag.Conn // guarded by mu
	devices bool           // the program knows them

	mu            sync.Mutex // over what follows, and the maps of the kernel
	table, counts int        // descriptors of maps: of sockets, and of how often each was handed a connection; -1: closed
	program, link int
	gates         map[uint32][]place
	taken         map[place]uint32  // the keys of gates
	begun         map[uint32]uint64 // connections that went by places which a gate has no more
}

// Open puts the program to work. It leads nowhere before Add. The error wraps unix.EPERM where a capability is missing.
func Open() (*Table, error) {
	t := &Table{
		sockets: sockdiag.New(), devices: true, table: -1, counts: -1, program: -1, link: -1,
		gates: make(map[uint32][]place), taken: make(map[place]uint32), begun: make(map[uint32]uint64),
	}
	var err error
	if t.table, err = createMap(unix.BPF_MAP_TYPE_SOCKHASH); err == nil {
		t.counts, err = createMap(unix.BPF_MAP_TYPE_HASH)
	}
	if err == nil {
		t.program, err = load(program(t.table, t.counts, true))
		if err != nil && !errors.Is(err, unix.EPERM) { // a kernel that does not tell the device
			t.devices = false
			t.program, err = load(program(t.table, t.counts, false))
		}
	}
	if err == nil {
		t.link, err = attach(t.program)
	}
	if err != nil {
		return nil, errors.Join(err, t.Close())
	}
	return t, nil
}

// Close ends it: new connections come to the listening sockets. What was handed over goes on. The end of our process does the same.
func (t *Table) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	errs := []error{t.sockets.Close()}
	for p := range t.taken { // a child that is being started may hold the link for a moment more
		errs = append(errs, remove(t.table, p))
	}
	for _, fd := range []*int{&t.link, &t.program, &t.table, &t.counts} { // it is the link that has the program run
		if *fd >= 0 {
			errs = append(errs, unix.Close(*fd))
			*fd = -1
		}
	}
	clear(t.gates)
	clear(t.taken)
	return errors.Join(errs...)
}

// Add hands new connections to a listening address over to the socket that listens on the address of the destination, of which those alone
// that come through a device if there is one. family is that of our socket. For a gate that was added before it does all this again, without
// a gap where the address is the same: that is how a destination is found again which listens anew; when it returns, the former one gets
// nothing new. After an error all come to our socket.
//
// Clients of an IP version that the destination's socket does not take stay with ours. The error has ErrNoListener, ErrUnfit or
// ErrShared in its chain, or unix.EPERM where the process is out of reach. ErrShared is about the sockets that are there now.
func (t *Table) Add(key uint32, listen activation.Address, family activation.Family, device string, to netip.AddrPort) error {
	to = netip.AddrPortFrom(to.Addr().Unmap(), to.Port())
	d, err := newDoor(listen, family, device)
	if err == nil {
		err = t.add(key, d, to)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("hand connections to %v over to %v: %w", listen, to, err), t.Remove(key))
	}
	return nil
}

func (t *Table) add(key uint32, d door, to netip.AddrPort) error {
	if !to.IsValid() || to.Port() == 0 || to.Addr().IsUnspecified() {
		return errors.New("the destination has no address, or no port")
	}
	if d.device != 0 && !t.devices {
		return fmt.Errorf("%w: kernels before Linux 5.17 do not tell programs of network interfaces", ErrUnfit)
	}
	candidates, err := t.candidates(d, to)
	if err != nil {
		return err
	}
	search := holders(candidates) // some 10 ms on a machine with many processes
	var failures []error
	for _, l := range candidates {
		h, ok := search.found[l.inode]
		switch {
		case !ok:
			err = search.missing(l)
		case h.pid == os.Getpid():
			// It would not die with its owner, nor could its account tell of what comes from here.
			err = fmt.Errorf("%w: it is one of our own", ErrUnfit)
		default:
			var replaced bool
			err = l.take(h, func(fd int, v versions) (err error) {
				if to.Addr().Is4() && !v.four {
					return ErrNoListener
				}
				replaced, err = t.lead(key, d.places(v), fd)
				return err
			})
			if replaced && err == nil {
				activation.WaitForPackets()
			}
		}
		if err == nil {
			return nil
		}
		failures = append(failures, err)
	}
	return errors.Join(failures...)
}

// candidates are the listening sockets of a destination.
func (t *Table) candidates(d door, to netip.AddrPort) ([]listener, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	ours, err := listeners(t.sockets, d.port)
	if err != nil {
		return nil, err
	}
	meet := 0
	for _, l := range ours {
		if d.meets(l.address.Addr(), l.device) {
			if meet++; meet > 1 { // ours is one
				return nil, fmt.Errorf("%w: %v", ErrShared, l.address)
			}
		}
	}
	all, err := listeners(t.sockets, to.Port())
	if err != nil {
		return nil, err
	}
	all = fitting(all, to)
	if len(all) == 0 {
		return nil, ErrNoListener
	}
	// It answers through its device, wherever the client is.
	all = slices.DeleteFunc(all, func(l listener) bool { return l.device != 0 && l.device != d.device })
	if len(all) == 0 {
		return nil, fmt.Errorf("%w: it is bound to a network interface", ErrUnfit)
	}
	return all, nil
}

// lead has the kernel lead to a socket from some places, and from no others. It says whether it led to another one before.
func (t *Table) lead(key uint32, places []place, fd int) (replaced bool, err error) {
	if len(places) == 0 {
		return false, fmt.Errorf("%w: %w", ErrUnfit, errOtherVersion)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.table < 0 {
		return false, os.ErrClosed
	}
	for _, p := range places {
		if other, taken := t.taken[p]; taken && other != key {
			return false, errors.New("they are handed over already")
		}
	}
	before := t.gates[key]
	for _, p := range places { // first, so that Remove finds them after an error
		if _, taken := t.taken[p]; !taken {
			t.gates[key], t.taken[p] = append(t.gates[key], p), key
		}
	}
	for _, p := range places {
		if _, counted := read(t.counts, p); !counted {
			if err := put(t.counts, p, 0); err != nil {
				return false, fmt.Errorf("change BPF map of numbers: %w", err)
			}
		}
		switch err := put(t.table, p, uint64(fd)); {
		case errors.Is(err, unix.E2BIG):
			return false, fmt.Errorf("change BPF map of sockets: it has room for %d: %w", maxPlaces, err)
		case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EINVAL):
			// It does not listen any more, or has a protocol above it (TCP_ULP of tcp(7)), or is in another program's map.
			return false, fmt.Errorf("%w: change BPF map of sockets: %w", ErrUnfit, err)
		case err != nil:
			return false, fmt.Errorf("change BPF map of sockets: %w", err)
		}
	}
	for _, p := range before {
		if slices.Contains(places, p) {
			continue
		}
		if err := remove(t.table, p); err != nil {
			return false, fmt.Errorf("change BPF map of sockets: %w", err)
		}
		if err := t.forget(key, p); err != nil {
			return false, err
		}
	}
	t.gates[key] = slices.Clone(places)
	return len(before) > 0, nil
}

// Remove ends what Add began. When it returns, in some 10 ms, no new connection goes to the destination any more, and sock_diag(7) lists
// all that have, with the port of our socket as their local one: in SYN_RECV, with inode 0 as long as they are not accepted, established.
// They go on. It does nothing where there is no gate of that key.
func (t *Table) Remove(key uint32) error {
	t.mu.Lock()
	places := t.gates[key]
	delete(t.gates, key)
	var errs []error
	for _, p := range places {
		if err := remove(t.table, p); err != nil {
			errs = append(errs, fmt.Errorf("end handing connections to port %d over: %w", p.port, err))
		}
	}
	t.mu.Unlock()
	if len(places) == 0 {
		return nil
	}
	activation.WaitForPackets() // the program runs, and the connection is listed, in one go
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, p := range places {
		errs = append(errs, t.forget(key, p))
	}
	return errors.Join(errs...)
}

// forget gives a place up that has no socket any more, and keeps what was counted there. It is called with the lock held.
func (t *Table) forget(key uint32, p place) error {
	n, _ := read(t.counts, p)
	t.begun[key] += n
	delete(t.taken, p)
	if err := remove(t.counts, p); err != nil {
		return fmt.Errorf("change BPF map of numbers: %w", err)
	}
	return nil
}

// Begun returns how many connections of a gate were handed over since Open.
func (t *Table) Begun(key uint32) uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.begun[key]
	for _, p := range t.gates[key] {
		more, _ := read(t.counts, p)
		n += more
	}
	return n
}
