package activation

import (
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
)

// A socket that is not open yet does no harm, and one that could not be opened can be later.
func TestPrepare(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	file := tempPath(t, "s")
	tests := map[string]struct {
		address string
		o       Options
		holder  string // has to go before it works
		prepare func() error
	}{
		"TCP, taken":           {"", Options{}, "tcp://127.0.0.1:0", nil},
		"UDP, taken":           {"", Options{}, "udp://127.0.0.1:0", nil},
		"a path, taken":        {"", Options{}, "unix://" + tempPath(t, "s"), nil},
		"an abstract name":     {"", Options{}, "unix:@hg-prepare", nil},
		"TCP, any port":        {"tcp://127.0.0.1:0", Options{}, "", nil},
		"a FIFO":               {"fifo://" + tempPath(t, "f"), Options{}, "", nil},
		"a path, and no links": {"unix://" + file, Options{Symlinks: []string{file + "-link"}}, "", nil},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var holder *Socket
			address := test.address
			if test.holder != "" {
				var err error
				holder, err = Open(Spec{Address: mustParse(t, test.holder)})
				if err != nil {
					t.Fatal(err)
				}
				address = holder.Address().String()
			}
			s := Prepare(&Spec{Address: mustParse(t, address), Options: test.o})
			checkNotOpen := func() {
				if s.FD() != -1 || s.Address() != s.Spec().Address || s.Parked() || s.Inode() != 0 || len(s.Warnings()) > 0 {
					t.Errorf("got descriptor %d, address %v", s.FD(), s.Address())
				}
				for i, f := range []func() error{
					func() error { _, err := s.Pending(); return err },
					func() error { _, err := s.Revive(); return err },
					func() error { _, err := s.Restore(); return err },
					func() error { _, _, err := s.Accept(); return err },
					s.Park,
				} {
					if err := f(); err == nil {
						t.Errorf("method %d: got no error", i)
					}
				}
				if err := errors.Join(s.Unpark(), s.Readmit(), s.Close()); err != nil {
					t.Error(err)
				}
			}
			checkNotOpen()
			if holder != nil {
				if err := s.Open(); !MayOpenLater(err) {
					t.Errorf("got %v, want that it may be opened later", err)
				}
				checkNotOpen()
				if err := holder.Close(); err != nil {
					t.Fatal(err)
				}
			}
			for range 2 {
				fd := s.FD()
				if err := s.Open(); err != nil || fd >= 0 && s.FD() != fd {
					t.Fatalf("got %v, descriptor %d", err, s.FD())
				}
			}
			checkFlags(t, s)
			if pending, err := s.Pending(); pending || err != nil {
				t.Errorf("got %v, %v", pending, err)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestMayOpenLater(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	file := tempPath(t, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	tests := map[string]struct {
		address string
		o       Options
		want    bool
	}{
		"an IPv4 address that is not here": {"tcp://192.0.2.99:0", Options{}, true},
		"an IPv6 address that is not here": {"udp://[2001:db8::99]:0", Options{}, true},
		"a device that is not here":        {"tcp://:0", Options{Device: "hg-none"}, true},
		"a zone that is not here":          {"tcp://[fe80::1%hg-none]:0", Options{}, true},
		"a family that does not fit":       {"tcp://127.0.0.1:0", Options{Family: FamilyIPv6}, false},
		"a directory that cannot be made":  {"unix://" + file + "/s", Options{}, false},
		"a user that is not there":         {"unix://" + file + "-s", Options{Owner: "hg-nobody-has-this-name"}, false},
		"a FIFO in the place of a file":    {"fifo://" + file, Options{}, false},
	}
	for name, test := range tests {
		s, err := Open(Spec{Address: mustParse(t, test.address), Options: test.o})
		if err == nil {
			t.Errorf("%s: it could be opened", name)
			s.Close()
		}
		if got := MayOpenLater(err); got != test.want {
			t.Errorf("%s: got %v of %v", name, got, err)
		}
	}
	if MayOpenLater(nil) || MayOpenLater(unix.EACCES) {
		t.Error("nothing will change")
	}
}
