package activation

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
)

func TestPathModeAndOwner(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	for _, scheme := range []string{"unix", "unixgram", "unixpacket", "fifo"} {
		for _, mode := range []fs.FileMode{0, 0o600, 0o777, 0o622} {
			p := tempPath(t, "a/b/s")
			mustOpen(t, scheme+"://"+p, Options{Mode: mode, DirMode: 0o710, Owner: "0", Group: "root"})
			if mode == 0 {
				mode = 0o666
			}
			for name, want := range map[string]fs.FileMode{p: mode, filepath.Dir(p): 0o710, filepath.Dir(filepath.Dir(p)): 0o710} {
				st, err := os.Stat(name)
				if err != nil {
					t.Fatal(err)
				}
				if got := st.Mode().Perm(); got != want {
					t.Errorf("%s %s: got mode %o, want %o", scheme, name, got, want)
				}
			}
		}
	}
}

// The file never has a bit that was not asked for: here is the moment after bind(2), with no umask to help.
func TestPathModeFromTheStart(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	p := tempPath(t, "s")
	s := &Socket{spec: &Spec{Address: mustParse(t, "unix://"+p)}, addr: mustParse(t, "unix://"+p), fd: -1}
	if _, err := s.create(); err != nil {
		t.Fatal(err)
	}
	defer s.abandon()
	if err := unix.Fchmod(s.fd, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unix.Bind(s.fd, &unix.SockaddrUnix{Name: p}); err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(p)
	if err != nil {
		t.Fatal(err)
	}
	if got := st.Mode().Perm(); got != 0o600 {
		t.Errorf("got mode %o, want 600", got)
	}
}

func TestPathOwner(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces, nettest.RealRoot)
	for _, scheme := range []string{"unix", "fifo"} {
		p := tempPath(t, "s")
		mustOpen(t, scheme+"://"+p, Options{Owner: "daemon", Group: "54321"})
		var st unix.Stat_t
		if err := unix.Stat(p, &st); err != nil {
			t.Fatal(err)
		}
		if st.Uid != 1 || st.Gid != 54321 {
			t.Errorf("%s: got owner %d:%d, want 1:54321", scheme, st.Uid, st.Gid)
		}
	}
	_, err := Open(Spec{Address: mustParse(t, "unix://"+tempPath(t, "s")), Options: Options{Owner: "no-such-user"}})
	if err == nil || !strings.Contains(err.Error(), "look up user no-such-user: user: unknown user no-such-user") {
		t.Errorf("got %v", err)
	}
	_, err = Open(Spec{Address: mustParse(t, "unix://"+tempPath(t, "s")), Options: Options{Group: "no-such-group"}})
	if err == nil || !strings.Contains(err.Error(), "look up group no-such-group: ") {
		t.Errorf("got %v", err)
	}
}

func TestPathStale(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	for _, scheme := range []string{"unix", "unixgram", "unixpacket"} {
		address := scheme + "://" + tempPath(t, "s")
		first := mustOpen(t, address, Options{})
		if err := first.Close(); err != nil {
			t.Fatal(err)
		}
		second := mustOpen(t, address, Options{}) // the file of the first is still there
		for _, other := range []string{"unix", "unixgram", "unixpacket"} {
			_, err := Open(Spec{Address: mustParse(t, other+"://"+second.Address().Path)})
			if !errors.Is(err, unix.EADDRINUSE) || !strings.HasSuffix(err.Error(), ": address already in use: another process holds the socket") {
				t.Errorf("%s over %s: got %v", other, scheme, err)
			} else if !MayOpenLater(err) {
				t.Errorf("%s over %s: it may go away", other, scheme)
			}
		}
		if ok, err := second.Pending(); ok || err != nil {
			t.Errorf("%s: asking whether it lives left something in its queue: %v, %v", scheme, ok, err)
		}
	}
}

