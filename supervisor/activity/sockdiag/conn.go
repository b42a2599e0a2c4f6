package sockdiag

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"hibergate/supervisor/activity/netlink"
)

// Conn asks sock_diag. It is not safe for concurrent use.
type Conn struct{ netlink *netlink.Conn }

// New returns a Conn. It opens its socket at the first question.
func New() *Conn { return &Conn{netlink: netlink.New(unix.NETLINK_SOCK_DIAG)} }

// Close closes the socket.
func (c *Conn) Close() error { return c.netlink.Close() }

// Inet calls each for every socket that meets the query. begin, which may be nil, is called before
// the first, and again where the kernel's answer has to be asked for anew. The
// Inet belongs to the caller of each and is overwritten by the next one.
func (c *Conn) Inet(q Query, begin func(), each func(*Inet)) error {
	var row Inet
	take := func(_ uint16, body []byte) error {
		if err := row.Decode(body); err != nil {
			return err
		}
		each(&row)
		return nil
	}
	err := c.netlink.Ask(q.request(), begin, take)
	if errors.Is(err, unix.EINVAL) && len(q.Ports) > 0 { // INET_DIAG_BC_S_EQ is not known before Linux 5.9
		q.Ports = nil
		err = c.netlink.Ask(q.request(), begin, take)
	}
	// ENOENT: no handler for the protocol, so its diag module is neither built in nor loadable.
	if errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("dump sockets: the kernel lacks inet_diag, tcp_diag or udp_diag: %w", err)
	}
	if err != nil {
		return fmt.Errorf("dump sockets: %w", err)
	}
	return nil
}

// Unix calls each for every Unix socket; begin and each as for Inet.
func (c *Conn) Unix(begin func(), each func(*Unix)) error {
	var row Unix
	err := c.netlink.Ask(unixRequest(), begin, func(_ uint16, body []byte) error {
		if err := row.Decode(body); err != nil {
			return err
		}
		each(&row)
		return nil
	})
	if err != nil {
		return fmt.Errorf("dump Unix sockets: %w", err)
	}
	return nil
}
