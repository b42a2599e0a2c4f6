package adopt

import (
	"fmt"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// data is struct seccomp_data as words: the number, the architecture, the address of the instruction and the
// arguments, lower halves first.
func data(nr, arch uint32, args ...uint64) []uint32 {
	d := make([]uint32, 16)
	d[0], d[1] = nr, arch
	for i, a := range args {
		d[4+2*i], d[5+2*i] = uint32(a), uint32(a>>32)
	}
	return d
}

// judge runs a classic BPF program as the kernel does. It also says whether it looked at an
// argument: then the kernel cannot remember the answer for the number.
func judge(program []unix.SockFilter, data []uint32) (verdict uint32, args bool, err error) {
	var acc uint32
	for pc := 0; pc < len(program); pc++ {
		in := program[pc]
		hit := false
		switch in.Code {
		case unix.BPF_LD | unix.BPF_W | unix.BPF_ABS:
			if in.K%4 != 0 || int(in.K/4) >= len(data) {
				return 0, args, fmt.Errorf("instruction %d loads from %d", pc, in.K)
			}
			acc, args = data[in.K/4], args || in.K >= dataArgs
			continue
		case unix.BPF_RET | unix.BPF_K:
			return in.K, args, nil
		case unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K:
			hit = acc == in.K
		case unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K:
			hit = acc >= in.K
		default:
			return 0, args, fmt.Errorf("instruction %d has code %#x", pc, in.Code)
		}
		if hit {
			pc += int(in.Jt)
		} else {
			pc += int(in.Jf)
		}
	}
	return 0, args, fmt.Errorf("the program runs out of its end")
}

const (
	allowed = unix.SECCOMP_RET_ALLOW
	asked   = unix.SECCOMP_RET_USER_NOTIF
)

func TestFilterAsks(t *testing.T) {
	t.Parallel()
	if runtime.GOARCH != "amd64" {
		t.Skip("the numbers are those of x86")
	}
	const native, i386, high = unix.AUDIT_ARCH_X86_64, unix.AUDIT_ARCH_I386, 1 << 32
	bind := func(length uint64) []uint32 { return data(unix.SYS_BIND, native, 3, high, length) }
	bind32 := func(length uint64) []uint32 { return data(i386Bind, i386, 3, 1, length) }
	for name, tt := range map[string]struct {
		data           []uint32
		without, paths uint32
	}{
		"bind of IPv4":                   {bind(16), asked, asked},
		"bind of IPv6":                   {bind(28), asked, asked},
		"bind of IPv6, RFC 2133":         {bind(24), asked, asked},
		"bind of a sockaddr_storage":     {bind(128), asked, asked},
		"bind, garbage above the length": {bind(high | 16), asked, asked},
		"bind of netlink, or /tmp/sock":  {bind(12), allowed, asked},
		"bind of a sockaddr_un":          {bind(110), allowed, asked},
		"bind of a short path":           {bind(3), allowed, asked},
		"bind of a family alone":         {bind(2), allowed, allowed},
		"bind of nothing":                {bind(0), allowed, allowed},
		"bind of a packet socket":        {bind(20), allowed, asked},
		"listen":                         {data(unix.SYS_LISTEN, native, 3, 5), asked, asked},
		"unlink":                         {data(unix.SYS_UNLINK, native, 1), allowed, asked},
		"unlinkat":                       {data(unix.SYS_UNLINKAT, native, 3, 1, 0), allowed, asked},
		"io_uring":                       {data(ioUringSetup, native), asked, asked},
		"connect":                        {data(unix.SYS_CONNECT, native, 3, 1, 16), allowed, allowed},
		"socket":                         {data(unix.SYS_SOCKET, native, 2, 1, 0), allowed, allowed},
		"rename":                         {data(unix.SYS_RENAME, native, 1, 2), allowed, allowed},
		"exit":                           {data(unix.SYS_EXIT_GROUP, native), allowed, allowed},

		"i386 bind":                 {bind32(16), asked, asked},
		"i386 bind of a path":       {bind32(110), allowed, asked},
		"i386 bind of netlink":      {bind32(12), allowed, asked},
		"i386 listen":               {data(i386Listen, i386, 3, 5), asked, asked},
		"i386 unlink":               {data(i386Unlink, i386, 1), allowed, asked},
		"i386 unlinkat":             {data(i386Unlinkat, i386, 3, 1, 0), allowed, asked},
		"i386 io_uring":             {data(ioUringSetup, i386), asked, asked},
		"i386 socketcall bind":      {data(i386Socketcall, i386, 2, 1), asked, asked},
		"i386 socketcall listen":    {data(i386Socketcall, i386, 4, 1), asked, asked},
		"i386 socketcall connect":   {data(i386Socketcall, i386, 3, 1), allowed, allowed},
		"i386 socketcall accept":    {data(i386Socketcall, i386, 5, 1), allowed, allowed},
		"i386 geteuid":              {data(unix.SYS_BIND, i386, 3, 1, 16), allowed, allowed},
		"the socketcall of i386":    {data(i386Socketcall, native, 2, 1), allowed, allowed},
		"the bind of i386":          {data(i386Bind, native, 3, 1, 16), allowed, allowed},
		"x32 bind":                  {data(x32|unix.SYS_BIND, native, 3, 1, 16), allowed, allowed},
		"x32 listen":                {data(x32|unix.SYS_LISTEN, native, 3, 1), allowed, allowed},
		"an unknown architecture":   {data(unix.SYS_BIND, unix.AUDIT_ARCH_S390X, 3, 1, 16), allowed, allowed},
		"no architecture":           {data(unix.SYS_LISTEN, 0, 3, 1), allowed, allowed},
		"a number that is not":      {data(^uint32(0), native), allowed, allowed},
		"a number that is not, 386": {data(^uint32(0), i386), allowed, allowed},
	} {
		local := tt.paths // with abstract names only, nobody asks about files
		if strings.Contains(name, "unlink") {
			local = allowed
		}
		for _, f := range []struct {
			local, paths bool
			want         uint32
		}{{false, false, tt.without}, {true, false, local}, {true, true, tt.paths}, {false, true, tt.paths}} {
			got, _, err := judge(Filter(f.local, f.paths), tt.data)
			if got != f.want || err != nil {
				t.Errorf("%s, local %v, paths %v: got %#x, %v, want %#x", name, f.local, f.paths, got, err, f.want)
			}
		}
	}
}

// filters are the kinds that there are: local, paths.
func filters() [][2]bool {
	return [][2]bool{{false, false}, {true, false}, {false, true}, {true, true}}
}

// Every call that the filter asks about is one that decode knows, on each architecture, and the kernel can remember its
// answer for all but a few.
func TestFilterAndDecodeAgree(t *testing.T) {
	t.Parallel()
	memory := func(_ uint64, to []byte) bool { clear(to); return true }
	for _, kind := range filters() {
		program := Filter(kind[0], kind[1])
		for _, a := range architectures() {
			var looked []uint32
			for nr := range uint32(1024) {
				looks := false
				for first := range uint64(6) {
					for _, third := range []uint64{0, 2, 3, 12, 16, 24, 28, 110, 128, 1 << 31} {
						verdict, args, err := judge(program, data(nr, a.audit, first, 1, third))
						if err != nil {
							t.Fatal(err)
						}
						looks = looks || args
						n := notification{nr: int32(nr), arch: a.audit, args: [6]uint64{first, 1, third}}
						if _, other := decode(&n, memory).(otherCall); verdict == asked && other {
							t.Errorf("%v, architecture %#x: call %d is asked about and not known", kind, a.audit, nr)
						}
					}
				}
				if looks {
					looked = append(looked, nr)
				}
			}
			want := 1 // bind
			if a.socketcall != 0 {
				want++
			}
			if len(looked) != want {
				t.Errorf("%v, architecture %#x: the arguments of %v are looked at, want %d calls", kind, a.audit, looked, want)
			}
		}
	}
}

// The program is one that the kernel takes: it is short, every jump lands within it, and no path runs out of its end. Jumps
// have 8 bits, which "where" fills without looking.
func TestFilterIsSound(t *testing.T) {
	t.Parallel()
	for _, kind := range filters() {
		program := Filter(kind[0], kind[1])
		if len(program) == 0 || len(program) > 255 {
			t.Fatalf("%v: %d instructions; with more than 255 jumps could overflow", kind, len(program))
		}
		for pc, in := range program {
			if in.Code&7 == unix.BPF_JMP && (pc+1+int(in.Jt) >= len(program) || pc+1+int(in.Jf) >= len(program)) {
				t.Errorf("%v: instruction %d jumps to %d or %d of %d", kind, pc, pc+1+int(in.Jt), pc+1+int(in.Jf), len(program))
			}
		}
		if last := program[len(program)-1]; last.Code != unix.BPF_RET|unix.BPF_K || last.K != allowed {
			t.Errorf("%v: it ends in %+v", kind, last)
		}
	}
	// And a part whose length a jump cannot say would be noticed here.
	var f filter
	f.where(1, func() {
		for range 255 {
			f.allow()
		}
	})
	if f.code[0].Jf != 255 {
		t.Errorf("got a jump of %d, want 255", f.code[0].Jf)
	}
}

// However much is asked, the answers take no more than their share of a processor.
func TestBudget(t *testing.T) {
	t.Parallel()
	now := time.Now()
	b := newBudget(now)
	for _, step := range []struct {
		after, took, want time.Duration
	}{
		{0, burst - 1, 0},           // at once
		{time.Hour, burst - 1, 0},   // and again, but
		{0, 1, rest * share},        // no more than that
		{rest * share, rest - 1, 0}, // there is what was waited for
		{share * 10, time.Millisecond + 11, (rest + time.Millisecond) * share},
	} {
		now = now.Add(step.after)
		if got := b.spend(now, step.took); got != step.want {
			t.Errorf("after %v, %v of work: got a pause of %v, want %v", step.after, step.took, got, step.want)
		}
	}
	// In the long run.
	b = newBudget(now)
	began, worked := now, time.Duration(0)
	for range 100000 {
		const took = 50 * time.Microsecond
		now = now.Add(took)
		worked += took
		pause := b.spend(now, took)
		if pause < 0 {
			t.Fatalf("got a pause of %v", pause)
		}
		now = now.Add(pause)
	}
	if limit := burst + rest + now.Sub(began)/share; worked > limit || worked < limit*9/10 {
		t.Errorf("worked %v of %v, want about %v", worked, now.Sub(began), limit)
	}
}

// The time of a thread is that of its work, and not of its waiting.
func TestThreadTime(t *testing.T) {
	t.Parallel()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	first := threadTime()
	for threadTime() < first+time.Millisecond {
	}
	began := time.Now()
	before := threadTime()
	if _, err := unix.Poll(nil, 50); err != nil {
		t.Skip(err)
	}
	if used, passed := threadTime()-before, time.Since(began); used >= passed {
		t.Errorf("waiting for %v used %v", passed, used)
	}
}
