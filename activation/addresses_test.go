package activation

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
)

// message builds a netlink message; attributes of an address go behind the body.
func message(kind uint16, body ...byte) []byte {
	b := binary.NativeEndian.AppendUint32(nil, uint32(unix.SizeofNlMsghdr+len(body)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	return append(append(b, make([]byte, unix.SizeofNlMsghdr-len(b))...), body...)
}

func address6(flags byte, all ...uint32) []byte {
	body := []byte{unix.AF_INET6, 64, flags, 0, 2, 0, 0, 0}
	body = append(body, 6, 0, unix.IFA_LABEL, 0, 'x', 0, 0, 0) // something else, padded
	for _, f := range all {
		body = append(body, 8, 0, unix.IFA_FLAGS, 0)
		body = binary.NativeEndian.AppendUint32(body, f)
	}
	return message(unix.RTM_NEWADDR, body...)
}

func link(flags, change uint32) []byte {
	body := binary.NativeEndian.AppendUint32(make([]byte, 8), flags)
	return message(unix.RTM_NEWLINK, binary.NativeEndian.AppendUint32(body, change)...)
}

func TestTellsOfAddress(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		b    []byte
		want bool
	}{
		"nothing":                   {nil, false},
		"an address":                {address6(unix.IFA_F_PERMANENT), true},
		"a tentative address":       {address6(unix.IFA_F_TENTATIVE), false},
		"an optimistic address":     {address6(unix.IFA_F_TENTATIVE | unix.IFA_F_OPTIMISTIC), true},
		"a duplicate address":       {address6(unix.IFA_F_DADFAILED), false},
		"tentative by attribute":    {address6(0, unix.IFA_F_TENTATIVE|unix.IFA_F_MANAGETEMPADDR), false},
		"usable by attribute":       {address6(0, unix.IFA_F_MANAGETEMPADDR), true},
		"an address removed":        {message(unix.RTM_DELADDR, make([]byte, 8)...), false},
		"a short address":           {message(unix.RTM_NEWADDR, 2, 24, 0, 0), false},
		"a new link":                {link(0, 1<<32-1), true},
		"a link comes up":           {link(unix.IFF_UP|unix.IFF_RUNNING, unix.IFF_UP), true},
		"a link goes down":          {link(0, unix.IFF_UP), false},
		"a link that is up":         {link(unix.IFF_UP, 0), false},
		"a short link":              {message(unix.RTM_NEWLINK, 1, 2, 3), false},
		"the second message":        {append(link(0, unix.IFF_UP), address6(0)...), true},
		"cut short":                 {address6(0)[:20], false},
		"a length that is too long": {append([]byte{255, 0, 0, 0}, address6(0)[4:]...), false},
		"a length of nothing":       {make([]byte, 64), false},
	}
	for name, test := range tests {
		if got := tellsOfAddress(test.b); got != test.want {
			t.Errorf("%s: got %v, want %v", name, got, test.want)
		}
	}
}

func FuzzTellsOfAddress(f *testing.F) {
	f.Add(address6(0, 0))
	f.Add(append(link(1, 1), address6(unix.IFA_F_TENTATIVE)...))
	f.Fuzz(func(t *testing.T, b []byte) {
		before := hex.EncodeToString(b)
		if tellsOfAddress(b) && len(b) < unix.SizeofNlMsghdr+unix.SizeofIfAddrmsg {
			t.Error("too short to tell of anything")
		}
		if hex.EncodeToString(b) != before {
			t.Error("the input was changed")
		}
	})
}

// The kernel tells of interfaces that come up and of addresses, and not of those that leave.
func TestAddressWatch(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces, nettest.Tool("ip"))
	inOwnNetwork(t, func() {
		w, err := NewAddressWatch()
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		ip := func(want bool, args ...string) {
			if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
				t.Fatalf("ip %v: %v: %s", args, err, out)
			}
			if want { // IPv6 addresses come by and by
				nettest.Eventually(t, func() error {
					if got, err := w.Drain(); !got || err != nil {
						return fmt.Errorf("ip %v: got %v, %w", args, got, err)
					}
					return nil
				})
			} else if got, err := w.Drain(); got || err != nil {
				t.Errorf("ip %v: got %v, %v", args, got, err)
			}
		}
		ip(true, "link", "set", "lo", "up")
		nettest.Eventually(t, func() error { // lo has addresses of its own
			return exec.Command("sh", "-c", "ip addr show dev lo | grep -q 'inet6 ::1'").Run()
		})
		if _, err := w.Drain(); err != nil {
			t.Fatal(err)
		}
		late := Prepare(&Spec{Address: mustParse(t, "tcp://192.0.2.7:80")})
		defer late.Close()
		if err := late.Open(); !MayOpenLater(err) {
			t.Errorf("got %v without the address", err)
		}
		ip(true, "addr", "add", "192.0.2.7/32", "dev", "lo")
		ip(true, "addr", "add", "2001:db8::7/128", "dev", "lo")
		ip(false, "link", "set", "lo", "mtu", "9000")
		ip(false, "addr", "del", "2001:db8::7/128", "dev", "lo")
		if err := late.Open(); err != nil {
			t.Error(err)
		}
		ip(false, "link", "set", "lo", "down")
		// More than fits into the queue of the socket.
		for range 3 {
			var script []byte
			for i := range 1000 {
				script = fmt.Appendf(script, "addr add 10.0.%d.%d/32 dev lo\naddr del 10.0.%d.%d/32 dev lo\n", i/250, i%250+1, i/250, i%250+1)
			}
			if err := batch(script); err != nil {
				t.Error(err)
			}
		}
		if got, err := w.Drain(); !got || err != nil {
			t.Errorf("got %v, %v when messages were lost", got, err)
		}
	})
}

// batch gives ip(8) many commands.
func batch(script []byte) error {
	cmd := exec.Command("ip", "-batch", "-")
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	_, err = in.Write(script)
	in.Close()
	if e := cmd.Wait(); e != nil {
		return e
	}
	return err
}

func TestAddressWatchClose(t *testing.T) {
	t.Parallel()
	w, err := NewAddressWatch()
	if err != nil {
		t.Fatal(err)
	}
	if changed, err := w.Drain(); changed || err != nil {
		t.Errorf("got %v, %v", changed, err)
	}
	for range 2 {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := w.Drain(); err == nil || w.FD() != -1 {
		t.Errorf("got %v, descriptor %d after Close", err, w.FD())
	}
}
