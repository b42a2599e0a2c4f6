package activation

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// play is what this binary does when a test starts it as a helper. Its standard
// output is compared by the test.
func play(role string) int {
	if err := map[string]func() error{"inherit": playInherit, "out-of-descriptors": playOutOfDescriptors}[role](); err != nil {
		fmt.Println("error:", err)
		return 1
	}
	return 0
}

// playInherit takes the sockets that $HIBERGATED_TEST_TAKE describes, as
// "NAME=ADDRESS" or "NAME=ADDRESS=FAMILY", and prints what it got.
func playInherit() error {
	h, err := Inherit()
	if err != nil {
		return err
	}
	var taken []*Socket
	for text := range strings.FieldsSeq(os.Getenv("HIBERGATED_TEST_TAKE")) {
		f := append(strings.Split(text, "="), "")
		a, err := ParseAddress(f[1])
		if err != nil {
			return err
		}
		family := map[string]Family{"": FamilyDefault, "dual": FamilyDual, "ipv4": FamilyIPv4, "ipv6": FamilyIPv6}[f[2]]
		s, ok, err := h.Take(&Spec{Name: f[0], Address: a, Options: Options{Family: family, Backlog: 5, KeepAlive: true}})
		if err != nil || !ok {
			fmt.Println(ok, err)
			continue
		}
		if s.Address().Network.IP() && s.Address().Port == 0 {
			return errors.New("the port is not known")
		}
		status, _ := unix.FcntlInt(uintptr(s.FD()), unix.F_GETFL, 0)
		flags, _ := unix.FcntlInt(uintptr(s.FD()), unix.F_GETFD, 0)
		keep, _ := unix.GetsockoptInt(s.FD(), unix.SOL_SOCKET, unix.SO_KEEPALIVE)
		fmt.Println("took", s.Spec().Address, status&unix.O_NONBLOCK != 0, flags&unix.FD_CLOEXEC != 0, s.Inode() != 0, keep, s.Warnings())
		taken = append(taken, s)
	}
	fmt.Println("unused", h.Unused())
	for _, s := range taken {
		if err := s.Close(); err != nil {
			return err
		}
	}
	for _, name := range []string{listenPID, listenFDs, listenFDNames} {
		if v, ok := os.LookupEnv(name); ok {
			fmt.Println(name, "is still", v)
		}
	}
	return h.Close()
}

// playOutOfDescriptors accepts with no descriptor left, and again with one.
func playOutOfDescriptors() error {
	s, err := Open(Spec{Address: Address{Network: Unix, Path: "@hg-out-of-descriptors"}})
	if err != nil {
		return err
	}
	client, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := unix.Connect(client, &unix.SockaddrUnix{Name: s.Address().Path}); err != nil {
		return err
	}
	var full unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &full); err != nil {
		return err
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(s.FD()), Max: full.Max}); err != nil {
		return err
	}
	_, _, err = s.Accept()
	fmt.Println(KindOfAcceptError(err) == AcceptPause, err)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &full); err != nil {
		return err
	}
	_, peer, err := s.Accept()
	fmt.Println(peer.PID == int32(os.Getpid()), err)
	return nil
}