func TestPathIsNoSocket(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	file, link := tempPath(t, "f"), tempPath(t, "l")
	if err := os.WriteFile(file, []byte("precious"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/nowhere/at/all", link); err != nil {
		t.Fatal(err)
	}
	tests := map[string]string{
		"unix://" + file: "bind unix://" + file + ": file exists: it is not a socket",
		"unix://" + link: "bind unix://" + link + ": file exists: it is not a socket",
		"fifo://" + file: "open fifo://" + file + ": file exists: it is not a FIFO",
		"fifo://" + link: "open fifo://" + link + ": file exists: it is not a FIFO",
	}
	for address, want := range tests {
		_, err := Open(Spec{Address: mustParse(t, address), Options: Options{RemoveOnStop: true}})
		if err == nil || err.Error() != want || MayOpenLater(err) {
			t.Errorf("got %v, may open later %v, want %s", err, MayOpenLater(err), want)
		}
	}
	if b, err := os.ReadFile(file); string(b) != "precious" {
		t.Errorf("the file was touched: %q, %v", b, err)
	}
	if _, err := os.Readlink(link); err != nil {
		t.Errorf("the link was touched: %v", err)
	}
}

func TestRemoveOnStop(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	exists := func(p string) bool { _, err := os.Lstat(p); return err == nil }
	for _, scheme := range []string{"unix", "fifo"} {
		for _, remove := range []bool{false, true} {
			p, l := tempPath(t, "s"), tempPath(t, "d/l")
			s := mustOpen(t, scheme+"://"+p, Options{RemoveOnStop: remove, Symlinks: []string{l}})
			if to, err := os.Readlink(l); to != p {
				t.Fatalf("got link to %q, %v, want %q", to, err, p)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			if exists(p) == remove || exists(l) == remove {
				t.Errorf("%s, RemoveOnStop %v: file exists: %v, link exists: %v", scheme, remove, exists(p), exists(l))
			}
		}
		// Somebody else has taken the path since.
		p := tempPath(t, "s")
		s := mustOpen(t, scheme+"://"+p, Options{RemoveOnStop: true})
		if err := os.Remove(p); err != nil {
			t.Fatal(err)
		}
		mustOpen(t, "unix://"+p, Options{})
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if !exists(p) {
			t.Errorf("%s: the socket of another was removed", scheme)
		}
	}
}

func TestSymlinks(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	p, old, file := tempPath(t, "s"), tempPath(t, "old"), tempPath(t, "file")
	if err := errors.Join(os.Symlink("/elsewhere", old), os.WriteFile(file, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	s := mustOpen(t, "unix://"+p, Options{Symlinks: []string{old, file}, RemoveOnStop: true})
	if to, _ := os.Readlink(old); to != p {
		t.Errorf("got link to %q, want %q", to, p)
	}
	want := fmt.Sprintf("make symbolic link %s to unix://%s: file exists", file, p)
	if w := s.Warnings(); len(w) != 1 || w[0].Error() != want {
		t.Errorf("got %v, want %s", w, want)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Lstat(file); err != nil || !st.Mode().IsRegular() {
		t.Errorf("the file in the place of the link was touched: %v", err)
	}
}

func TestFIFO(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	p := tempPath(t, "f")
	s := mustOpen(t, "fifo://"+p, Options{Mode: 0o620})
	checkFlags(t, s)
	for range 2 { // writers that come and go leave no end of file behind
		if ok, err := s.Pending(); ok || err != nil {
			t.Fatalf("got %v, %v of an empty FIFO", ok, err)
		}
		if err := os.WriteFile(p, []byte("x"), 0); err != nil {
			t.Fatal(err)
		}
		if ok, err := s.Pending(); !ok || err != nil {
			t.Fatalf("got %v, %v of a FIFO with a byte", ok, err)
		}
		var b [1]byte
		if n, err := unix.Read(s.FD(), b[:]); n != 1 {
			t.Fatal(n, err)
		}
	}
	if _, _, err := s.Accept(); err == nil || KindOfAcceptError(err) != AcceptFailed {
		t.Errorf("got %v from Accept", err)
	}
	again := mustOpen(t, "fifo://"+p, Options{Mode: 0o620})
	if again.Inode() != s.Inode() {
		t.Error("the FIFO was replaced")
	}
	_, err := Open(Spec{Address: mustParse(t, "fifo://"+p)})
	if want := "open fifo://" + p + ": file exists: it has mode 0620, not 0666"; err == nil || err.Error() != want || !errors.Is(err, unix.EEXIST) {
		t.Errorf("got %v, want %s", err, want)
	}
	_, err = Open(Spec{Address: mustParse(t, "fifo://"+p), Options: Options{Mode: 0o620, Owner: "4321"}})
	if want := "open fifo://" + p + ": file exists: it belongs to user 0, not 4321"; err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
	_, err = Open(Spec{Address: mustParse(t, "fifo://"+p), Options: Options{Mode: 0o620, Group: "4321"}})
	if want := "open fifo://" + p + ": file exists: it belongs to group 0, not 4321"; err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

// Whoever may write to the directory cannot make us change another file by putting it in
// the place of the new FIFO. The other file is a hard link, as one may make of a file
// of somebody else's.
func TestFIFOSwapped(t *testing.T) {
	t.Parallel()
	for _, kind := range []uint32{unix.S_IFREG, unix.S_IFIFO} {
		p := tempPath(t, "f")
		victim, link := p+".victim", p+".link"
		if err := unix.Mknod(victim, kind|0o600, 0); err != nil {
			t.Fatal(err)
		}
		stop, ended := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(ended)
			for {
				select {
				case <-stop:
					return
				default:
				}
				// The link takes the place of the FIFO as soon as there is one.
				_ = os.Link(victim, link)
				for range 1000 {
					if unix.Renameat2(unix.AT_FDCWD, link, unix.AT_FDCWD, p, unix.RENAME_EXCHANGE) == nil {
						break
					}
				}
				_ = os.Remove(link)
			}
		}()
		for i := range 1000 {
			s, err := Open(Spec{Address: mustParse(t, "fifo://"+p), Options: Options{Mode: 0o666}})
			if err == nil {
				err = s.Close()
			}
			_ = os.Remove(p)
			st, statErr := os.Stat(victim)
			if statErr != nil {
				t.Fatal(statErr)
			}
			if st.Mode().Perm() != 0o600 {
				t.Errorf("try %d: the other file has mode %v (%v)", i, st.Mode(), err)
				break
			}
		}
		close(stop)
		<-ended
	}
}

// Only a FIFO is opened, and no symbolic link is followed.
func TestOpenNode(t *testing.T) {
	t.Parallel()
	p := tempPath(t, "f")
	if err := errors.Join(unix.Mkfifo(p, 0o600), os.Symlink(p, p+".link"), os.WriteFile(p+".file", nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	for _, other := range []string{p + ".link", p + ".file", "/dev/null"} {
		if fd, err := openNode(other, &st); fd != -1 || !errors.Is(err, unix.EEXIST) {
			t.Errorf("%s: got descriptor %d, %v, want EEXIST", other, fd, err)
		}
	}
	fd, err := openNode(p, &st)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if st.Mode != unix.S_IFIFO|0o600 {
		t.Errorf("got mode %o", st.Mode)
	}
}

func TestModeBits(t *testing.T) {
	t.Parallel()
	if got := modeBits(0o750 | fs.ModeSetuid | fs.ModeSetgid | fs.ModeSticky); got != 0o7750 {
		t.Errorf("got %o, want 7750", got)
	}
}
