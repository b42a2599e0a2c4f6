// Command binder sends lines back to whoever connects to its address. It opens its socket in a way
// that can be chosen; see the flags.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "binder:", err)
		os.Exit(1) //nolint:forbidigo // this is main
	}
}

func run() error {
	how := flag.String("by", "bind", "bind, i386 (the system calls that bind(3) of an i386 program makes beside socketcall(2)), or io_uring")
	filter := flag.Bool("filter", false, "install a seccomp filter first")
	check := flag.Bool("check", false, "only say whether it can be done")
	flag.Parse()
	at, err := netip.ParseAddrPort(flag.Arg(0))
	if err != nil {
		return err
	}
	if *filter {
		if err := install(); err != nil {
			return fmt.Errorf("seccomp: %w", err)
		}
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return err
	}
	switch *how {
	case "bind":
		err = plainly(fd, at)
	case "i386":
		err = i386(fd, at)
	case "io_uring":
		err = byRing(fd, at)
		if errors.Is(err, unix.ENOSYS) && !*check {
			err = plainly(fd, at)
		}
	default:
		err = fmt.Errorf("unknown way %q", *how)
	}
	if err != nil || *check {
		return err
	}
	return serve(fd)
}

func plainly(fd int, at netip.AddrPort) error {
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: at.Addr().As4(), Port: int(at.Port())}); err != nil {
		return fmt.Errorf("bind: %w", err)
	}
	return unix.Listen(fd, backlog)
}

const backlog = 128

func serve(fd int) error {
	for {
		c, _, err := unix.Accept4(fd, unix.SOCK_CLOEXEC)
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.ECONNABORTED) {
			continue
		}
		if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		go func() {
			f := os.NewFile(uintptr(c), "connection")
			defer f.Close()
			if _, err := io.Copy(struct{ io.Writer }{f}, struct{ io.Reader }{f}); err != nil {
				fmt.Fprintln(os.Stderr, "binder:", err)
			}
		}()
	}
}

// i386 makes the calls that 32-bit x86 programs have had since Linux 4.3. Go's own take socketcall(2) there.
func i386(fd int, at netip.AddrPort) error {
	const bind, listen = 361, 363
	if unsafe.Sizeof(uintptr(0)) != 4 {
		return errors.New("not an i386 program")
	}
	sa := sockaddr(at)
	if _, _, errno := unix.Syscall(bind, uintptr(fd), uintptr(unsafe.Pointer(&sa)), unsafe.Sizeof(sa)); errno != 0 {
		return fmt.Errorf("bind: %w", errno)
	}
	if _, _, errno := unix.Syscall(listen, uintptr(fd), backlog, 0); errno != 0 {
		return fmt.Errorf("listen: %w", errno)
	}
	return nil
}

func sockaddr(at netip.AddrPort) unix.RawSockaddrInet4 {
	sa := unix.RawSockaddrInet4{Family: unix.AF_INET, Addr: at.Addr().As4()}
	*(*[2]byte)(unsafe.Pointer(&sa.Port)) = [2]byte{byte(at.Port() >> 8), byte(at.Port())}
	return sa
}

// install makes all threads have a filter as sandboxes have one: what they do not need is an error.
func install() error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	code := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0}, // the number of the call
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: uint32(unix.SYS_PTRACE), Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	prog := unix.SockFprog{Len: uint16(len(code)), Filter: &code[0]} //nolint:gosec // it is 4
	thread, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&prog)))
	switch {
	case errno != 0:
		return errno
	case thread != 0:
		return fmt.Errorf("thread %d has another filter", thread)
	}
	if _, _, errno := unix.Syscall(unix.SYS_PTRACE, 0, 0, 0); errno != unix.EPERM {
		return fmt.Errorf("ptrace: %w, not what the filter says", errno)
	}
	return nil
}
