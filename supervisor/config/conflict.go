package config

import (
	"net/netip"
	"strconv"

	"hibergate/activation"
	"hibergate/supervisor"
)

// An addressBook finds sockets that cannot both be opened, without comparing each
// with each: two sockets can only conflict when they are on the same shelf, and a shelf
// has one entry of each class.
type addressBook struct {
	paths map[string][]*entry
	ports map[shelf][]*entry
}

// newAddressBook makes a book that has room for so many sockets without growing.
func newAddressBook(sockets int) addressBook {
	return addressBook{paths: map[string][]*entry{}, ports: make(map[shelf][]*entry, 2*sockets)}
}

// A shelf holds sockets of one network and port. Every one is on the shelf anyIP, where
// those look that are bound to all addresses; and on the shelf of its own IP or of those
// that are bound to all, where the others look.
type shelf struct {
	network activation.Network
	where   where
	port    uint16
	ip      netip.Addr
}

// where says which of the shelves of a port is meant.
type where uint8

const (
	anyIP    where = iota + 1 // every socket of the port
	wildcard                  // those that are bound to all addresses
	oneIP                     // those that are bound to shelf.ip
)

// A class is what [activation.Spec.Conflicts] looks at beside the shelf: sockets of one class
// on one shelf have the same conflicts.
type class struct {
	network   activation.Network
	v4        bool
	family    activation.Family
	reusePort bool
	device    string
}

// An entry is a socket of a service.
type entry struct {
	spec    *activation.Spec
	service *supervisor.Service
	source  *source
	pattern string // how a pattern is written; empty: spec has an address
	listed  bool   // stands in an array
	index   int
}

// String returns the socket as the configuration has it.
func (e *entry) String() string {
	if e.pattern != "" {
		return e.pattern
	}
	return e.spec.Address.String()
}

// path returns the path of the socket in its file.
func (e *entry) path() []string {
	path := []string{"service", e.service.Name, "listen"}
	if e.listed {
		path = append(path, "#"+strconv.Itoa(e.index))
	}
	return path
}

// isWildcard says whether the address stands for all addresses of an IP version or of both.
func isWildcard(a activation.Address) bool { return !a.IP.IsValid() || a.IP.IsUnspecified() }

// classOf returns the class of a socket.
func classOf(s *activation.Spec) class {
	c := class{network: s.Address.Network}
	if c.network.IP() {
		c.v4, c.reusePort, c.device = s.Address.IP.Is4(), s.Options.ReusePort, s.Options.Device
		if isWildcard(s.Address) {
			c.family = s.Options.Family
		}
	}
	return c
}

// conflict returns a socket in the book that cannot be opened beside this one; nil
// where there is none.
func (b addressBook) conflict(s *activation.Spec) *entry {
	a := s.Address
	switch {
	case !a.Network.IP():
		return search(s, b.paths[a.Path])
	case isWildcard(a):
		return search(s, b.ports[shelf{a.Network, anyIP, a.Port, netip.Addr{}}])
	}
	if e := search(s, b.ports[shelf{a.Network, wildcard, a.Port, netip.Addr{}}]); e != nil {
		return e
	}
	return search(s, b.ports[shelf{a.Network, oneIP, a.Port, a.IP}])
}

// search returns an entry that conflicts with s. There are few: one of each class.
func search(s *activation.Spec, entries []*entry) *entry {
	for _, e := range entries {
		if s.Conflicts(*e.spec) {
			return e
		}
	}
	return nil
}

// add puts a socket into the book.
func (b addressBook) add(e *entry) {
	a := e.spec.Address
	switch {
	case !a.Network.IP():
		b.paths[a.Path] = put(b.paths[a.Path], e)
		return
	case a.Port == 0: // the kernel chooses
		return
	}
	own := shelf{a.Network, wildcard, a.Port, netip.Addr{}}
	if !isWildcard(a) {
		own.where, own.ip = oneIP, a.IP
	}
	for _, at := range []shelf{own, {a.Network, anyIP, a.Port, netip.Addr{}}} {
		b.ports[at] = put(b.ports[at], e)
	}
}

// put appends an entry, unless one of its class is there.
func put(entries []*entry, e *entry) []*entry {
	for _, other := range entries {
		if classOf(other.spec) == classOf(e.spec) {
			return entries
		}
	}
	return append(entries, e)
}
