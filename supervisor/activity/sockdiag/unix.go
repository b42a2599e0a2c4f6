package sockdiag

import (
	"encoding/binary"

	"golang.org/x/sys/unix"

	"hibergate/supervisor/activity/netlink"
)

// Unix is one Unix socket.
type Unix struct {
	Type   uint8 // unix.SOCK_STREAM, SOCK_DGRAM, SOCK_SEQPACKET
	State  State // of a listener Listen, of a connection Established
	Inode  uint32
	Cookie uint64
	// Name is the bound path without final NULs, or, with a leading NUL, the abstract name.
	// Accepted connections carry the name of their listener. It aliases the message.
	Name []byte
	Peer uint32 // inode of the other end; 0: not accepted yet, or gone
	// ReceiveQ: of a listener the connections that wait to be accepted, else bytes to be read.
	ReceiveQ uint32
	// Pending are, of a listener, the inodes of the clients that wait to be accepted,
	// four bytes each. It aliases the message.
	Pending []byte
}

// Names of unix_diag.h.
const (
	unixMessageSize = 16 // struct unix_diag_msg
	unixName        = 0  // UNIX_DIAG_NAME
	unixPeer        = 2  // UNIX_DIAG_PEER
	unixPending     = 3  // UNIX_DIAG_ICONS
	unixQueue       = 4  // UNIX_DIAG_RQLEN
	unixShowName    = 1 << 0
	unixShowPeer    = 1 << 2
	unixShowPending = 1 << 3
	unixShowQueue   = 1 << 4
)

// Decode decodes one row of a dump (struct unix_diag_msg with attributes). It allocates nothing. Pure.
func (s *Unix) Decode(body []byte) error {
	if len(body) < unixMessageSize {
		return netlink.ErrMalformed
	}
	*s = Unix{
		Type: body[1], State: State(body[2]),
		Inode:  binary.NativeEndian.Uint32(body[4:]),
		Cookie: binary.NativeEndian.Uint64(body[8:]),
	}
	as := netlink.Attributes{Rest: body[unixMessageSize:]}
	for as.Next() {
		switch as.Type {
		case unixName:
			s.Name = as.Value
			// A path may or may not be bound with its final NUL; in an abstract name NULs count.
			for len(s.Name) > 0 && s.Name[0] != 0 && s.Name[len(s.Name)-1] == 0 {
				s.Name = s.Name[:len(s.Name)-1]
			}
		case unixPeer:
			if len(as.Value) >= 4 {
				s.Peer = binary.NativeEndian.Uint32(as.Value)
			}
		case unixPending:
			s.Pending = as.Value
		case unixQueue:
			if len(as.Value) >= 4 {
				s.ReceiveQ = binary.NativeEndian.Uint32(as.Value)
			}
		}
	}
	return as.Err()
}

func unixRequest() *netlink.Request {
	body := make([]byte, 24) // struct unix_diag_req
	body[0] = unix.AF_UNIX
	binary.NativeEndian.PutUint32(body[4:], 1<<32-1)
	binary.NativeEndian.PutUint32(body[12:], unixShowName|unixShowPeer|unixShowPending|unixShowQueue)
	return netlink.NewRequest(byFamily, unix.NLM_F_DUMP).Raw(body...)
}
