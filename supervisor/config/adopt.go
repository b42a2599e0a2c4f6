package config

import (
	"net/netip"

	"hibergate/activation"
	"hibergate/activation/adopt"
	"hibergate/supervisor"
)

func adoptKeys() []key {
	return []key{
		{
			"io_uring", `"allow" or "refuse"`, `"allow"`,
			"refuse: io_uring_setup(2) fails as on a kernel without it, for programs that would bind by io_uring, which cannot be adopted", 0,
			(*decoder).ioUring,
		},
	}
}

// ioUring reads whether the program may use io_uring.
func (d *decoder) ioUring(raw any) {
	var word string
	if d.choice(raw, &word, "allow", "refuse") {
		d.service.RefuseIOUring = word == "refuse"
	}
}

// adopts says whether the program of the service binds its sockets itself.
func (d *decoder) adopts() bool { return d.service.Handoff == supervisor.Adopt }

// checkAdopt checks the table adopt against the rest.
func (d *decoder) checkAdopt(since int, keys map[string]any) {
	if keys["adopt"] != nil && !d.adopts() && !d.failed(since, "handoff", "adopt") {
		d.wrongKey("adopt", `needs handoff = "adopt"`)
	}
}

// asPattern reads an address that may be a pattern, and says whether there is nothing more to read.
func (d *decoder) asPattern(text string) bool {
	p, ok, err := adopt.ParsePattern(text)
	if err != nil {
		return !d.wrong("%v", err)
	}
	if !ok {
		return false
	}
	s := d.socket
	s.learn, s.pattern = true, p
	s.spec.Address = activation.Address{Network: p.Network, Port: p.Port}
	if p.Host == adopt.Wildcard6 {
		s.spec.Address.IP = netip.IPv6Unspecified()
	}
	return true
}

// checkPattern checks a table whose address is a pattern. With a family nothing is open any more, and it is an address.
func (d *decoder) checkPattern(raw map[string]any) {
	s := d.socket
	switch {
	case !s.learn:
	case s.pattern == adopt.Auto:
		for name := range raw {
			if d.schema.listen.byName[name] != nil && name != "address" && name != "name" {
				d.wrongOption(name, `is not for "auto", which stands for sockets of any kind: it may have a name, and nothing else`)
			}
		}
	case s.spec.Options.Family == activation.FamilyDefault:
	case s.pattern.Host == adopt.Localhost:
		d.wrongOption("family", "%q does not go with %s; write 127.0.0.1 or [::1] for one IP version", raw["family"], s)
	default:
		s.learn = false
	}
}

// checkAlone notes an "auto" that is not all that listen says.
func (d *decoder) checkAlone() {
	for i := range d.elements {
		if e := &d.elements[i]; e.learn && e.pattern == adopt.Auto && len(d.elements) > 1 {
			d.path = append(d.path, d.index(i))
			d.wrong(`"auto" stands for all sockets, and must be the only element`)
			d.path = d.path[:len(d.path)-1]
		}
	}
}

// splitVersions makes addresses of those patterns "[::]" that stand beside an IPv4 socket of the same port: a program
// that has one for each IP version binds "[::]" for IPv6 alone.
func (d *decoder) splitVersions() {
	four := map[activation.Address]bool{} // "[::]" of each port that IPv4 has
	for i := range d.elements {
		e := &d.elements[i]
		if a := e.spec.Address; a.Network.IP() && !e.learn && (a.IP.Is4() || isWildcard(a) && e.spec.Options.Family == activation.FamilyIPv4) {
			a.IP = netip.IPv6Unspecified()
			four[a] = true
		}
	}
	for i := range d.elements {
		if e := &d.elements[i]; e.learn && four[e.spec.Address] {
			e.learn, e.spec.Options.Family = false, activation.FamilyIPv6
		}
	}
}

// occupied returns what no other socket may have beside a pattern: of "localhost" those two addresses that it is for
// every program, of the others all that they may mean. "auto" may come to mean anything, and so occupies nothing.
func (s *socketDraft) occupied() []*activation.Spec {
	one := s.spec
	if s.pattern.Host != adopt.Localhost {
		return []*activation.Spec{&one}
	}
	two := s.spec
	one.Address.IP, two.Address.IP = netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()
	return []*activation.Spec{&one, &two}
}
