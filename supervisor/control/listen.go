package control

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// ErrRunning says that another supervisor, or another program, answers on the control socket.
var ErrRunning = errors.New("another hibergated is running")

// maxPath is the length of sun_path less the closing zero (unix(7)).
const maxPath = 107

// listen binds path as a Unix socket of mode 0600 and returns it with the lock
// that makes it ours. The caller closes both, the socket (which removes it) first.
func listen(ctx context.Context, path string) (net.Listener, *lock, error) {
	if !filepath.IsAbs(path) {
		return nil, nil, errors.New("the path must be absolute")
	}
	if len(path) > maxPath {
		return nil, nil, fmt.Errorf("the path is longer than %d bytes", maxPath)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, nil, err
	}
	l, err := acquire(path + ".lock")
	if err != nil {
		return nil, nil, err
	}
	ln, err := bind(ctx, path)
	if err != nil {
		return nil, nil, errors.Join(err, l.release())
	}
	return ln, l, nil
}

// bind takes the place of a socket that a killed predecessor left behind, and listens.
func bind(ctx context.Context, path string) (net.Listener, error) {
	if err := removeStale(ctx, path); err != nil {
		return nil, err
	}
	// A Unix socket file gets the mode of the socket at the time of bind(2), less the umask. Setting it
	// before, and not with chmod afterwards, leaves no moment at which others may connect.
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		if e := c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) }); e != nil {
			return e
		}
		return err
	}}
	return config.Listen(ctx, "unix", path)
}

// removeStale removes a socket on which nobody listens. It fails for one on which
// somebody does, and for anything that is not a socket.
func removeStale(ctx context.Context, path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("%s exists and is not a socket", path)
	}
	conn, err := new(net.Dialer).DialContext(ctx, "unix", path)
	switch {
	case err == nil:
		conn.Close()
		return fmt.Errorf("%w: it answers on %s", ErrRunning, path)
	case errors.Is(err, unix.ECONNREFUSED):
		return os.Remove(path)
	default:
		// EAGAIN: somebody listens and is busy. Others: who can tell.
		return err
	}
}

// lock is a file lock (flock(2)) that ends with the process however it ends. The
// socket alone could not decide between two that start at the same time: each would
// find the other's bound but not yet listening, and remove it.
type lock struct {
	file *os.File
	path string
}

func acquire(path string) (*lock, error) {
	for {
		// 0600, because who may open a file may lock it.
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return nil, err
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			f.Close()
			if errors.Is(err, unix.EWOULDBLOCK) {
				return nil, fmt.Errorf("%w: it holds %s", ErrRunning, path)
			}
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		// Its last owner may have removed the file after we opened it; then
		// we hold a lock that nobody else will ever see.
		held, err := f.Stat()
		if err != nil {
			f.Close()
			return nil, err
		}
		if named, err := os.Lstat(path); err == nil && os.SameFile(held, named) {
			return &lock{file: f, path: path}, nil
		}
		f.Close()
	}
}

// release removes the file while it is still locked, then unlocks.
func (l *lock) release() error {
	return errors.Join(os.Remove(l.path), l.file.Close())
}
