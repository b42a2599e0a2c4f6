package ledger

import (
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"hibergate/supervisor/activity/nftable"
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
	count   [2]*nftables.Set // by direction
	last    *nftables.Set
	ignored [families]*nftables.Set // nil where no account of that kind ignores such peers
}

// table is the table of a Ledger.
type table struct {
	*nftable.Table
	track bool        // makes connection tracking active
	sets  [kinds]sets // that there are
}

// addSets puts the sets that elements need and are not there yet into the next batch. grown says
// that there are any.
func (t *table) addSets(e *elements) (grown bool, err error) {
	id := uint32(0) // the library's own counter is shared and not locked
	add := func(set nftables.Set) *nftables.Set {
		id++
		set.Table, set.Concatenation, set.ID = t.Home(), true, id
		if err == nil {
			err = t.Batch().AddSet(&set, nil)
		}
		grown = true
		return &set
	}
	for k := range kinds {
		parts := []nftables.SetDatatype{nftables.TypeInetProto, nftables.TypeInetService}
		if k != dual {
			first := [...]nftables.SetDatatype{nftables.TypeIPAddr, nftables.TypeIP6Addr, nftables.TypeNFProto}[k]
			parts = slices.Insert(parts, 0, first)
		}
		s, key := &t.sets[k], nftables.MustConcatSetType(parts...)
		if s.last == nil && len(e.keys[k]) > 0 {
			for _, d := range []direction{in, out} {
				s.count[d] = add(nftables.Set{Name: d.String() + "_" + k.String(), KeyType: key, Counter: true})
			}
			s.last = add(nftables.Set{Name: "last_" + k.String(), KeyType: key, Dynamic: true, HasTimeout: true, Timeout: lifetime})
		}
		for f := range families {
			if s.ignored[f] == nil && len(e.ignored[k][f]) > 0 {
				peer := [...]nftables.SetDatatype{nftables.TypeIPAddr, nftables.TypeIP6Addr}[f]
				s.ignored[f] = add(nftables.Set{
					Name: "ignored_" + k.String() + "_" + f.String(), KeyType: nftables.MustConcatSetType(append(parts, peer)...), Interval: true,
				})
			}
		}
	}
	return grown, err
}

// writeRules puts the chains and their rules into the next batch, in the place of those that are there.
// Their number does not depend on that of the sockets.
//
//	chain in  { type filter hook input priority 300
//	    [ct state]                                            # only if track: turns connection tracking on
//	    ip daddr . meta l4proto . th dport @in_ip4 goto in_ip4
//	    ip6 daddr . meta l4proto . th dport @in_ip6 goto in_ip6
//	    meta nfproto . meta l4proto . th dport @in_any goto in_any
//	    meta l4proto . th dport @in_dual goto in_dual }
//	chain in_ip4 {
//	    ip daddr . meta l4proto . th dport . ip saddr @ignored_ip4_v4 return   # only if there is such a set
//	    tcp flags & (fin|syn|rst|psh) != 0 update @last_ip4 { ip daddr . meta l4proto . th dport }
//	    meta l4proto udp update @last_ip4 { ip daddr . meta l4proto . th dport } }
//
// and the same for out, with source and destination exchanged. The hooks lie behind destination NAT and
// filters and before source NAT, so the packets have the addresses that the socket sees.
func (t *table) writeRules() {
	chain := func(c nftables.Chain) *nftables.Chain {
		c.Table = t.Home()
		added := t.Batch().AddChain(&c)
		t.Batch().FlushChain(added)
		return added
	}
	rule := func(chain *nftables.Chain, exprs ...expr.Any) {
		t.Batch().AddRule(&nftables.Rule{Table: chain.Table, Chain: chain, Exprs: exprs})
	}
	for d, hook := range []*nftables.ChainHook{nftables.ChainHookInput, nftables.ChainHookOutput} {
		d := direction(d)
		base := chain(nftables.Chain{
			Name: d.String(), Type: nftables.ChainTypeFilter, Hooknum: hook, Priority: nftables.ChainPriorityConntrackHelper,
		})
		if t.track {
			rule(base, &expr.Ct{Register: keyRegister, Key: expr.CtKeySTATE})
		}
		// An address of its own takes precedence over the wildcard, as in the kernel's
		// choice of the socket: goto does not come back.
		for k, s := range t.sets {
			if s.last == nil {
				continue // no lookups for nothing
			}
			k := kind(k)
			touch := chain(nftables.Chain{Name: d.String() + "_" + k.String()})
			for f, set := range s.ignored {
				if set != nil {
					rule(touch, slices.Concat(loadKeyAndPeer(k, d, family(f)), []expr.Any{
						&expr.Lookup{SourceRegister: keyRegister, SetName: set.Name},
						&expr.Verdict{Kind: expr.VerdictReturn},
					})...)
				}
			}
			last := &expr.Dynset{SrcRegKey: keyRegister, Operation: unix.NFT_DYNSET_OP_UPDATE, SetName: s.last.Name}
			key := loadKey(k, d)
			rule(touch, slices.Concat(tcpThatMatters(), key, []expr.Any{last})...)
			rule(touch, slices.Concat(protocolIs(unix.IPPROTO_UDP), key, []expr.Any{last})...)
			rule(base, slices.Concat(key, []expr.Any{
				&expr.Lookup{SourceRegister: keyRegister, SetName: s.count[d].Name},
				&expr.Verdict{Kind: expr.VerdictGoto, Chain: touch.Name},
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

// loadKeyAndPeer loads the key of a packet and behind it the address of the other end. It matches only
// packets of the family.
func loadKeyAndPeer(k kind, d direction, f family) []expr.Any {
	peer := &expr.Payload{Base: expr.PayloadBaseNetworkHeader, Offset: 12, Len: 4}
	if f == v6 {
		peer.Offset, peer.Len = 8, 16
	}
	if d == out {
		peer.Offset += peer.Len
	}
	// The registers that loadKey fills: the address or family, protocol and port.
	peer.DestRegister = keyRegister + [...]uint32{1, 4, 1, 0}[k] + 2
	protocol := [...]byte{unix.NFPROTO_IPV4, unix.NFPROTO_IPV6}[f]
	return slices.Concat(
		[]expr.Any{&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: keyRegister}, equal(protocol)}, loadKey(k, d), []expr.Any{peer})
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
