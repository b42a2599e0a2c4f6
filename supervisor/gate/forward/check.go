package forward

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"hibergate/activation"
)

var (
	errNotTCP       = errors.New("only TCP connections can be forwarded in the kernel")
	errOtherVersion = errors.New("the clients speak another version of IP than the destination")
)

// Check says why a socket cannot be forwarded in the kernel, without a look at this machine; nil: nothing is known
// against it. The destination has no IP where that is a name which is yet to be looked up. It is pure.
func Check(listen activation.Spec, to activation.Address) error {
	o := &listen.Options
	switch {
	case o.ReusePort:
		return errors.New("the socket shares its port (reuse_port), and the kernel would forward the connections of the others too")
	case !o.Access.Everybody():
		return errors.New("the socket has an access list, which what is forwarded in the kernel would pass by")
	case o.Transparent:
		return errors.New("the socket takes connections to addresses that are not of this machine (transparent)")
	}
	return check(listen.Address, o.Family, to)
}

func check(listen activation.Address, family activation.Family, to activation.Address) error {
	if listen.Network != activation.TCP || to.Network != activation.TCP {
		return errNotTCP
	}
	if !to.IP.IsValid() {
		return nil
	}
	local, remote := bare(listen.IP), bare(to.IP)
	everywhere := local == netip.Addr{}
	switch {
	case remote == netip.Addr{} || remote.IsMulticast() || to.IP.Zone() != "":
		return fmt.Errorf("connections cannot be sent to %v", to.IP)
	case !everywhere && local.Is4() != remote.Is4():
		return errOtherVersion
	case everywhere && remote.Is6() && (listen.IP.Is4() || family == activation.FamilyIPv4):
		return errOtherVersion
	case everywhere && remote.Is4() && family == activation.FamilyIPv6:
		return errOtherVersion
	case local.IsLoopback() && !remote.IsLoopback():
		return fmt.Errorf("clients of the loopback address %v cannot be sent to %v, which is none; "+
			`listen on another address, or use forward = "relay"`, local, remote)
	case !local.IsLoopback() && remote.IsLoopback():
		return fmt.Errorf("clients of other machines cannot be sent to the loopback address %v; "+
			`let the program listen on another address, or use forward = "relay"`, remote)
	case local == remote && listen.Port == to.Port && listen.Port != 0:
		return fmt.Errorf("%v leads to itself", listen)
	}
	return nil
}

// CheckMachine says why this machine, as it is now, cannot forward connections to a destination; nil: it
// can as far as can be told without trying. The error wraps unix.EPERM where it is CAP_NET_ADMIN that this process lacks.
func CheckMachine(to netip.AddrPort) error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return fmt.Errorf("ask for capabilities: %w", err)
	}
	if data[0].Effective&(1<<unix.CAP_NET_ADMIN) == 0 {
		return fmt.Errorf("CAP_NET_ADMIN is needed to forward in the kernel: %w", unix.EPERM)
	}
	address := to.Addr().Unmap()
	if activation.IsLocal(address) {
		return nil
	}
	name, path := "net.ipv4.ip_forward", "/proc/sys/net/ipv4/ip_forward"
	if address.Is6() {
		name, path = "net.ipv6.conf.all.forwarding", "/proc/sys/net/ipv6/conf/all/forwarding"
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if strings.TrimSpace(string(b)) == "0" {
		return fmt.Errorf("%v is not an address of this machine, and %s is 0: clients of other machines would not get there; "+
			`set it to 1, or use forward = "relay"`, address, name)
	}
	return nil
}
