package conntrack

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"hibergate/supervisor/activity/netlink"
)

const (
	getFlow    = 1 // IPCTNL_MSG_CT_GET
	deleteFlow = 2 // IPCTNL_MSG_CT_DELETE
)

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
	return c.dump(family, protocol, netip.AddrPortFrom(netip.Addr{}, port), begin, each)
}

// DumpFrom is Dump of the flows whose answers come from an address and port.
func (c *Conn) DumpFrom(protocol uint8, source netip.AddrPort, begin func(), each func(*Flow)) error {
	return c.dump(family(source.Addr()), protocol, source, begin, each)
}

func (c *Conn) dump(family, protocol uint8, source netip.AddrPort, begin func(), each func(*Flow)) error {
	flags := uint32(filterProtoNumber | filterSourcePort)
	r := netlink.NetfilterRequest(unix.NFNL_SUBSYS_CTNETLINK, getFlow, unix.NLM_F_DUMP, family)
	r.Nested(ctaTupleReply, func(r *netlink.Request) {
		// Of IPv6 the kernel takes a filter by address for its opposite (up to Linux 6.18 at least): the port must do.
		if source.Addr().Is4() {
			flags |= filterSource
			r.Nested(ctaTupleIP, func(r *netlink.Request) { r.Attribute(ctaIPv4Source, source.Addr().AsSlice()...) })
		}
		r.Nested(ctaTupleProto, func(r *netlink.Request) {
			r.Attribute(ctaProtoNumber, protocol)
			r.Attribute(ctaProtoSourcePort, binary.BigEndian.AppendUint16(nil, source.Port())...)
		})
	})
	r.Nested(ctaFilter, func(r *netlink.Request) { // the flags are in host order, unlike the rest
		r.Attribute(ctaFilterReplyFlags, binary.NativeEndian.AppendUint32(nil, flags)...)
	})
	var f Flow
	err := c.netlink.Ask(r, begin, func(_ uint16, body []byte) error {
		if err := f.Decode(body); err != nil {
			return err
		}
		from := f.Reply.Source
		if f.Protocol == protocol && from.Port() == source.Port() && // older kernels do not filter
			(!source.Addr().IsValid() || from.Addr() == source.Addr()) {
			each(&f)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("dump flows: %w", err)
	}
	return nil
}

// Delete deletes a flow that Get or Dump gave, and says whether it was still there. The next packet of it is taken for
// that of a new one.
func (c *Conn) Delete(f *Flow) (bool, error) {
	r := netlink.NetfilterRequest(unix.NFNL_SUBSYS_CTNETLINK, deleteFlow, unix.NLM_F_ACK, family(f.Original.Source.Addr()))
	addTuple(r, ctaTupleOrig, f.Protocol, f.Original)
	r.Attribute(ctaID, binary.BigEndian.AppendUint32(nil, f.ID)...)
	if f.Zone != 0 {
		r.Attribute(ctaZone, binary.BigEndian.AppendUint16(nil, f.Zone)...)
	}
	err := c.netlink.Ask(r, nil, func(uint16, []byte) error { return nil })
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("delete flow: %w", err)
	}
	return true, nil
}
