package adopt

import "golang.org/x/sys/unix"

// architectures are those of x86-64 and i386. x32 calls have another number, and are left alone.
func architectures() []arch {
	return []arch{
		{audit: unix.AUDIT_ARCH_X86_64, bind: unix.SYS_BIND, listen: unix.SYS_LISTEN, unlink: unix.SYS_UNLINK, unlinkat: unix.SYS_UNLINKAT, word: 8},
		{audit: unix.AUDIT_ARCH_I386, bind: 361, listen: 363, unlink: 10, unlinkat: 301, socketcall: 102, word: 4},
	}
}
