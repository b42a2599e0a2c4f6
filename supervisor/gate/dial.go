package gate

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation"
)

const (
	// anew is how long a probe waits for one connection before it tries another one beside it: where the machine at the
	// address was not there yet, the SYN got lost, and the kernel sends it again only after 1, 3 and 7 seconds.
	anew = 250 * time.Millisecond
	// maxTries is how many of them are under way at a time.
	maxTries = 8
	// slice is how long a probe waits at a time, so that it notices in time that nobody wants to know any more.
	slice = 25 * time.Millisecond
)

// dial returns a connection with an address, which belongs to the caller. It does not block longer than the timeout, and
// is over soon after ctx has ended.
func dial(ctx context.Context, at activation.Address, timeout time.Duration) (int, error) {
	var tries []unix.PollFd
	defer func() {
		for _, t := range tries {
			letGo(int(t.Fd))
		}
	}()
	end := time.Now().Add(timeout)
	var next time.Time
	for {
		now := time.Now()
		if !now.Before(end) || ctx.Err() != nil {
			return -1, fmt.Errorf("connect: %w", unix.ETIMEDOUT)
		}
		if !now.Before(next) {
			if len(tries) == maxTries {
				letGo(int(tries[0].Fd))
				tries = slices.Delete(tries, 0, 1)
			}
			fd, done, err := begin(at)
			if err != nil || done {
				return fd, err
			}
			tries = append(tries, unix.PollFd{Fd: int32(fd), Events: unix.POLLOUT})
			next = now.Add(anew)
		}
		wait := min(time.Until(next), time.Until(end), slice)
		n, err := unix.Poll(tries, max(1, int(wait.Milliseconds())))
		if err != nil && !errors.Is(err, unix.EINTR) {
			return -1, fmt.Errorf("poll: %w", err)
		}
		for i := 0; n > 0 && i < len(tries); i++ {
			if tries[i].Revents == 0 {
				continue
			}
			fd := int(tries[i].Fd)
			tries = slices.Delete(tries, i, i+1)
			if err := socketError(fd); err != nil {
				letGo(fd)
				return -1, fmt.Errorf("connect: %w", err)
			}
			return fd, nil
		}
	}
}

// begin begins to connect; done says that it is over already. The descriptor is -1 with an error, and else the caller's.
func begin(at activation.Address) (fd int, done bool, err error) {
	domain, sa, err := sockaddrAt(at)
	if err != nil {
		return -1, false, err
	}
	fd, err = unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, false, fmt.Errorf("socket: %w", err)
	}
	switch err = unix.Connect(fd, sa); {
	case err == nil:
		return fd, true, nil
	case errors.Is(err, unix.EINPROGRESS), errors.Is(err, unix.EINTR):
		return fd, false, nil
	}
	letGo(fd)
	return -1, false, fmt.Errorf("connect: %w", err)
}

// sockaddrAt is an address as connect(2) takes it, and its domain.
func sockaddrAt(at activation.Address) (domain int, sa unix.Sockaddr, err error) {
	switch {
	case at.Network == activation.Unix:
		return unix.AF_UNIX, &unix.SockaddrUnix{Name: at.Path}, nil
	case at.IP.Is4():
		return unix.AF_INET, &unix.SockaddrInet4{Port: int(at.Port), Addr: at.IP.As4()}, nil
	}
	zone, err := interfaceNumber(at.IP.Zone())
	return unix.AF_INET6, &unix.SockaddrInet6{Port: int(at.Port), Addr: at.IP.As16(), ZoneId: zone}, err
}

// socketError takes the error that waits on a socket.
func socketError(fd int) error {
	errno, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err == nil && errno != 0 {
		err = unix.Errno(errno)
	}
	return err
}

func letGo(fd int) { _ = unix.Close(fd) } // close(2) releases it whatever it returns
