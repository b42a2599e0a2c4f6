package activity_test

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
	"hibergate/supervisor/activity"
)

// reader is a process whose child copies lines from a FIFO.
type reader struct {
	dir, fifo string
	roots     []int
	copied    *bufio.Reader
}

func mustStartReader(t *testing.T) *reader {
	t.Helper()
	r := &reader{dir: t.TempDir()}
	r.fifo = filepath.Join(r.dir, "fifo")
	if err := unix.Mkfifo(r.fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Open(r.fifo, unix.O_RDWR|unix.O_CLOEXEC, 0) // blocking, as many a program wants it
	if err != nil {
		t.Fatal(err)
	}
	fifo := os.NewFile(uintptr(fd), r.fifo)
	defer fifo.Close()
	cmd := exec.Command("sh", "-c", `sh -c 'while read -r x; do echo "$x"; done'; :`)
	cmd.Stdin = fifo
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		unix.Kill(-cmd.Process.Pid, unix.SIGKILL)
		cmd.Wait()
	})
	r.roots, r.copied = []int{cmd.Process.Pid}, bufio.NewReader(out)
	return r
}

// mustCopy waits until what was written has been read and copied: after that the reader waits.
func (r *reader) mustCopy(t *testing.T, w io.Writer) {
	t.Helper()
	if _, err := io.WriteString(w, "hello\n"); err != nil {
		t.Fatal(err)
	}
	if line, err := r.copied.ReadString('\n'); err != nil || line != "hello\n" {
		t.Fatalf("got %q, %v", line, err)
	}
}

func (r *reader) mustRead(t *testing.T) uint64 {
	t.Helper()
	n, err := (*activity.Tracker)(nil).Read(t.Context(), r.roots)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// What a child reads from a FIFO is seen, through whatever mount it was written; waiting, being stopped
// and going on is not reading.
func TestRead(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	r := mustStartReader(t)
	writer, err := os.OpenFile(r.fifo, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer writer.Close()
	r.mustCopy(t, writer)
	at := r.mustRead(t)
	for _, c := range []struct {
		signal unix.Signal
		state  string
	}{{unix.SIGSTOP, "T"}, {unix.SIGCONT, "S"}} {
		if err := unix.Kill(-r.roots[0], c.signal); err != nil {
			t.Fatal(err)
		}
		nettest.Eventually(t, func() error {
			for _, pid := range append(nettest.Children(r.roots[0]), r.roots...) {
				b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
				if err != nil {
					return err
				}
				if _, rest, _ := strings.Cut(string(b), ") "); !strings.HasPrefix(rest, c.state) {
					return fmt.Errorf("process %d is %s, want state %s", pid, b, c.state)
				}
			}
			return nil
		})
		if got := r.mustRead(t); got != at {
			t.Errorf("got %x after %v, want %x as before", got, c.signal, at)
		}
	}
	r.mustCopy(t, writer)
	written := r.mustRead(t)
	if written == at {
		t.Errorf("got %x before and after a write", at)
	}
	through, err := openReadOnly(t.TempDir(), r.dir)
	if err != nil {
		t.Log(err) // an ordinary user may not mount everything
		return
	}
	defer through.Close()
	r.mustCopy(t, through)
	if got := r.mustRead(t); got == written {
		t.Errorf("got %x before and after a write through a read-only mount", got)
	}
}

// openReadOnly opens the FIFO in dir for writing, by way of a read-only mount that only one thread sees.
func openReadOnly(mount, dir string) (*os.File, error) {
	type opened struct {
		*os.File
		error
	}
	done := make(chan opened)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread and its mounts end with the goroutine
		err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS)
		for _, m := range []struct {
			source, target string
			flags          uintptr
		}{{"", "/", unix.MS_REC | unix.MS_PRIVATE}, {dir, mount, unix.MS_BIND}, {"", mount, unix.MS_BIND | unix.MS_REMOUNT | unix.MS_RDONLY}} {
			if err == nil {
				err = unix.Mount(m.source, m.target, "", m.flags, "")
			}
		}
		if err != nil {
			done <- opened{nil, fmt.Errorf("mount read-only: %w", err)}
			return
		}
		f, err := os.OpenFile(filepath.Join(mount, "fifo"), os.O_WRONLY, 0)
		done <- opened{f, err}
	}()
	o := <-done
	return o.File, o.error
}

// Processes that have gone have read nothing; one that hides what it reads is an error.
func TestReadOfGoneAndForbidden(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces)
	gone := exec.Command("true")
	if err := gone.Run(); err != nil {
		t.Fatal(err)
	}
	tracker := (*activity.Tracker)(nil)
	for _, roots := range [][]int{nil, {gone.Process.Pid}} {
		if got, err := tracker.Read(t.Context(), roots); got != 0 || err != nil {
			t.Errorf("got %x, %v of processes %v, want zero", got, err, roots)
		}
	}
	r := mustStartReader(t)
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		header, none := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, [2]unix.CapUserData{}
		err := unix.Capset(&header, &none[0])
		if err == nil {
			_, err = tracker.Read(t.Context(), r.roots) // it may do more than we
		}
		done <- err
	}()
	if err := <-done; err == nil || !strings.Contains(err.Error(), fmt.Sprintf("read what process %d has read: ", r.roots[0])) {
		t.Errorf("got %v, want an error about process %d", err, r.roots[0])
	}
}
