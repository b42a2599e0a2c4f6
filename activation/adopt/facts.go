package adopt

import (
	"bytes"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"hibergate/activation"
)

// facts are what a Session knows of its own process: whoever lives in other namespaces has other addresses.
type facts struct {
	network    uint64 // the cookie of the network namespace; 0: not known
	low, high  uint16 // the ports that the kernel chooses from
	users      uint64 // the inode of the user namespace
	privileged uint16 // the first port that anybody may bind
}

func readFacts() facts {
	f := facts{privileged: 1024}
	if fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err == nil {
		f.network = networkOf(fd)
		_ = unix.Close(fd) // it was only asked with
	}
	f.users = namespace("/proc/self/ns/user")
	if b, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range"); err == nil {
		_, _ = fmt.Sscan(string(b), &f.low, &f.high) // else none is taken for one that the kernel chose
	}
	if b, err := os.ReadFile("/proc/sys/net/ipv4/ip_unprivileged_port_start"); err == nil {
		if n, err := strconv.ParseUint(string(bytes.TrimSpace(b)), 10, 16); err == nil {
			f.privileged = uint16(n)
		}
	}
	return f
}

// chosen says whether a port may be one that the kernel chose, and that is another one the next time.
func (f *facts) chosen(a activation.Address) bool {
	return a.Network.IP() && f.low <= a.Port && a.Port <= f.high
}

// networkOf returns the cookie of the network namespace of a socket (SO_NETNS_COOKIE, Linux 5.14; unix(7) sockets have
// it too).
func networkOf(fd int) uint64 {
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil {
		return 0
	}
	return cookie
}

func namespace(path string) uint64 {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		return 0
	}
	return st.Ino
}
