package forward

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync"

	mdlayher "github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"hibergate/activation"
	"hibergate/supervisor/activity/conntrack"
	"hibergate/supervisor/activity/netlink"
	"hibergate/supervisor/activity/nftable"
	"hibergate/supervisor/activity/sockdiag"
)

var (
	// ErrLost says that the table, or something in it, is not there any more: somebody deleted it. Kernels since Linux
	// 5.12 do not let them.
	ErrLost = errors.New("the nftables table was deleted or changed")
	// ErrShared says that another socket would get some of the connections.
	ErrShared = errors.New("another socket listens on the same port")
)

// Table is an nftables table that forwards, in the network namespace of the thread that opened it. It is safe for concurrent use, but no two calls may
// be about the same rule. After ErrLost it is good for nothing but Close.
type Table struct {
	acct activation.Switch // of the counters of flows

	mu       sync.Mutex // over what follows; a transaction takes less than a millisecond
	nft      *nftable.Table
	reader   *netlink.Conn
	sockets  *sockdiag.Conn
	rules    map[uint32]rule
	places   map[place]uint32 // the keys of rules
	passages map[passage]int  // how many rules have each
	draining map[uint16]int   // how many calls of Drain are about each port
	drains   int              // how many there are

	flows flows
}

// Open makes the table. It is called name, or name-2 and so on where a live process owns that; a table that a dead process left
// is replaced. From then on all connections of this network namespace are tracked, and their packets and bytes counted where
// that can be switched on. The error wraps unix.EPERM where CAP_NET_ADMIN is missing.
func Open(name string) (*Table, error) {
	t := &Table{
		acct:   activation.Switch{Path: "/proc/sys/net/netfilter/nf_conntrack_acct"},
		reader: netlink.New(unix.NETLINK_NETFILTER), sockets: sockdiag.New(),
		rules: make(map[uint32]rule), places: make(map[place]uint32), passages: make(map[passage]int), draining: make(map[uint16]int),
		flows: flows{conn: conntrack.New()},
	}
	var err error
	if t.nft, err = nftable.Create(t.reader, name); err == nil {
		err = t.writeTable()
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("create nftables table %s: %w", name, err), t.Close())
	}
	_ = t.acct.On() // the module is there now; Account.Counted says whether it worked
	return t, nil
}

// Name returns the name of the table, of family inet.
func (t *Table) Name() string { return t.nft.Name() }

// Close removes the table. What is forwarded ends with it.
func (t *Table) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	var err error
	if t.nft != nil {
		err = t.nft.Close()
	}
	return errors.Join(err, t.reader.Close(), t.sockets.Close(), t.flows.close(), t.acct.Restore())
}

// Add leads new connections to a listening address to a destination, of which packets alone that come through a device if there
// is one. In the place of a rule of that key another one comes without a gap. family is that of the socket. The error has
// ErrShared in its chain where another socket listens on the port that is meant by some of the packets; it says so of those that
// are there now.
func (t *Table) Add(key uint32, listen activation.Address, family activation.Family, device string, to netip.AddrPort) error {
	r, err := newRule(listen, family, device, to)
	if err == nil {
		err = t.put(key, r)
	}
	if err != nil {
		return fmt.Errorf("forward connections to %v in the kernel: %w", listen, err)
	}
	return nil
}

func (t *Table) put(key uint32, r rule) error {
	t.mu.Lock()
	before, replaces := t.rules[key]
	var err error
	if before != r {
		if err = t.isAlone(&r); err == nil {
			err = t.replace(key, r)
		}
	}
	t.mu.Unlock()
	if before == r || err != nil || !replaces {
		return err
	}
	return t.leavePassage(before.passage())
}

