package activity

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"hibergate/activation"
	"hibergate/supervisor/activity/sockdiag"
)

// Held counts the connections of a Unix stream or seqpacket socket whose client is in another network
// namespace (a container with the path mounted into it). The kernel files such a connection
// under the client's namespace, so Look cannot see it; the processes that serve it can
// be asked instead. roots are those processes; their descendants are asked too. For
// other kinds of socket it returns zero at once.
//
// It borrows descriptors with pidfd_getfd(2) (Linux 5.6), for which it needs the right to
// trace the processes: same user, or CAP_SYS_PTRACE.
func (t *Tracker) Held(ctx context.Context, key uint32, roots []int) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	w := t.sockets[key]
	if w == nil || t.closed || w.Address.Network != activation.Unix && w.Address.Network != activation.Unixpacket {
		return 0, nil
	}
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	// First the processes: a connection that is accepted in between is in the list then.
	type place struct{ pid, fd int }
	places := make(map[uint32]place)
	eachSocket(roots, func(pid, fd int, inode uint32) { places[inode] = place{pid, fd} })
	seen := make(map[uint32]bool)
	err := t.sockdiag.Unix(func() { clear(seen) }, func(row *sockdiag.Unix) { seen[row.Inode] = true })
	if err != nil {
		return 0, err
	}
	held := 0
	for inode, p := range places {
		if seen[inode] {
			continue
		}
		is, err := isConnectionOf(p.pid, p.fd, w)
		if err != nil {
			return 0, fmt.Errorf("look at descriptor %d of process %d: %w", p.fd, p.pid, err)
		}
		if is {
			held++
		}
	}
	return held, nil
}

// isConnectionOf says whether a descriptor of a process is a connection of the socket.
func isConnectionOf(pid, fd int, w *watched) (bool, error) {
	process, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
		return false, nil // gone: it holds nothing
	}
	if err != nil {
		return false, err
	}
	defer func() { _ = unix.Close(process) }()
	borrowed, err := unix.PidfdGetfd(process, fd, 0)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EBADF) {
		return false, nil // gone, or closed since
	}
	if err != nil {
		return false, err
	}
	defer func() { _ = unix.Close(borrowed) }()
	name, err := unix.Getsockname(borrowed)
	if err != nil {
		return false, nil //nolint:nilerr // a kind of socket that the library does not know: not a Unix one
	}
	local, ok := name.(*unix.SockaddrUnix)
	return ok && socketName(local) == w.name, nil
}

// socketName returns a name as sock_diag tells it: an abstract one with a leading NUL.
func socketName(a *unix.SockaddrUnix) string {
	if a.Name != "" && a.Name[0] == '@' {
		return "\x00" + a.Name[1:]
	}
	return a.Name
}
