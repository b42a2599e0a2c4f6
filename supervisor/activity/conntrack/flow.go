package conntrack

import (
	"encoding/binary"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/supervisor/activity/netlink"
)

// Tuple is one direction of a flow.
type Tuple struct {
	Source, Destination netip.AddrPort
}

// Counters counts one direction of a flow, whole IP packets.
type Counters struct{ Packets, Bytes uint64 }

// Status bits (nf_conntrack_common.h).
const (
	SeenReply      = 1 << 1 // IPS_SEEN_REPLY
	Assured        = 1 << 2 // IPS_ASSURED
	DestinationNAT = 1 << 5 // IPS_DST_NAT: the destination was changed
)

// Flow is one entry of the table.
type Flow struct {
	Protocol uint8 // unix.IPPROTO_TCP, …
	// Original is what the client sent; Reply what the answers look like, so its source is our
	// local end also behind destination NAT.
	Original, Reply Tuple
	Status          uint32
	ID              uint32        // tells it from a later flow with the same tuples
	Zone            uint16        // of connection tracking; 0 unless a rule says otherwise
	TCPState        TCPState      // meaningful for TCP
	Timeout         time.Duration // until the entry goes, whole seconds
	// Counted says that the counters are there: nf_conntrack_acct was on when the flow began.
	Counted                         bool
	OriginalCounters, ReplyCounters Counters
}

// TCPState is conntrack's idea of a TCP connection (nf_conntrack_tcp.h).
type TCPState uint8

// The states. SynSent2 is that of a connection which both ends open at once.
const (
	None TCPState = iota
	SynSent
	SynReceived
	Established
	FinWait
	CloseWait
	LastAck
	TimeWait
	Closed
	SynSent2
)

// String returns the name that conntrack -L prints.
func (s TCPState) String() string {
	names := [...]string{
		"NONE", "SYN_SENT", "SYN_RECV", "ESTABLISHED", "FIN_WAIT", "CLOSE_WAIT", "LAST_ACK", "TIME_WAIT", "CLOSE", "SYN_SENT2",
	}
	if int(s) < len(names) {
		return names[s]
	}
	return "UNKNOWN"
}

// Attributes of nfnetlink_conntrack.h.
const (
	ctaTupleOrig     = 1
	ctaTupleReply    = 2
	ctaStatus        = 3
	ctaProtoinfo     = 4
	ctaTimeout       = 7
	ctaCountersOrig  = 9
	ctaCountersReply = 10
	ctaID            = 12
	ctaZone          = 18
	ctaFilter        = 25

	ctaTupleIP    = 1 // in a tuple
	ctaTupleProto = 2

	ctaIPv4Source      = 1 // in CTA_TUPLE_IP
	ctaIPv4Destination = 2
	ctaIPv6Source      = 3
	ctaIPv6Destination = 4

	ctaProtoNumber          = 1 // in CTA_TUPLE_PROTO
	ctaProtoSourcePort      = 2
	ctaProtoDestinationPort = 3

	ctaProtoinfoTCP      = 1 // in CTA_PROTOINFO
	ctaProtoinfoTCPState = 1 // in CTA_PROTOINFO_TCP

	ctaCountersPackets = 1 // in CTA_COUNTERS_*
	ctaCountersBytes   = 2

	ctaFilterReplyFlags = 2   // in CTA_FILTER
	filterSource        = 0x1 // CTA_FILTER_F_CTA_IP_SRC
	filterProtoNumber   = 0x8 // CTA_FILTER_F_CTA_PROTO_NUM
	filterSourcePort    = 0x10
)

// Decode decodes one flow: what follows the netlink header, struct nfgenmsg first. It
// allocates nothing. Pure.
func (f *Flow) Decode(body []byte) error {
	*f = Flow{}
	if len(body) < 4 {
		return netlink.ErrMalformed
	}
	as := netlink.Attributes{Rest: body[4:]}
	for as.Next() {
		var err error
		switch as.Type {
		case ctaTupleOrig:
			err = f.decodeTuple(&f.Original, as.Value)
		case ctaTupleReply:
			err = f.decodeTuple(&f.Reply, as.Value)
		case ctaStatus:
			f.Status = bigEndian32(as.Value)
		case ctaID:
			f.ID = bigEndian32(as.Value)
		case ctaZone:
			f.Zone = bigEndian16(as.Value)
		case ctaTimeout:
			f.Timeout = time.Duration(bigEndian32(as.Value)) * time.Second
		case ctaProtoinfo:
			err = f.decodeState(as.Value)
		case ctaCountersOrig:
			f.Counted = true
			err = f.OriginalCounters.decode(as.Value)
		case ctaCountersReply:
			f.Counted = true
			err = f.ReplyCounters.decode(as.Value)
		}
		if err != nil {
			return err
		}
	}
	return as.Err()
}

