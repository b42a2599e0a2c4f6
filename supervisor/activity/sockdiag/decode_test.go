package sockdiag_test

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"

	"hibergate/supervisor/activity/netlink/captured"
	"hibergate/supervisor/activity/sockdiag"
)

func TestDecodeInet(t *testing.T) {
	t.Parallel()
	want := []string{
		"LISTEN 127.0.0.1:8080 0.0.0.0:0 held=true queue=1 timed=true",
		"FIN_WAIT2 127.0.0.1:36778 127.0.0.1:8090 held=false queue=0 timed=false",
		"ESTABLISHED 127.0.0.1:60812 127.0.0.1:8081 held=true queue=0 timed=true",
		"ESTABLISHED 127.0.0.1:45908 127.0.0.1:8080 held=true queue=0 timed=true",
		"ESTABLISHED 127.0.0.1:8080 127.0.0.1:45908 held=false queue=0 timed=true",
		"ESTABLISHED 127.0.0.1:8080 127.0.0.1:60812 held=true queue=5 timed=true",
		"LISTEN [::]:8090 [::]:0 held=true queue=0 timed=true",
		"ESTABLISHED [::1]:8090 [::1]:46812 held=true queue=5 timed=true",
		"CLOSE_WAIT 127.0.0.1:8090 127.0.0.1:36778 held=true queue=1 timed=true",
		"ESTABLISHED [::1]:46812 [::1]:8090 held=true queue=0 timed=true",
		"ESTABLISHED 127.0.0.1:50555 127.0.0.1:5353 held=true queue=832 timed=false",
		"CLOSE 127.0.0.1:5353 0.0.0.0:0 held=true queue=0 timed=false",
		"CLOSE [::1]:5353 [::]:0 held=true queue=832 timed=false",
		"ESTABLISHED [::1]:56678 [::1]:5353 held=true queue=0 timed=false",
	}
	var got []string
	for _, m := range captured.Messages(t, "inet_diag.hex") {
		var s sockdiag.Inet
		if err := s.Decode(m); err != nil {
			t.Fatal(err)
		}
		got = append(got, fmt.Sprintf("%v %v %v held=%v queue=%d timed=%v", s.State, s.Local, s.Peer, s.Inode != 0, s.ReceiveQ, s.Timed))
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestDecodeUnix(t *testing.T) {
	t.Parallel()
	want := []string{
		`1 ESTABLISHED "" peer=true queue=0`,
		`1 ESTABLISHED "" peer=true queue=0`,
		`2 ESTABLISHED "" peer=true queue=0`,
		`1 ESTABLISHED "\x00abstract" peer=true queue=0`,
		`1 ESTABLISHED "" peer=false queue=0`, // its server end is not accepted yet
		`1 ESTABLISHED "/tmp/act-cap/x.sock" peer=true queue=0`,
		`1 LISTEN "/tmp/act-cap/x.sock" peer=false queue=1`,
		`2 ESTABLISHED "/tmp/act-cap/x.sockd" peer=false queue=5`,
		`1 LISTEN "\x00abstract" peer=false queue=0`,
		`2 CLOSE "\x00nftables/TestZZCapture" peer=false queue=0`,
	}
	var got []string
	for _, m := range captured.Messages(t, "unix_diag.hex") {
		var s sockdiag.Unix
		if err := s.Decode(m); err != nil {
			t.Fatal(err)
		}
		got = append(got, fmt.Sprintf("%d %v %q peer=%v queue=%d", s.Type, s.State, s.Name, s.Peer != 0, s.ReceiveQ))
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestDecodeAllocatesNothing(t *testing.T) {
	inet, unixes := captured.Messages(t, "inet_diag.hex"), captured.Messages(t, "unix_diag.hex")
	var i sockdiag.Inet
	var u sockdiag.Unix
	if n := testing.AllocsPerRun(100, func() {
		for _, m := range inet {
			if err := i.Decode(m); err != nil {
				t.Fatal(err)
			}
		}
		for _, m := range unixes {
			if err := u.Decode(m); err != nil {
				t.Fatal(err)
			}
		}
	}); n != 0 {
		t.Errorf("got %v allocations, want none", n)
	}
}

// FuzzSockDiag: no bytes make the decoders panic, and names lie within the message.
func FuzzSockDiag(f *testing.F) {
	for _, name := range []string{"inet_diag.hex", "unix_diag.hex"} {
		for _, m := range captured.Messages(f, name) {
			f.Add(m)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var i sockdiag.Inet
		if err := i.Decode(b); err == nil && i.Local.Addr().Is4In6() {
			t.Errorf("IPv4 is not shown as such: %v", i.Local)
		}
		var u sockdiag.Unix
		if err := u.Decode(b); err == nil && !bytes.Contains(b, u.Name) {
			t.Errorf("name %q is not in the message", u.Name)
		}
	})
}
