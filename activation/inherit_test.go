package activation

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
)

// helper runs this binary in a role, with descriptors from 3 on that are announced
// as sd_listen_fds(3) says, and returns its output. The shell sets LISTEN_PID,
// which must be the pid of the program itself.
func helper(t *testing.T, role string, fds []int, env ...string) string {
	t.Helper()
	cmd := exec.Command("/bin/sh", "-c", `LISTEN_PID=$$; export LISTEN_PID; exec /proc/$PPID/exe`)
	cmd.Env = append([]string{"HIBERGATED_TEST_ROLE=" + role, "GORACE=atexit_sleep_ms=0"}, env...)
	for _, fd := range fds {
		dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			t.Fatal(err)
		}
		f := os.NewFile(uintptr(dup), "")
		defer f.Close()
		cmd.ExtraFiles = append(cmd.ExtraFiles, f)
	}
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil && len(out) == 0 {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

func TestInherit(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	dual := mustOpen(t, "tcp://:0", Options{Family: FamilyDual})
	only6 := mustOpen(t, "tcp://:0", Options{Family: FamilyIPv6})
	only4 := mustOpen(t, "udp://127.0.0.1:0", Options{})
	path := mustOpen(t, "unix://"+tempPath(t, "s"), Options{})
	abstract := mustOpen(t, "unixpacket:@hg-inherit", Options{})
	fifo := mustOpen(t, "fifo://"+tempPath(t, "f"), Options{})
	quiet, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0) // does not listen
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(quiet) })
	raw, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0) // none of ours
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(raw) })
	at := func(s *Socket) string { return s.Address().String() }

	const took, plain = "true true true 1 []", "true true true 0 []"
	tests := map[string]struct {
		fds   []int
		names string
		take  []string
		want  []string
	}{
		"by address": {
			[]int{dual.FD(), only4.FD(), path.FD(), abstract.FD(), fifo.FD()},
			"",
			[]string{"a=" + at(dual), "b=" + at(only4), "c=" + at(path), "d=" + at(abstract), "e=" + at(fifo)},
			[]string{
				"took " + at(dual) + " " + took, "took " + at(only4) + " true true true 0 []", "took " + at(path) + " " + plain,
				"took " + at(abstract) + " " + plain, "took " + at(fifo) + " " + plain, "unused []",
			},
		},
		"by name, port chosen by the kernel": {
			[]int{dual.FD(), only6.FD()},
			"first:second",
			[]string{"third=tcp://:0", "second=tcp://:0=ipv6", "first=tcp://:0"},
			[]string{"false <nil>", "took tcp://:0 " + took, "took tcp://:0 " + took, "unused []"},
		},
		"one name for all, as systemd does": {
			[]int{dual.FD(), path.FD()},
			"x.socket:x.socket",
			[]string{"web=" + at(path), "x.socket=" + at(dual)},
			[]string{"took " + at(path) + " " + plain, "took " + at(dual) + " " + took, "unused []"},
		},
		"wrong address": {
			[]int{dual.FD(), only4.FD()},
			"web:dns",
			[]string{"web=tcp://:1", "dns=tcp://:1", "other=tcp://:1"},
			[]string{
				fmt.Sprintf(`false inherit tcp://:1: socket "web" (tcp://[::]:%d) has its name, but has another port`, dual.Address().Port),
				fmt.Sprintf(`false inherit tcp://:1: socket "dns" (%s) has its name, but is not of the network tcp`, at(only4)),
				"false <nil>",
				fmt.Sprintf(`unused ["web" (tcp://[::]:%d) "dns" (%s)]`, dual.Address().Port, at(only4)),
			},
		},
		"wrong family": {
			[]int{only6.FD()},
			"web",
			[]string{"web=tcp://:0=dual", "web=tcp://:0=ipv4", "web=tcp://0.0.0.0:0", "web=tcp://[::]:0=ipv6"},
			[]string{
				fmt.Sprintf(`false inherit tcp://:0: socket "web" (tcp://[::]:%d) has its name, but serves one IP version only`, only6.Address().Port),
				fmt.Sprintf(`false inherit tcp://:0: socket "web" (tcp://[::]:%d) has its name, but is not IPv4 only`, only6.Address().Port),
				fmt.Sprintf(`false inherit tcp://0.0.0.0:0: socket "web" (tcp://[::]:%d) has its name, but has another IP address`, only6.Address().Port),
				"took tcp://[::]:0 " + took,
				"unused []",
			},
		},
		"no listener and no socket of ours": {
			[]int{quiet, raw},
			"a:b",
			[]string{"a=tcp://0.0.0.0:0", "b=tcp://:0"},
			[]string{
				`false inherit tcp://0.0.0.0:0: socket "a" (tcp://0.0.0.0:0) has its name, but does not listen`,
				`false inherit tcp://:0: socket "b" (of an unknown kind) has its name, but is not of the network tcp`,
				`unused ["a" (tcp://0.0.0.0:0) "b" (of an unknown kind)]`,
			},
		},
		"nothing": {nil, "", []string{"a=tcp://:0"}, []string{"false <nil>", "unused []"}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got := helper(t, "inherit", test.fds, fmt.Sprintf("LISTEN_FDS=%d", len(test.fds)), "LISTEN_FDNAMES="+test.names,
				"HIBERGATED_TEST_TAKE="+strings.Join(test.take, " "))
			if want := strings.Join(test.want, "\n"); got != want {
				t.Errorf("got\n%s\nwant\n%s", got, want)
			}
		})
	}
}

