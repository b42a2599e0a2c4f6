package forward

import (
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// keyRegister is where a key starts, and what a map has for it; its parts follow in registers of four bytes.
const keyRegister = unix.NFT_REG32_00

const (
	drainingSet = "draining"
	inChain     = "in"
	outChain    = "out"
	postChain   = "post"
	drainIn     = "drain_in"
	drainOut    = "drain_out"
)

func passageName(v version) string { return "passage" + v.String() }

// writeTable puts the sets, and the chains that are always there, into the next batch. Only the first packet of a connection
// sees the chains, as those of type nat are.
//
//	map any4 { type inet_service : ipv4_addr . inet_service; counter }
//	map ip4 { type ipv4_addr . inet_service : ipv4_addr . inet_service; counter }
//	map device4 { type ifname . inet_service : …
//	map device_ip4 { type ifname . ipv4_addr . inet_service : …
//	set passage4 { type inet_service . ipv4_addr . inet_service }
//	chain in { type nat hook prerouting priority dstnat
//	    meta l4proto != tcp return
//	    tcp flags & (fin|syn|rst|ack) != syn return           # nothing that was picked up in its middle
//	    dnat ip to iifname . ip daddr . tcp dport map @device_ip4
//	    dnat ip to ip daddr . tcp dport map @ip4
//	    fib daddr type local dnat ip to iifname . tcp dport map @device4
//	    fib daddr type local dnat ip to tcp dport map @any4 }
//	chain out { type nat hook output priority dstnat          # clients of this machine
//	    (the same first two)
//	    ip saddr 127.0.0.0/8 ip daddr != 127.0.0.0/8 return   # they could not get off it
//	    dnat ip to ip daddr . tcp dport map @ip4
//	    ip daddr 127.0.0.0/8 return
//	    fib daddr type local dnat ip to tcp dport map @any4 }
//	chain post { type nat hook postrouting priority srcnat
//	    meta l4proto != tcp return
//	    ct status & dnat == 0 return
//	    ct original proto-dst . ip daddr . tcp dport @passage4 fib daddr type != local masquerade }
//
// and the same for IPv6.
func (t *Table) writeTable() error {
	if err := t.writeSets(); err != nil {
		return err
	}
	w := writer{t}
	in := w.chain(inChain, nftables.ChainTypeNAT, nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest)
	out := w.chain(outChain, nftables.ChainTypeNAT, nftables.ChainHookOutput, nftables.ChainPriorityNATDest)
	post := w.chain(postChain, nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource)
	leave := []expr.Any{&expr.Verdict{Kind: expr.VerdictReturn}}
	for _, c := range []*nftables.Chain{in, out, post} {
		w.rule(c, protocol(expr.CmpOpNeq), leave)
	}
	for _, c := range []*nftables.Chain{in, out} {
		w.rule(c, synAlone(expr.CmpOpNeq), leave)
	}
	w.rule(post, statusDNAT(expr.CmpOpEq), leave)
	for v := range versions {
		for k := range kinds {
			w.rule(in, ipVersion(v), lookUp(k, v))
		}
		w.rule(out, ipVersion(v), loopback(v, source, expr.CmpOpEq), loopback(v, destination, expr.CmpOpNeq), leave)
		w.rule(out, ipVersion(v), lookUp(ip, v))
		w.rule(out, ipVersion(v), loopback(v, destination, expr.CmpOpEq), leave)
		w.rule(out, ipVersion(v), lookUp(anywhere, v))
		w.rule(post, ipVersion(v), throughUs(v), addressIsLocal(expr.CmpOpNeq), []expr.Any{&expr.Masq{}})
	}
	return t.nft.Flush()
}

func (t *Table) writeSets() error {
	var err error
	id := uint32(0) // the library's own counter is shared and not locked
	add := func(set nftables.Set) {
		id++
		set.Table, set.ID = t.nft.Home(), id
		if err == nil {
			err = t.nft.Batch().AddSet(&set, nil)
		}
	}
	for v := range versions {
		address := [...]nftables.SetDatatype{nftables.TypeIPAddr, nftables.TypeIP6Addr}[v]
		for k := range kinds {
			key := []nftables.SetDatatype{nftables.TypeInetService}
			if k.hasIP() {
				key = slices.Insert(key, 0, address)
			}
			if k.hasDevice() {
				key = slices.Insert(key, 0, nftables.TypeIFName)
			}
			set := nftables.Set{
				Name: mapName(k, v), IsMap: true, Counter: true, Concatenation: len(key) > 1,
				KeyType: nftables.TypeInetService, DataType: nftables.MustConcatSetType(address, nftables.TypeInetService),
			}
			if set.Concatenation {
				set.KeyType = nftables.MustConcatSetType(key...)
			}
			add(set)
		}
		add(nftables.Set{
			Name: passageName(v), Concatenation: true,
			KeyType: nftables.MustConcatSetType(nftables.TypeInetService, address, nftables.TypeInetService),
		})
	}
	add(nftables.Set{Name: drainingSet, KeyType: nftables.TypeInetService})
	return err
}

// addDrain puts into the next batch what holds up, between connection tracking and NAT, the clients that take up the port of
// a connection that was forwarded and has ended. The kernel drops such a SYN or answers it from the entry of the old one.
//
//	chain drain_in { type filter hook prerouting priority mangle
//	    meta l4proto tcp tcp flags & (fin|syn|rst|ack) == syn ct state != new ct status & dnat != 0 tcp dport @draining drop }
//	chain drain_out { type filter hook output priority mangle; … }
func (t *Table) addDrain() error {
	w := writer{t}
	for _, c := range []*nftables.Chain{
		w.chain(drainIn, nftables.ChainTypeFilter, nftables.ChainHookPrerouting, nftables.ChainPriorityMangle),
		w.chain(drainOut, nftables.ChainTypeFilter, nftables.ChainHookOutput, nftables.ChainPriorityMangle),
	} {
		w.rule(c, protocol(expr.CmpOpEq), synAlone(expr.CmpOpEq), established(), statusDNAT(expr.CmpOpNeq),
			[]expr.Any{port(keyRegister), &expr.Lookup{SourceRegister: keyRegister, SetName: drainingSet}, &expr.Verdict{Kind: expr.VerdictDrop}})
	}
	return t.nft.Flush()
}

func (t *Table) removeDrain() error {
	for _, name := range []string{drainIn, drainOut} {
		t.nft.Batch().DelChain(&nftables.Chain{Table: t.nft.Home(), Name: name})
	}
	return t.nft.Flush()
}

// writer puts chains and rules into the next batch.
type writer struct{ *Table }

func (w writer) chain(name string, typ nftables.ChainType, hook *nftables.ChainHook, priority *nftables.ChainPriority) *nftables.Chain {
	return w.nft.Batch().AddChain(&nftables.Chain{Table: w.nft.Home(), Name: name, Type: typ, Hooknum: hook, Priority: priority})
}

func (w writer) rule(chain *nftables.Chain, parts ...[]expr.Any) {
	w.nft.Batch().AddRule(&nftables.Rule{Table: chain.Table, Chain: chain, Exprs: slices.Concat(parts...)})
}

// lookUp translates the destination of what a map has a rule for.
func lookUp(k kind, v version) []expr.Any {
	var load []expr.Any
	if !k.hasIP() {
		load = addressIsLocal(expr.CmpOpEq)
	}
	next := uint32(keyRegister)
	if k.hasDevice() {
		load = append(load, &expr.Meta{Key: expr.MetaKeyIIFNAME, Register: next})
		next += unix.IFNAMSIZ / 4
	}
	size := uint32(1)
	if v == v6 {
		size = 4
	}
	if k.hasIP() {
		load = append(load, address(v, destination, next))
		next += size
	}
	return append(load, port(next),
		&expr.Lookup{SourceRegister: keyRegister, DestRegister: keyRegister, IsDestRegSet: true, SetName: mapName(k, v)},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: uint32(v.protocol()), RegAddrMin: keyRegister, RegProtoMin: keyRegister + size})
}

