package ledger

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/supervisor/activity/netlink"
	"hibergate/supervisor/activity/nftable"
)

// Counters counts one direction of an account. Bytes are those of whole IP packets.
type Counters struct{ Packets, Bytes uint64 }

// Reading is what one account says.
type Reading struct {
	In, Out Counters // since the table was made
	// Quiet is the time since the last packet that matters, rounded down to the kernel's clock
	// tick (1 to 10 ms). A new account starts with zero.
	Quiet time.Duration
}

// ErrLost says that the table, or an account in it, is not there any more: somebody deleted it.
var ErrLost = errors.New("the nftables table was deleted or changed")

// Ledger is one nftables table with an account for each of its keys. It is not safe for
// concurrent use.
type Ledger struct {
	table    *table
	reader   *netlink.Conn
	accounts map[Key]*account
	count    [kinds]int // accounts of each kind
	round    uint32     // of Read
	// refused tells why the kernel did not take what some accounts ignore.
	refused map[Key]error
}

// Account is an account that is to be kept.
type Account struct {
	Key
	// Ignored are the peers whose packets do not touch the clock; the counters count them. It needs Linux 5.6.
	// Where the kernel does not take them all, none are ignored; see Ledger.Refused.
	Ignored []Range
}

type account struct {
	Reading
	ignored []Range   // as normalize returns them
	seen    [3]uint32 // the round in which in, out and last were read
}

const (
	// dumpFactor is what an element costs that is asked for by its key, in elements of a dump of the
	// whole set (3.7 us against 0.6 us).
	dumpFactor = 6
	// perRequest bounds the answers to one request: they must fit into the receive buffer.
	perRequest = 64
)

// Open makes the table. It is called name, or name-2 and so on where a live
// process owns that; a table that a dead process left is replaced. track makes
// connection tracking active in this network namespace. Keys may repeat; the first holds.
// The error wraps unix.EPERM where CAP_NET_ADMIN is missing.
func Open(name string, accounts []Account, track bool) (*Ledger, error) {
	l := &Ledger{reader: netlink.New(unix.NETLINK_NETFILTER), accounts: make(map[Key]*account, len(accounts))}
	var add elements
	var ignoring []Key
	room := make([]account, len(accounts))
	for i, a := range accounts {
		if _, twice := l.accounts[a.Key]; twice {
			continue
		}
		l.enter(a, &room[i], &add)
		if len(a.Ignored) > 0 {
			ignoring = append(ignoring, a.Key)
		}
	}
	made, err := nftable.Create(l.reader, name)
	if err == nil {
		l.table = &table{Table: made, track: track}
		err = l.table.add(&add)
	}
	if err == nil {
		err = l.ignore(ignoring)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("create nftables table: %w", err), l.Close())
	}
	return l, nil
}

// enter notes a new account and its elements, but for what it ignores.
func (l *Ledger) enter(a Account, to *account, add *elements) {
	to.ignored = normalize(a.Ignored)
	l.accounts[a.Key] = to
	l.count[a.kind()]++
	add.keys[a.kind()] = append(add.keys[a.kind()], a.Key)
}

// ignore adds what accounts ignore. Where the kernel refuses that of one, it ignores nobody; the others are none
// the worse for it.
func (l *Ledger) ignore(keys []Key) error {
	var add elements
	for _, key := range keys {
		add.ignore(key, l.accounts[key].ignored)
	}
	err := l.table.add(&add)
	if err == nil || !isRefusal(err) {
		return err
	}
	if len(keys) == 1 {
		l.accounts[keys[0]].ignored = nil
		if l.refused == nil {
			l.refused = make(map[Key]error)
		}
		l.refused[keys[0]] = err
		return nil
	}
	for some := range slices.Chunk(keys, (len(keys)+1)/2) {
		if err := l.ignore(some); err != nil {
			return err
		}
	}
	return nil
}

// isRefusal says whether an error is the kernel's word on elements or sets, and the table is as it was before.
func isRefusal(err error) bool {
	var why unix.Errno
	if !errors.As(err, &why) || errors.Is(err, errBroken) {
		return false
	}
	return why != unix.ENOENT && why != unix.EPERM && why != unix.ENOBUFS
}

// Refused says why some accounts ignore nobody though they should; nil where none does.
func (l *Ledger) Refused() error {
	for key, err := range l.refused {
		return fmt.Errorf("%d accounts ignore nobody, such as that of port %d: %w", len(l.refused), key.Port, err)
	}
	return nil
}

