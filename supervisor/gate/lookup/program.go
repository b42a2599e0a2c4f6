package lookup

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// The program (BPF_PROG_TYPE_SK_LOOKUP) runs where the kernel is about to look for the socket that listens, or the unconnected UDP socket,
// for a packet which belongs to no connection: for TCP a SYN, and stray packets. It looks for the place that the packet is for
// in the map, in the order in which the kernel would choose among listening sockets: one address comes before all, and one
// device before all. Where it finds a socket it has the kernel take that instead of looking on. Whatever happens, the packet passes:
// without a socket from here, the kernel looks as ever.
//
// The kernel refuses a socket that cannot take the packet (bpf_sk_assign: a socket of IPv4 for IPv6), and one when another program has
// chosen before us. It is well so: then our listening socket gets the packet, or the one that the other program wants. Among the
// sockets that share the port of the one here (SO_REUSEPORT) it chooses as ever.

// instruction is one of eBPF (struct bpf_insn).
type instruction struct {
	code      uint8
	registers uint8 // the destination is the first of the two bit fields
	offset    int16
	immediate int32
}

// Offsets in struct bpf_sk_lookup (linux/bpf.h).
const (
	ctxFamily   = 8
	ctxProtocol = 12
	ctxLocalIP4 = 40 // as it is in the packet
	ctxLocalIP6 = 44
	ctxPort     = 60 // in the order of this machine
	ctxDevice   = 64 // since Linux 5.17
)

// The place on the stack that the map is asked for.
const (
	keyIP     = -keySize
	keyPort   = keyIP + 16
	keyDevice = keyPort + 4
)

const (
	mapLookup = 1   // BPF_FUNC_map_lookup_elem
	skRelease = 86  // BPF_FUNC_sk_release
	skAssign  = 124 // BPF_FUNC_sk_assign

	pseudoMap = 1 // BPF_PSEUDO_MAP_FD
	skPass    = 1 // SK_PASS
)

// Registers. What is in r1 to r5 is gone after a call.
const (
	r0 uint8 = iota // what a call returns
	r1
	r2
	r3
	_
	_
	r6 // the context
	r7 // the family, then the socket, then what came of it
	_
	_
	r10 // the end of the stack
)

const (
	load32   = unix.BPF_LDX | unix.BPF_MEM | unix.BPF_W
	count64  = unix.BPF_STX | 0xc0 | unix.BPF_DW // BPF_ATOMIC, with BPF_ADD as its immediate value
	store32  = unix.BPF_STX | unix.BPF_MEM | unix.BPF_W
	zero32   = unix.BPF_ST | unix.BPF_MEM | unix.BPF_W
	zero64   = unix.BPF_ST | unix.BPF_MEM | unix.BPF_DW
	loadMap  = unix.BPF_LD | unix.BPF_DW | unix.BPF_IMM
	move     = unix.BPF_ALU64 | unix.BPF_MOV | unix.BPF_X
	set      = unix.BPF_ALU64 | unix.BPF_MOV | unix.BPF_K
	add      = unix.BPF_ALU64 | unix.BPF_ADD | unix.BPF_K
	jump     = unix.BPF_JMP | unix.BPF_JA
	jumpIf   = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
	jumpElse = unix.BPF_JMP | unix.BPF_JNE | unix.BPF_K
	call     = unix.BPF_JMP | unix.BPF_CALL
	exit     = unix.BPF_JMP | unix.BPF_EXIT
)

// label is somewhere to jump to.
type label uint8

const (
	six label = iota
	port
	any4
	found
	pass
	labels
)

// assembly is a program as it is written.
type assembly struct {
	code   []instruction
	places [labels]int
	jumps  map[int]label // by the instruction
}

func (a *assembly) op(code, destination, source uint8, offset int, immediate int32) {
	registers := source<<4 | destination
	if binary.NativeEndian.Uint16([]byte{0, 1}) == 1 {
		registers = destination<<4 | source
	}
	a.code = append(a.code, instruction{code, registers, int16(offset), immediate})
}

