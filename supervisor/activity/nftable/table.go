package nftable

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/google/nftables"
	mdlayher "github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"hibergate/supervisor/activity/netlink"
)

const (
	// nftTableOwner is NFT_TABLE_F_OWNER (Linux 5.12): the table belongs to the netlink socket that
	// made it. Nobody else can change it, and the kernel removes it with the socket.
	nftTableOwner   = 0x2
	nftTableOwnedBy = 7 // NFTA_TABLE_OWNER: port of the owner's socket
	nftTableFlags   = unix.NFTA_TABLE_FLAGS

	maxNames = 16 // supervisors of one name in one network namespace
)

// Table is an nftables table and what holds it. It is not safe for concurrent use.
type Table struct {
	name string
	// conn owns the table; wire is the same socket, for what the library cannot say.
	conn *nftables.Conn
	wire *mdlayher.Conn
	// lock is an abstract Unix socket named after the table: it tells the living from the dead where
	// the kernel knows no owners. -1: none, as where it does: anybody may take such a name.
	lock int
}

// Create makes an empty table. It is called name, or name-2 and so on where a live
// process owns that; a table that a dead process left is replaced. It asks through reader. The
// error wraps unix.EPERM where CAP_NET_ADMIN is missing.
func Create(reader *netlink.Conn, name string) (*Table, error) {
	for i := 1; i <= maxNames; i++ {
		t := &Table{name: name, lock: -1}
		if i > 1 {
			t.name = fmt.Sprintf("%s-%d", name, i)
		}
		owned, err := isOwned(reader, t.name)
		if err != nil {
			return nil, err
		}
		if owned {
			continue
		}
		if err = t.create(); err == nil {
			return t, nil
		}
		if releaseErr := t.release(); !errors.Is(err, errInUse) || releaseErr != nil {
			return nil, errors.Join(err, releaseErr)
		}
	}
	return nil, fmt.Errorf("%d tables named %s belong to other live processes", maxNames, name)
}

// Name returns the name of the table.
func (t *Table) Name() string { return t.name }

// Home returns the table as the library wants it.
func (t *Table) Home() *nftables.Table {
	return &nftables.Table{Name: t.name, Family: nftables.TableFamilyINet}
}

// Batch returns what gathers changes of the table until Flush, nil after Close.
func (t *Table) Batch() *nftables.Conn { return t.conn }

// isOwned says whether there is a table of this name that belongs to a live socket.
func isOwned(reader *netlink.Conn, name string) (bool, error) {
	r := netlink.NetfilterRequest(unix.NFNL_SUBSYS_NFTABLES, unix.NFT_MSG_GETTABLE, 0, unix.NFPROTO_INET).
		String(unix.NFTA_TABLE_NAME, name)
	owned := false
	err := reader.Ask(r, nil, func(_ uint16, body []byte) error {
		if len(body) < 4 {
			return netlink.ErrMalformed
		}
		as := netlink.Attributes{Rest: body[4:]}
		for as.Next() {
			owned = owned || as.Type == nftTableOwnedBy
		}
		return as.Err()
	})
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	return owned, err
}

// errInUse says that a live process holds the lock.
var errInUse = errors.New("the table is in use")

func (t *Table) takeLock() error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open lock: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: "@hibergate/nftables/" + t.name}); err != nil {
		if errors.Is(err, unix.EADDRINUSE) {
			err = errInUse
		}
		return errors.Join(fmt.Errorf("take lock: %w", err), unix.Close(fd))
	}
	t.lock = fd
	return nil
}

