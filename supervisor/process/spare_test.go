package process

import (
	"errors"
	"os"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"
)

// Starts fail before the last descriptor is gone, and work again when there are some.
func TestStartsLeaveDescriptors(t *testing.T) {
	if os.Getenv("FEW_DESCRIPTORS") == "" {
		t.Parallel()
		cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^TestStartsLeaveDescriptors$", "-test.v")
		cmd.Env = append(os.Environ(), "FEW_DESCRIPTORS=1")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v:\n%s", err, out)
		}
		return
	}
	const limit = 64
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: limit, Max: limit}); err != nil {
		t.Fatal(err)
	}
	s, err := NewSpawner("few-descriptors")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	spec := &Spec{Exec: &Exec{Command: []string{"/bin/true"}}, Stdout: -1, Stderr: -1}
	start := func() error {
		p, err := s.Start(spec)
		if err == nil {
			_, err = p.collect()
		}
		return err
	}
	if err := start(); err != nil {
		t.Fatal(err)
	}
	var taken []int
	for err == nil {
		var fd int
		if fd, err = unix.FcntlInt(0, unix.F_DUPFD_CLOEXEC, 0); err != nil {
			t.Fatal("no descriptor is left, and starts work:", err)
		}
		taken = append(taken, fd)
		err = start()
	}
	if !errors.Is(err, unix.EMFILE) {
		t.Error(err)
	}
	free := 0
	for ; ; free++ {
		fd, err := unix.FcntlInt(0, unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			break
		}
		taken = append(taken, fd)
	}
	if free < limit/spareFraction-1 {
		t.Errorf("%d descriptors are left", free)
	}
	for _, fd := range taken {
		unix.Close(fd)
	}
	if err := start(); err != nil {
		t.Error("later:", err)
	}
}
