package adopt

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// notification is struct seccomp_notif with the struct seccomp_data in it.
type notification struct {
	id    uint64
	tid   uint32 // of the thread
	flags uint32
	nr    int32
	arch  uint32
	ip    uint64
	args  [6]uint64
}

// response is struct seccomp_notif_resp.
type response struct {
	id    uint64
	val   int64
	err   int32 // negative
	flags uint32
}

// addFD is struct seccomp_notif_addfd.
type addFD struct {
	id         uint64
	flags      uint32
	srcFD      uint32
	newFD      uint32
	newFDFlags uint32
}

// The ioctls of seccomp_unotify(2) that package unix does not have.
const (
	ioctlIDValid = 0x40082102
	ioctlAddFD   = 0x40182103
)

// call is what a thread wants of the kernel.
type call interface{ isCall() }

type (
	bindCall   struct{ fd, addr, length uint64 }
	listenCall struct{ fd, backlog uint64 }
	unlinkCall struct {
		dir   int64 // AT_FDCWD for unlink(2)
		path  uint64
		flags uint64
	}
	ioUringCall struct{}
	otherCall   struct{} // not ours to answer
)

func (bindCall) isCall()    {}
func (listenCall) isCall()  {}
func (unlinkCall) isCall()  {}
func (ioUringCall) isCall() {}
func (otherCall) isCall()   {}

// low is the half of an argument that is an int: what a program leaves in the other one, the kernel does not look at.
const low = 1<<32 - 1

// decode says what a notification is about. read reads memory of the thread: a socketcall(2) has its arguments there.
func decode(n *notification, read func(address uint64, to []byte) bool) call {
	for _, a := range architectures() {
		if a.audit == n.arch {
			return a.decode(n, read)
		}
	}
	return otherCall{}
}

func (a *arch) decode(n *notification, read func(uint64, []byte) bool) call {
	nr := uint32(n.nr)
	args := n.args
	if a.socketcall != 0 && nr == a.socketcall {
		var b [12]byte
		var words int
		switch uint32(args[0]) {
		case socketcallBind:
			nr, words = a.bind, 3
		case socketcallListen:
			nr, words = a.listen, 2
		default:
			return otherCall{}
		}
		if !read(args[1]&low, b[:4*words]) {
			return otherCall{}
		}
		for i := range 3 {
			args[i] = uint64(binary.NativeEndian.Uint32(b[4*i:]))
		}
	}
	if a.word == 4 {
		for i := range args {
			args[i] &= low
		}
	}
	switch {
	case nr == a.bind:
		return bindCall{args[0] & low, args[1], args[2] & low}
	case nr == a.listen:
		return listenCall{args[0] & low, args[1] & low}
	case nr == a.unlinkat:
		return unlinkCall{int64(int32(args[0])), args[1], args[2] & low}
	case a.unlink != 0 && nr == a.unlink:
		return unlinkCall{unix.AT_FDCWD, args[0], 0}
	case nr == ioUringSetup:
		return ioUringCall{}
	}
	return otherCall{}
}
