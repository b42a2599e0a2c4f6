package activation

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
)

// BenchmarkAccess measures what the filter costs allowed clients on loopback: the CPU time of both ends
// and of the kernel between them per request of 100 bytes each way, on an open connection and with a connection of its own. Turns
// without a list, with lists of several lengths, and without one again take turns; each ratio
// is the median of those of the rounds, and "same" is how well two equal things can be told apart.
//
//	go test -run '^$' -bench 'BenchmarkAccess$' -benchtime 200x ./activation
func BenchmarkAccess(b *testing.B) {
	nettest.Need(b, nettest.Namespaces)
	sysctl(b, "net/ipv4/tcp_max_tw_buckets", "0") // thousands of connections in TIME_WAIT slow down connect(2)
	lists := []*Access{nil, manyAllowed(1), manyAllowed(10), manyAllowed(500), nil}
	names := []string{"", "ratio-1", "ratio-10", "ratio-500", "ratio-same"}
	for name, turn := range map[string]func(b *testing.B, s *Socket) time.Duration{"keep-alive": onOneConnection, "connection": onManyConnections} {
		b.Run(name, func(b *testing.B) {
			runtime.LockOSThread() // for threadTime
			defer runtime.UnlockOSThread()
			took := make([][]time.Duration, len(lists))
			for round := range b.N {
				for i := range lists {
					i = (i + round) % len(lists)
					// The list of a socket cannot change.
					s, err := Open(Spec{Address: mustParse(b, "tcp://127.0.0.1:0")})
					if err != nil {
						b.Fatal(err)
					}
					if err := s.attachAccess(lists[i], s.FD()); err != nil {
						b.Fatal(err)
					}
					took[i] = append(took[i], turn(b, s))
					s.Close()
				}
			}
			b.ReportMetric(float64(median(took[0]).Nanoseconds()), "ns/request")
			b.ReportMetric(0, "ns/op")
			for i, name := range names[1:] {
				ratios := make([]float64, b.N)
				for round, with := range took[i+1] {
					ratios[round] = float64(took[0][round]) / float64(with)
				}
				b.ReportMetric(median(ratios), name)
			}
		})
	}
}

// manyAllowed allows the client by one of n prefixes that have nothing to do with one another.
func manyAllowed(n int) *Access {
	a := manyPrefixes(n-1, false, 24)
	a.Allow = append(a.Allow, netip.MustParsePrefix("127.0.0.0/8"))
	return a
}

func median[T cmp.Ordered](d []T) T {
	d = slices.Sorted(slices.Values(d))
	return d[len(d)/2]
}

// connected makes a connection, and returns both ends.
func connected(b *testing.B, s *Socket, sa unix.Sockaddr) (near, far int) {
	b.Helper()
	near, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		b.Fatal(err)
	}
	if err := unix.Connect(near, sa); err != nil {
		b.Fatal(err)
	}
	// Not Socket.Accept, which also asks for addresses.
	far, _, err = unix.Accept4(s.FD(), unix.SOCK_CLOEXEC)
	if err != nil {
		b.Fatal(err)
	}
	return near, far
}

func request(b *testing.B, near, far int) {
	b.Helper()
	var buf [100]byte
	for _, ends := range [][2]int{{near, far}, {far, near}} {
		if _, err := unix.Write(ends[0], buf[:]); err != nil {
			b.Fatal(err)
		}
		if n, err := unix.Read(ends[1], buf[:]); n != len(buf) {
			b.Fatal(n, err)
		}
	}
}

// threadTime is the CPU time of this thread, and so of both ends and of the kernel between them. Other
// programs on the machine disturb it less than they disturb the clock.
func threadTime(b *testing.B) time.Duration {
	b.Helper()
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t); err != nil {
		b.Fatal(err)
	}
	return time.Duration(t.Nano())
}

