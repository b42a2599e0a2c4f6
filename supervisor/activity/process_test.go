package activity

import (
	"bufio"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
)

// mustStartFamily starts a process (its name has a parenthesis) with a child and a grandchild.
func mustStartFamily(t *testing.T) (pids []int) {
	t.Helper()
	const script = `echo $$; sh -c 'echo $$; sh -c "echo \$\$; echo; read x"; :'; :`
	cmd := exec.Command("sh", "-c", script)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	stdin, err := cmd.StdinPipe() // held open: the grandchild waits
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		unix.Kill(-cmd.Process.Pid, unix.SIGKILL)
		stdin.Close()
		cmd.Wait()
	})
	for lines := bufio.NewScanner(out); lines.Scan() && lines.Text() != ""; {
		pid, err := strconv.Atoi(lines.Text())
		if err != nil {
			t.Fatal(err)
		}
		pids = append(pids, pid)
	}
	if len(pids) != 3 {
		t.Fatalf("got processes %v, want three", pids)
	}
	if err := os.WriteFile("/proc/"+strconv.Itoa(pids[0])+"/comm", []byte("a) S 1 ("), 0); err != nil {
		t.Logf("not renamed: %v", err)
	}
	return pids
}

// Every process comes once and after its parent, however the roots are given; those that have gone are no error.
func TestEachProcess(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	family := mustStartFamily(t)
	top, child, grandchild := family[0], family[1], family[2]
	gone := exec.Command("true")
	if err := gone.Run(); err != nil {
		t.Fatal(err)
	}
	want, err := (*Tracker)(nil).Read(t.Context(), []int{top})
	if err != nil {
		t.Fatal(err)
	}
	for _, roots := range [][]int{
		{top}, {top, top}, {top, child, grandchild}, {grandchild, child, top}, {grandchild, top}, {child, grandchild, top, child},
	} {
		roots = append(slices.Clone(roots), gone.Process.Pid)
		var got []int
		eachProcess(roots, func(pid int, _ string) {
			if pid != gone.Process.Pid {
				got = append(got, pid)
			}
		})
		slices.Sort(got)
		if sorted := slices.Sorted(slices.Values(family)); !slices.Equal(got, sorted) {
			t.Errorf("roots %v: got %v, want each of %v once", roots, got, sorted)
		}
		if read, err := (*Tracker)(nil).Read(t.Context(), roots); read != want || err != nil {
			t.Errorf("roots %v: got %x, %v from Read, want %x", roots, read, err, want)
		}
	}
	for _, roots := range [][]int{{top, child, grandchild}, {grandchild, child, top}, {child, top, grandchild}} {
		var got []int
		eachProcess(roots, func(pid int, _ string) { got = append(got, pid) })
		if !slices.Equal(got, family) {
			t.Errorf("roots %v: got %v, want parents first: %v", roots, got, family)
		}
	}
}

// Where a process and its child hold a connection, it is the child's, whatever the order of the roots.
func TestHolders(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	held := os.NewFile(uintptr(fd), "socket")
	defer held.Close()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sh", "-c", "echo; read x")
	cmd.ExtraFiles = []*os.File{held}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer stdin.Close()
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || strings.TrimSpace(line) != "" {
		t.Fatalf("got %q, %v", line, err)
	}
	us, child := os.Getpid(), cmd.Process.Pid
	for _, roots := range [][]int{{us}, {us, child}, {child, us}} {
		if got := holders(roots)[uint32(st.Ino)]; got != child {
			t.Errorf("roots %v: got process %d, want the child %d", roots, got, child)
		}
	}
}
