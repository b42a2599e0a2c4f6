package activity

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Read returns a number that changes whenever one of roots or their descendants has read
// anything, from whatever it may be, and when such a process comes or goes. It is the evidence
// that a FIFO was used: who writes to it may come through a read-only mount, which leaves no trace.
// Without any processes it is zero.
//
// It is made of rchar in /proc/PID/io, see proc_pid_io(5): bytes that read(2) and the like have
// returned. The kernel does not count splice(2) and io_uring there. syscr is no use: it also moves
// when a waiting read is interrupted, as it is when the process is stopped for the last look.
//
// A living process that cannot be read is an error: that needs the right to trace it, same
// user or CAP_SYS_PTRACE, and CONFIG_TASK_IO_ACCOUNTING in the kernel.
func (*Tracker) Read(ctx context.Context, roots []int) (uint64, error) {
	var all uint64
	err := ctx.Err()
	eachProcess(roots, func(pid int, dir string) {
		if err != nil {
			return
		}
		var read uint64
		if read, err = bytesRead(dir); err == nil {
			all ^= mix(mix(uint64(pid)) + read)
			err = ctx.Err()
			return
		}
		// No such file: it is gone, or it is hidden, or the kernel does not count.
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) {
			if errors.Is(unix.Kill(pid, 0), unix.ESRCH) {
				err = nil
			}
		}
		if err != nil {
			err = fmt.Errorf("read what process %d has read: %w", pid, err)
		}
	})
	if err != nil {
		return 0, err
	}
	return all, nil
}

func bytesRead(dir string) (n uint64, err error) {
	b, err := os.ReadFile(dir + "/io")
	if err != nil {
		return 0, err
	}
	if _, err := fmt.Sscanf(string(b), "rchar: %d", &n); err != nil {
		return 0, fmt.Errorf("no rchar in %q: %w", b, err)
	}
	return n, nil
}