func (f *Flow) decodeTuple(t *Tuple, b []byte) error {
	var source, destination netip.Addr
	var sourcePort, destinationPort uint16
	parts := netlink.Attributes{Rest: b}
	for parts.Next() {
		as := netlink.Attributes{Rest: parts.Value}
		for as.Next() {
			switch v := as.Value; parts.Type<<8 | as.Type {
			case ctaTupleIP<<8 | ctaIPv4Source, ctaTupleIP<<8 | ctaIPv6Source:
				source, _ = netip.AddrFromSlice(v)
			case ctaTupleIP<<8 | ctaIPv4Destination, ctaTupleIP<<8 | ctaIPv6Destination:
				destination, _ = netip.AddrFromSlice(v)
			case ctaTupleProto<<8 | ctaProtoNumber:
				if len(v) > 0 {
					f.Protocol = v[0]
				}
			case ctaTupleProto<<8 | ctaProtoSourcePort:
				sourcePort = bigEndian16(v)
			case ctaTupleProto<<8 | ctaProtoDestinationPort:
				destinationPort = bigEndian16(v)
			}
		}
		if err := as.Err(); err != nil {
			return err
		}
	}
	t.Source, t.Destination = netip.AddrPortFrom(source, sourcePort), netip.AddrPortFrom(destination, destinationPort)
	return parts.Err()
}

func (f *Flow) decodeState(b []byte) error {
	infos := netlink.Attributes{Rest: b}
	for infos.Next() {
		if infos.Type != ctaProtoinfoTCP {
			continue
		}
		as := netlink.Attributes{Rest: infos.Value}
		for as.Next() {
			if as.Type == ctaProtoinfoTCPState && len(as.Value) > 0 {
				f.TCPState = TCPState(as.Value[0])
			}
		}
		if err := as.Err(); err != nil {
			return err
		}
	}
	return infos.Err()
}

func (c *Counters) decode(b []byte) error {
	as := netlink.Attributes{Rest: b}
	for as.Next() {
		if len(as.Value) != 8 {
			continue
		}
		switch n := binary.BigEndian.Uint64(as.Value); as.Type {
		case ctaCountersPackets:
			c.Packets = n
		case ctaCountersBytes:
			c.Bytes = n
		}
	}
	return as.Err()
}

// A figure of the wrong size reads as zero: the kernel does not send any.
func bigEndian32(b []byte) uint32 {
	if len(b) != 4 {
		return 0
	}
	return binary.BigEndian.Uint32(b)
}

func bigEndian16(b []byte) uint16 {
	if len(b) != 2 {
		return 0
	}
	return binary.BigEndian.Uint16(b)
}

// addTuple adds a tuple to a request.
func addTuple(r *netlink.Request, attribute uint16, protocol uint8, t Tuple) {
	source, destination := uint16(ctaIPv4Source), uint16(ctaIPv4Destination)
	if !t.Source.Addr().Is4() {
		source, destination = ctaIPv6Source, ctaIPv6Destination
	}
	r.Nested(attribute, func(r *netlink.Request) {
		r.Nested(ctaTupleIP, func(r *netlink.Request) {
			r.Attribute(source, t.Source.Addr().AsSlice()...)
			r.Attribute(destination, t.Destination.Addr().AsSlice()...)
		})
		r.Nested(ctaTupleProto, func(r *netlink.Request) {
			r.Attribute(ctaProtoNumber, protocol)
			r.Attribute(ctaProtoSourcePort, binary.BigEndian.AppendUint16(nil, t.Source.Port())...)
			r.Attribute(ctaProtoDestinationPort, binary.BigEndian.AppendUint16(nil, t.Destination.Port())...)
		})
	})
}

func family(a netip.Addr) uint8 {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}