func onOneConnection(b *testing.B, s *Socket) time.Duration {
	b.Helper()
	const n = 500
	sa := at(s.Address().IP, s.Address().Port)
	near, far := connected(b, s, sa)
	begin := threadTime(b)
	for range n {
		request(b, near, far)
	}
	took := (threadTime(b) - begin) / n
	unix.Close(near)
	unix.Close(far)
	return took
}

func onManyConnections(b *testing.B, s *Socket) time.Duration {
	b.Helper()
	const n = 200
	sa := at(s.Address().IP, s.Address().Port)
	begin := threadTime(b)
	for range n {
		near, far := connected(b, s, sa)
		request(b, near, far)
		unix.Close(near)
		unix.Close(far)
	}
	return (threadTime(b) - begin) / n
}

// BenchmarkAccessDenied sends SYNs from a denied source. The owner of the socket waits in
// epoll_wait(2) on a thread of its own; how often it woke and how long it ran is
// what the kernel says of that thread. The time of an op is that of the client: a socket, its SYN, close.
//
//	go test -run '^$' -bench AccessDenied -benchtime 100000x ./activation
func BenchmarkAccessDenied(b *testing.B) {
	nettest.Need(b, nettest.Namespaces)
	for _, n := range []int{1, 10, 500} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			a := manyPrefixes(n, false, 24)
			a.Allow = append(a.Allow, netip.MustParsePrefix("127.0.0.3/32"))
			s := mustOpenAccess(b, "tcp://127.0.0.1:0", a)
			ep, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
			if err != nil {
				b.Fatal(err)
			}
			defer unix.Close(ep)
			if err := unix.EpollCtl(ep, unix.EPOLL_CTL_ADD, s.FD(), &unix.EpollEvent{Events: unix.EPOLLIN}); err != nil {
				b.Fatal(err)
			}
			tid, woke := make(chan int), make(chan error)
			go func() {
				runtime.LockOSThread()
				defer runtime.UnlockOSThread()
				tid <- unix.Gettid()
				_, err := unix.EpollWait(ep, make([]unix.EpollEvent, 1), -1)
				woke <- err
			}()
			thread := <-tid
			nettest.Eventually(b, func() error {
				if stat := threadStat(b, thread); !strings.Contains(stat, "poll") {
					return errors.New("the owner does not wait yet: " + stat)
				}
				return nil
			})
			before := switches(b, thread)
			source, sa := at(netip.MustParseAddr("127.0.0.2"), 0), at(s.Address().IP, s.Address().Port)
			for b.Loop() {
				fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
				if err != nil {
					b.Fatal(err)
				}
				unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1)
				if err := unix.Bind(fd, source); err != nil {
					b.Fatal(err)
				}
				if err := unix.Connect(fd, sa); !errors.Is(err, unix.EINPROGRESS) {
					b.Fatal(err)
				}
				unix.Close(fd)
			}
			after := switches(b, thread)
			b.ReportMetric(float64(drops(b, s.FD()))/float64(b.N), "dropped/op")
			if after != before {
				b.Errorf("the owner of the socket ran: before %s, after %s", before, after)
			}
			b.ReportMetric(0, "wake-ups")
			// An allowed client wakes it.
			fd := client(b, unix.SOCK_STREAM, netip.MustParseAddr("127.0.0.3"))
			if err := unix.Connect(fd, sa); err != nil && !errors.Is(err, unix.EINPROGRESS) {
				b.Fatal(err)
			}
			if err := <-woke; err != nil {
				b.Error(err)
			}
		})
	}
}

// threadStat says where in the kernel a thread of this process waits.
func threadStat(tb testing.TB, tid int) string {
	tb.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/wchan", tid))
	if err != nil {
		tb.Fatal(err)
	}
	return string(b)
}

// switches returns how often a thread of this process has begun and ceased to wait, and how long it ran.
func switches(tb testing.TB, tid int) string {
	tb.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/schedstat", tid)) // ns that it ran, ns that it waited for a CPU, how often it ran
	if err != nil {
		tb.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}
