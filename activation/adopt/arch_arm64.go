package adopt

import "golang.org/x/sys/unix"

// architectures are those of arm64 and of 32-bit ARM (EABI).
func architectures() []arch {
	return []arch{
		{audit: unix.AUDIT_ARCH_AARCH64, bind: unix.SYS_BIND, listen: unix.SYS_LISTEN, unlinkat: unix.SYS_UNLINKAT, word: 8},
		{audit: unix.AUDIT_ARCH_ARM, bind: 282, listen: 284, unlink: 10, unlinkat: 328, word: 4},
	}
}
