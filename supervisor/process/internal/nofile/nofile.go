// Package nofile knows the limit on open files that this program was started with.
//
// Package syscall raises the soft limit to the hard one in its init function and
// keeps the old one to itself. This package looks before that: Go initialises
// packages in the order of their import paths once their imports are done, and
// this one imports nothing and sorts before "syscall". So it must stay without imports.
package nofile

import "unsafe"

// Limit is RLIMIT_NOFILE as getrlimit(2) reports it.
type Limit struct{ Soft, Hard uint64 }

//nolint:gochecknoglobals // must be filled while packages are being initialised
var (
	atStart Limit
	known   = read(&atStart)
)

// AtStart returns the limit that was in force when the program began; false
// where the kernel did not tell.
func AtStart() (Limit, bool) { return atStart, known }

// read fills in a Limit that is not on the stack, so that its address is stable.
func read(l *Limit) bool {
	const rlimitNofile = 7
	_, _, errno := rawSyscall6(sysPrlimit64, 0, rlimitNofile, 0, uintptr(unsafe.Pointer(l)), 0, 0)
	return errno == 0
}

// rawSyscall6 is syscall.RawSyscall6, which needs nothing to be initialised.
// It is reached by its link name as an import would turn the order around.
//
//go:linkname rawSyscall6 syscall.RawSyscall6
//go:noescape
func rawSyscall6(trap, a1, a2, a3, a4, a5, a6 uintptr) (r1, r2, errno uintptr)
