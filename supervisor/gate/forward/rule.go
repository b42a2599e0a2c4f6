package forward

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"hibergate/activation"
)

// version is the IP version of a destination, and so of the clients that are led there.
type version uint8

const (
	v4 version = iota
	v6
	versions
)

func (v version) String() string { return [...]string{"4", "6"}[v] }

// protocol is NFPROTO_IPV4 or NFPROTO_IPV6.
func (v version) protocol() byte { return [...]byte{unix.NFPROTO_IPV4, unix.NFPROTO_IPV6}[v] }

func versionOf(a netip.Addr) version {
	if a.Is4() {
		return v4
	}
	return v6
}

// kind says in which map a rule is.
type kind uint8

// In the order in which the kernel would choose the socket.
const (
	deviceIP kind = iota // one address, through one device
	ip                   // one address
	device               // every address, through one device
	anywhere
	kinds
)

func (k kind) String() string { return [...]string{"device_ip", "ip", "device", "any"}[k] }

func (k kind) hasDevice() bool { return k == deviceIP || k == device }
func (k kind) hasIP() bool     { return k == deviceIP || k == ip }

// rule leads new connections somewhere.
type rule struct {
	place
	to netip.AddrPort
}

// place is where the clients of a rule come to.
type place struct {
	version version    // of IP, that of the destination too
	ip      netip.Addr // without zone; the zero Addr: every address
	device  string     // "": every one
	port    uint16
}

// newRule makes the rule of a listening address, or says why there is none.
func newRule(listen activation.Address, family activation.Family, device string, to netip.AddrPort) (rule, error) {
	r := rule{place{version: versionOf(to.Addr().Unmap()), ip: bare(listen.IP), device: device, port: listen.Port}, unmapped(to)}
	destination := activation.Address{Network: activation.TCP, IP: to.Addr(), Port: to.Port()}
	if err := check(listen, family, destination); err != nil {
		return rule{}, err
	}
	if !to.IsValid() || to.Port() == 0 || listen.Port == 0 {
		return rule{}, errors.New("both ends must have a port, and the destination an address")
	}
	if zone := listen.IP.Zone(); zone != "" && r.device == "" {
		r.device = zone
	}
	if len(r.device) >= unix.IFNAMSIZ {
		return rule{}, fmt.Errorf("%q is no network interface", r.device)
	}
	if !listen.IP.Is4() && r.ip == (netip.Addr{}) && family == activation.FamilyDefault && r.version == v4 && onlyV6() {
		return rule{}, errOtherVersion
	}
	return r, nil
}

// bare returns an address as packets have it; the zero Addr for that of all.
func bare(a netip.Addr) netip.Addr {
	if !a.IsValid() || a.IsUnspecified() {
		return netip.Addr{}
	}
	return a.Unmap().WithZone("")
}

// onlyV6 says whether "[::]" means IPv6 alone on this machine.
func onlyV6() bool {
	b, err := os.ReadFile("/proc/sys/net/ipv6/bindv6only")
	return err == nil && strings.TrimSpace(string(b)) == "1"
}

func (p *place) kind() kind {
	switch {
	case p.ip.IsValid() && p.device != "":
		return deviceIP
	case p.ip.IsValid():
		return ip
	case p.device != "":
		return device
	}
	return anywhere
}

// set is the name of the map that holds the rule.
func (p *place) set() string { return mapName(p.kind(), p.version) }

func mapName(k kind, v version) string { return k.String() + v.String() }

// key is the key in that map. As in all concatenations of nftables, every part starts on four bytes.
func (p *place) key() []byte {
	if p.kind() == anywhere {
		return portAlone(p.port)
	}
	var b []byte
	if p.device != "" {
		b = append(b, p.device...)
		b = append(b, make([]byte, unix.IFNAMSIZ-len(b))...)
	}
	if p.ip.IsValid() {
		b = append(b, p.ip.AsSlice()...)
	}
	return appendPort(b, p.port)
}

// data is what the map has for it.
func (r *rule) data() []byte { return appendPort(r.to.Addr().AsSlice(), r.to.Port()) }

// passage is what the last chain knows new connections of the rule by: the port that the client asked for, and
// where it leads. Several rules may have the same.
func (r *rule) passage() passage { return passage{port: r.port, to: r.to} }

type passage struct {
	port uint16
	to   netip.AddrPort
}

func (p passage) key() []byte {
	return appendPort(append(appendPort(nil, p.port), p.to.Addr().AsSlice()...), p.to.Port())
}

// portAlone is a port that is no part of a concatenation.
func portAlone(port uint16) []byte { return binary.BigEndian.AppendUint16(nil, port) }

func appendPort(b []byte, port uint16) []byte {
	return append(binary.BigEndian.AppendUint16(b, port), 0, 0)
}