func (a *assembly) jump(code, register uint8, value int32, to label) {
	a.jumps[len(a.code)] = to
	a.op(code, register, 0, 0, value)
}

// here is where a label is.
func (a *assembly) here(l label) { a.places[l] = len(a.code) }

// copy32 puts a word of the context on the stack.
func (a *assembly) copy32(from, to int) {
	a.op(load32, r1, r6, from, 0)
	a.op(store32, r10, r1, to, 0)
}

// ask asks a map for the place on the stack.
func (a *assembly) ask(table int) {
	a.op(loadMap, r1, pseudoMap, 0, int32(table))
	a.op(0, 0, 0, 0, 0) // the upper half of what is loaded
	a.op(move, r2, r10, 0, 0)
	a.op(add, r2, 0, 0, keyIP)
	a.op(call, 0, 0, 0, mapLookup)
}

// look asks the map of sockets, and goes on where there is none.
func (a *assembly) look(table int) {
	a.ask(table)
	a.jump(jumpElse, r0, 0, found)
}

// program returns the program that leads to the sockets of a map, and counts in another one. Kernels before Linux 5.17 do not tell programs the device, and
// refuse the one that asks for it.
func program(table, counts int, devices bool) []instruction {
	a := assembly{jumps: make(map[int]label)}
	a.op(move, r6, r1, 0, 0)
	a.op(load32, r1, r6, ctxProtocol, 0)
	a.jump(jumpElse, r1, unix.IPPROTO_TCP, pass)
	a.op(load32, r7, r6, ctxFamily, 0)
	a.jump(jumpIf, r7, unix.AF_INET6, six)
	mapped := [4]byte{2: 0xff, 3: 0xff} // ::ffff:0.0.0.0/96
	a.op(zero64, r10, 0, keyIP, 0)
	a.op(zero32, r10, 0, keyIP+8, int32(binary.NativeEndian.Uint32(mapped[:])))
	a.copy32(ctxLocalIP4, keyIP+12)
	a.jump(jump, 0, 0, port)
	a.here(six)
	for word := 0; word < 16; word += 4 {
		a.copy32(ctxLocalIP6+word, keyIP+word)
	}
	a.here(port)
	a.copy32(ctxPort, keyPort)
	if devices {
		a.copy32(ctxDevice, keyDevice)
		a.look(table)
	}
	a.op(zero32, r10, 0, keyDevice, 0)
	a.look(table)

	a.jump(jumpElse, r7, unix.AF_INET6, any4)
	a.op(zero64, r10, 0, keyIP, 0)
	a.op(zero32, r10, 0, keyIP+8, 0)
	a.here(any4)
	a.op(zero32, r10, 0, keyIP+12, 0)
	if devices {
		a.copy32(ctxDevice, keyDevice)
		a.look(table)
		a.op(zero32, r10, 0, keyDevice, 0)
	}
	a.look(table)
	a.jump(jump, 0, 0, pass)

	a.here(found)
	a.op(move, r7, r0, 0, 0)
	a.op(move, r1, r6, 0, 0)
	a.op(move, r2, r7, 0, 0)
	a.op(set, r3, 0, 0, 0)
	a.op(call, 0, 0, 0, skAssign)
	a.op(move, r1, r7, 0, 0)
	a.op(move, r7, r0, 0, 0)
	a.op(call, 0, 0, 0, skRelease)
	a.jump(jumpElse, r7, 0, pass)
	a.ask(counts)
	a.jump(jumpIf, r0, 0, pass)
	a.op(set, r1, 0, 0, 1)
	a.op(count64, r0, r1, 0, 0)
	a.here(pass)
	a.op(set, r0, 0, 0, skPass)
	a.op(exit, 0, 0, 0, 0)

	for at, to := range a.jumps {
		a.code[at].offset = int16(a.places[to] - at - 1)
	}
	return a.code
}
