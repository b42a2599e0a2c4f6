package adopt

import (
	"encoding/binary"
	"runtime"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// i386 is the other architecture of amd64.
const (
	i386Unlink, i386Socketcall, i386Unlinkat, i386Bind, i386Listen = 10, 102, 301, 361, 363
	x32                                                            = 1 << 30
)

// words is the memory of a thread at an address.
func words(address uint64, values ...uint32) func(uint64, []byte) bool {
	var memory []byte
	for _, v := range values {
		memory = binary.NativeEndian.AppendUint32(memory, v)
	}
	return func(at uint64, to []byte) bool {
		if at != address || len(to) > len(memory) {
			return false
		}
		copy(to, memory)
		return true
	}
}

func TestDecode(t *testing.T) {
	t.Parallel()
	if runtime.GOARCH != "amd64" {
		t.Skip("the numbers are those of x86")
	}
	const native, i386 = unix.AUDIT_ARCH_X86_64, unix.AUDIT_ARCH_I386
	const high = 0xdeadbeef << 32 // what a caller may leave in the upper half of an int
	none := func(uint64, []byte) bool { return false }
	type args = [6]uint64
	for name, tt := range map[string]struct {
		arch   uint32
		nr     int32
		args   args
		memory func(uint64, []byte) bool
		want   call
	}{
		"bind":                           {native, unix.SYS_BIND, args{3, 0x7fff12345678, 16}, none, bindCall{3, 0x7fff12345678, 16}},
		"bind, garbage in the halves":    {native, unix.SYS_BIND, args{high | 3, 0x7fff12345678, high | 16}, none, bindCall{3, 0x7fff12345678, 16}},
		"bind, a length below 0":         {native, unix.SYS_BIND, args{3, 1, high | 0xffffffff}, none, bindCall{3, 1, 0xffffffff}},
		"listen":                         {native, unix.SYS_LISTEN, args{4, 128}, none, listenCall{4, 128}},
		"listen, garbage in the halves":  {native, unix.SYS_LISTEN, args{high | 4, high | 128}, none, listenCall{4, 128}},
		"unlink":                         {native, unix.SYS_UNLINK, args{0x7fff00000000}, none, unlinkCall{unix.AT_FDCWD, 0x7fff00000000, 0}},
		"unlinkat":                       {native, unix.SYS_UNLINKAT, args{5, 0x7fff00000000, unix.AT_REMOVEDIR}, none, unlinkCall{5, 0x7fff00000000, unix.AT_REMOVEDIR}},
		"unlinkat of AT_FDCWD":           {native, unix.SYS_UNLINKAT, args{0xffffff9c, 9, 0}, none, unlinkCall{unix.AT_FDCWD, 9, 0}},
		"unlinkat of AT_FDCWD, extended": {native, unix.SYS_UNLINKAT, args{0xffffffffffffff9c, 9, 0}, none, unlinkCall{unix.AT_FDCWD, 9, 0}},
		"unlinkat, garbage":              {native, unix.SYS_UNLINKAT, args{high | 5, 9, high}, none, unlinkCall{5, 9, 0}},
		"io_uring":                       {native, ioUringSetup, args{}, none, ioUringCall{}},
		"another call":                   {native, unix.SYS_CONNECT, args{3, 1, 16}, none, otherCall{}},
		"the bind of i386":               {native, i386Bind, args{3, 1, 16}, none, otherCall{}},
		"the socketcall of i386":         {native, i386Socketcall, args{2, 1}, words(1, 3, 2, 16), otherCall{}},
		"a number below 0":               {native, -1, args{}, none, otherCall{}},

		"x32 bind":     {native, x32 | unix.SYS_BIND, args{3, 1, 16}, none, otherCall{}},
		"x32 listen":   {native, x32 | unix.SYS_LISTEN, args{3, 1}, none, otherCall{}},
		"x32 unlink":   {native, x32 | unix.SYS_UNLINK, args{1}, none, otherCall{}},
		"x32 io_uring": {native, x32 | ioUringSetup, args{}, none, otherCall{}},

		"i386 bind":                     {i386, i386Bind, args{3, 0xffffd000, 16}, none, bindCall{3, 0xffffd000, 16}},
		"i386 bind, garbage":            {i386, i386Bind, args{high | 3, high | 0xffffd000, high | 16}, none, bindCall{3, 0xffffd000, 16}},
		"i386 listen":                   {i386, i386Listen, args{4, 0xffffffff}, none, listenCall{4, 0xffffffff}},
		"i386 unlink":                   {i386, i386Unlink, args{high | 9}, none, unlinkCall{unix.AT_FDCWD, 9, 0}},
		"i386 unlinkat":                 {i386, i386Unlinkat, args{0xffffff9c, high | 9, high}, none, unlinkCall{unix.AT_FDCWD, 9, 0}},
		"i386 io_uring":                 {i386, ioUringSetup, args{}, none, ioUringCall{}},
		"i386 geteuid is no bind":       {i386, unix.SYS_BIND, args{3, 1, 16}, none, otherCall{}},
		"i386 socketcall bind":          {i386, i386Socketcall, args{2, 0xffffd000}, words(0xffffd000, 3, 0xffffe000, 28), bindCall{3, 0xffffe000, 28}},
		"i386 socketcall bind, garbage": {i386, i386Socketcall, args{high | 2, high | 0xffffd000}, words(0xffffd000, 3, 9, 28), bindCall{3, 9, 28}},
		"i386 socketcall listen":        {i386, i386Socketcall, args{4, 0xffffd000}, words(0xffffd000, 3, 511), listenCall{3, 511}},
		"i386 socketcall, no memory":    {i386, i386Socketcall, args{2, 0xffffd000}, none, otherCall{}},
		"i386 socketcall, two words":    {i386, i386Socketcall, args{2, 0xffffd000}, words(0xffffd000, 3, 9), otherCall{}},
		"i386 socketcall connect":       {i386, i386Socketcall, args{3, 0xffffd000}, words(0xffffd000, 3, 9, 16), otherCall{}},

		"an unknown architecture":       {unix.AUDIT_ARCH_S390X, unix.SYS_BIND, args{3, 1, 16}, none, otherCall{}},
		"an architecture that is not":   {0, unix.SYS_BIND, args{3, 1, 16}, none, otherCall{}},
		"the architecture of ARM":       {unix.AUDIT_ARCH_AARCH64, unix.SYS_BIND, args{3, 1, 16}, none, otherCall{}},
		"the one architecture's number": {i386, unix.SYS_LISTEN, args{3, 1}, none, otherCall{}},
	} {
		n := notification{nr: tt.nr, arch: tt.arch, args: tt.args}
		if got := decode(&n, tt.memory); got != tt.want {
			t.Errorf("%s: got %T %+v, want %T %+v", name, got, got, tt.want, tt.want)
		}
		if diff := cmp.Diff(tt.args, n.args); diff != "" {
			t.Errorf("%s: the notification was changed:\n%s", name, diff)
		}
	}
}

// FuzzDecode: whatever is asked, decode does not panic, what is not of our architectures or of x32 is not
// ours, and descriptors and lengths are what the kernel takes them for.
func FuzzDecode(f *testing.F) {
	for _, a := range architectures() {
		for _, nr := range []uint32{a.bind, a.listen, a.unlink, a.unlinkat, a.socketcall, ioUringSetup, x32 | a.bind} {
			f.Add(a.audit, int32(nr), uint64(2), uint64(1)<<40, uint64(16), []byte("123456789012"))
		}
	}
	f.Fuzz(func(t *testing.T, arch uint32, nr int32, a0, a1, a2 uint64, memory []byte) {
		read := func(_ uint64, to []byte) bool { return copy(to, memory) == len(to) }
		got := decode(&notification{nr: nr, arch: arch, args: [6]uint64{a0, a1, a2, 1, 2, 3}}, read)
		known, narrow := false, false
		for _, a := range architectures() {
			if a.audit == arch {
				known, narrow = true, a.word == 4
			}
		}
		const most = 1<<32 - 1
		switch got := got.(type) {
		case bindCall:
			if got.fd > most || got.length > most || narrow && got.addr > most {
				t.Errorf("got %+v", got)
			}
		case listenCall:
			if got.fd > most || got.backlog > most {
				t.Errorf("got %+v", got)
			}
		case unlinkCall:
			if got.dir != int64(int32(got.dir)) || narrow && got.path > most || got.flags > most {
				t.Errorf("got %+v", got)
			}
		case ioUringCall, otherCall:
		}
		if _, other := got.(otherCall); !other && (!known || nr&x32 != 0) {
			t.Errorf("architecture %#x, call %#x: got %T %+v", arch, nr, got, got)
		}
	})
}
