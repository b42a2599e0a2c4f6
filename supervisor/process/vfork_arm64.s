#include "textflag.h"

// func rawVfork(trap, a1, a2, a3 uintptr) (r1, errno uintptr)
//
// A system call that returns twice on one stack; see vfork_amd64.s. Here the
// return address is in the link register, which the kernel keeps, and a leaf
// without a frame does not spill it.
TEXT ·rawVfork(SB),NOSPLIT|NOFRAME,$0-48
	MOVD	trap+0(FP), R8
	MOVD	a1+8(FP), R0
	MOVD	a2+16(FP), R1
	MOVD	a3+24(FP), R2
	MOVD	ZR, R3
	MOVD	ZR, R4
	MOVD	ZR, R5
	SVC
	MOVD	ZR, R1
	CMN	$4095, R0	// -4095..-1 are error numbers
	BCC	done
	NEG	R0, R1
	MOVD	$-1, R0
done:
	MOVD	R0, r1+32(FP)
	MOVD	R1, errno+40(FP)
	RET
