package activation

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// setting is a socket option by which a process that shares a TCP or UDP socket can lose the clients of
// those that get the socket after it. None takes privilege to set.
type setting struct {
	option
	name  string
	tcp   bool // TCP only
	v6    bool // IPv6 sockets only
	usual bool // programs set it for themselves: no news
}

// settings are the values of the options that riskySettings returns, in its order.
type settings [10]int32

// riskySettings returns all of them. Those that concern only the answers are among them: accepted
// sockets inherit them, and a handshake takes answers too.
func riskySettings() [len(settings{})]setting {
	return [...]setting{
		{option{unix.SOL_SOCKET, unix.SO_DONTROUTE}, "SO_DONTROUTE", false, false, false},
		{option{unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX}, "SO_BINDTODEVICE", false, false, false},
		{option{unix.SOL_SOCKET, unix.SO_REUSEPORT}, "SO_REUSEPORT", true, false, true},
		{option{unix.SOL_SOCKET, unix.SO_RCVLOWAT}, "SO_RCVLOWAT", true, false, true},
		{option{unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT}, "TCP_USER_TIMEOUT", true, false, true},
		{option{unix.IPPROTO_IP, unix.IP_TRANSPARENT}, "IP_TRANSPARENT", false, false, false},
		{option{unix.IPPROTO_IP, unix.IP_MINTTL}, "IP_MINTTL", true, false, false},
		{option{unix.IPPROTO_IPV6, unix.IPV6_MINHOPCOUNT}, "IPV6_MINHOPCOUNT", true, true, false},
		{option{unix.IPPROTO_IP, unix.IP_TTL}, "IP_TTL", false, false, false},
		{option{unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS}, "IPV6_UNICAST_HOPS", false, true, false},
	}
}

// of says whether a socket has the option.
func (o *setting) of(n Network, v6 bool) bool { return n.IP() && (n == TCP || !o.tcp) && (v6 || !o.v6) }

// remember reads what is to be set back later, when nobody else has had the socket yet.
func (s *Socket) remember() error {
	domain, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	if err != nil {
		return s.failure("read address family of", err)
	}
	s.v6 = domain == unix.AF_INET6
	for i, o := range riskySettings() {
		if !o.of(s.addr.Network, s.v6) {
			continue
		}
		now, err := unix.GetsockoptInt(s.fd, o.level, o.option.name)
		if err != nil && !unknownOption(err) { // which the kernel does not have, nobody changes
			return s.failure("read "+o.name+" of", err)
		}
		s.sound[i] = int32(now)
	}
	s.filtered = hasFilter(s.fd)
	return nil
}

// restoreSettings sets back what remember has read, takes away a filter, and keys for everybody. It says what
// of that a process had set, and is not usual.
func (s *Socket) restoreSettings() (found []string, err error) {
	if s.addr.Network == FIFO {
		return nil, nil
	}
	var errs []error
	for i, o := range riskySettings() {
		if !o.of(s.addr.Network, s.v6) {
			continue
		}
		changed, err := s.restoreSetting(&o, &s.sound[i])
		if err != nil {
			errs = append(errs, s.failure("set "+o.name+" of", err))
		} else if changed && !o.usual {
			found = append(found, o.name)
		}
	}
	if s.addr.Network.IP() {
		if err := s.restoreTimes(); err != nil {
			errs = append(errs, err)
		}
	}
	if s.addr.Network == TCP && s.forgetKeys() {
		found = append(found, "TCP_MD5SIG")
	}
	changed, err := s.removeFilter()
	if err != nil {
		errs = append(errs, err)
	}
	if changed {
		found = append(found, "SO_ATTACH_FILTER")
	}
	return found, errors.Join(errs...)
}

