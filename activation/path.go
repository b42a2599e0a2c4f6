package activation

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path"
	"strconv"

	"golang.org/x/sys/unix"
)

// node tells one file from every other that exists at the same time.
type node struct{ dev, ino uint64 }

// nodeOf holds as long as the file exists or is open; later the inode may be another's.
func nodeOf(st *unix.Stat_t) node { return node{uint64(st.Dev), st.Ino} } //nolint:unconvert // narrower on some machines

// fileLook is what a file is like.
type fileLook struct {
	mode     uint32 // as chmod(2) takes it
	uid, gid uint32
}

// fill sets the options that are not set, so that a file that is made after them looks like this one.
func (l *fileLook) fill(o *Options) {
	if o.Mode == 0 {
		o.Mode = fs.FileMode(l.mode & 0o777)
	}
	if o.Owner == "" {
		o.Owner = strconv.FormatUint(uint64(l.uid), 10)
	}
	if o.Group == "" {
		o.Group = strconv.FormatUint(uint64(l.gid), 10)
	}
}

// bindPath binds a Unix socket to its path. The file has no more permissions than
// asked for at any moment.
func (s *Socket) bindPath() error {
	p, o := s.addr.Path, &s.spec.Options
	uid, gid, err := owner(o)
	if err != nil {
		return s.failure("bind", err)
	}
	if err := makeParents(p, o.dirMode()); err != nil {
		return s.failure("make directory for", err)
	}
	// bind(2) makes the file with the mode of the socket's own inode, less the umask. The umask
	// belongs to the whole process, so it stays as it is and chmod gives back what it took.
	if err := unix.Fchmod(s.fd, o.mode()); err != nil {
		return s.failure("set mode of", err)
	}
	sa := &unix.SockaddrUnix{Name: p}
	err = unix.Bind(s.fd, sa)
	if errors.Is(err, unix.EADDRINUSE) {
		if err := removeStale(p); err != nil {
			return s.failure("bind", err)
		}
		err = unix.Bind(s.fd, sa)
	}
	if err != nil {
		return s.failure("bind", err)
	}
	if s.file, err = settle(p, unix.S_IFSOCK, o.mode(), uid, gid); err != nil {
		return s.failure("set mode and owner of", err)
	}
	return nil
}

// openFIFO makes the FIFO, or opens the one that is there when it is as it would be made.
func (s *Socket) openFIFO() error {
	p, o := s.addr.Path, &s.spec.Options
	uid, gid, err := owner(o)
	if err != nil {
		return s.failure("open", err)
	}
	if err := makeParents(p, o.dirMode()); err != nil {
		return s.failure("make directory for", err)
	}
	err = unix.Mkfifo(p, o.mode())
	made := err == nil
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return s.failure("make", err)
	}
	var st unix.Stat_t
	if s.fd, err = openNode(p, &st); err != nil {
		return s.failure("open", err)
	}
	if made {
		// Whoever may write to the directory may have put another FIFO there since. Ours is nobody
		// else's and has no second name.
		if int(st.Uid) != os.Geteuid() || st.Nlink != 1 {
			return s.failure("open", fmt.Errorf("%w: the path has just changed", unix.EEXIST))
		}
		s.file = nodeOf(&st)
		if err := errors.Join(unix.Fchown(s.fd, uid, gid), unix.Fchmod(s.fd, o.mode())); err != nil {
			return s.failure("set mode and owner of", err)
		}
	} else if err := checkFIFO(&st, o.mode(), uid, gid); err != nil {
		return s.failure("open", err)
	}
	s.file, s.inode = nodeOf(&st), st.Ino
	s.setPipeSize()
	return nil
}