// create replaces whatever has the name by an empty table of our own, in one transaction.
func (t *Table) create() error {
	// The library sends no table flags, so it lends its socket.
	var err error
	t.conn, err = nftables.New(nftables.AsLasting(), nftables.WithSockOptions(func(c *mdlayher.Conn) error {
		t.wire = c
		return nil
	}))
	if err != nil {
		return err
	}
	add := t.message(unix.NFT_MSG_NEWTABLE, 0)
	del := t.message(unix.NFT_MSG_DELTABLE, 0)
	err = t.Transact(add, del, t.message(unix.NFT_MSG_NEWTABLE, nftTableOwner))
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) { // before Linux 5.12
		if err = t.takeLock(); err == nil {
			err = t.Transact(add, del, add)
		}
	}
	return err
}

// message makes a message about the table itself.
func (t *Table) message(typ uint16, flags uint32) mdlayher.Message {
	r := netlink.NetfilterRequest(unix.NFNL_SUBSYS_NFTABLES, typ, 0, unix.NFPROTO_INET).
		String(unix.NFTA_TABLE_NAME, t.name)
	if flags != 0 {
		r.Attribute(nftTableFlags, binary.BigEndian.AppendUint32(nil, flags)...)
	}
	return Message(typ, r)
}

// Message makes of a request, whose type is typ (NFT_MSG_*), what Transact takes.
func Message(typ uint16, r *netlink.Request) mdlayher.Message {
	return mdlayher.Message{
		Header: mdlayher.Header{
			Type:  mdlayher.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | typ),
			Flags: mdlayher.Request | mdlayher.Acknowledge | mdlayher.Create,
		},
		Data: r.Bytes()[unix.SizeofNlMsghdr:],
	}
}

// bound makes the reads that follow end in time, until the returned function is called: a
// deadline that was left would wake the program once more.
func (t *Table) bound() (unbound func(), err error) {
	if err := t.wire.SetReadDeadline(time.Now().Add(answerWithin)); err != nil {
		return nil, err
	}
	return func() { _ = t.wire.SetReadDeadline(time.Time{}) }, nil // it cannot fail where the other did not
}

// Transact sends messages as one batch and waits for all acknowledgements. After an error, an
// unix.Errno in its chain where the kernel refused, nothing was done.
func (t *Table) Transact(messages ...mdlayher.Message) error {
	if len(messages) == 0 {
		return nil
	}
	unbound, err := t.bound()
	if err != nil {
		return err
	}
	defer unbound()
	edge := func(typ uint16) mdlayher.Message { // nfgenmsg with the subsystem in the place of the resource
		return mdlayher.Message{
			Header: mdlayher.Header{Type: mdlayher.HeaderType(typ), Flags: mdlayher.Request},
			Data:   []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, unix.NFNL_SUBSYS_NFTABLES},
		}
	}
	batch := append([]mdlayher.Message{edge(unix.NFNL_MSG_BATCH_BEGIN)}, messages...)
	if _, err := t.wire.SendMessages(append(batch, edge(unix.NFNL_MSG_BATCH_END))); err != nil {
		return err
	}
	var first error
	for range messages {
		if _, err := t.wire.Receive(); err != nil && first == nil {
			first = err
			if errors.Is(err, unix.EPERM) {
				break // the kernel refuses the batch as a whole, once
			}
		}
	}
	return first
}

// answerWithin is when the kernel is given up on; it answers at once.
const answerWithin = 10 * time.Second

// Flush sends what Batch has gathered, as one transaction.
func (t *Table) Flush() error {
	unbound, err := t.bound()
	if err != nil {
		return err
	}
	defer unbound()
	return t.conn.Flush()
}

// Close deletes the table and lets go of its name. Nothing else may be called after it.
func (t *Table) Close() error {
	err := t.Transact(t.message(unix.NFT_MSG_DELTABLE, 0))
	if errors.Is(err, unix.ENOENT) {
		err = nil // somebody was faster
	}
	return errors.Join(err, t.release())
}

func (t *Table) release() error {
	var err error
	if t.conn != nil {
		err = t.conn.CloseLasting()
		t.conn = nil
	}
	if t.lock >= 0 {
		err = errors.Join(err, unix.Close(t.lock))
		t.lock = -1
	}
	return err
}
