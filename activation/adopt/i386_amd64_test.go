package adopt

import (
	"encoding/binary"
	"runtime"
	"sync"
	"testing"
	"unsafe"

	"hibergate/activation"

	"golang.org/x/sys/unix"
)

// i386Entry is a page of memory below 4 GB, with code that enters the kernel as programs of i386 do.
var i386Entry = sync.OnceValue(func() []byte {
	page, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE|unix.PROT_EXEC, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_32BIT)
	if err != nil {
		panic(err)
	}
	copy(page, []byte{0x89, 0xfa, 0xcd, 0x80, 0xc3}) // mov edx, edi; int 0x80; ret
	return page
})

// lowMemory is what a call of i386 can point to.
func lowMemory(i386 bool) []byte {
	if !i386 {
		return nil
	}
	return i386Entry()[64:]
}

// enterI386 makes a system call of i386. Go passes the four in AX, BX, CX and DI, and takes the result from AX.
func enterI386(nr, a, b, c uint32) uint32 {
	code := unsafe.Pointer(&i386Entry()[0])
	function := unsafe.Pointer(&code)
	return (*(*func(nr, a, b, c uint32) uint32)(unsafe.Pointer(&function)))(nr, a, b, c)
}

// Programs of i386 are told by their architecture, however they enter the kernel.
func TestBindI386(t *testing.T) {
	t.Parallel()
	if runtime.GOARCH != "amd64" {
		t.Skip("there is no i386")
	}
	s := mustOpen(t, "tcp://127.0.0.1:0", activation.Options{})
	dir := shortDir(t)
	u := mustOpen(t, "unix://"+dir+"/s", activation.Options{})
	p := mustStart(t, start{paths: true})
	_, e := p.adopt(Options{Have: have(s, u)})
	i386 := func(nr uintptr, args ...any) order {
		o := sys(nr, args...)
		o.I386 = true
		return o
	}
	const getpid = 20
	if r := p.do(i386(getpid)); r.Errno != 0 || int(r.R1) != p.cmd.Process.Pid {
		t.Skipf("the kernel does not run i386 programs: %v, %d", r.Errno, r.R1)
	}
	words := func(values ...int) []byte {
		var b []byte
		for _, v := range values {
			b = binary.NativeEndian.AppendUint32(b, uint32(v))
		}
		return b
	}
	fd := p.tcp4()
	wantErrno(t, "bind", p.do(i386(i386Bind, fd, address(s), lenInet4)).failure(), 0)
	p.ours(fd, s, true)
	e.want("bind", Event{Kind: Bound, Socket: s})
	wantErrno(t, "listen", p.do(i386(i386Listen, fd, 5)).failure(), 0)
	e.want("listen", Event{Kind: Listening, Socket: s})
	// Both of socketcall(2), whose arguments are in memory: behind them, here.
	p.close(fd)
	fd = p.tcp4()
	at := int(i386Memory(p))
	wantErrno(t, "bind", p.do(i386(i386Socketcall, socketcallBind, append(words(fd, at+16, lenInet4, 0), address(s)...))).failure(), 0)
	p.ours(fd, s, true)
	e.want("socketcall bind", Event{Kind: Bound, Socket: s})
	wantErrno(t, "listen", p.do(i386(i386Socketcall, socketcallListen, words(fd, 5))).failure(), 0)
	e.want("socketcall listen", Event{Kind: Listening, Socket: s})
	wantErrno(t, "no memory", p.do(i386(i386Socketcall, socketcallBind, 16)).failure(), unix.EFAULT)
	wantErrno(t, "unlink", p.do(i386(i386Unlink, []byte(dir+"/s\x00"))).failure(), 0)
	wantErrno(t, "unlinkat", p.do(i386(i386Unlinkat, unix.AT_FDCWD, []byte(dir+"/s\x00"), 0)).failure(), 0)
	if !exists(dir + "/s") {
		t.Error("it was removed")
	}
	fd = p.socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	b := unixPath(dir + "/s")
	wantErrno(t, "bind of a path", p.do(i386(i386Bind, fd, b, len(b))).failure(), 0)
	p.ours(fd, u, true)
	e.want("bind of a path", Event{Kind: Bound, Socket: u})
}

// i386Memory is where the first argument that is bytes goes.
func i386Memory(p *program) uint64 {
	p.t.Helper()
	return p.do(order{Op: "low"}).R1
}
