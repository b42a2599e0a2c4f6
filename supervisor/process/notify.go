package process

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Notify is a socket on which the processes of one run say how they are, as sd_notify(3) describes. Anybody on the machine
// may send to it, so what it says is worth what its sender is. It is not safe for concurrent use.
type Notify struct {
	fd   int
	name string
}

// Notification is one message.
type Notification struct {
	PID   int  // of the sender, in our namespace; the kernel says so
	Ready bool // READY=1 is in it
}

// maxNotification is how much of a message is read, in bytes. maxNotifications is how many Receive reads at a time.
const (
	maxNotification  = 4096
	maxNotifications = 16
)

// NewNotify makes such a socket, with an abstract name that cannot be guessed. The caller closes it.
func NewNotify() (*Notify, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("make notification socket: %w", err)
	}
	random := make([]byte, 16)
	_, _ = rand.Read(random) // never fails
	n := &Notify{fd: fd, name: "@hibergated/notify/" + hex.EncodeToString(random)}
	err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PASSCRED, 1)
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrUnix{Name: n.name})
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make notification socket: %w", err), n.Close())
	}
	return n, nil
}

// Address is what NOTIFY_SOCKET has to say.
func (n *Notify) Address() string { return n.name }

// FD returns the descriptor, borrowed. It becomes readable when there is a message.
func (n *Notify) FD() int { return n.fd }

// Receive returns what has come, without waiting, and not more than a few. Descriptors that came along are closed.
func (n *Notify) Receive() []Notification {
	var out []Notification
	buf, oob := make([]byte, maxNotification), make([]byte, 4096)
	for range maxNotifications {
		size, oobn, flags, _, err := unix.Recvmsg(n.fd, buf, oob, unix.MSG_CMSG_CLOEXEC|unix.MSG_DONTWAIT)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			break
		}
		pid := sender(oob[:oobn])
		if pid == 0 || flags&unix.MSG_TRUNC != 0 {
			continue
		}
		ready := false
		for line := range bytes.Lines(buf[:size]) {
			ready = ready || string(bytes.TrimSuffix(line, []byte("\n"))) == "READY=1"
		}
		out = append(out, Notification{PID: pid, Ready: ready})
	}
	return out
}

// sender finds who sent a message, and closes the descriptors that it carries.
func sender(oob []byte) (pid int) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return 0
	}
	for i := range messages {
		if cred, err := unix.ParseUnixCredentials(&messages[i]); err == nil {
			pid = int(cred.Pid)
		}
		if fds, err := unix.ParseUnixRights(&messages[i]); err == nil {
			for _, fd := range fds {
				_ = unix.Close(fd) // nobody asked for it
			}
		}
	}
	return pid
}

// Close closes the socket. Messages that come later are refused.
func (n *Notify) Close() error {
	if err := unix.Close(n.fd); err != nil {
		return os.NewSyscallError("close", err)
	}
	return nil
}