// replace adds a rule, and removes the one that has its key. The caller holds mu.
func (t *Table) replace(key uint32, r rule) error {
	if other, taken := t.places[r.place]; taken && other != key {
		return errors.New("it is forwarded already")
	}
	var batch []mdlayher.Message
	before, replaces := t.rules[key]
	if replaces {
		batch = append(batch, t.element(unix.NFT_MSG_DELSETELEM, before.set(), before.key(), nil))
	}
	p := r.passage()
	if t.passages[p] == 0 {
		batch = append(batch, t.element(unix.NFT_MSG_NEWSETELEM, passageName(r.version), p.key(), nil))
	}
	batch = append(batch, t.element(unix.NFT_MSG_NEWSETELEM, r.set(), r.key(), r.data()))
	if err := lost(t.nft.Transact(batch...)); err != nil {
		return err
	}
	delete(t.places, before.place) // the zero one, where there was none, is nobody's
	t.rules[key], t.places[r.place] = r, key
	t.passages[p]++
	return nil
}

// Remove ends a rule. When it returns, the first packets of connections that had taken it are through all chains, in some
// 10 ms: every such connection is known to Flows, and goes on. It does nothing where there is no rule of that key.
func (t *Table) Remove(key uint32) error {
	t.mu.Lock()
	r, ok := t.rules[key]
	var err error
	if ok {
		err = lost(t.nft.Transact(t.element(unix.NFT_MSG_DELSETELEM, r.set(), r.key(), nil)))
	}
	if err == nil || errors.Is(err, ErrLost) {
		delete(t.rules, key)
		delete(t.places, r.place)
	}
	t.mu.Unlock()
	if ok && err == nil {
		err = t.leavePassage(r.passage())
	}
	if err != nil {
		return fmt.Errorf("end forwarding of port %d to %v in the kernel: %w", r.port, r.to, err)
	}
	return nil
}

// leavePassage waits until no packet is under way any more that has taken a rule which was there. Then it
// takes away what the last chain had to find for it, unless another rule needs that.
func (t *Table) leavePassage(p passage) error {
	activation.WaitForPackets()
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.passages[p]--; t.passages[p] > 0 {
		return nil
	}
	delete(t.passages, p)
	return lost(t.nft.Transact(t.element(unix.NFT_MSG_DELSETELEM, passageName(versionOf(p.to.Addr())), p.key(), nil)))
}

// element makes a message about one element of a set or map.
func (t *Table) element(typ uint16, set string, key, data []byte) mdlayher.Message {
	return nftable.Message(typ, t.elements(typ, 0, set, key, data))
}

func (t *Table) elements(typ, flags uint16, set string, key, data []byte) *netlink.Request {
	value := func(b []byte) func(*netlink.Request) {
		return func(r *netlink.Request) { r.Attribute(unix.NFTA_DATA_VALUE, b...) }
	}
	return netlink.NetfilterRequest(unix.NFNL_SUBSYS_NFTABLES, typ, flags, unix.NFPROTO_INET).
		String(unix.NFTA_SET_ELEM_LIST_TABLE, t.nft.Name()).
		String(unix.NFTA_SET_ELEM_LIST_SET, set).
		Nested(unix.NFTA_SET_ELEM_LIST_ELEMENTS, func(r *netlink.Request) {
			r.Nested(unix.NFTA_LIST_ELEM, func(r *netlink.Request) {
				r.Nested(unix.NFTA_SET_ELEM_KEY, value(key))
				if data != nil {
					r.Nested(unix.NFTA_SET_ELEM_DATA, value(data))
				}
			})
		})
}

// begun returns how many connections have taken a rule. The caller holds mu.
func (t *Table) begun(r *rule) (n uint64, err error) {
	err = t.reader.Ask(t.elements(unix.NFT_MSG_GETSETELEM, unix.NLM_F_ACK, r.set(), r.key(), nil), nil, func(_ uint16, body []byte) error {
		return nftable.DecodeElements(body, func(e nftable.Element) { n = e.Packets })
	})
	if err != nil {
		return 0, fmt.Errorf("read counter of nftables map %s: %w", r.set(), lost(err))
	}
	return n, nil
}

// lost says what it means that something of the table is not there.
func lost(err error) error {
	if errors.Is(err, unix.ENOENT) {
		return ErrLost
	}
	return err
}

func native(n uint32) []byte { return binary.NativeEndian.AppendUint32(nil, n) }
