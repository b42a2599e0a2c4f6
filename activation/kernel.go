package activation

import (
	"net/netip"

	"golang.org/x/sys/unix"
)

// WaitForPackets waits until no processor works any more on a packet that it had begun with before, in some 10 ms.
func WaitForPackets() {
	const global = 1 // MEMBARRIER_CMD_GLOBAL (membarrier(2)): synchronize_rcu in the kernel
	if _, _, errno := unix.Syscall(unix.SYS_MEMBARRIER, global, 0, 0); errno != 0 {
		// Not with nohz_full. Nothing takes that long.
		_, _ = unix.Poll(nil, 20) // an early return by a signal is no harm
	}
}

// IsLocal says whether the kernel delivers packets for an address on this machine: it is one of loopback, or one that the machine has.
func IsLocal(a netip.Addr) bool {
	if a = a.Unmap(); a.IsLoopback() {
		return true
	}
	var to unix.Sockaddr = &unix.SockaddrInet6{Addr: a.As16(), Port: 9}
	domain := unix.AF_INET6
	if a.Is4() {
		to, domain = &unix.SockaddrInet4{Addr: a.As4(), Port: 9}, unix.AF_INET
	}
	fd, err := unix.Socket(domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)             //nolint:errcheck // it was only asked with
	if unix.Connect(fd, to) != nil { // sends nothing, but chooses our address
		return false
	}
	switch name, _ := unix.Getsockname(fd); from := name.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrFrom4(from.Addr) == a
	case *unix.SockaddrInet6:
		return netip.AddrFrom16(from.Addr) == a
	}
	return false
}
