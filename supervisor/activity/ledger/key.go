package ledger

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Key names one account: the local end of the packets that it counts. It is comparable.
type Key struct {
	// Addr is the local address, without zone. The zero Addr counts the packets
	// of every address that has no account of its own.
	Addr     netip.Addr
	Family   uint8 // unix.NFPROTO_IPV4 or NFPROTO_IPV6; 0, without Addr: both
	Protocol uint8 // unix.IPPROTO_TCP or IPPROTO_UDP
	Port     uint16
}

// kind says in which sets a key is.
type kind uint8

const (
	ip4 kind = iota
	ip6
	wildcard // every address of one family
	dual     // every address of both
	kinds
)

func (k kind) String() string { return [...]string{"ip4", "ip6", "any", "dual"}[k] }

func (k Key) kind() kind {
	switch {
	case !k.Addr.IsValid() && k.Family == unix.NFPROTO_UNSPEC:
		return dual
	case !k.Addr.IsValid():
		return wildcard
	case k.Family == unix.NFPROTO_IPV4:
		return ip4
	default:
		return ip6
	}
}

// encode returns the key as nftables concatenates it: every part starts on four bytes.
func (k Key) encode() []byte {
	var b []byte
	switch k.kind() {
	case wildcard:
		b = []byte{k.Family, 0, 0, 0}
	case ip4, ip6:
		b = k.Addr.AsSlice()
	case dual, kinds:
	}
	b = append(b, k.Protocol, 0, 0, 0)
	b = binary.BigEndian.AppendUint16(b, k.Port)
	return append(b, 0, 0)
}

// decodeKey is the inverse of encode.
func decodeKey(kind kind, b []byte) (Key, bool) {
	var key Key
	switch kind {
	case ip4:
		if len(b) != 12 {
			return key, false
		}
		key.Family, key.Addr = unix.NFPROTO_IPV4, netip.AddrFrom4([4]byte(b))
		b = b[4:]
	case ip6:
		if len(b) != 24 {
			return key, false
		}
		key.Family, key.Addr = unix.NFPROTO_IPV6, netip.AddrFrom16([16]byte(b))
		b = b[16:]
	case wildcard:
		if len(b) != 12 || b[0] == unix.NFPROTO_UNSPEC {
			return key, false
		}
		key.Family = b[0]
		b = b[4:]
	case dual:
		if len(b) != 8 {
			return key, false
		}
	case kinds:
		return key, false
	}
	key.Protocol, key.Port = b[0], binary.BigEndian.Uint16(b[4:])
	return key, true
}
