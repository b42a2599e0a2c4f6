package adopt

import (
	"sync"
	"unsafe"

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
