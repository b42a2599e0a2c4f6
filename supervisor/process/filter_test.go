package process

import (
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
)

// asksAbout is a filter that asks about one system call, and allows all others.
func asksAbout(nr uint32) []unix.SockFilter {
	return []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jt: 0, Jf: 1, K: nr},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_USER_NOTIF},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
}

// niceFilter asks about setpriority(2), which nobody calls but renice: changeNice says what comes of it.
func niceFilter() []unix.SockFilter { return asksAbout(unix.SYS_SETPRIORITY) }

const changeNice = `/bin/busybox renice -n 5 -p $$; cut -d' ' -f19 /proc/$$/stat`

// question is struct seccomp_notif, and reply struct seccomp_notif_resp.
type question struct {
	id    uint64
	pid   uint32
	flags uint32
	nr    int32
	arch  uint32
	ip    uint64
	args  [6]uint64
}

type reply struct {
	id    uint64
	val   int64
	err   int32
	flags uint32
}

// answer waits for the one question that comes at a listener, and answers it.
func answer(tb testing.TB, listener int, r reply) question {
	tb.Helper()
	var q question
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(listener), unix.SECCOMP_IOCTL_NOTIF_RECV, uintptr(unsafe.Pointer(&q))); errno != 0 {
		tb.Fatal(errno)
	}
	r.id = q.id
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(listener), unix.SECCOMP_IOCTL_NOTIF_SEND, uintptr(unsafe.Pointer(&r))); errno != 0 {
		tb.Fatal(errno)
	}
	return q
}

// mustTakeListener takes the listener of a process that has one.
func mustTakeListener(tb testing.TB, p *Process) int {
	tb.Helper()
	fd := p.TakeListener()
	if fd < 0 {
		tb.Fatal("there is no listener")
	}
	if again := p.TakeListener(); again != -1 {
		tb.Errorf("got %d the second time, want -1", again)
	}
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
	if err != nil || flags&unix.FD_CLOEXEC == 0 {
		tb.Errorf("got flags %#x, %v, want close-on-exec", flags, err)
	}
	return fd
}

// canFilter is the feature that a filter that asks can be installed here: the kernel has it, and nobody else has one.
var canFilter = sync.OnceValue(func() error {
	var errno unix.Errno
	onThread(func() {
		var fd int
		if fd, errno = installHere(niceFilter()); errno == 0 {
			unix.Close(fd)
		}
	})
	if errno != 0 {
		return fmt.Errorf("no filter that asks: %w", errno)
	}
	return nil
})

// installHere gives the thread a filter.
func installHere(f []unix.SockFilter) (int, unix.Errno) {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return -1, unix.EPERM
	}
	prog := unix.SockFprog{Len: uint16(len(f)), Filter: &f[0]}
	fd, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_NEW_LISTENER, uintptr(unsafe.Pointer(&prog)))
	return int(fd), errno
}

// onThread runs f on a thread of its own, which ends with it. The first thread of the process cannot end.
func onThread(f func()) {
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		runtime.LockOSThread()
		if unix.Gettid() == os.Getpid() {
			onThread(f)
			runtime.UnlockOSThread()
			return
		}
		f()
	}()
	<-ended
}

// What the filter asks about, whoever takes the listener answers.
func TestFilterAsks(t *testing.T) {
	nettest.Need(t, canFilter, nettest.Tool("/bin/busybox"))
	for way, noClone3 := range bothClones() {
		for name, tt := range map[string]struct {
			r    reply
			want string
		}{
			"goes on": {reply{flags: unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE}, "5\n"},
			"fails":   {reply{err: -int32(unix.EXDEV)}, "cross-device link\n0\n"},
		} {
			t.Run(way+", "+name, func(t *testing.T) {
				s := newSpawner(t)
				s.noClone3.Store(noClone3)
				r, w := blockingPipe(t)
				defer w.Close()
				defer r.Close()
				p, err := s.Start(&Spec{Exec: sh(changeNice), Filter: niceFilter(), Stdout: int(w.Fd()), Stderr: int(w.Fd())})
				w.Close()
				if err != nil {
					t.Fatal(err)
				}
				endWithTest(t, p)
				listener := mustTakeListener(t, p)
				if q := answer(t, listener, tt.r); q.args[1] != uint64(p.PID()) || int(q.pid) == p.PID() || q.nr != unix.SYS_SETPRIORITY {
					t.Errorf("got %+v, want a child of process %d", q, p.PID())
				}
				out, err := io.ReadAll(r)
				if err != nil || !strings.HasSuffix(string(out), tt.want) {
					t.Errorf("got %q, %v, want %q", out, err, tt.want)
				}
				mustWait(t, p)
				unix.Close(listener)
			})
		}
	}
}

