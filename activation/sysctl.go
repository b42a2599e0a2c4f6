package activation

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Switch turns a setting of the kernel on, a file under /proc/sys that holds 0 or 1, and off
// again where it was off before and nobody else wants it. All supervisors of a network
// namespace hold a shared lock (flock(2)) on the file, so that the one that leaves sees
// the others. A second lock (F_OFD_SETLK of fcntl(2)) says that the setting was off before the first of
// them; whoever comes while it is held takes it too, so that the last one turns the setting off
// even if the one that had turned it on was killed. It stays on where all of them are killed.
// It is not safe for concurrent use.
type Switch struct {
	Path string // "/proc/sys/net/ipv4/tcp_migrate_req"

	file   *os.File // holds the locks; nil: not yet
	wasOff bool     // before the first supervisor
}

// On turns the setting on. It may be called again: somebody else may have turned it off. The
// error has fs.ErrNotExist in its chain where the kernel does not have the setting.
func (s *Switch) On() error {
	if s.file == nil {
		f, err := os.Open(s.Path)
		if err != nil {
			return err
		}
		s.file = f
		// Where the lock is refused, somebody is about to turn it off: the next call sets it right.
		_ = unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB)
	}
	on, err := isOn(s.Path)
	if err != nil {
		return err
	}
	if on {
		if s.othersSayOff() {
			s.sayOff()
		}
		return nil
	}
	if err := os.WriteFile(s.Path, []byte("1\n"), 0); err != nil {
		return fmt.Errorf("%w; it is to be set to 1", err)
	}
	s.sayOff()
	return nil
}

// sayOff remembers that the setting was off, and lets the others see it.
func (s *Switch) sayOff() {
	lock := unix.Flock_t{Type: unix.F_RDLCK, Whence: io.SeekStart, Len: 1}
	_ = unix.FcntlFlock(s.file.Fd(), unix.F_OFD_SETLK, &lock) // nobody ever has the other kind; without it the others do not know
	s.wasOff = true
}

// othersSayOff says whether another supervisor remembers that the setting was off.
func (s *Switch) othersSayOff() bool {
	lock := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart, Len: 1} // would that be in anybody's way?
	return unix.FcntlFlock(s.file.Fd(), unix.F_OFD_GETLK, &lock) == nil && lock.Type != unix.F_UNLCK
}

// Restore turns the setting off if it was off before the first supervisor and this is the last. It does
// nothing without On, and On may be called again after it.
func (s *Switch) Restore() error {
	if s.file == nil {
		return nil
	}
	var err error
	if s.wasOff && unix.Flock(int(s.file.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
		err = os.WriteFile(s.Path, []byte("0\n"), 0)
	}
	err = errors.Join(err, s.file.Close())
	s.file, s.wasOff = nil, false
	return err
}

// isOn reads a setting.
func isOn(path string) (bool, error) {
	// The file has no length and no poller could watch it, so package os would only cost time.
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd) //nolint:errcheck // it was only read
	var b [16]byte
	n, err := unix.Read(fd, b[:])
	if err != nil {
		return false, &fs.PathError{Op: "read", Path: path, Err: err}
	}
	return strings.TrimSpace(string(b[:n])) != "0", nil
}
