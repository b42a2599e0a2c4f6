package conntrack_test

import (
	"errors"
	"fmt"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"

	"hibergate/activation/nettest"
	"hibergate/supervisor/activity/conntrack"
	"hibergate/supervisor/activity/netlink/captured"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

// What the kernel sent reads as conntrack -L printed it at that moment.
func TestDecode(t *testing.T) {
	t.Parallel()
	want := []string{
		"6 431999 ESTABLISHED src=[::1]:46812 dst=[::1]:8090 3/229 src=[::1]:8090 dst=[::1]:46812 2/152 assured",
		"6 431999 ESTABLISHED src=127.0.0.1:60812 dst=127.0.0.1:8081 3/169 src=127.0.0.1:8080 dst=127.0.0.1:60812 2/112 assured",
		"6 431999 ESTABLISHED src=127.0.0.1:45908 dst=127.0.0.1:8080 2/112 src=127.0.0.1:8080 dst=127.0.0.1:45908 1/60 assured",
		"6 59 CLOSE_WAIT src=127.0.0.1:36778 dst=127.0.0.1:8090 3/164 src=127.0.0.1:8090 dst=127.0.0.1:36778 2/112 assured",
		"17 29 NONE src=127.0.0.1:50555 dst=127.0.0.1:5353 1/29 src=127.0.0.1:5353 dst=127.0.0.1:50555 1/29 replied",
		"17 29 NONE src=[::1]:56678 dst=[::1]:5353 1/49 src=[::1]:5353 dst=[::1]:56678 0/0 unreplied",
	}
	var got []string
	for _, m := range captured.Messages(t, "conntrack.hex") {
		var f conntrack.Flow
		if err := f.Decode(m); err != nil {
			t.Fatal(err)
		}
		status := "unreplied"
		switch {
		case f.Status&conntrack.Assured != 0:
			status = "assured"
		case f.Status&conntrack.SeenReply != 0:
			status = "replied"
		}
		if !f.Counted {
			t.Errorf("%x: not counted", m)
		}
		got = append(got, fmt.Sprintf("%d %.0f %v src=%v dst=%v %d/%d src=%v dst=%v %d/%d %s", f.Protocol, f.Timeout.Seconds(), f.TCPState,
			f.Original.Source, f.Original.Destination, f.OriginalCounters.Packets, f.OriginalCounters.Bytes,
			f.Reply.Source, f.Reply.Destination, f.ReplyCounters.Packets, f.ReplyCounters.Bytes, status))
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestDecodeAllocatesNothing(t *testing.T) {
	messages := captured.Messages(t, "conntrack.hex")
	var f conntrack.Flow
	if n := testing.AllocsPerRun(100, func() {
		for _, m := range messages {
			if err := f.Decode(m); err != nil {
				t.Fatal(err)
			}
		}
	}); n != 0 {
		t.Errorf("got %v allocations, want none", n)
	}
}

// FuzzConntrack: no bytes make the decoder panic, and decoding is a function of the bytes alone.
func FuzzConntrack(f *testing.F) {
	for _, m := range captured.Messages(f, "conntrack.hex") {
		f.Add(m)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var one, two conntrack.Flow
		two.Timeout = 1 // must not survive
		errOne, errTwo := one.Decode(b), two.Decode(b)
		if !errors.Is(errOne, errTwo) || one != two {
			t.Errorf("got %+v (%v), then %+v (%v)", one, errOne, two, errTwo)
		}
	})
}

func BenchmarkDecode(b *testing.B) {
	messages := captured.Messages(b, "conntrack.hex")
	var f conntrack.Flow
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		if err := f.Decode(messages[i%len(messages)]); err != nil {
			b.Fatal(err)
		}
	}
}