// A listener that is closed leaves the process with ENOSYS, and one that nobody takes is closed by Reap: the test counts
// descriptors.
func TestFilterListenerClosed(t *testing.T) {
	nettest.Need(t, canFilter, nettest.Tool("/bin/busybox"))
	s := newSpawner(t)
	r, w := blockingPipe(t)
	defer r.Close()
	p, err := s.Start(&Spec{Exec: sh(changeNice), Filter: niceFilter(), Stdout: int(w.Fd()), Stderr: int(w.Fd())})
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	endWithTest(t, p)
	unix.Close(mustTakeListener(t, p))
	out, err := io.ReadAll(r)
	if err != nil || !strings.Contains(string(out), "not implemented\n0\n") {
		t.Errorf("got %q, %v, want ENOSYS", out, err)
	}
	mustWait(t, p)
	for range 3 {
		p, err := s.Start(&Spec{Exec: sh("exit 3"), Filter: niceFilter(), Stdout: -1, Stderr: -1})
		if err != nil {
			t.Fatal(err)
		}
		if got := mustWait(t, p); got.Code != 3 {
			t.Errorf("got %v", got)
		}
		if fd := p.TakeListener(); fd != -1 {
			t.Errorf("got %d after Reap, want -1", fd)
		}
	}
	p, err = s.Start(&Spec{Exec: sh("exit 3"), Stdout: -1, Stderr: -1})
	if err != nil {
		t.Fatal(err)
	}
	if fd := p.TakeListener(); fd != -1 {
		t.Errorf("got %d without a filter, want -1", fd)
	}
	mustWait(t, p)
}

// The program does not get the descriptor on which it is judged.
func TestFilterListenerNotInChild(t *testing.T) {
	nettest.Need(t, canFilter, nettest.Tool("/bin/busybox"))
	for way, noClone3 := range bothClones() {
		for _, others := range []int{0, 50, 1000} {
			t.Run(fmt.Sprintf("%s, among %d", way, others), func(t *testing.T) {
				s := newSpawner(t)
				s.noClone3.Store(noClone3)
				openFDs(t, others, 0)
				fds := openFiles(t, 5)
				r, w := blockingPipe(t)
				p, err := s.Start(&Spec{Exec: sh(listFDs), FDs: fds, First: 3, Filter: niceFilter(), Stdout: int(w.Fd()), Stderr: int(w.Fd())})
				w.Close()
				if err != nil {
					t.Fatal(err)
				}
				b, err := io.ReadAll(r)
				if err != nil {
					t.Fatal(err)
				}
				r.Close()
				mustWait(t, p)
				table := fdTable(string(b))
				if len(table) != 3+len(fds) || strings.Contains(string(b), "seccomp") {
					t.Errorf("got %v", table)
				}
				for i, fd := range fds {
					if got, want := table[strconv.Itoa(3+i)], target(t, fd); got != want {
						t.Errorf("descriptor %d: got %s, want %s", 3+i, got, want)
					}
				}
			})
		}
	}
}

// A start that fails after the filter is there leaves nothing: the test counts descriptors and children.
func TestFilterStartFails(t *testing.T) {
	nettest.Need(t, canFilter)
	for name, tt := range map[string]struct {
		spec Spec
		err  error
		text string
	}{
		"no program":   {Spec{Exec: &Exec{Command: []string{"/no/such/program"}}, Filter: niceFilter()}, unix.ENOENT, "exec /no/such/program: no such file or directory"},
		"no directory": {Spec{Exec: &Exec{Command: []string{"/bin/true"}, WorkingDirectory: "/no/dir"}, Filter: niceFilter()}, unix.ENOENT, "chdir /no/dir: no such file or directory"},
		"no filter":    {Spec{Exec: &Exec{Command: []string{"/bin/true"}}, Filter: []unix.SockFilter{{Code: 0xffff}}}, unix.EINVAL, "seccomp: invalid argument"},
		"no end":       {Spec{Exec: &Exec{Command: []string{"/bin/true"}}, Filter: niceFilter()[:2]}, unix.EINVAL, "seccomp: invalid argument"},
	} {
		for way, noClone3 := range bothClones() {
			t.Run(name+", "+way, func(t *testing.T) {
				s := newSpawner(t)
				s.noClone3.Store(noClone3)
				for range 3 {
					p, err := s.Start(&tt.spec)
					if err == nil {
						mustWait(t, p)
						t.Fatal("it has started")
					}
					var startErr *StartError
					if !errors.As(err, &startErr) || !errors.Is(err, tt.err) || err.Error() != tt.text {
						t.Errorf("got %q, want %q", err, tt.text)
					}
				}
			})
		}
	}
}

