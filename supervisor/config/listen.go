package config

import (
	"strings"

	"hibergate/activation"
	"hibergate/activation/adopt"
	"hibergate/supervisor"
)

// maxSockets is how many descriptors one message carries between processes: SCM_MAX_FD, unix(7).
const maxSockets = 253

// kinds are kinds of sockets.
type kinds uint8

const (
	forTCP kinds = 1 << iota
	forUDP
	forUnix
	forUnixgram
	forUnixpacket
	forFIFO
	withPath // not abstract
)

// kindOf returns the kind of a socket; 0 for one whose address is wrong.
func kindOf(a activation.Address) kinds {
	k := map[activation.Network]kinds{
		activation.TCP: forTCP, activation.UDP: forUDP, activation.Unix: forUnix,
		activation.Unixgram: forUnixgram, activation.Unixpacket: forUnixpacket, activation.FIFO: forFIFO,
	}[a.Network]
	if a.Network.Path() && !a.Abstract() {
		k |= withPath
	}
	return k
}

// fit says whether a key for the sockets k is for a socket of the kind one.
func (k kinds) fit(one kinds) bool {
	return k&one&^withPath != 0 && (k&withPath == 0 || one&withPath != 0)
}

// String returns "tcp and udp sockets".
func (k kinds) String() string {
	var names []string
	for i, name := range []string{"tcp", "udp", "unix", "unixgram", "unixpacket", "fifo"} {
		if k&(1<<i) != 0 {
			names = append(names, name)
		}
	}
	s := names[len(names)-1] + " sockets"
	if len(names) > 1 {
		s = strings.Join(names[:len(names)-1], ", ") + " and " + s
	}
	if k&withPath != 0 {
		s += " with a path"
	}
	return s
}

// A socketDraft is an element of listen while it is read.
type socketDraft struct {
	spec activation.Spec
	kind string // what "type" says

	// With learn it is the pattern. Of the address spec then has the network, the port and "[::]"; with "auto"
	// nothing, as where the address is wrong.
	learn   bool
	pattern adopt.Pattern
}

// String returns the socket as the configuration has it.
func (s *socketDraft) String() string {
	if s.learn {
		return s.pattern.String()
	}
	return s.spec.Address.String()
}

// listen reads the sockets of a service.
func (d *decoder) listen(raw any) {
	if address, ok := raw.(string); ok {
		d.element(address)
		return
	}
	d.each(raw, "an address or an array of addresses and tables", d.element)
	if n := len(d.elements); n > maxSockets {
		d.wrong("has %d sockets, at most %d are possible", n, maxSockets)
	}
	if d.adopts() {
		d.checkAlone()
		d.splitVersions()
	}
}

// element reads one socket. It counts even where it is wrong.
func (d *decoder) element(raw any) {
	d.elements = append(d.elements, socketDraft{})
	d.socket = &d.elements[len(d.elements)-1]
	switch raw := raw.(type) {
	case string:
		d.address(raw)
	case map[string]any:
		outer := d.meant
		d.meant = nil
		d.table(&d.schema.listen, raw)
		d.missing(raw, "address", "")
		d.meant = outer
		d.checkPattern(raw)
		d.applyType()
		d.checkFit(raw)
	default:
		d.wrongType("an address or a table", raw)
	}
	if d.socket.spec.Name == "" {
		d.socket.spec.Name = d.service.Name
	}
}

// address reads an address or a pattern. Its path must not be a part of the text of the file.
func (d *decoder) address(raw any) {
	var text string
	if !d.str(raw, &text) {
		return
	}
	switch {
	case d.adopts():
		if d.asPattern(text) {
			return
		}
	case text == adopt.Auto.String():
		d.wrong(`"auto" needs handoff = "adopt"`)
		return
	}
	a, err := activation.ParseAddress(text)
	if err != nil {
		d.wrong("%v", err)
		return
	}
	if d.adopts() && a.Network.IP() && a.Port == 0 {
		d.wrong("address %q: a port is needed: 0 stands for any, and the program could not know which one to bind", text)
		return
	}
	a.Path = strings.Clone(a.Path)
	d.socket.spec.Address = a
}

