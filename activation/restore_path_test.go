package activation

import (
	"errors"
	"os"
	"path"
	"testing"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
)

// A process that removes the path, or puts another socket there that nobody holds any more,
// loses nothing for those who are in the queue, and nothing for those to come.
func TestRestorePath(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	for _, network := range []string{"unix", "unixpacket", "unixgram", "fifo"} {
		for _, how := range []string{"removed", "replaced", "removed with its directory"} {
			t.Run(network+" "+how, func(t *testing.T) {
				t.Parallel()
				p := tempPath(t, "d/s")
				s := mustOpen(t, network+"://"+p, Options{Mode: 0o640, RemoveOnStop: true})
				fd := s.FD()
				if repaired, err := s.Restore(); repaired != "" || err != nil {
					t.Fatalf("got %q, %v of a sound one", repaired, err)
				}
				arrive := func() {
					if network == "fifo" {
						out, err := os.OpenFile(p, os.O_WRONLY|unix.O_NONBLOCK, 0)
						if err != nil {
							t.Fatal(err)
						}
						defer out.Close()
						if _, err := out.Write([]byte("x")); err != nil {
							t.Fatal(err)
						}
						return
					}
					client := mustDial(t, s)
					if _, err := unix.Write(client, []byte("x")); err != nil {
						t.Fatal(err)
					}
				}
				take := func() {
					if pending, err := s.Pending(); !pending || err != nil {
						t.Fatalf("got %v, %v, want what arrived", pending, err)
					}
					from := s.FD()
					if s.Address().Network.Connections() {
						conn, _, err := s.Accept()
						if err != nil {
							t.Fatal(err)
						}
						defer unix.Close(conn)
						from = conn
					}
					var b [8]byte
					if n, err := unix.Read(from, b[:]); n != 1 || err != nil {
						t.Fatalf("got %d bytes, %v", n, err)
					}
				}
				arrive()
				if err := os.Remove(p); err != nil {
					t.Fatal(err)
				}
				want := "its path was removed"
				switch how {
				case "replaced":
					want = "its path was replaced"
					if network == "fifo" {
						if err := errors.Join(unix.Mkfifo(p, 0o600), os.Chmod(p, 0o640)); err != nil {
							t.Fatal(err)
						}
						break
					}
					other, err := Open(Spec{Address: s.Address()})
					if err != nil {
						t.Fatal(err)
					}
					if err := other.Close(); err != nil {
						t.Fatal(err)
					}
				case "removed with its directory":
					if err := os.Remove(path.Dir(p)); err != nil {
						t.Fatal(err)
					}
				}
				if repaired, err := s.Restore(); repaired != "" || err != nil {
					t.Fatalf("got %q, %v while something waits", repaired, err)
				}
				take()
				if repaired, err := s.Restore(); repaired != want || err != nil {
					t.Fatalf("got %q, %v, want %q", repaired, err, want)
				}
				if repaired, err := s.Restore(); repaired != "" || err != nil || s.FD() != fd {
					t.Fatalf("got %q, %v, descriptor %d the second time", repaired, err, s.FD())
				}
				checkFlags(t, s)
				if st, err := os.Lstat(p); err != nil || st.Mode().Perm() != 0o640 {
					t.Errorf("got %v, %v", st.Mode(), err)
				}
				arrive()
				take()
			})
		}
	}
}

// A path that somebody else listens on is not ours to take.
func TestRestorePathTaken(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	p := tempPath(t, "s")
	s := mustOpen(t, "unix://"+p, Options{})
	if err := os.Remove(p); err != nil {
		t.Fatal(err)
	}
	other := mustOpen(t, "unix://"+p, Options{})
	repaired, err := s.Restore()
	if _, ok := errors.AsType[*SocketError](err); repaired != "" || !ok || !errors.Is(err, unix.EADDRINUSE) {
		t.Errorf("got %q, %v, want EADDRINUSE", repaired, err)
	}
	mustDial(t, other)
	if pending, err := other.Pending(); !pending || err != nil {
		t.Errorf("got %v, %v of the other", pending, err)
	}
	if pending, err := s.Pending(); pending || err != nil {
		t.Errorf("got %v, %v", pending, err)
	}
}

// The path of an inherited socket looks as whoever made it wanted it.
func TestRestorePathInherited(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	p := tempPath(t, "s")
	made := mustOpen(t, "unix://"+p, Options{Mode: 0o604})
	s := &Socket{spec: &Spec{Address: made.Address()}, addr: made.Address(), fd: made.FD(), inode: made.Inode(), inherited: true}
	if err := s.adoptPath(); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(p); err != nil {
		t.Fatal(err)
	}
	if repaired, err := s.Restore(); repaired == "" || err != nil {
		t.Fatalf("got %q, %v", repaired, err)
	}
	if st, err := os.Lstat(p); err != nil || st.Mode().Perm() != 0o604 {
		t.Errorf("got %v, %v", st.Mode(), err)
	}
}
