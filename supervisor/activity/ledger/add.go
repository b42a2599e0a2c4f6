package ledger

import (
	"slices"

	mdlayher "github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"hibergate/supervisor/activity/netlink"
)

// elements are what is added to the sets of a table, or removed from them.
type elements struct {
	keys    [kinds][]Key                 // of accounts
	ignored [kinds][families][]addrRange // what they ignore
}

const (
	chunk    = 500 // elements in a message: an attribute holds at most 64 KB
	perBatch = 8   // messages in a batch: it must fit into the send buffer, 208 KB by default
)

// add adds elements, and before them the sets that are not there yet. Where there were any, all rules
// are written anew in one transaction: no packet sees the table without them.
func (t *table) add(e *elements) error {
	grown, err := t.addSets(e)
	if err != nil {
		return err
	}
	if grown {
		if err := t.flush(); err != nil {
			return err
		}
	}
	if err := t.send(unix.NFT_MSG_NEWSETELEM, e); err != nil || !grown {
		return err
	}
	t.writeRules()
	return t.flush()
}

// remove removes elements.
func (t *table) remove(e *elements) error { return t.send(unix.NFT_MSG_DELSETELEM, e) }

// send sends messages about elements. The library could, with several times the time and memory,
// which matters for thousands.
func (t *table) send(typ uint16, e *elements) error {
	var batch []mdlayher.Message
	put := func(set string, fill func(*netlink.Request)) error {
		r := netlink.NetfilterRequest(unix.NFNL_SUBSYS_NFTABLES, typ, 0, unix.NFPROTO_INET).
			String(unix.NFTA_SET_ELEM_LIST_TABLE, t.name).
			String(unix.NFTA_SET_ELEM_LIST_SET, set).
			Nested(unix.NFTA_SET_ELEM_LIST_ELEMENTS, fill)
		if batch = append(batch, asMessage(typ, r)); len(batch) < perBatch {
			return nil
		}
		err := t.transact(batch...)
		batch = batch[:0]
		return err
	}
	for k, s := range t.sets {
		// First what is ignored: with a new account it holds from the first packet.
		for f := range families {
			for some := range slices.Chunk(e.ignored[k][f], chunk) {
				if err := put(s.ignored[f].Name, func(r *netlink.Request) { addRanges(r, some) }); err != nil {
					return err
				}
			}
		}
		for some := range slices.Chunk(e.keys[k], chunk) {
			for _, name := range []string{s.count[in].Name, s.count[out].Name, s.last.Name} {
				if err := put(name, func(r *netlink.Request) { addKeys(r, some) }); err != nil {
					return err
				}
			}
		}
	}
	return t.transact(batch...)
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
