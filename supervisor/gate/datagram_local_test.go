package gate

import (
	"net"
	"net/netip"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
)

// addLocal6 gives the loopback interface an IPv6 address, and returns its number. It is there as long as the namespace.
func addLocal6(tb testing.TB, ip string) uint32 {
	tb.Helper()
	lo, err := net.InterfaceByName("lo")
	if err != nil {
		tb.Fatal(err)
	}
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		tb.Fatal(err)
	}
	defer unix.Close(fd)
	request := struct { // in6_ifreq of linux/ipv6.h
		addr  [16]byte
		bits  uint32
		index int32
	}{netip.MustParseAddr(ip).As16(), 64, int32(lo.Index)}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCSIFADDR, uintptr(unsafe.Pointer(&request))); errno != 0 && errno != unix.EEXIST {
		tb.Fatal(errno)
	}
	return uint32(lo.Index)
}

// Addresses that mean nothing without their interface keep it.
func TestDatagramsOfLinkLocalAddresses(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	lo := addLocal6(t, "fe80::77")
	r := newDatagramRig(t, &Spec{}, "udp://:0")
	a := startUDP(t, "", "127.0.0.1:0")
	far := a.target(0)
	r.mustAdmit(t, a)
	port := int(r.socket.Address().Port)
	client, err := unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(client) })
	link := netip.MustParseAddr("fe80::77").As16()
	nettest.Eventually(t, func() error { // a new address is tentative for a moment
		return unix.Bind(client, &unix.SockaddrInet6{Addr: link, ZoneId: lo})
	})
	if err := unix.Sendto(client, []byte("x"), 0, &unix.SockaddrInet6{Addr: link, Port: port, ZoneId: lo}); err != nil {
		t.Fatal(err)
	}
	answer := make([]byte, 20)
	n, from, err := unix.Recvfrom(client, answer, 0)
	if err != nil {
		t.Fatal(err)
	}
	if sa := from.(*unix.SockaddrInet6); string(answer[:n]) != "x" || sa.Addr != link || sa.Port != port || sa.ZoneId != lo {
		t.Errorf("got %q from %+v", answer[:n], sa)
	}
	// The same as a destination.
	b := startUDP(t, "b", "[fe80::77%lo]:0")
	if err := r.admit([]Target{far, b.target(1)}); err != nil {
		t.Fatal(err)
	}
	var got []string
	for range 2 {
		got = append(got, dialUDP(t, portOf(r.socket, "127.0.0.1")).ask("x"))
	}
	if got[0] != "x" || got[1] != "b x" {
		t.Errorf("got %q", got)
	}
}

// What was sent to many is answered from one address of ours.
func TestDatagramsToBroadcast(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	r := newDatagramRig(t, &Spec{}, "udp://:0")
	r.mustAdmit(t, startUDP(t, "", "127.0.0.1:0"))
	client, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(client) })
	if err := unix.SetsockoptInt(client, unix.SOL_SOCKET, unix.SO_BROADCAST, 1); err != nil {
		t.Fatal(err)
	}
	port := int(r.socket.Address().Port)
	if err := unix.Sendto(client, []byte("x"), 0, &unix.SockaddrInet4{Addr: [4]byte{127, 255, 255, 255}, Port: port}); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 10)
	n, from, err := unix.Recvfrom(client, b, 0)
	if err != nil {
		t.Fatal(err)
	}
	if sa := from.(*unix.SockaddrInet4); string(b[:n]) != "x" || sa.Addr != [4]byte{127, 0, 0, 1} || sa.Port != port {
		t.Errorf("got %q from %v", b[:n], sa)
	}
}