// The reference tool hands over what we take.
func TestInheritFromSystemd(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces, nettest.Tool("systemd-socket-activate"))
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p := tempPath(t, "s")
	cmd := exec.Command("systemd-socket-activate", "--listen="+p, "--fdname=web", "--setenv=HIBERGATED_TEST_ROLE=inherit",
		"--setenv=HIBERGATED_TEST_TAKE=web=unix://"+p, "--setenv=GORACE=atexit_sleep_ms=0", exe)
	var out strings.Builder
	cmd.Stdout = &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	client, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(client)
	nettest.Eventually(t, func() error { return unix.Connect(client, &unix.SockaddrUnix{Name: p}) })
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	if want := "took unix://" + p + " true true true 0 []\nunused []\n"; out.String() != want {
		t.Errorf("got\n%swant\n%s", out.String(), want)
	}
}

func TestInheritErrors(t *testing.T) {
	t.Parallel()
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	tests := map[string]struct {
		fds  []int
		n    string
		want string
	}{
		"no number": {nil, "many", `error: inherit sockets: LISTEN_FDS="many" is not a number`},
		// The first descriptor that is not passed is closed, or one of the Go runtime.
		"too many": {nil, "1000000000", `error: inherit sockets: LISTEN_FDS=1000000000, but descriptor 3`},
		"a device": {[]int{int(null.Fd())}, "1", `error: inherit sockets: LISTEN_FDS=1, but descriptor 3 is neither a socket nor a FIFO`},
	}
	for name, test := range tests {
		if got := helper(t, "inherit", test.fds, "LISTEN_FDS="+test.n); !strings.HasPrefix(got, test.want) {
			t.Errorf("%s: got %s, want %s", name, got, test.want)
		}
	}
}

func TestInheritRemoves(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	for _, remove := range []bool{false, true} {
		p := tempPath(t, "s")
		owner := mustOpen(t, "unix://"+p, Options{Mode: 0o600})
		fd, err := unix.FcntlInt(uintptr(owner.FD()), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			t.Fatal(err)
		}
		in := inherited{fd: fd}
		if err := in.ask(); err != nil {
			t.Fatal(err)
		}
		h := &Inherited{sockets: []inherited{in}}
		s, ok, err := h.Take(&Spec{Address: mustParse(t, "unix://"+p), Options: Options{RemoveOnStop: remove}})
		if !ok || err != nil {
			t.Fatal(ok, err)
		}
		if st, err := os.Stat(p); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("the mode was changed: %v, %v", st.Mode(), err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Lstat(p); (err != nil) != remove {
			t.Errorf("RemoveOnStop %v: got %v", remove, err)
		}
	}
}

func TestAcceptOutOfDescriptors(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	want := "true accept on unix:@hg-out-of-descriptors: too many open files\ntrue <nil>"
	if got := helper(t, "out-of-descriptors", nil); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// A FIFO that is open for reading only would report the end of its last writer for ever.
func TestInheritedFIFOForReadingOnly(t *testing.T) {
	t.Parallel()
	spec := Spec{Address: Address{Network: FIFO, Path: "/run/x"}}
	in := inherited{fd: -1, addr: spec.Address}
	if err := in.differs(&spec); err == nil || err.Error() != "is not open for reading and writing" {
		t.Errorf("got %v, want it refused", err)
	}
	in.readWrite = true
	if err := in.differs(&spec); err != nil {
		t.Errorf("got %v of one that is open for both", err)
	}
}