// settle gives the service its sockets. They stay in memory, so they are allocated once.
func (d *decoder) settle() {
	s, learn := d.service, 0
	for i := range d.elements {
		if d.elements[i].learn {
			learn++
		}
	}
	if n := len(d.elements) - learn; n > 0 {
		s.Sockets = make([]activation.Spec, 0, n)
	}
	if learn > 0 {
		s.Learn = make([]supervisor.Learn, 0, learn)
	}
	for i := range d.elements {
		e := &d.elements[i]
		if e.learn {
			spec := e.spec
			spec.Address = activation.Address{}
			s.Learn = append(s.Learn, supervisor.Learn{Pattern: e.pattern, Spec: spec})
			continue
		}
		// The program may ask for it only after the first datagrams have come. A gate answers from the address that a
		// client has sent to, also a client that came before it was asked.
		e.spec.Options.PacketInfo = (d.adopts() || d.gates()) && e.spec.Address.Network == activation.UDP
		s.Sockets = append(s.Sockets, e.spec)
	}
}

// socketName reads the name of a socket in LISTEN_FDNAMES.
func (d *decoder) socketName(raw any) {
	var name string
	if !d.str(raw, &name) {
		return
	}
	if err := activation.CheckName(name); err != nil {
		d.wrong("%v", err)
		return
	}
	d.socket.spec.Name = name
	d.keep(&d.socket.spec.Name)
}

// family reads which IP versions an address serves.
func (d *decoder) family(raw any) {
	var word string
	if d.choice(raw, &word, "default", "dual", "ipv4", "ipv6") {
		d.socket.spec.Options.Family = map[string]activation.Family{
			"dual": activation.FamilyDual, "ipv4": activation.FamilyIPv4, "ipv6": activation.FamilyIPv6,
		}[word]
	}
}

// device reads the name of a network interface: see dev_valid_name in the kernel.
func (d *decoder) device(raw any) {
	var s string
	if !d.str(raw, &s) {
		return
	}
	if len(s) > 15 || s == "." || s == ".." || strings.ContainsAny(s, "/: \t\n\v\f\r") {
		d.wrong("must be the name of a network interface, got %q", s)
		return
	}
	d.socket.spec.Options.Device = s
	d.keep(&d.socket.spec.Options.Device)
}

// applyType makes a unix address what type says. A type that only repeats what the
// address says is allowed.
func (d *decoder) applyType() {
	a := &d.socket.spec.Address
	if a.Network == 0 || d.socket.kind == "" {
		return
	}
	become := map[string]activation.Network{
		"stream": activation.Unix, "dgram": activation.Unixgram, "seqpacket": activation.Unixpacket,
	}[d.socket.kind]
	fits := map[string]kinds{"stream": forTCP | forUnix, "dgram": forUDP | forUnixgram, "seqpacket": forUnixpacket}[d.socket.kind]
	switch {
	case a.Network == activation.Unix:
		a.Network = become
	case !fits.fit(kindOf(*a)):
		d.wrongOption("type", "%q contradicts the address %s", d.socket.kind, d.socket)
	}
}

// checkFit notes the keys that are not for this kind of socket.
func (d *decoder) checkFit(raw map[string]any) {
	a := d.socket.spec.Address
	one := kindOf(a)
	if one == 0 {
		return
	}
	for name := range raw {
		if k := d.schema.listen.byName[name]; k != nil && k.fits != 0 && !k.fits.fit(one) {
			d.wrongOption(name, "is for %s, not for %s", k.fits, d.socket)
		}
	}
	// One address belongs to one IP version; only those without an IP and "[::]" leave a choice.
	family := d.socket.spec.Options.Family
	switch {
	case !a.IP.IsValid() || family == activation.FamilyDefault:
	case a.IP.Is4() && family != activation.FamilyIPv4, a.IP.Is6() && !a.IP.IsUnspecified() && family != activation.FamilyIPv6:
		d.wrongOption("family", "%q contradicts the address %s", raw["family"], a)
	}
	// The link would take the place of the socket.
	for _, link := range d.socket.spec.Options.Symlinks {
		if link == a.Path {
			d.wrongOption("symlinks", "%s is the path of the socket itself", link)
		}
	}
}

// wrongOption notes a problem of a key of the socket being read.
func (d *decoder) wrongOption(name, format string, args ...any) {
	d.path = append(d.path, name)
	d.wrong(format, args...)
	d.path = d.path[:len(d.path)-1]
}