// Put adds an account, or changes what it ignores. The figures of all accounts that are there
// stay, and no packet is missed. After an error the Ledger is good for nothing but Close.
func (l *Ledger) Put(a Account) error {
	there := l.accounts[a.Key]
	var add, remove elements
	if there == nil {
		l.enter(a, &account{}, &add)
	} else {
		ignored := normalize(a.Ignored)
		if slices.Equal(there.ignored, ignored) && l.refused[a.Key] == nil {
			return nil
		}
		remove.ignore(a.Key, there.ignored)
		there.ignored = ignored
		delete(l.refused, a.Key)
	}
	err := l.table.remove(&remove)
	if err == nil {
		err = l.table.add(&add)
	}
	if err == nil {
		err = l.ignore([]Key{a.Key})
	}
	if err != nil {
		return fmt.Errorf("add account of %+v to nftables table: %w", a.Key, lost(err))
	}
	return nil
}

// Remove ends an account. After an error the Ledger is good for nothing but Close.
func (l *Ledger) Remove(key Key) error {
	there := l.accounts[key]
	if there == nil {
		return nil
	}
	delete(l.accounts, key)
	delete(l.refused, key)
	l.count[key.kind()]--
	var remove elements
	remove.keys[key.kind()] = []Key{key}
	remove.ignore(key, there.ignored)
	if err := l.table.remove(&remove); err != nil {
		return fmt.Errorf("remove account of %+v from nftables table: %w", key, lost(err))
	}
	return nil
}

// lost says what it means that something of the table is not there.
func lost(err error) error {
	if errors.Is(err, unix.ENOENT) {
		return ErrLost
	}
	return err
}

// Name returns the name of the table, of family inet.
func (l *Ledger) Name() string { return l.table.Name() }

// Close removes the table.
func (l *Ledger) Close() error {
	var err error
	if l.table != nil {
		err = l.table.Close()
	}
	return errors.Join(err, l.reader.Close())
}

// Read reads the accounts of keys; Reading gives them out. It reads nothing but the
// sets that hold one of them. The error wraps ErrLost where the table has to be made anew.
func (l *Ledger) Read(keys []Key) error {
	l.round++
	var due [kinds][]Key
	for _, key := range keys {
		due[key.kind()] = append(due[key.kind()], key)
	}
	for k := range kinds {
		if len(due[k]) == 0 {
			continue
		}
		for i, name := range [...]string{"in_", "out_", "last_"} {
			if err := l.readSet(k, name+k.String(), i, due[k]); err != nil {
				return fmt.Errorf("read nftables set %s: %w", name+k.String(), lost(err))
			}
		}
	}
	for _, key := range keys {
		if a := l.accounts[key]; a == nil || a.seen != [3]uint32{l.round, l.round, l.round} {
			return fmt.Errorf("read account of %v: %w", key, ErrLost)
		}
	}
	return nil
}

// Reading returns what the last Read said about one of its keys.
func (l *Ledger) Reading(key Key) Reading {
	if a := l.accounts[key]; a != nil {
		return a.Reading
	}
	return Reading{}
}

// readSet reads one set; which is 0 for "in", 1 for "out", 2 for "last".
func (l *Ledger) readSet(k kind, name string, which int, due []Key) error {
	take := func(_ uint16, body []byte) error {
		return nftable.DecodeElements(body, func(e nftable.Element) {
			key, ok := decodeKey(k, e.Key)
			a := l.accounts[key]
			if !ok || a == nil {
				return
			}
			switch which {
			case 0:
				a.In = Counters{Packets: e.Packets, Bytes: e.Bytes}
			case 1:
				a.Out = Counters{Packets: e.Packets, Bytes: e.Bytes}
			default:
				if !e.Timed {
					return // not our set: the account counts as lost
				}
				a.Quiet = max(lifetime-e.Left, 0)
			}
			a.seen[which] = l.round
		})
	}
	if len(due)*dumpFactor >= l.count[k] {
		return l.reader.Ask(l.request(name, unix.NLM_F_DUMP), nil, take)
	}
	for ; len(due) > 0; due = due[min(perRequest, len(due)):] {
		r := l.request(name, unix.NLM_F_ACK).Nested(unix.NFTA_SET_ELEM_LIST_ELEMENTS, func(r *netlink.Request) {
			addKeys(r, due[:min(perRequest, len(due))])
		})
		if err := l.reader.Ask(r, nil, take); err != nil {
			return err
		}
	}
	return nil
}

// request starts a request for elements of a set.
func (l *Ledger) request(set string, flags uint16) *netlink.Request {
	return netlink.NetfilterRequest(unix.NFNL_SUBSYS_NFTABLES, unix.NFT_MSG_GETSETELEM, flags, unix.NFPROTO_INET).
		String(unix.NFTA_SET_ELEM_LIST_TABLE, l.table.Name()).
		String(unix.NFTA_SET_ELEM_LIST_SET, set)
}