// throughUs matches the connections that one of our rules has led off.
func throughUs(v version) []expr.Any {
	size := uint32(1)
	if v == v6 {
		size = 4
	}
	return []expr.Any{
		&expr.Ct{Register: keyRegister, Key: expr.CtKeyPROTODST, Direction: original},
		address(v, destination, keyRegister+1),
		port(keyRegister + 1 + size),
		&expr.Lookup{SourceRegister: keyRegister, SetName: passageName(v)},
	}
}

const original = 0 // IP_CT_DIR_ORIGINAL

// end is one end of a packet.
type end uint8

const (
	source end = iota
	destination
)

// address loads an address of a packet.
func address(v version, e end, register uint32) expr.Any {
	p := &expr.Payload{Base: expr.PayloadBaseNetworkHeader, DestRegister: register, Offset: 12, Len: 4}
	if v == v6 {
		p.Offset, p.Len = 8, 16
	}
	if e == destination {
		p.Offset += p.Len
	}
	return p
}

// port loads the port that a packet goes to.
func port(register uint32) expr.Any {
	return &expr.Payload{Base: expr.PayloadBaseTransportHeader, DestRegister: register, Offset: 2, Len: 2}
}

// loopback matches packets that have an address at one end that is on loopback (CmpOpEq), or is not.
func loopback(v version, e end, op expr.CmpOp) []expr.Any {
	if v == v6 {
		one := make([]byte, 16)
		one[15] = 1
		return []expr.Any{address(v, e, keyRegister), &expr.Cmp{Op: op, Register: keyRegister, Data: one}}
	}
	first := &expr.Payload{Base: expr.PayloadBaseNetworkHeader, DestRegister: keyRegister, Offset: 12, Len: 1}
	if e == destination {
		first.Offset += 4
	}
	return []expr.Any{first, &expr.Cmp{Op: op, Register: keyRegister, Data: []byte{127}}}
}

