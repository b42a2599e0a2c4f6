package activation

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The filter of an access list is a classic BPF program on the socket (SO_ATTACH_FILTER, socket(7)).
// The kernel runs it on every packet for the socket, before anything else of the socket sees the
// packet; where it returns 0 the packet is dropped, without an answer. So a SYN from a denied
// source makes no request socket and, with SYN cookies, no cookie; it never gets into the accept queue, and
// epoll does not hear of it. That holds for the data of TCP Fast Open too, which comes with a SYN. A
// denied datagram never gets into the queue. What was dropped is counted in the socket's
// SK_MEMINFO_DROPS (sock_diag(7)), together with what did not fit into a queue.
//
// Accepted connections inherit the filter, and run it on every packet. So for TCP it lets everything
// but a SYN without ACK pass at once, after three instructions. That opens nothing to a denied
// source: a listening socket makes a connection of a SYN, or of the ACK that completes
// a handshake whose SYN has passed here; the rest it answers with RST, or not at all. The one other way in is
// to guess a SYN cookie. Who can do that needs no answer from us, and could as well write an
// allowed source into the packet. A simultaneous open is between two sockets that connect; a
// listening one takes no part in it. A SYN that finds a connection in TIME_WAIT is tested like any other.
//
// A packet is what skb->data points at: the TCP or UDP header. The IP header is at SKF_NET_OFF. The source is in
// its fixed part, so neither IPv4 options nor IPv6 extension headers move it. An
// IPv6 packet with an IPv4-mapped source is denied wherever there is a list: it is forged, and the service would take
// it for an IPv4 one. The kernel drops it for TCP only (tcp_v6_conn_request; measured with UDP, 6.18).
//
// The memory of the filter counts for each socket that has it, accepted ones included, and net.core.optmem_max is the
// limit for all. So who lowers that too far while the socket is open lets all new connections fail.

const (
	netOffset = 1<<32 - 0x100000 // SKF_NET_OFF of linux/filter.h, as a 32-bit offset

	ipVersion   = netOffset      // in the upper half of the byte
	ipv4Source  = netOffset + 12 // RFC 791
	ipv6Source  = netOffset + 8  // RFC 8200
	tcpFlags    = 13             // RFC 9293
	tcpFlagSYN  = 0x02
	tcpFlagACK  = 0x10
	pass        = 1<<32 - 1 // how much of the packet is kept: all
	farthest    = 254       // a conditional jump has 8 bits; one less, as a jump for the other branch may come in between
	loadByte    = unix.BPF_LD | unix.BPF_B | unix.BPF_ABS
	loadWord    = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
	jumpAlways  = unix.BPF_JMP | unix.BPF_JA
	jumpEqual   = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
	jumpAtLeast = unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K // unsigned
	jumpAnyBit  = unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K
	verdict     = unix.BPF_RET | unix.BPF_K
)

// program returns the filter, nil for everybody. It may be longer than the kernel takes.
//
// The source is looked up by binary search, so that the number of instructions that run
// grows with the logarithm of the number of prefixes.
func (a *Access) program(network Network) []unix.SockFilter {
	if a.Everybody() {
		return nil
	}
	var f filter
	six := f.search(ipv6Source, 0, a.spans(netip.IPv6Unspecified()))
	four := f.search(ipv4Source-12, 3, a.spans(netip.IPv4Unspecified()))
	f.branch(jumpAtLeast, 6<<4, six, four)
	start := f.add(loadByte, ipVersion)
	if network == TCP {
		whole := f.add(verdict, pass)
		syn := f.branch(jumpAnyBit, tcpFlagSYN, start, whole)
		f.branch(jumpAnyBit, tcpFlagACK, whole, syn)
		f.add(loadByte, tcpFlags)
	}
	slices.Reverse(f.code)
	return f.code
}

// filter is a program that is written from its end, so that the targets of jumps, which only go
// forward, are known. A place in it is an index into code.
type filter struct {
	code []unix.SockFilter // the last instruction first
}

// top returns the place of the instruction that was written last, and so is run first.
func (f *filter) top() int { return len(f.code) - 1 }

// add puts an instruction in front.
func (f *filter) add(code uint16, k uint32) int {
	f.code = append(f.code, unix.SockFilter{Code: code, K: k})
	return f.top()
}

// verdict returns the place of an instruction that ends the program.
func (f *filter) verdict(permitted bool) int {
	var k uint32
	if permitted {
		k = pass
	}
	for place := f.top(); place >= 0 && f.near(place); place-- {
		if f.code[place] == (unix.SockFilter{Code: verdict, K: k}) {
			return place
		}
	}
	return f.add(verdict, k)
}

// near says whether a conditional jump, written next, reaches the place.
func (f *filter) near(place int) bool { return f.top()-place <= farthest }

// reach returns a place within reach from where the program goes on at place.
func (f *filter) reach(place int) int {
	switch target := f.code[place]; {
	case f.near(place):
		return place
	case target.Code == verdict:
		return f.add(verdict, target.K)
	}
	return f.add(jumpAlways, uint32(f.top()-place))
}

// branch puts a conditional jump in front.
func (f *filter) branch(code uint16, k uint32, yes, no int) int {
	yes, no = f.reach(yes), f.reach(no)
	f.code = append(f.code, unix.SockFilter{Code: code, Jt: uint8(f.top() - yes), Jf: uint8(f.top() - no), K: k})
	return f.top()
}

// words is an address: IPv6 as four words, IPv4 as the last of them.
type words [4]uint32

func wordsOf(addr netip.Addr) (w words) {
	b := addr.AsSlice()
	for i := len(w) - len(b)/4; i < len(w); i++ {
		w[i], b = binary.BigEndian.Uint32(b), b[4:]
	}
	return w
}

