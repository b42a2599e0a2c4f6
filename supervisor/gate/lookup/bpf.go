package lookup

import (
	"errors"
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// objectName is what administrators see (bpftool prog, bpftool map). The kernel takes 15 bytes.
const objectName = "hibergated"

const (
	keySize   = 24    // of a place
	valueSize = 8     // a descriptor as it is written, the cookie of the socket as it is read
	maxPlaces = 16384 // of all gates; each costs 16 bytes from the start (struct bpf_shtab_bucket)
)

// bpf is bpf(2). attr points at the part of union bpf_attr that the command knows; the kernel takes the rest for zero.
func bpf(command int, attr unsafe.Pointer, size uintptr) (int, error) {
	n, _, errno := unix.Syscall(unix.SYS_BPF, uintptr(command), uintptr(attr), size)
	if errno != 0 {
		return -1, errno
	}
	return int(n), nil
}

// pointer is an address as union bpf_attr has it. pin keeps there what it points at.
func pointer[T any](pin *runtime.Pinner, p *T) uint64 {
	pin.Pin(p)
	return uint64(uintptr(unsafe.Pointer(p)))
}

// name is a name as union bpf_attr has it.
func name(s string) (n [unix.BPF_OBJ_NAME_LEN]byte) {
	copy(n[:len(n)-1], s)
	return n
}

// createMap makes a map by places: of sockets (BPF_MAP_TYPE_SOCKHASH), or of numbers (BPF_MAP_TYPE_HASH), whose elements cost nothing before they
// are there. The descriptor is the caller's to close.
func createMap(kind uint32) (int, error) {
	flags := uint32(0)
	if kind == unix.BPF_MAP_TYPE_HASH {
		flags = unix.BPF_F_NO_PREALLOC
	}
	attr := struct {
		kind, key, value, entries, flags, inner, node uint32
		name                                          [unix.BPF_OBJ_NAME_LEN]byte
	}{kind: kind, key: keySize, value: valueSize, entries: maxPlaces, flags: flags, name: name(objectName)}
	fd, err := bpf(unix.BPF_MAP_CREATE, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	if err != nil {
		return -1, fmt.Errorf("create BPF map: %w", explain(err))
	}
	return fd, nil
}

// load gives the kernel a program. The descriptor is the caller's to close.
func load(code []instruction) (int, error) {
	var pin runtime.Pinner
	defer pin.Unpin()
	license := append([]byte("Apache-2.0"), 0)
	attr := struct {
		kind, count             uint32
		code, license           uint64
		logLevel, logSize       uint32
		log                     uint64
		kernelVersion, flags    uint32
		name                    [unix.BPF_OBJ_NAME_LEN]byte
		device, expectedToServe uint32
	}{
		kind: unix.BPF_PROG_TYPE_SK_LOOKUP, count: uint32(len(code)), code: pointer(&pin, &code[0]), license: pointer(&pin, &license[0]),
		name: name(objectName), expectedToServe: unix.BPF_SK_LOOKUP,
	}
	fd, err := bpf(unix.BPF_PROG_LOAD, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	if err != nil {
		return -1, fmt.Errorf("load BPF program of type sk_lookup: %w", explain(err))
	}
	return fd, nil
}

// attach has the kernel run a program in the network namespace of this thread, until the descriptor that is returned is closed.
func attach(program int) (int, error) {
	ns, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open network namespace: %w", err)
	}
	defer unix.Close(ns) //nolint:errcheck // nothing was written
	attr := struct{ program, target, kind, flags uint32 }{uint32(program), uint32(ns), unix.BPF_SK_LOOKUP, 0}
	fd, err := bpf(unix.BPF_LINK_CREATE, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	if errors.Is(err, unix.E2BIG) {
		return -1, fmt.Errorf("attach BPF program to the network namespace: there are too many others (64): %w", err)
	}
	if err != nil {
		return -1, fmt.Errorf("attach BPF program to the network namespace: %w", explain(err))
	}
	return fd, nil
}

// element is what the commands about one element of a map take.
type element struct {
	table      uint32
	_          uint32
	key, value uint64
	flags      uint64
}

func (e *element) do(command int) error {
	_, err := bpf(command, unsafe.Pointer(e), unsafe.Sizeof(*e))
	return err
}

// put writes the element of a place: the descriptor of the socket that new connections go to, or a number. It takes the place of
// another one.
func put(table int, p place, value uint64) error {
	var pin runtime.Pinner
	defer pin.Unpin()
	key := p.key()
	e := element{table: uint32(table), key: pointer(&pin, &key[0]), value: pointer(&pin, &value)}
	return e.do(unix.BPF_MAP_UPDATE_ELEM)
}

// remove leaves a place without an element.
func remove(table int, p place) error {
	var pin runtime.Pinner
	defer pin.Unpin()
	key := p.key()
	e := element{table: uint32(table), key: pointer(&pin, &key[0])}
	if err := e.do(unix.BPF_MAP_DELETE_ELEM); !errors.Is(err, unix.ENOENT) {
		return err
	}
	return nil // its socket has been closed
}

// read returns the element of a place: the cookie of a socket, or a number. ok: there is one.
func read(table int, p place) (value uint64, ok bool) {
	var pin runtime.Pinner
	defer pin.Unpin()
	key := p.key()
	to := new(uint64)
	e := element{table: uint32(table), key: pointer(&pin, &key[0]), value: pointer(&pin, to)}
	err := e.do(unix.BPF_MAP_LOOKUP_ELEM)
	return *to, err == nil
}

// explain says what is missing.
func explain(err error) error {
	switch {
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("it needs CAP_BPF (or CAP_SYS_ADMIN) and CAP_NET_ADMIN of the machine, those of a user namespace are not enough; "+
			"before Linux 5.11 also a limit of locked memory (LimitMEMLOCK) of some MiB: %w", err)
	case errors.Is(err, unix.ENOSYS):
		return fmt.Errorf("the kernel is built without bpf(2): %w", err)
	case errors.Is(err, unix.EINVAL):
		return fmt.Errorf("the kernel is older than Linux 5.9, or built without CONFIG_BPF_STREAM_PARSER or CONFIG_INET: %w", err)
	}
	return err
}
