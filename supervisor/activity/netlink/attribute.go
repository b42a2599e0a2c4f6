package netlink

import (
	"encoding/binary"
	"errors"

	"golang.org/x/sys/unix"
)

// ErrMalformed says that a message or an attribute does not fit into its bounds.
var ErrMalformed = errors.New("malformed netlink message")

// Attributes walks the attributes of a message or of a nested attribute:
//
//	as := netlink.Attributes{Rest: body}
//	for as.Next() { … as.Type, as.Value … }
//	return as.Err()
//
// Values alias Rest.
type Attributes struct {
	Rest  []byte // what is still to be walked
	Type  uint16 // without the flags NLA_F_NESTED and NLA_F_NET_BYTEORDER
	Value []byte
	bad   bool
}

// Next goes to the next attribute. It is false at the end and at the first
// attribute that does not fit; Err tells which.
func (as *Attributes) Next() bool {
	b := as.Rest
	if len(b) == 0 || as.bad {
		return false
	}
	if len(b) < unix.SizeofNlAttr {
		as.bad = true
		return false
	}
	n := int(binary.NativeEndian.Uint16(b))
	if n < unix.SizeofNlAttr || n > len(b) {
		as.bad = true
		return false
	}
	as.Type = binary.NativeEndian.Uint16(b[2:]) &^ (unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER)
	as.Value = b[unix.SizeofNlAttr:n]
	as.Rest = b[min(align(n), len(b)):] // the last one need not be padded
	return true
}

// Err returns ErrMalformed when the walk ended early.
func (as *Attributes) Err() error {
	if as.bad {
		return ErrMalformed
	}
	return nil
}

// align rounds up to the four bytes on which messages and attributes start.
func align(n int) int { return (n + 3) &^ 3 }