// splits says whether the address has bits after its word i.
func (w words) splits(i int) bool {
	for _, rest := range w[i+1:] {
		if rest != 0 {
			return true
		}
	}
	return false
}

// choice is a run of values of one word of the source, up to the next choice. With one
// span that is the verdict; with more the run is one value, and the words after it decide.
type choice struct {
	from  uint32
	spans []span
}

// choices divides the values of word i. The first span is that of its value 0, wherever it
// begins; the others are in order, and have the words before in common.
func choices(spans []span, i int) []choice {
	out := []choice{{0, spans[:1:1]}}
	for n := 1; n < len(spans); n++ {
		w := wordsOf(spans[n].from)
		value, top := w[i], &out[len(out)-1]
		if top.from > value { // the value after the one that is divided further here
			out = out[:len(out)-1]
			top = &out[len(out)-1]
		}
		within := spans[n : n+1 : n+1]
		if w.splits(i) {
			within = spans[n-1 : n+1 : n+1]
			if top.from == value {
				within = append(top.spans, spans[n])
			}
		}
		if top.from == value {
			top.spans = within
		} else {
			out = append(out, choice{value, within})
		}
		if len(within) > 1 && value+1 != 0 {
			out = append(out, choice{value + 1, spans[n : n+1 : n+1]})
		}
	}
	return out
}

// search writes the search for the source among spans, by its word i and those after it. The word 0
// is, or would be, at the offset source.
func (f *filter) search(source uint32, i int, spans []span) int {
	if len(spans) == 1 {
		return f.verdict(spans[0].permitted)
	}
	f.choose(source, i, choices(spans, i))
	return f.add(loadWord, source+4*uint32(i))
}

// choose writes the search for the loaded word i.
func (f *filter) choose(source uint32, i int, c []choice) int {
	n := len(c)
	switch {
	case n == 1:
		return f.search(source, i+1, c[0].spans)
	case n == 3 && c[1].from+1 == c[2].from && c[0].is(c[2]): // one value among others: one instruction instead of two
		no := f.choose(source, i, c[:1])
		return f.branch(jumpEqual, c[1].from, f.choose(source, i, c[1:2]), no)
	}
	more := f.choose(source, i, c[n/2:])
	return f.branch(jumpAtLeast, c[n/2].from, more, f.choose(source, i, c[:n/2]))
}

// is says whether both are the same verdict.
func (c choice) is(o choice) bool {
	return len(c.spans) == 1 && len(o.spans) == 1 && c.spans[0].permitted == o.spans[0].permitted
}

// attachAccess makes the kernel drop what comes from sources that may not use the socket, and
// keeps a process that shares the socket from undoing it. It is to be called before
// bind(2), so that nothing comes in before. fd is a socket for the address of s; one that is neither
// TCP nor UDP stays as it is.
//
// The lock is for good, for us too: the list of a socket cannot change, and where a filter is there
// already (an inherited socket) it has to be the same. It locks the program of a reuseport group as well: through
// fd, SO_ATTACH_REUSEPORT_CBPF is EPERM from now on; another socket of the group, which
// has [Socket.filterAccess] only, is to set it. A list on an MPTCP socket, which can only be inherited, is EOPNOTSUPP.
func (s *Socket) attachAccess(a *Access, fd int) error {
	if err := s.filterAccess(a, fd); err != nil || a.Everybody() || !s.addr.Network.IP() {
		return err
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_LOCK_FILTER, 1); err != nil {
		return s.failure("set SO_LOCK_FILTER of", err)
	}
	return nil
}

// filterAccess is attachAccess without the lock, for a socket that no other process gets.
func (s *Socket) filterAccess(a *Access, fd int) error {
	if !s.addr.Network.IP() {
		return nil
	}
	want := a.program(s.addr.Network)
	if len(want) > unix.BPF_MAXINSNS {
		return s.failure("set access list of", a.Check())
	}
	locked, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_LOCK_FILTER)
	if err != nil {
		return s.failure("read SO_LOCK_FILTER of", err)
	}
	if locked != 0 {
		if have, err := attachedFilter(fd); err != nil || !slices.Equal(have, want) {
			return s.failure("set access list of", fmt.Errorf("it has another one, which is locked: %w", cmp.Or(err, error(unix.EPERM))))
		}
		return nil
	}
	if len(want) == 0 {
		return nil
	}
	program := unix.SockFprog{Len: uint16(len(want)), Filter: &want[0]}
	if err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &program); err != nil {
		return s.failure("set access list of", explainFilter(err))
	}
	return nil
}

// explainFilter says what is needed where the kernel refuses a filter.
func explainFilter(err error) error {
	switch {
	case errors.Is(err, unix.ENOMEM):
		return fmt.Errorf("net.core.optmem_max may be too low for it: %w", err)
	case errors.Is(err, unix.EPERM): // it is not locked, so it is the user
		return fmt.Errorf("it needs root or CAP_NET_ADMIN here: %w", err)
	}
	return err
}

// attachedFilter reads the classic BPF program of a socket; without one it is empty.
func attachedFilter(fd int) ([]unix.SockFilter, error) {
	// Of this option the length is in instructions, and 0 asks for it.
	code := make([]unix.SockFilter, unix.BPF_MAXINSNS)
	size, err := readFilter(fd, &code[0], len(code))
	return code[:size], err
}

// filterLength is the number of instructions; the error is EACCES for a program that is not classic BPF.
func filterLength(fd int) (int, error) { return readFilter(fd, nil, 0) }

func readFilter(fd int, code *unix.SockFilter, room int) (int, error) {
	size := uint32(room)
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_GET_FILTER,
		uintptr(unsafe.Pointer(code)), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return 0, errno
	}
	return int(size), nil
}
