package conntrack

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"hibergate/supervisor/activity/netlink"
)

const getFlow = 1 // IPCTNL_MSG_CT_GET

// Conn asks ctnetlink. It is not safe for concurrent use.
type Conn struct{ netlink *netlink.Conn }

// New returns a Conn. It opens its socket at the first question.
func New() *Conn { return &Conn{netlink: netlink.New(unix.NETLINK_NETFILTER)} }

// Close closes the socket.
func (c *Conn) Close() error { return c.netlink.Close() }

// Get fills f with the flow whose answers have this tuple, and says whether there is one.
func (c *Conn) Get(protocol uint8, reply Tuple, f *Flow) (bool, error) {
	r := netlink.NetfilterRequest(unix.NFNL_SUBSYS_CTNETLINK, getFlow, 0, family(reply.Source.Addr()))
	addTuple(r, ctaTupleReply, protocol, reply)
	err := c.netlink.Ask(r, nil, func(_ uint16, body []byte) error { return f.Decode(body) })
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("get flow: %w", err)
	}
	return true, nil
}

// Dump calls each for every flow of a family (AF_INET or AF_INET6) and protocol whose
// answers come from a port. begin, which may be nil, is called before the first, and
// again where the answer has to be asked for anew. The Flow is overwritten by the next one.
func (c *Conn) Dump(family, protocol uint8, port uint16, begin func(), each func(*Flow)) error {
	r := netlink.NetfilterRequest(unix.NFNL_SUBSYS_CTNETLINK, getFlow, unix.NLM_F_DUMP, family)
	r.Nested(ctaTupleReply, func(r *netlink.Request) {
		r.Nested(ctaTupleProto, func(r *netlink.Request) {
			r.Attribute(ctaProtoNumber, protocol)
			r.Attribute(ctaProtoSourcePort, binary.BigEndian.AppendUint16(nil, port)...)
		})
	})
	r.Nested(ctaFilter, func(r *netlink.Request) { // the flags are in host order, unlike the rest
		r.Attribute(ctaFilterReplyFlags, binary.NativeEndian.AppendUint32(nil, filterProtoNumber|filterSourcePort)...)
	})
	var f Flow
	err := c.netlink.Ask(r, begin, func(_ uint16, body []byte) error {
		if err := f.Decode(body); err != nil {
			return err
		}
		if f.Protocol == protocol && f.Reply.Source.Port() == port { // older kernels do not filter
			each(&f)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("dump flows: %w", err)
	}
	return nil
}
