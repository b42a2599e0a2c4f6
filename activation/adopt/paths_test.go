package adopt

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"hibergate/activation"
)

// shortDir is a directory whose sockets have short paths, which t.TempDir does not promise.
func shortDir(tb testing.TB) string {
	tb.Helper()
	dir, err := os.MkdirTemp("", "hg") //nolint:usetesting // a socket's path must be short
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func (p *program) unlink(path string) error {
	p.t.Helper()
	return p.do(sys(unix.SYS_UNLINKAT, unix.AT_FDCWD, append([]byte(path), 0), 0)).failure()
}

func (p *program) chdir(dir string) {
	p.t.Helper()
	p.must("chdir", p.do(sys(unix.SYS_CHDIR, append([]byte(dir), 0))))
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return !errors.Is(err, os.ErrNotExist)
}

// A path is ours however the program writes it, and stays where it is.
func TestBindPath(t *testing.T) {
	t.Parallel()
	dir := shortDir(t)
	for _, name := range []string{"sub", "other/deep", "far"} {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for from, to := range map[string]string{"link": "sub", "far/back": dir + "/sub", "hop": "other/deep", "other/up": "../sub"} {
		if err := os.Symlink(to, filepath.Join(dir, from)); err != nil {
			t.Fatal(err)
		}
	}
	s := mustOpen(t, "unix://"+dir+"/sub/s", activation.Options{})
	p := mustStart(t, start{paths: true})
	_, e := p.adopt(Options{Have: have(s)})
	p.chdir(dir)
	for _, name := range []string{
		dir + "/sub/s", "sub/s", "./sub/s", "sub//s", "sub/./s", "sub/../sub/s", "link/s", dir + "/link/s", "far/back/s", dir + "/far/back/s",
		"other/up/s", "hop/../up/s", dir + "/hop/../up/s", "//" + dir[1:] + "/sub/s",
	} {
		client := mustDial(t, s, "hello")
		wantErrno(t, "unlink "+name, p.unlink(name), 0)
		fd := p.socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
		wantErrno(t, name, p.bind(fd, unixPath(name)), 0)
		p.ours(fd, s, true)
		p.mustListen(fd, 1)
		e.want(name, Event{Kind: Bound, Socket: s}, Event{Kind: Listening, Socket: s})
		p.serve(fd)
		if n, err := unix.Read(client, make([]byte, 10)); n != 5 || err != nil {
			t.Errorf("%s: got %d bytes, %v", name, n, err)
		}
		p.close(fd)
	}
	p.chdir(dir + "/sub")
	for _, name := range []string{"s", "./s"} {
		wantErrno(t, "unlink "+name, p.unlink(name), 0)
		fd := p.socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
		wantErrno(t, name, p.bind(fd, unixPath(name)), 0)
		p.ours(fd, s, true)
	}
	e.take()
	if !exists(s.Address().Path) {
		t.Error("its path was removed")
	}

	// These are others, though it looks as if they were not.
	p.chdir(dir)
	for _, name := range []string{"other/s", "hop/../s", dir + "/hop/../s", "s", "sub/t", "sub/S", "link/../s"} {
		fd := p.socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
		wantErrno(t, name, p.bind(fd, unixPath(name)), 0)
		p.ours(fd, s, false)
		wantErrno(t, "unlink "+name, p.unlink(name), 0)
	}
	for name, want := range map[string]unix.Errno{"sub/s/": unix.EADDRINUSE, "sub/s/.": unix.ENOTDIR, "no/s": unix.ENOENT, "sub/s/x": unix.ENOTDIR} {
		fd := p.socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
		if err := p.bind(fd, unixPath(name)); err == nil {
			t.Errorf("%s: bound", name)
		} else if name != "sub/s/" {
			wantErrno(t, name, err, want)
		}
	}
	for kind, want := range map[int]unix.Errno{unix.SOCK_DGRAM: unix.EADDRINUSE, unix.SOCK_SEQPACKET: unix.EADDRINUSE} {
		fd := p.socket(unix.AF_UNIX, kind, 0)
		wantErrno(t, "another type", p.bind(fd, unixPath(dir+"/sub/s")), want)
	}
	e.want("others")
	if !exists(s.Address().Path) {
		t.Error("its path was removed")
	}
}

// A path is the program's own: from its root, in its directories.
func TestBindPathInOtherRoot(t *testing.T) {
	t.Parallel()
	dir := shortDir(t)
	for _, name := range []string{"root/run", "run"} {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("/run", filepath.Join(dir, "root/link")); err != nil { // to that of the program
		t.Fatal(err)
	}
	s := mustOpen(t, "unix://"+dir+"/root/run/s", activation.Options{})
	p := mustStart(t, start{paths: true})
	_, e := p.adopt(Options{Have: have(s), Learn: learn("auto")})
	p.must("chroot", p.do(sys(unix.SYS_CHROOT, []byte(dir+"/root\x00"))))
	p.chdir("/")
	for _, name := range []string{"/run/s", "run/s", "/link/s", "/../run/s"} {
		wantErrno(t, "unlink "+name, p.unlink(name), 0)
		fd := p.socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
		wantErrno(t, name, p.bind(fd, unixPath(name)), 0)
		p.ours(fd, s, true)
		e.want(name, Event{Kind: Bound, Socket: s})
	}
	if !exists(s.Address().Path) {
		t.Error("its path was removed")
	}
	// What it binds there is not where we would look for it.
	fd := p.socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	p.mustBind(fd, unixPath("/run/t"))
	p.mustListen(fd, 1)
	e.want("not seen", Event{Kind: Elsewhere, Text: "unix:///run/t"})
}

// A removal is only answered where it is of a socket of ours.
func TestUnlink(t *testing.T) {
	t.Parallel()
	dir := shortDir(t)
	s := mustOpen(t, "unix://"+dir+"/s", activation.Options{})
	gram := mustOpen(t, "unixgram://"+dir+"/gram", activation.Options{})
	gone := mustOpen(t, "unix://"+dir+"/gone", activation.Options{})
	abstract := mustOpen(t, "unix:@"+dir+"/abstract", activation.Options{})
	if err := os.Remove(dir + "/gone"); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"gone", "file", "long"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"d", "d/s", "d/t"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("s", dir+"/d/link"); err != nil {
		t.Fatal(err)
	}
	p := mustStart(t, start{paths: true})
	_, e := p.adopt(Options{Have: have(s, gram, gone, abstract)})
	at := p.must("open", p.do(sys(unix.SYS_OPENAT, unix.AT_FDCWD, []byte(dir+"\x00"), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC)))
	sub := p.must("open", p.do(sys(unix.SYS_OPENAT, unix.AT_FDCWD, []byte(dir+"/d\x00"), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC)))
	p.chdir(dir + "/d")
	unlinkat := func(at int, name string, flags int) order {
		return sys(unix.SYS_UNLINKAT, at, []byte(name+"\x00"), flags)
	}
	const bad = 1
	for name, tt := range map[string]struct {
		call order
		want unix.Errno
		gone string
	}{
		"of ours":                             {unlinkat(unix.AT_FDCWD, dir+"/s", 0), 0, ""},
		"of ours, from a directory":           {unlinkat(at, "s", 0), 0, ""},
		"of ours, from the working directory": {unlinkat(unix.AT_FDCWD, "../s", 0), 0, ""},
		"of ours, from another directory":     {unlinkat(sub, "../s", 0), 0, ""},
		"of ours, absolute, no directory":     {unlinkat(999, dir+"/s", 0), 0, ""},
		"of ours, datagrams":                  {unlinkat(at, "gram", 0), 0, ""},
		"of a file":                           {unlinkat(at, "file", 0), 0, "file"},
		"of a file that took the place":       {unlinkat(at, "gone", 0), 0, "gone"},
		"of a link":                           {unlinkat(sub, "link", 0), 0, "d/link"},
		"of a directory":                      {unlinkat(at, "d/s", 0), unix.EISDIR, ""},
		"of a directory, rightly":             {unlinkat(at, "d/t", unix.AT_REMOVEDIR), 0, "d/t"},
		"of ours as a directory":              {unlinkat(at, "s", unix.AT_REMOVEDIR), unix.ENOTDIR, ""},
		"of nothing":                          {unlinkat(at, "nothing", 0), unix.ENOENT, ""},
		"of no name":                          {unlinkat(at, "", 0), unix.ENOENT, ""},
		"from no directory":                   {unlinkat(999, "s", 0), unix.EBADF, ""},
		"of no memory":                        {sys(unix.SYS_UNLINKAT, unix.AT_FDCWD, bad, 0), unix.EFAULT, ""},
		"of ours, as if it was a directory":   {unlinkat(at, "s/", 0), unix.ENOTDIR, ""},
		"of too long a name":                  {unlinkat(at, strings.Repeat("x", 5000)+"/s", 0), unix.ENAMETOOLONG, ""},
		"of too long a path":                  {unlinkat(at, strings.Repeat("d/../", 1000)+"s", 0), unix.ENAMETOOLONG, ""},
		"of a long path, which is ours":       {unlinkat(at, strings.Repeat("d/../", 800)+"s", 0), 0, ""},
		"of a long path, which is not":        {unlinkat(at, strings.Repeat("d/../", 800)+"long", 0), 0, "long"},
	} {
		wantErrno(t, name, p.do(tt.call).failure(), tt.want)
		if tt.gone != "" && exists(filepath.Join(dir, tt.gone)) {
			t.Errorf("%s: %s is still there", name, tt.gone)
		}
		e.want(name)
	}
	for _, name := range []string{"s", "gram"} {
		if !exists(filepath.Join(dir, name)) {
			t.Errorf("%s was removed", name)
		}
	}
	if _, err := os.Lstat(dir + "/d"); err != nil {
		t.Error(err)
	}
	// A string may end at the end of a page, after which there is nothing.
	const page = 4096
	memory := uint64(p.must("mmap", p.do(sys(unix.SYS_MMAP, 0, 2*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS, -1, 0))))
	p.must("munmap", p.do(sys(unix.SYS_MUNMAP, memory+page, page)))
	zero := p.must("open", p.do(sys(unix.SYS_MEMFD_CREATE, []byte("text\x00"), unix.MFD_CLOEXEC)))
	put := func(text string) uint64 {
		p.must("write", p.do(sys(unix.SYS_PWRITE64, zero, []byte(text), len(text), 0)))
		at := memory + page - uint64(len(text))
		p.must("read", p.do(sys(unix.SYS_PREAD64, zero, at, len(text), 0)))
		return at
	}
	wantErrno(t, "unlink at the end", p.do(sys(unix.SYS_UNLINKAT, unix.AT_FDCWD, put(dir+"/s\x00"), 0)).failure(), 0)
	wantErrno(t, "unlink of a string without an end", p.do(sys(unix.SYS_UNLINKAT, unix.AT_FDCWD, put(dir+"/s"), 0)).failure(), unix.EFAULT)
	if !exists(dir + "/s") {
		t.Error("it was removed")
	}
}

// Without paths in the filter, the program removes what it likes.
func TestUnlinkWithoutPaths(t *testing.T) {
	t.Parallel()
	dir := shortDir(t)
	s := mustOpen(t, "unix://"+dir+"/s", activation.Options{})
	p := mustStart(t, start{})
	p.adopt(Options{Have: have(s)})
	wantErrno(t, "unlink", p.unlink(dir+"/s"), 0)
	if exists(dir + "/s") {
		t.Error("it is still there")
	}
}

func TestBindAbstract(t *testing.T) {
	t.Parallel()
	name := fmt.Sprintf("@hg-abstract-%d", freshPort())
	stream, packet, gram := mustOpen(t, "unix:"+name, activation.Options{}), mustOpen(t, "unixpacket:"+name, activation.Options{}), mustOpen(t, "unixgram:"+name, activation.Options{})
	p := mustStart(t, start{paths: true})
	_, e := p.adopt(Options{Have: have(stream, packet, gram)})
	for kind, s := range map[int]*activation.Socket{unix.SOCK_STREAM: stream, unix.SOCK_SEQPACKET: packet, unix.SOCK_DGRAM: gram} {
		fd := p.socket(unix.AF_UNIX, kind, 0)
		p.mustBind(fd, unixPath(name))
		p.ours(fd, s, true)
		e.want(name, Event{Kind: Bound, Socket: s})
		// A NUL is a byte of the name.
		for _, other := range []string{name + "\x00", name + "x", name[:len(name)-1], "@"} {
			fd := p.socket(unix.AF_UNIX, kind, 0)
			wantErrno(t, other, p.bind(fd, unixPath(other)), 0)
			p.ours(fd, s, false)
		}
		// The name as a path is a file.
		dir := shortDir(t)
		p.chdir(dir)
		fd = p.socket(unix.AF_UNIX, kind, 0)
		wantErrno(t, "as a path", p.bind(fd, append(unixPath("x")[:2], name+"\x00"...)), 0)
		p.ours(fd, s, false)
		e.want("others")
	}
	// As one of a Unix socket that has no path it is asked about too.
	fd := p.socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	wantErrno(t, "a name by the kernel", p.bind(fd, unixPath("x")[:2]), 0)
	p.mustListen(fd, 1)
	if got := e.take(); len(got) != 1 || got[0].Kind != Elsewhere {
		t.Errorf("got events %v, want Elsewhere", list(got))
	}
}

// Clients see who listens (SO_PEERCRED): the program.
func TestListenPathCredentials(t *testing.T) {
	t.Parallel()
	dir := shortDir(t)
	s := mustOpen(t, "unix://"+dir+"/s", activation.Options{})
	p := mustStart(t, start{paths: true})
	p.adopt(Options{Have: have(s)})
	fd := p.socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	p.mustBind(fd, unixPath(dir+"/s"))
	p.mustListen(fd, 1)
	client := mustDial(t, s, "")
	cred, err := unix.GetsockoptUcred(client, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil || int(cred.Pid) != p.cmd.Process.Pid {
		t.Errorf("got %+v, %v, want pid %d", cred, err, p.cmd.Process.Pid)
	}
}

// FIFOs and IP sockets have no paths that a program could bind.
func TestPathsOfOthers(t *testing.T) {
	t.Parallel()
	dir := shortDir(t)
	fifo := mustOpen(t, "fifo://"+dir+"/fifo", activation.Options{})
	ip := mustOpen(t, "tcp://127.0.0.1:0", activation.Options{})
	p := mustStart(t, start{paths: true})
	_, e := p.adopt(Options{Have: have(fifo, ip)})
	fd := p.socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	wantErrno(t, "a FIFO", p.bind(fd, unixPath(dir+"/fifo")), unix.EADDRINUSE)
	wantErrno(t, "another", p.bind(fd, unixPath(dir+"/s")), 0)
	wantErrno(t, "its removal", p.unlink(dir+"/s"), 0)
	wantErrno(t, "removal of a FIFO", p.unlink(dir+"/fifo"), 0)
	if exists(dir+"/s") || exists(dir+"/fifo") {
		t.Error("something was not removed")
	}
	e.want("nothing")
}
