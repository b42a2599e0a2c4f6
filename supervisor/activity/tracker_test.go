package activity_test

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation"
	"hibergate/activation/nettest"
	"hibergate/supervisor/activity"
)

// A connection is queued, then open, then half closed (still open), then gone, and every
// step moves the time of the last activity.
func TestTCP(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	for name, c := range map[string]struct{ network, listen, dial string }{
		"v4 specific":       {"tcp4", "127.0.0.1:0", "127.0.0.1"},
		"v4 wildcard":       {"tcp4", "0.0.0.0:0", "127.0.0.1"},
		"v6 specific":       {"tcp6", "[::1]:0", "::1"},
		"v6 wildcard":       {"tcp6", "[::]:0", "::1"},
		"dual stack, by v4": {"tcp", ":0", "127.0.0.1"},
		"dual stack, by v6": {"tcp", ":0", "::1"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := mustListen(t, 7, c.network, c.listen)
			tracker := mustTrack(t, l.Socket)
			began := time.Now()
			if s := look(t, tracker, 7); !s.Known || !s.Exact || s.Why != "" || s.Open+s.Queued != 0 || s.Peers != 0 {
				t.Fatalf("at first: got %+v", s)
			}
			client := mustDial(t, "tcp", net.JoinHostPort(c.dial, strconv.Itoa(int(l.Address.Port))))
			s := look(t, tracker, 7)
			if !s.Known || s.Open != 0 || s.Queued != 1 || s.In.Packets < 2 || s.Out.Packets < 1 || s.Last.Before(began) {
				t.Errorf("queued: got %+v", s)
			}
			server := l.mustAccept(t)
			s = look(t, tracker, 7)
			if s.Open != 1 || s.Queued != 0 || s.Peers == 0 {
				t.Errorf("accepted: got %+v", s)
			}
			peers := s.Peers
			sent := time.Now()
			if _, err := client.Write([]byte("hello")); err != nil {
				t.Fatal(err)
			}
			s = look(t, tracker, 7)
			if s.Last.Before(sent) || s.LastPayload.Before(sent) || s.Peers != peers {
				t.Errorf("after payload at %v: got %+v", sent, s)
			}
			closed := time.Now()
			if err := client.(*net.TCPConn).CloseWrite(); err != nil {
				t.Fatal(err)
			}
			s = look(t, tracker, 7)
			if s.Open != 1 || s.Last.Before(closed) {
				t.Errorf("half closed at %v: got %+v", closed, s)
			}
			server.Close()
			client.Close()
			eventually(t, tracker, 7, "closed", func(s activity.Summary) bool { return s.Known && s.Open+s.Queued == 0 && s.Peers == 0 })
		})
	}
}

// Of two sockets on one port a connection belongs to the one bound to its address; other ports do not count.
func TestAddressBeforeWildcard(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	specific := mustListen(t, 1, "udp4", "127.0.0.3:0")
	if err := unix.SetsockoptInt(specific.FD, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		t.Fatal(err)
	}
	wild := mustListen(t, 2, "udp4", fmt.Sprintf("0.0.0.0:%d", specific.Address.Port))
	other := mustListen(t, 3, "udp4", "127.0.0.3:0")
	tracker := mustTrack(t, specific.Socket, wild.Socket, other.Socket)
	mustWrite(t, mustDial(t, "udp", specific.udp.LocalAddr().String()), "x")
	got := tracker.Look(t.Context(), time.Now(), []uint32{1, 2, 3})
	for i, want := range []uint64{1, 0, 0} {
		if !got[i].Known || got[i].In.Packets != want || got[i].Queued != int(want) {
			t.Errorf("socket %d: got %+v, want %d packets in and queued", i+1, got[i], want)
		}
	}
}

// Keep-alive probes and their answers are counted, but are no activity.
func TestKeepAlive(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	l := mustListen(t, 1, "tcp4", "127.0.0.1:0")
	tracker := mustTrack(t, l.Socket)
	client := mustDial(t, "tcp", l.Addr().String())
	l.mustAccept(t)
	const idle = time.Second
	before := look(t, tracker, 1)
	if err := client.(*net.TCPConn).SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: idle, Interval: idle}); err != nil {
		t.Fatal(err)
	}
	s := eventually(t, tracker, 1, "probed", func(s activity.Summary) bool {
		return s.In.Packets > before.In.Packets && s.Out.Packets > before.Out.Packets
	})
	// Who has seen the probe knows that nothing else came for as long as it waited, however late it is now.
	const errs = 3 * 10 * time.Millisecond // three clock ticks
	if quiet := time.Since(s.Last); quiet < idle-errs {
		t.Errorf("probed: got the last activity %v ago, want at least %v", quiet, idle)
	}
	if quiet := time.Since(s.LastPayload); quiet < idle-errs {
		t.Errorf("probed: got the last payload %v ago, want at least %v", quiet, idle)
	}
}

