package adopt

import (
	"golang.org/x/sys/unix"
)

// arch is a calling convention by which programs of one machine can enter its kernel.
type arch struct {
	audit      uint32 // AUDIT_ARCH_*
	bind       uint32
	listen     uint32
	unlink     uint32 // 0: there is none
	unlinkat   uint32
	socketcall uint32 // 0: there is none
	word       int    // bytes of a pointer
}

// The numbers of socketcall(2), and that of io_uring_setup(2), which is the same everywhere.
const (
	socketcallBind   = 2
	socketcallListen = 4
	ioUringSetup     = 425
)

// Where struct seccomp_data has what the filter looks at. The machines are little-endian, so that the lower half of
// an argument comes first.
const (
	dataNumber  = 0
	dataArch    = 4
	dataArgs    = 16
	dataArgSize = 8
)

// What bind(2) is told as the length of an address: sockaddr_in, sockaddr_in6 as in RFC 2133
// and as it is now, and sockaddr_storage, which some programs pass whatever is in it.
const (
	lenInet4    = 16
	lenInet6Old = 24
	lenInet6    = 28
	lenStorage  = 128

	lenShortPath = 3   // a family and one byte
	lenUnix      = 110 // sockaddr_un
)

// Filter returns the program for seccomp(2) that asks about what a Session answers, and allows all else. With local it
// also asks about Unix sockets, and with paths about those and the removal of files.
//
// For every other system call it looks at the architecture and the number only, so that the kernel
// remembers its answer and does not even run it (Linux 5.11).
func Filter(local, paths bool) []unix.SockFilter {
	var f filter
	for _, a := range architectures() {
		f.arch(a, local || paths, paths)
	}
	f.add(unix.BPF_RET|unix.BPF_K, unix.SECCOMP_RET_ALLOW)
	return f.code
}

// filter is a seccomp program that is being written. Each part ends in a verdict, or is jumped over as a whole.
type filter struct{ code []unix.SockFilter }

func (f *filter) add(code uint16, k uint32) int {
	f.code = append(f.code, unix.SockFilter{Code: code, K: k})
	return len(f.code) - 1
}

func (f *filter) load(offset uint32) { f.add(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, offset) }

// where adds a part that runs only where what was loaded equals k.
func (f *filter) where(k uint32, part func()) {
	at := f.add(unix.BPF_JMP|unix.BPF_JEQ|unix.BPF_K, k)
	part()
	f.code[at].Jf = uint8(len(f.code) - at - 1)
}

func (f *filter) ask()   { f.add(unix.BPF_RET|unix.BPF_K, unix.SECCOMP_RET_USER_NOTIF) }
func (f *filter) allow() { f.add(unix.BPF_RET|unix.BPF_K, unix.SECCOMP_RET_ALLOW) }

// arch adds the part for one architecture.
func (f *filter) arch(a arch, local, paths bool) {
	f.load(dataArch)
	f.where(a.audit, func() {
		f.load(dataNumber)
		numbers := []uint32{a.listen, ioUringSetup}
		if paths {
			numbers = append(numbers, a.unlinkat)
			if a.unlink != 0 {
				numbers = append(numbers, a.unlink)
			}
		}
		for _, n := range numbers {
			f.where(n, f.ask)
		}
		f.where(a.bind, func() {
			f.load(dataArgs + 2*dataArgSize)
			if local {
				// Also those as long as a sockaddr_nl: so is that of "/tmp/sock".
				f.add(unix.BPF_JMP|unix.BPF_JGE|unix.BPF_K, lenShortPath)
				f.code[len(f.code)-1].Jf = 1
				f.ask()
				f.allow()
				return
			}
			for _, n := range []uint32{lenInet4, lenInet6Old, lenInet6, lenStorage} {
				f.where(n, f.ask)
			}
			f.allow()
		})
		if a.socketcall != 0 {
			f.where(a.socketcall, func() {
				f.load(dataArgs)
				f.where(socketcallBind, f.ask)
				f.where(socketcallListen, f.ask)
				f.allow()
			})
		}
		f.allow()
	})
}
