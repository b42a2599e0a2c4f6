#include "textflag.h"

// func rawVfork(trap, a1, a2, a3 uintptr) (r1, errno uintptr)
//
// A system call that returns twice on one stack. The child runs first and goes
// on to call other functions, which overwrites everything below the frame of
// our caller, the return address of this very call included. A register is the
// only place where it survives until the parent comes back, and R12 is one
// that the kernel keeps. NOFRAME: no frame pointer may be saved on the stack
// either. The results are written after the call by whoever returns.
TEXT ·rawVfork(SB),NOSPLIT|NOFRAME,$0-48
	MOVQ	trap+0(FP), AX
	MOVQ	a1+8(FP), DI
	MOVQ	a2+16(FP), SI
	MOVQ	a3+24(FP), DX
	XORL	R10, R10
	XORL	R8, R8
	XORL	R9, R9
	POPQ	R12
	SYSCALL
	PUSHQ	R12
	XORL	CX, CX
	CMPQ	AX, $-4095	// -4095..-1 are error numbers
	JCS	done
	MOVQ	AX, CX
	NEGQ	CX
	MOVQ	$-1, AX
done:
	MOVQ	AX, r1+32(FP)
	MOVQ	CX, errno+40(FP)
	RET