// restoreSetting sets one option back, and says whether it was another.
func (s *Socket) restoreSetting(o *setting, sound *int32) (bool, error) {
	want := int(*sound)
	if o.option.name == unix.SO_REUSEPORT && o.level == unix.SOL_SOCKET {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.parking != nil {
			want = 1
		}
	}
	now, err := unix.GetsockoptInt(s.fd, o.level, o.option.name)
	if unknownOption(err) {
		return false, nil
	}
	if err != nil || now == want {
		return false, err
	}
	hops := o.level == unix.IPPROTO_IP && o.option.name == unix.IP_TTL || o.level == unix.IPPROTO_IPV6 && o.option.name == unix.IPV6_UNICAST_HOPS
	if !hops || s.inherited || s.spec.Options.TTL > 0 {
		return true, unix.SetsockoptInt(s.fd, o.level, o.option.name, want)
	}
	// It is as the host says, who may say something else by now.
	if err := unix.SetsockoptInt(s.fd, o.level, o.option.name, -1); err != nil {
		return false, err
	}
	usual, err := unix.GetsockoptInt(s.fd, o.level, o.option.name)
	*sound = int32(usual)
	return now != usual, err
}

// unknownOption says whether the kernel does not have an option, or not for this kind of socket (MPTCP).
func unknownOption(err error) bool {
	return errors.Is(err, unix.ENOPROTOOPT) || errors.Is(err, unix.EOPNOTSUPP)
}

// restoreTimes sets back what accepted sockets inherit and no listener is made with: to reset a
// connection when it is closed, and to give up reading or writing.
func (s *Socket) restoreTimes() error {
	var none unix.Timeval
	err := errors.Join(
		unix.SetsockoptLinger(s.fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{}),
		unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &none),
		unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &none),
	)
	if err != nil {
		return s.failure("set SO_LINGER and time limits of", err)
	}
	return nil
}

// forgetKeys removes the keys without which nobody is heard (TCP_MD5SIG_EXT of tcp(7), prefix length 0), and
// says whether there were any. A key for certain clients cannot be found without privilege.
func (s *Socket) forgetKeys() bool {
	key := unix.TCPMD5Sig{Addr: unix.SockaddrStorage{Family: unix.AF_INET}, Flags: unix.TCP_MD5SIG_FLAG_PREFIX} // of length 0: to be removed
	if !s.v6 {
		return unix.SetsockoptTCPMD5Sig(s.fd, unix.IPPROTO_TCP, unix.TCP_MD5SIG_EXT, &key) == nil
	}
	key.Addr.Family = unix.AF_INET6
	found := unix.SetsockoptTCPMD5Sig(s.fd, unix.IPPROTO_TCP, unix.TCP_MD5SIG_EXT, &key) == nil
	// The address is after port and flow, and an IPv4-mapped one is for IPv4.
	const mapped = 6 + 10
	key.Addr.Data[mapped], key.Addr.Data[mapped+1] = 0xff, 0xff
	return unix.SetsockoptTCPMD5Sig(s.fd, unix.IPPROTO_TCP, unix.TCP_MD5SIG_EXT, &key) == nil || found
}

// removeFilter detaches a filter that is not to be there.
func (s *Socket) removeFilter() (bool, error) {
	if s.filtered {
		return false, nil
	}
	err := unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_DETACH_FILTER, 0)
	switch {
	case err == nil:
		return true, nil
	case errors.Is(err, unix.ENOENT), unknownOption(err): // there is none
		return false, nil
	case errors.Is(err, unix.EPERM) && !hasFilter(s.fd): // a lock on nothing
		return false, nil
	case errors.Is(err, unix.EPERM):
		err = fmt.Errorf("a process has locked it, only a new socket is without: %w", err)
	}
	return false, s.failure("detach filter of", err)
}

// hasFilter says whether a socket has a filter, also one that cannot be read.
func hasFilter(fd int) bool {
	n, err := filterLength(fd)
	return n > 0 || errors.Is(err, unix.EACCES)
}

// tellFound says it for people.
func tellFound(found []string) string {
	if len(found) == 0 {
		return ""
	}
	slices.Sort(found)
	return "a process had set " + strings.Join(found, ", ")
}