// Datagrams in and out are activity; one that nobody reads is queued.
func TestUDP(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	for name, c := range map[string]struct{ network, listen, dial string }{
		"v4":                {"udp4", "127.0.0.1:0", "127.0.0.1"},
		"v6":                {"udp6", "[::1]:0", "::1"},
		"dual stack, by v4": {"udp", ":0", "127.0.0.1"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := mustListen(t, 1, c.network, c.listen)
			tracker := mustTrack(t, l.Socket)
			client := mustDial(t, "udp", net.JoinHostPort(c.dial, strconv.Itoa(int(l.Address.Port))))
			sent := time.Now()
			mustWrite(t, client, "x")
			if s := look(t, tracker, 1); !s.Known || !s.Exact || s.Queued != 1 || s.In.Packets != 1 || s.Last.Before(sent) {
				t.Errorf("datagram at %v: got %+v", sent, s)
			}
			_, from, err := l.udp.ReadFromUDP(make([]byte, 10))
			if err != nil {
				t.Fatal(err)
			}
			answered := time.Now()
			if _, err := l.udp.WriteToUDP([]byte("y"), from); err != nil {
				t.Fatal(err)
			}
			if s := look(t, tracker, 1); s.Queued != 0 || s.Out.Packets != 1 || s.Last.Before(answered) {
				t.Errorf("answer at %v: got %+v", answered, s)
			}
			flows, why := tracker.Flows(t.Context(), 1, nil)
			// Another test may have had the port a moment ago, and conntrack remembers.
			flows = slices.DeleteFunc(flows, func(f activity.Flow) bool { return f.Peer.String() != client.LocalAddr().String() })
			if len(flows) != 1 || why != "" {
				t.Fatalf("got flows %+v (%s), want one", flows, why)
			}
			f := flows[0]
			if f.Local != f.Original || f.Local.Port() != l.Address.Port ||
				!f.Counted || f.In.Packets != 1 || f.Out.Packets != 1 || f.State != "REPLIED" {
				t.Errorf("got flow %+v of peer %v", f, client.LocalAddr())
			}
		})
	}
}

// Unix connections are counted; their payload is not seen, and of datagrams nothing is known.
func TestUnix(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	path := filepath.Join(t.TempDir(), "s")
	for _, c := range []struct{ network, address string }{{"unix", path}, {"unix", "@" + path}, {"unixpacket", path + "p"}} {
		t.Run(c.network+c.address[:1], func(t *testing.T) {
			t.Parallel()
			l := mustListen(t, 1, c.network, c.address)
			tracker := mustTrack(t, l.Socket)
			if s := look(t, tracker, 1); s != (activity.Summary{Known: true}) {
				t.Errorf("at first: got %+v", s)
			}
			client := mustDial(t, c.network, c.address)
			if s := look(t, tracker, 1); !s.Known || s.Queued != 1 || s.Open != 0 || s.PayloadUnseen {
				t.Errorf("queued: got %+v", s)
			}
			l.mustAccept(t)
			if s := look(t, tracker, 1); !s.Known || s.Queued != 0 || s.Open != 1 || s.Peers == 0 || !s.PayloadUnseen {
				t.Errorf("accepted: got %+v", s)
			}
			flows, why := tracker.Flows(t.Context(), 1, []int{os.Getpid()})
			if len(flows) != 1 || why != "" || flows[0].PID != os.Getpid() || flows[0].Protocol != "unix" {
				t.Errorf("got flows %+v (%s)", flows, why)
			}
			client.Close()
		})
	}
	t.Run("datagrams", func(t *testing.T) {
		t.Parallel()
		l := mustListen(t, 1, "unixgram", path+"d")
		tracker := mustTrack(t, l.Socket)
		mustWrite(t, mustDial(t, "unixgram", path+"d"), "x")
		if s := look(t, tracker, 1); s.Known || s.Queued == 0 || s.Why == "" {
			t.Errorf("got %+v, want not known, queued, and why", s)
		}
	})
}

// A FIFO tells by itself what is in it and, as far as the wall clock goes, when it was written to,
// on every file system.
func TestFIFO(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	for _, dir := range []string{t.TempDir(), "/dev/shm"} {
		path := filepath.Join(dir, "fifo"+strconv.Itoa(os.Getpid()))
		if err := unix.Mkfifo(path, 0o600); err != nil {
			t.Skip(err) // an ordinary user may not write here
		}
		t.Cleanup(func() { os.Remove(path) })
		fd, err := unix.Open(path, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		tracker := mustTrack(t, activity.Socket{Key: 1, FD: fd, Address: activation.Address{Network: activation.FIFO, Path: path}})
		long := time.Now().Add(-time.Hour)
		if err := os.Chtimes(path, long, long); err != nil {
			t.Fatal(err)
		}
		if s := look(t, tracker, 1); !s.Known || s.Exact || s.Queued != 0 || s.Last.Sub(long).Abs() > time.Minute {
			t.Errorf("at first: got %+v, want last %v", s, long)
		}
		wrote := time.Now()
		if _, err := unix.Write(fd, []byte("hello")); err != nil {
			t.Fatal(err)
		}
		if s := look(t, tracker, 1); s.Queued != 5 || s.Last.Before(wrote) {
			t.Errorf("written at %v: got %+v", wrote, s)
		}
		future := time.Now().Add(time.Hour) // the clock was set back
		if err := os.Chtimes(path, future, future); err != nil {
			t.Fatal(err)
		}
		if s := look(t, tracker, 1); !s.Known || !s.Last.IsZero() || s.Queued != 5 {
			t.Errorf("written in the future: got %+v, want no time", s)
		}
	}
}