// openNode opens the FIFO at p, and only a FIFO, and fills st in. It is held by an O_PATH
// descriptor from before it is looked at until it is open: to open a device can
// have effects, and the path may lead to another file at any moment.
func openNode(p string, st *unix.Stat_t) (int, error) {
	held, err := unix.Open(p, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	defer unix.Close(held) //nolint:errcheck // O_PATH: there is nothing to lose
	if err := unix.Fstat(held, st); err != nil {
		return -1, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFIFO {
		return -1, fmt.Errorf("%w: it is not a FIFO", unix.EEXIST)
	}
	// For reading and writing, so that it never ends when the last writer leaves (fifo(7)).
	fd, err := unix.Open("/proc/self/fd/"+strconv.Itoa(held), unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	var now unix.Stat_t
	if err := unix.Fstat(fd, &now); err != nil || now.Mode&unix.S_IFMT != unix.S_IFIFO || nodeOf(&now) != nodeOf(st) {
		return -1, errors.Join(fmt.Errorf("%w: the path has just changed", unix.EEXIST), err, unix.Close(fd))
	}
	*st = now
	return fd, nil
}

// setPipeSize changes the size of the pipe itself, for everybody who has it open
// (F_SETPIPE_SZ, fcntl(2)).
func (s *Socket) setPipeSize() {
	size := s.spec.Options.PipeSize
	if size <= 0 {
		return
	}
	if _, err := unix.FcntlInt(uintptr(s.fd), unix.F_SETPIPE_SZ, size); err != nil {
		s.warn("set pipe size of", err)
	}
}

// checkFIFO says why an existing FIFO may not be used: someone else could own
// it, or more people could write to it than the user believes.
func checkFIFO(st *unix.Stat_t, mode uint32, uid, gid int) error {
	if uid < 0 {
		uid = os.Geteuid()
	}
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFIFO:
		return fmt.Errorf("%w: it is not a FIFO", unix.EEXIST)
	case st.Mode&0o7777 != mode:
		return fmt.Errorf("%w: it has mode %04o, not %04o", unix.EEXIST, st.Mode&0o7777, mode)
	case int(st.Uid) != uid:
		return fmt.Errorf("%w: it belongs to user %d, not %d", unix.EEXIST, st.Uid, uid)
	case gid >= 0 && int(st.Gid) != gid:
		return fmt.Errorf("%w: it belongs to group %d, not %d", unix.EEXIST, st.Gid, gid)
	}
	return nil
}

// removeStale removes the file of a Unix socket that no process holds any more.
func removeStale(p string) error {
	var st, now unix.Stat_t
	if err := unix.Lstat(p, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		return fmt.Errorf("%w: it is not a socket", unix.EEXIST) // nobody will leave it
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd) //nolint:errcheck // it was only asked with
	// The kernel looks for the holder before it compares the types, so a datagram socket asks a
	// listener without leaving a connection in its queue: EPROTOTYPE means that it lives.
	switch err := unix.Connect(fd, &unix.SockaddrUnix{Name: p}); {
	case err == nil, errors.Is(err, unix.EPROTOTYPE), errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w: another process holds the socket", unix.EADDRINUSE)
	case !errors.Is(err, unix.ECONNREFUSED):
		return fmt.Errorf("%w: cannot tell whether another process holds the socket: %w", unix.EADDRINUSE, err)
	}
	if err := unix.Lstat(p, &now); err != nil || nodeOf(&now) != nodeOf(&st) {
		return fmt.Errorf("%w: the path has just changed", unix.EADDRINUSE)
	}
	return unix.Unlink(p)
}

// settle gives a file its owner and its exact mode, and returns which file it
// is. It never follows a symbolic link; a uid or gid of -1 stays as it is.
func settle(p string, kind, mode uint32, uid, gid int) (node, error) {
	fd, err := unix.Open(p, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return node{}, err
	}
	defer unix.Close(fd) //nolint:errcheck // O_PATH: there is nothing to lose
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return node{}, err
	}
	if st.Mode&unix.S_IFMT != kind {
		return node{}, fmt.Errorf("%w: the path has just changed", unix.EEXIST)
	}
	if uid >= 0 || gid >= 0 {
		if err := unix.Fchownat(fd, "", uid, gid, unix.AT_EMPTY_PATH); err != nil {
			return nodeOf(&st), err
		}
	}
	if st.Mode&0o7777 != mode {
		// fchmod(2) refuses O_PATH descriptors; their name in /proc leads to the same file.
		if err := unix.Chmod("/proc/self/fd/"+strconv.Itoa(fd), mode); err != nil {
			return nodeOf(&st), err
		}
	}
	return nodeOf(&st), nil
}

// makeParents makes the directories that lead to p, those that are missing with
// this very mode.
func makeParents(p string, mode uint32) error {
	dir := path.Dir(p)
	if dir == "/" {
		return nil
	}
	err := unix.Mkdir(dir, mode)
	if errors.Is(err, unix.ENOENT) {
		if err := makeParents(dir, mode); err != nil {
			return err
		}
		err = unix.Mkdir(dir, mode)
	}
	if err == nil {
		_, err = settle(dir, unix.S_IFDIR, mode, -1, -1) // what the umask took
		return err
	}
	// Where a directory is there, mkdir(2) may say EEXIST, but also EROFS or EACCES.
	var st unix.Stat_t
	if unix.Stat(dir, &st) == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", dir, err)
}

// link makes the symbolic links. What is in their place is only replaced when it
// is a symbolic link itself. A failure is a warning: the socket works without.
func (s *Socket) link() {
	for _, l := range s.spec.Options.Symlinks {
		if !s.addr.Network.Path() || s.addr.Abstract() {
			return
		}
		if to, err := os.Readlink(l); err == nil && to != s.addr.Path {
			err = unix.Unlink(l)
			if err != nil {
				s.warn("replace symbolic link "+l+" to", err)
				continue
			}
		} else if err == nil {
			continue
		}
		err := makeParents(l, s.spec.Options.dirMode())
		if err == nil {
			err = unix.Symlink(s.addr.Path, l)
		}
		if err != nil {
			s.warn("make symbolic link "+l+" to", err)
		}
	}
}

// removeFile removes the path where it still is the file that was bound.
func (s *Socket) removeFile() error {
	var st unix.Stat_t
	if s.file == (node{}) || unix.Lstat(s.addr.Path, &st) != nil || nodeOf(&st) != s.file {
		return nil
	}
	if err := unix.Unlink(s.addr.Path); err != nil {
		return s.failure("remove", err)
	}
	s.file = node{}
	return nil
}

// removeLinks removes the symbolic links that still lead to the path.
func (s *Socket) removeLinks() error {
	var errs []error
	for _, l := range s.spec.Options.Symlinks {
		if to, err := os.Readlink(l); err != nil || to != s.addr.Path {
			continue
		}
		if err := unix.Unlink(l); err != nil {
			errs = append(errs, s.failure("remove symbolic link "+l+" to", err))
		}
	}
	return errors.Join(errs...)
}

// mode is the mode of the file, as chmod(2) takes it.
func (o *Options) mode() uint32 {
	if o.Mode == 0 {
		return 0o666
	}
	return modeBits(o.Mode)
}

// dirMode is the mode of directories that have to be made.
func (o *Options) dirMode() uint32 {
	if o.DirMode == 0 {
		return 0o755
	}
	return modeBits(o.DirMode)
}

// modeBits turns a FileMode into what chmod(2) takes.
func modeBits(m fs.FileMode) uint32 {
	bits := uint32(m.Perm())
	if m&fs.ModeSetuid != 0 {
		bits |= unix.S_ISUID
	}
	if m&fs.ModeSetgid != 0 {
		bits |= unix.S_ISGID
	}
	if m&fs.ModeSticky != 0 {
		bits |= unix.S_ISVTX
	}
	return bits
}

// owner looks up the user and group of a path; -1 where nothing is asked for.
func owner(o *Options) (uid, gid int, err error) {
	uid, err = lookUp(o.Owner, func(name string) (string, error) {
		u, err := user.Lookup(name)
		if err != nil {
			return "", err
		}
		return u.Uid, nil
	})
	if err != nil {
		return -1, -1, fmt.Errorf("look up user %s: %w", o.Owner, err)
	}
	gid, err = lookUp(o.Group, func(name string) (string, error) {
		g, err := user.LookupGroup(name)
		if err != nil {
			return "", err
		}
		return g.Gid, nil
	})
	if err != nil {
		return -1, -1, fmt.Errorf("look up group %s: %w", o.Group, err)
	}
	return uid, gid, nil
}

// lookUp takes a number as it is, also where no such user or group exists, and asks
// find for the number of a name.
func lookUp(name string, find func(string) (string, error)) (int, error) {
	if name == "" {
		return -1, nil
	}
	number := name
	if _, err := strconv.ParseUint(name, 10, 31); err != nil {
		if number, err = find(name); err != nil {
			return -1, err
		}
	}
	return strconv.Atoi(number)
}