func addressIsLocal(op expr.CmpOp) []expr.Any {
	return []expr.Any{
		&expr.Fib{Register: keyRegister, FlagDADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: op, Register: keyRegister, Data: native(unix.RTN_LOCAL)},
	}
}

func ipVersion(v version) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: keyRegister},
		&expr.Cmp{Op: expr.CmpOpEq, Register: keyRegister, Data: []byte{v.protocol()}},
	}
}

func protocol(op expr.CmpOp) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: keyRegister},
		&expr.Cmp{Op: op, Register: keyRegister, Data: []byte{unix.IPPROTO_TCP}},
	}
}

func synAlone(op expr.CmpOp) []expr.Any {
	const fin, syn, rst, ack = 1, 2, 4, 16
	return []expr.Any{
		&expr.Payload{Base: expr.PayloadBaseTransportHeader, DestRegister: keyRegister, Offset: 13, Len: 1},
		&expr.Bitwise{SourceRegister: keyRegister, DestRegister: keyRegister, Len: 1, Mask: []byte{fin | syn | rst | ack}, Xor: []byte{0}},
		&expr.Cmp{Op: op, Register: keyRegister, Data: []byte{syn}},
	}
}

// statusDNAT compares with zero whether the destination of the connection was changed.
func statusDNAT(op expr.CmpOp) []expr.Any {
	return masked(expr.CtKeySTATUS, 1<<5, op) // IPS_DST_NAT
}

// established matches what belongs to a connection that the other end has answered to.
func established() []expr.Any {
	return masked(expr.CtKeySTATE, expr.CtStateBitESTABLISHED, expr.CmpOpNeq)
}

func masked(key expr.CtKey, bits uint32, op expr.CmpOp) []expr.Any {
	return []expr.Any{
		&expr.Ct{Register: keyRegister, Key: key},
		&expr.Bitwise{SourceRegister: keyRegister, DestRegister: keyRegister, Len: 4, Mask: native(bits), Xor: native(0)},
		&expr.Cmp{Op: op, Register: keyRegister, Data: native(0)},
	}
}
