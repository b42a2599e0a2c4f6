package apiserver

import (
	"net"
	"net/netip"
	"strconv"

	"golang.org/x/sys/unix"
)

// reserve binds a socket to a TCP address, and returns it with the address it has, which is another one if the port
// was 0. It does not listen: connections are refused. Whoever sets SO_REUSEADDR, as package net does, can listen there.
func reserve(address string) (int, string, error) {
	at, err := netip.ParseAddrPort(address)
	if err != nil {
		return -1, "", err
	}
	family, name := unix.AF_INET6, unix.Sockaddr(&unix.SockaddrInet6{Port: int(at.Port()), Addr: at.Addr().As16()})
	if ip := at.Addr().Unmap(); ip.Is4() {
		family, name = unix.AF_INET, &unix.SockaddrInet4{Port: int(at.Port()), Addr: ip.As4()}
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, "", err
	}
	port, err := bind(fd, name)
	if err != nil {
		_ = unix.Close(fd) // the first error says more
		return -1, "", err
	}
	return fd, net.JoinHostPort(at.Addr().String(), strconv.Itoa(port)), nil
}

// bind returns the port that the socket then has.
func bind(fd int, name unix.Sockaddr) (int, error) {
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return 0, err
	}
	if err := unix.Bind(fd, name); err != nil {
		return 0, err
	}
	got, err := unix.Getsockname(fd)
	if err != nil {
		return 0, err
	}
	if v4, ok := got.(*unix.SockaddrInet4); ok {
		return v4.Port, nil
	}
	return got.(*unix.SockaddrInet6).Port, nil
}
