package adopt

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A test starts this binary as its program. In the role "filter" it gives itself a filter, sends the listener to the
// test and becomes the "program", in which every thread has the filter: that does what
// the test tells it, one system call at a time.
const (
	roleEnv     = "HIBERGATED_TEST_ROLE"
	roleFilter  = "filter"
	roleProgram = "program"
	roleProbe   = "probe"

	pathsEnv   = "HIBERGATED_TEST_PATHS" // "1": Filter(true, true)
	flagsEnv   = "HIBERGATED_TEST_FLAGS" // of seccomp(2)
	controlFD  = 3                       // where the test is
	childFD    = 4                       // where it is for a child
	maxThreads = 8
)

func play(role string) int {
	err := map[string]func() error{roleFilter: playFilter, roleProgram: playProgram, roleProbe: playProbe}[role]()
	if err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		return 1
	}
	return 0
}

// install gives the thread a filter.
func install(paths bool, flags uintptr) (listener int, err error) {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return -1, err
	}
	f := Filter(paths, paths)
	prog := unix.SockFprog{Len: uint16(len(f)), Filter: &f[0]}
	fd, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags|unix.SECCOMP_FILTER_FLAG_NEW_LISTENER, uintptr(unsafe.Pointer(&prog)))
	if errno != 0 {
		return -1, fmt.Errorf("seccomp: %w", errno)
	}
	return int(fd), nil
}

func playProbe() error {
	runtime.LockOSThread()
	_, err := install(true, 0)
	return err
}

func playFilter() error {
	runtime.LockOSThread()
	var flags uintptr
	if _, err := fmt.Sscan(os.Getenv(flagsEnv), &flags); err != nil {
		return err
	}
	listener, err := install(os.Getenv(pathsEnv) == "1", flags)
	if err != nil {
		return err
	}
	if err := unix.Sendmsg(controlFD, []byte{0}, unix.UnixRights(listener), nil, 0); err != nil {
		return err
	}
	if err := os.Setenv(roleEnv, roleProgram); err != nil {
		return err
	}
	return syscall.Exec("/proc/self/exe", os.Args, os.Environ()) // its descriptor is close-on-exec
}

// order is what a test tells its program.
type order struct {
	ID     int
	Thread int    // which one does it
	Op     string // "": a system call
	NR     uintptr
	Args   []arg
	I386   bool // by the entry of i386
	Times  int
}

// arg is an argument of a system call: a number, bytes to point to, or memory that was named before.
type arg struct {
	Int   uint64
	Bytes []byte
	Ref   string
}

// answer is what came of it.
type answer struct {
	ID    int
	R1    uint64
	Errno unix.Errno
	Bytes [][]byte           // what the arguments point to, after the call
	Count map[unix.Errno]int // of Op "storm"
	Err   string             // the program itself is wrong
}

// actor is the program.
type actor struct {
	mu      sync.Mutex // over replies
	to      *json.Encoder
	threads [maxThreads]chan order
	memory  map[string][]byte // never freed; of run alone
	flips   map[string]*flip
	child   *os.Process
}

func playProgram() error {
	control := os.NewFile(controlFD, "control")
	a := &actor{to: json.NewEncoder(control), memory: map[string][]byte{}, flips: map[string]*flip{}}
	for i := range a.threads {
		a.threads[i] = make(chan order)
		go func() {
			runtime.LockOSThread() // and never back: a thread may change its namespaces
			for r := range a.threads[i] {
				a.reply(a.do(r))
			}
		}()
	}
	from := json.NewDecoder(control)
	for {
		var r order
		if err := from.Decode(&r); errors.Is(err, io.EOF) {
			return nil // the test has let it go
		} else if err != nil {
			return err
		}
		switch r.Op {
		case "remember", "flip", "still", "fork", "reap":
			a.reply(a.manage(r))
		default:
			for i, x := range r.Args { // threads must not read the map
				if x.Ref != "" {
					r.Args[i].Int = uint64(uintptr(unsafe.Pointer(&a.memory[x.Ref][0])))
				}
			}
			a.threads[r.Thread] <- r
		}
	}
}

