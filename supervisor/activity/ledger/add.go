package ledger

import (
	"errors"
	"fmt"
	"slices"

	mdlayher "github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"hibergate/supervisor/activity/netlink"
	"hibergate/supervisor/activity/nftable"
)

// elements are what is added to the sets of a table, or removed from them.
type elements struct {
	keys    [kinds][]Key                 // of accounts
	ignored [kinds][families][]addrRange // what they ignore
}

const (
	chunk = 500 // elements in a message: an attribute holds at most 64 KB
	// A batch must fit into the send buffer, and its acknowledgements into the receive buffer; both are
	// 208 KB by default.
	perBatch      = 8 // messages
	bytesPerBatch = 128 << 10
)

// add adds elements, and before them the sets that are not there yet. Where there were any, all rules
// are written anew in one transaction: no packet sees the table without them. After an error no element was
// added.
func (t *table) add(e *elements) error {
	before := t.sets
	grown, err := t.addSets(e)
	if err == nil && grown {
		err = t.Flush()
	}
	if err != nil {
		t.sets = before
		return err
	}
	err = t.send(unix.NFT_MSG_NEWSETELEM, e)
	if grown { // also where nothing was added: the sets are there
		t.writeRules()
		if err := t.Flush(); err != nil {
			return fmt.Errorf("%w: write rules: %w", errBroken, err)
		}
	}
	return err
}

// remove removes elements.
func (t *table) remove(e *elements) error { return t.send(unix.NFT_MSG_DELSETELEM, e) }

// send sends messages about elements. What is to be added is added as a whole, or not at all.
func (t *table) send(typ uint16, e *elements) error {
	batches := t.batches(typ, e)
	for i, batch := range batches {
		err := t.Transact(batch...)
		if err == nil {
			continue
		}
		if typ == unix.NFT_MSG_NEWSETELEM {
			for _, undo := range t.batches(unix.NFT_MSG_DELSETELEM, e)[:i] {
				if undoErr := t.Transact(undo...); undoErr != nil {
					return fmt.Errorf("%w: remove elements: %w", errBroken, errors.Join(err, undoErr))
				}
			}
		}
		return err
	}
	return nil
}

// errBroken says that a table holds what it should not.
var errBroken = errors.New("the nftables table was left half changed")

// batches returns the messages about elements, by transaction. The library could, with several times the time
// and memory, which matters for thousands.
func (t *table) batches(typ uint16, e *elements) (all [][]mdlayher.Message) {
	var batch []mdlayher.Message
	size := 0
	put := func(set string, fill func(*netlink.Request)) {
		r := netlink.NetfilterRequest(unix.NFNL_SUBSYS_NFTABLES, typ, 0, unix.NFPROTO_INET).
			String(unix.NFTA_SET_ELEM_LIST_TABLE, t.Name()).
			String(unix.NFTA_SET_ELEM_LIST_SET, set).
			Nested(unix.NFTA_SET_ELEM_LIST_ELEMENTS, fill)
		n := len(r.Bytes())
		if len(batch) == perBatch || size+n > bytesPerBatch {
			all, batch, size = append(all, batch), nil, 0
		}
		batch, size = append(batch, nftable.Message(typ, r)), size+n
	}
	for k, s := range t.sets {
		for f := range families {
			for some := range slices.Chunk(e.ignored[k][f], chunk) {
				put(s.ignored[f].Name, func(r *netlink.Request) { addRanges(r, some) })
			}
		}
		for some := range slices.Chunk(e.keys[k], chunk) {
			for _, name := range []string{s.count[in].Name, s.count[out].Name, s.last.Name} {
				put(name, func(r *netlink.Request) { addKeys(r, some) })
			}
		}
	}
	if len(batch) > 0 {
		all = append(all, batch)
	}
	return all
}

// addKeys adds a list of elements that consist of a key.
func addKeys(r *netlink.Request, keys []Key) {
	for _, key := range keys {
		r.Nested(unix.NFTA_LIST_ELEM, func(r *netlink.Request) {
			r.Nested(unix.NFTA_SET_ELEM_KEY, func(r *netlink.Request) {
				r.Attribute(unix.NFTA_DATA_VALUE, key.encode()...)
			})
		})
	}
}
