package ledger

import (
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// lifetime is the timeout of the elements of the "last" sets: longer than any
// idle timeout, so that they never go away.
const lifetime = 1000 * 24 * time.Hour

// direction is that of the packets, as seen from the socket.
type direction uint8

const (
	in direction = iota
	out
)

func (d direction) String() string { return [...]string{"in", "out"}[d] }

// sets are the sets of one kind; zero where no account is of that kind.
type sets struct {
	count [2]*nftables.Set // by direction
	last  *nftables.Set
}

// addSets puts the sets of one kind, with room for size elements, into the next batch.
// Every set gets its id from us: the library's own counter is shared and not locked.
func addSets(c *nftables.Conn, table *nftables.Table, k kind, size int) (sets, error) {
	parts := []nftables.SetDatatype{nftables.TypeInetProto, nftables.TypeInetService}
	if k != dual {
		first := [...]nftables.SetDatatype{nftables.TypeIPAddr, nftables.TypeIP6Addr, nftables.TypeNFProto}[k]
		parts = slices.Insert(parts, 0, first)
	}
	base := nftables.Set{
		Table:         table,
		KeyType:       nftables.MustConcatSetType(parts...),
		Concatenation: true,
		Size:          uint32(max(size, 1)), // the sets never grow
	}
	var s sets
	for _, d := range []direction{in, out} {
		set := base
		set.ID, set.Name, set.Counter = uint32(k)*3+uint32(d)+1, d.String()+"_"+k.String(), true
		s.count[d] = &set
	}
	set := base
	set.ID, set.Name, set.Dynamic, set.HasTimeout, set.Timeout = uint32(k)*3+3, "last_"+k.String(), true, true, lifetime
	s.last = &set
	for _, set := range []*nftables.Set{s.count[in], s.count[out], s.last} {
		if err := c.AddSet(set, nil); err != nil {
			return s, err
		}
	}
	return s, nil
}

// addRules puts the chains and their rules into the next batch. Their number does not
// depend on that of the sockets.
//
//	chain in  { type filter hook input priority 300
//	    [ct state]                                            # only if track: turns connection tracking on
//	    ip daddr . meta l4proto . th dport @in_ip4 goto in_ip4
//	    ip6 daddr . meta l4proto . th dport @in_ip6 goto in_ip6
//	    meta nfproto . meta l4proto . th dport @in_any goto in_any
//	    meta l4proto . th dport @in_dual goto in_dual }
//	chain in_ip4 {
//	    tcp flags & (fin|syn|rst|psh) != 0 update @last_ip4 { ip daddr . meta l4proto . th dport }
//	    meta l4proto udp update @last_ip4 { ip daddr . meta l4proto . th dport } }
//
// and the same for out, with the source. The hooks lie behind destination NAT and filters
// and before source NAT, so the packets have the addresses that the socket sees.
func addRules(c *nftables.Conn, table *nftables.Table, all [kinds]sets, track bool) {
	rule := func(chain *nftables.Chain, exprs ...expr.Any) {
		c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: exprs})
	}
	for d, hook := range []*nftables.ChainHook{nftables.ChainHookInput, nftables.ChainHookOutput} {
		d := direction(d)
		touch := [kinds]*nftables.Chain{}
		for k := range kinds {
			if all[k].last == nil {
				continue
			}
			touch[k] = c.AddChain(&nftables.Chain{Name: d.String() + "_" + k.String(), Table: table})
			last := &expr.Dynset{
				SrcRegKey: keyRegister, Operation: unix.NFT_DYNSET_OP_UPDATE,
				SetName: all[k].last.Name, SetID: all[k].last.ID,
			}
			key := loadKey(k, d)
			rule(touch[k], slices.Concat(tcpThatMatters(), key, []expr.Any{last})...)
			rule(touch[k], slices.Concat(protocolIs(unix.IPPROTO_UDP), key, []expr.Any{last})...)
		}
		base := c.AddChain(&nftables.Chain{
			Name: d.String(), Table: table, Type: nftables.ChainTypeFilter,
			Hooknum: hook, Priority: nftables.ChainPriorityConntrackHelper,
		})
		if track {
			rule(base, &expr.Ct{Register: keyRegister, Key: expr.CtKeySTATE})
		}
		// An address of its own takes precedence over the wildcard, as in the kernel's
		// choice of the socket: goto does not come back.
		for k := range kinds {
			if all[k].last == nil {
				continue // no lookups for nothing
			}
			rule(base, slices.Concat(loadKey(k, d), []expr.Any{
				&expr.Lookup{SourceRegister: keyRegister, SetName: all[k].count[d].Name, SetID: all[k].count[d].ID},
				&expr.Verdict{Kind: expr.VerdictGoto, Chain: touch[k].Name},
			})...)
		}
	}
}

// keyRegister is where a key starts; its parts follow in registers of four bytes.
const keyRegister = unix.NFT_REG32_00

// loadKey loads the key of a packet.
func loadKey(k kind, d direction) []expr.Any {
	port := uint32(2) // th dport
	if d == out {
		port = 0 // th sport
	}
	family := &expr.Meta{Key: expr.MetaKeyNFPROTO, Register: keyRegister}
	var load []expr.Any
	next := uint32(keyRegister + 1)
	switch k {
	case ip4:
		address := &expr.Payload{Base: expr.PayloadBaseNetworkHeader, DestRegister: keyRegister, Offset: 16, Len: 4}
		if d == out {
			address.Offset = 12
		}
		load = []expr.Any{family, equal(unix.NFPROTO_IPV4), address}
	case ip6:
		address := &expr.Payload{Base: expr.PayloadBaseNetworkHeader, DestRegister: keyRegister, Offset: 24, Len: 16}
		if d == out {
			address.Offset = 8
		}
		load = []expr.Any{family, equal(unix.NFPROTO_IPV6), address}
		next = keyRegister + 4
	case wildcard:
		load = []expr.Any{family}
	case dual, kinds:
		next = keyRegister
	}
	return append(load,
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: next},
		&expr.Payload{Base: expr.PayloadBaseTransportHeader, DestRegister: next + 1, Offset: port, Len: 2})
}

// tcpThatMatters matches TCP packets that open, close or carry data.
func tcpThatMatters() []expr.Any {
	const fin, syn, rst, psh = 1, 2, 4, 8
	return append(protocolIs(unix.IPPROTO_TCP),
		&expr.Payload{Base: expr.PayloadBaseTransportHeader, DestRegister: keyRegister, Offset: 13, Len: 1},
		&expr.Bitwise{SourceRegister: keyRegister, DestRegister: keyRegister, Len: 1, Mask: []byte{fin | syn | rst | psh}, Xor: []byte{0}},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: keyRegister, Data: []byte{0}})
}

func protocolIs(protocol byte) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: keyRegister}, equal(protocol)}
}

func equal(b byte) expr.Any {
	return &expr.Cmp{Op: expr.CmpOpEq, Register: keyRegister, Data: []byte{b}}
}