// The kernel allows one filter that asks, and says EBUSY where whoever started us has one.
func TestFilterBusy(t *testing.T) {
	nettest.Need(t, canFilter)
	s := newSpawner(t)
	onThread(func() {
		fd, errno := installHere(niceFilter())
		if errno != 0 {
			t.Error(errno)
			return
		}
		defer unix.Close(fd)
		p, err := s.Start(&Spec{Exec: &Exec{Command: []string{"/bin/true"}}, Filter: niceFilter(), Stdout: -1, Stderr: -1})
		if err == nil {
			mustWait(t, p)
		}
		if !errors.Is(err, unix.EBUSY) || !strings.Contains(err.Error(), "a filter of whoever started the supervisor asks") {
			t.Errorf("got %v, want EBUSY and why", err)
		}
		// Without one of its own it starts.
		p, err = s.Start(&Spec{Exec: &Exec{Command: []string{"/bin/true"}}, Stdout: -1, Stderr: -1})
		if err != nil {
			t.Error(err)
			return
		}
		if status := mustWait(t, p); status != (ExitStatus{}) {
			t.Error(status)
		}
	})
}

// status has the program say what the kernel notes of it.
func status(t *testing.T, s *Spawner, spec *Spec) string {
	t.Helper()
	spec.Exec = sh(`exec /bin/busybox grep -E '^(NoNewPrivs|Seccomp):' /proc/self/status`)
	out, _ := output(t, s, spec)
	return strings.Join(strings.Fields(out), " ")
}

// As root the program keeps what setuid programs give it; who may not filter otherwise gives that up.
func TestFilterPrivileges(t *testing.T) {
	nettest.Need(t, canFilter, nettest.Tool("/bin/busybox"))
	s := newSpawner(t)
	const plain, kept, given = "NoNewPrivs: 0 Seccomp: 0", "NoNewPrivs: 0 Seccomp: 2", "NoNewPrivs: 1 Seccomp: 2"
	if os.Geteuid() == 0 { // in a user namespace, too
		if got := status(t, s, &Spec{}); got != plain {
			t.Errorf("without a filter: got %q, want %q", got, plain)
		}
		if got := status(t, s, &Spec{Filter: niceFilter()}); got != kept {
			t.Errorf("as root: got %q, want %q", got, kept)
		}
	}
	onThread(func() {
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var caps [2]unix.CapUserData
		if err := unix.Capget(&header, &caps[0]); err != nil {
			t.Error(err)
			return
		}
		caps[0].Effective &^= 1 << unix.CAP_SYS_ADMIN
		caps[0].Permitted &^= 1 << unix.CAP_SYS_ADMIN
		if err := unix.Capset(&header, &caps[0]); err != nil {
			t.Error(err)
			return
		}
		if got := status(t, s, &Spec{}); got != plain {
			t.Errorf("without CAP_SYS_ADMIN and a filter: got %q, want %q", got, plain)
		}
		for _, noClone3 := range bothClones() {
			s.noClone3.Store(noClone3)
			if got := status(t, s, &Spec{Filter: niceFilter()}); got != given {
				t.Errorf("without CAP_SYS_ADMIN: got %q, want %q", got, given)
			}
		}
	})
}

// With another user's identity the filter is the same, and root's right to install it is enough.
func TestFilterIdentity(t *testing.T) {
	nettest.Need(t, canFilter, nettest.RealRoot, nettest.Tool("/bin/busybox"))
	s := newSpawner(t)
	if got, want := status(t, s, &Spec{Filter: niceFilter(), Identity: &Identity{UID: 65534, GID: 65534}}), "NoNewPrivs: 0 Seccomp: 2"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// Starts at the same time do not get each other's listeners.
func TestFilterManyStarts(t *testing.T) {
	nettest.Need(t, canFilter, nettest.Tool("/bin/busybox"))
	s := newSpawner(t)
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			for range 15 {
				p, err := s.Start(&Spec{Exec: &Exec{Command: []string{"/bin/busybox", "renice", "-n", "5", "-p", "1"}}, Filter: niceFilter(), Stdout: -1, Stderr: -1})
				if err != nil {
					t.Error(err)
					return
				}
				listener := p.TakeListener()
				var q question
				if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(listener), unix.SECCOMP_IOCTL_NOTIF_RECV, uintptr(unsafe.Pointer(&q))); errno != 0 || int(q.pid) != p.PID() {
					t.Errorf("got %v and a question of %d, want %d", errno, q.pid, p.PID())
				}
				unix.Close(listener)
				if _, err := wait(p); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
}

func TestFilterFlags(t *testing.T) {
	t.Parallel()
	nettest.Need(t, canFilter)
	flags := filterFlags()
	if flags&unix.SECCOMP_FILTER_FLAG_NEW_LISTENER == 0 {
		t.Errorf("got %#x, want a listener", flags)
	}
	b, err := os.ReadFile("/proc/thread-self/status")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(b), "\nSeccomp:\t0\n") {
		t.Error("to ask has installed a filter, or somebody else has one")
	}
}