func (a *actor) reply(r answer) {
	a.mu.Lock()
	defer a.mu.Unlock()
	_ = a.to.Encode(r) // without the test, the program ends
}

// do makes one system call, or many.
func (a *actor) do(r order) answer {
	out := answer{ID: r.ID}
	if r.Op == "low" {
		out.R1 = uint64(uintptr(unsafe.Pointer(&lowMemory(true)[0])))
		return out
	}
	if r.Op == "storm" {
		out.Count = storm(r.Args[0].Bytes, r.Times)
		return out
	}
	var args [6]uintptr
	var pin runtime.Pinner
	defer pin.Unpin()
	low := lowMemory(r.I386)
	for i, x := range r.Args {
		switch {
		case x.Bytes == nil:
			args[i] = uintptr(x.Int)
		case r.I386:
			copy(low, x.Bytes)
			args[i] = uintptr(unsafe.Pointer(&low[0]))
			low = low[(len(x.Bytes)+15)&^15:]
		default:
			b := append(x.Bytes, 0) // so that there is something to point to
			r.Args[i].Bytes = b[:len(x.Bytes)]
			pin.Pin(&b[0])
			args[i] = uintptr(unsafe.Pointer(&b[0]))
		}
	}
	if r.I386 {
		got := int32(enterI386(uint32(r.NR), uint32(args[0]), uint32(args[1]), uint32(args[2])))
		if got < 0 {
			out.Errno = unix.Errno(-got)
		}
		out.R1 = uint64(got)
		return out
	}
	r1, _, errno := unix.Syscall6(r.NR, args[0], args[1], args[2], args[3], args[4], args[5])
	out.R1, out.Errno = uint64(r1), errno
	for _, x := range r.Args {
		out.Bytes = append(out.Bytes, x.Bytes)
	}
	return out
}

// storm binds TCP sockets as fast as it can.
func storm(address []byte, times int) map[unix.Errno]int {
	count := map[unix.Errno]int{}
	for range times {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			panic(err)
		}
		_, _, errno := unix.Syscall(unix.SYS_BIND, uintptr(fd), uintptr(unsafe.Pointer(&address[0])), uintptr(len(address)))
		count[errno]++
		_ = unix.Close(fd)
	}
	return count
}

// flip is a thread that changes memory for ever.
type flip struct {
	stop  atomic.Bool
	ended chan struct{}
}

// manage does what concerns the whole program.
func (a *actor) manage(r order) answer {
	out := answer{ID: r.ID}
	fail := func(err error) {
		if err != nil {
			out.Err = err.Error()
		}
	}
	switch r.Op {
	case "remember": // memory by a name
		b, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		fail(err)
		copy(b, r.Args[0].Bytes)
		a.memory[r.Args[0].Ref] = b
	case "flip": // the first 4 bytes between two values
		at := (*uint32)(unsafe.Pointer(&a.memory[r.Args[0].Ref][0]))
		values := [2]uint32{uint32(r.Args[1].Int), uint32(r.Args[2].Int)}
		f := &flip{ended: make(chan struct{})}
		a.flips[r.Args[0].Ref] = f
		go func() {
			defer close(f.ended)
			for i := 0; !f.stop.Load(); i++ {
				atomic.StoreUint32(at, values[i&1])
			}
		}()
	case "still":
		f := a.flips[r.Args[0].Ref]
		f.stop.Store(true)
		<-f.ended
	case "fork": // a child that has the filter too, and is told by the test what to do
		var err error
		control := os.NewFile(childFD, "child")
		a.child, err = os.StartProcess("/proc/self/exe", os.Args, &os.ProcAttr{Env: os.Environ(), Files: []*os.File{os.Stdin, os.Stdout, os.Stderr, control}})
		control.Close() // so that its end is seen
		fail(err)
	case "reap":
		_, err := a.child.Wait()
		fail(err)
	}
	return out
}
