package lookup

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"

	"hibergate/activation"
)

var (
	errNotTCP       = errors.New("only TCP connections can be handed over by the kernel")
	errOtherVersion = errors.New("the clients speak another version of IP than the destination")
)

// Possible says why the connections of a socket cannot be handed to the destination by the kernel, without a look at this machine; nil:
// nothing is known against it. The destination has no IP where that is a name which is yet to be looked up. It is pure.
func Possible(listen activation.Spec, to activation.Address) error {
	o := &listen.Options
	switch {
	case listen.Address.Network != activation.TCP || to.Network != activation.TCP:
		return errNotTCP
	case o.ReusePort: // the program runs before the kernel chooses among them
		return errors.New("the socket shares its port (reuse_port), and the kernel would hand over the connections of the others too")
	case !o.Access.Everybody(): // it is a filter of our socket
		return errors.New("the socket has an access list, which what is handed over would pass by")
	case o.Transparent: // only a transparent socket can answer from these
		return errors.New("the socket takes connections to addresses that are not of this machine (transparent)")
	case !to.IP.IsValid():
		return nil
	case to.IP.IsUnspecified() || to.IP.IsMulticast() || to.IP.Zone() != "":
		return fmt.Errorf("connections cannot be handed to %v", to.IP)
	case listen.Address.IP.Unmap() == to.IP.Unmap() && listen.Address.Port == to.Port && to.Port != 0:
		return fmt.Errorf("%v leads to itself", listen.Address)
	}
	served := versionsOf(listen.Address.IP, o.Family, false)
	if to := to.IP.Unmap(); to.Is4() && !served.four || to.Is6() && !served.six {
		return errOtherVersion
	}
	return nil
}

// Local says whether a destination listens on this machine, which may still be in another network namespace: Add tells.
func Local(to netip.AddrPort) bool { return activation.IsLocal(to.Addr()) }

// versions of IP.
type versions struct{ four, six bool }

func (v versions) and(o versions) versions { return versions{v.four && o.four, v.six && o.six} }

// versionsOf says whose packets come to a socket on an address; "[::]" may mean IPv6 alone.
func versionsOf(ip netip.Addr, family activation.Family, onlyV6 bool) versions {
	switch {
	case ip.Unmap().Is4(), family == activation.FamilyIPv4:
		return versions{four: true}
	case ip.IsValid() && !ip.IsUnspecified(), family == activation.FamilyIPv6, family == activation.FamilyDefault && onlyV6:
		return versions{six: true}
	}
	return versions{four: true, six: true}
}

// onlyV6 says whether "[::]" means IPv6 alone on this machine.
func onlyV6() bool {
	b, err := os.ReadFile("/proc/sys/net/ipv6/bindv6only")
	return err == nil && strings.TrimSpace(string(b)) == "1"
}

// place is where packets come to, as the map has it.
type place struct {
	ip     [16]byte // IPv4 as ::ffff:0:0/96; all zero, or ::ffff:0.0.0.0: every address of the version
	port   uint16
	device uint32 // index; 0: every one
}

// key is the key in the map.
func (p place) key() (b [keySize]byte) {
	copy(b[:], p.ip[:])
	binary.NativeEndian.PutUint32(b[16:], uint32(p.port))
	binary.NativeEndian.PutUint32(b[20:], p.device)
	return b
}

// door is where the clients of one gate come in.
type door struct {
	ip       netip.Addr // the zero Addr: every address
	port     uint16
	device   uint32 // index; 0: every one
	versions versions
}

func newDoor(listen activation.Address, family activation.Family, device string) (door, error) {
	d := door{port: listen.Port, versions: versionsOf(listen.IP, family, onlyV6())}
	if listen.IP.IsValid() && !listen.IP.IsUnspecified() {
		d.ip = listen.IP.Unmap().WithZone("")
	}
	if zone := listen.IP.Zone(); zone != "" && device == "" {
		device = zone
	}
	switch {
	case listen.Network != activation.TCP:
		return door{}, errNotTCP
	case listen.Port == 0:
		return door{}, errors.New("it has no port")
	case device != "":
		i, err := net.InterfaceByName(device)
		if err != nil {
			return door{}, fmt.Errorf("network interface %q: %w", device, err)
		}
		d.device = uint32(i.Index)
	}
	return d, nil
}

// places returns those of some versions.
func (d door) places(v versions) []place {
	p := place{port: d.port, device: d.device}
	v = v.and(d.versions)
	if d.ip.IsValid() {
		if p.ip = d.ip.As16(); d.ip.Is4() && v.four || d.ip.Is6() && v.six {
			return []place{p}
		}
		return nil
	}
	var all []place
	if v.four {
		p.ip = netip.IPv4Unspecified().As16()
		all = append(all, p)
	}
	if v.six {
		p.ip = netip.IPv6Unspecified().As16()
		all = append(all, p)
	}
	return all
}

// meets says whether some packets that come in at the door are for a socket on an address and a device too.
func (d door) meets(ip netip.Addr, device uint32) bool {
	switch {
	case device != 0 && d.device != 0 && device != d.device:
		return false
	case ip.Is4() && !d.versions.four, ip.Is6() && !d.versions.six:
		return false
	}
	// A socket on all addresses of IPv6 leaves those of IPv4 to us, where we could bind them.
	return ip.IsUnspecified() || !d.ip.IsValid() || ip == d.ip
}
