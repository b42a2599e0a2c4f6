package netlink

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// Request is one message to the kernel. Make it with NewRequest; it can be used
// again and again.
type Request struct{ b []byte }

// NewRequest starts a message. NLM_F_REQUEST is added to flags. Without NLM_F_DUMP
// and NLM_F_ACK the kernel must answer with exactly one message, or an error.
func NewRequest(typ, flags uint16) *Request {
	r := &Request{b: make([]byte, unix.SizeofNlMsghdr, 256)}
	binary.NativeEndian.PutUint16(r.b[4:], typ)
	binary.NativeEndian.PutUint16(r.b[6:], flags|unix.NLM_F_REQUEST)
	return r
}

// NetfilterRequest starts a message of a netfilter subsystem (nfnetlink) for an
// address or protocol family.
func NetfilterRequest(subsystem, message, flags uint16, family uint8) *Request {
	return NewRequest(subsystem<<8|message, flags).Raw(family, unix.NFNETLINK_V0, 0, 0)
}

// Raw appends bytes as they are, padded to four.
func (r *Request) Raw(b ...byte) *Request {
	r.b = append(r.b, b...)
	return r.pad()
}

// Attribute appends an attribute.
func (r *Request) Attribute(typ uint16, value ...byte) *Request {
	r.b = binary.NativeEndian.AppendUint16(r.b, uint16(unix.SizeofNlAttr+len(value)))
	r.b = binary.NativeEndian.AppendUint16(r.b, typ)
	r.b = append(r.b, value...)
	return r.pad()
}

// String appends an attribute that holds a string with its final NUL.
func (r *Request) String(typ uint16, s string) *Request {
	return r.Attribute(typ, append([]byte(s), 0)...)
}

// Nested appends an attribute that holds what fill appends.
func (r *Request) Nested(typ uint16, fill func(*Request)) *Request {
	at := len(r.b)
	r.Attribute(typ | unix.NLA_F_NESTED)
	fill(r)
	binary.NativeEndian.PutUint16(r.b[at:], uint16(len(r.b)-at))
	return r
}

func (r *Request) pad() *Request {
	for len(r.b)%4 != 0 {
		r.b = append(r.b, 0)
	}
	return r
}

func (r *Request) flags() uint16 { return binary.NativeEndian.Uint16(r.b[6:]) }

// Bytes returns the whole message, valid until the Request is changed or sent.
// Its sequence and port number are those of the last time it was sent.
func (r *Request) Bytes() []byte {
	binary.NativeEndian.PutUint32(r.b, uint32(len(r.b)))
	return r.b
}
