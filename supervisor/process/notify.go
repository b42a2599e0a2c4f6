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
// may send to it, so what it says is worth what its sender is. Receive and Close may block for as long as
// a sender likes: it can send a descriptor that takes its time to close. Only Stop may be called at the same time as another method.
type Notify struct {
	fd   int
	stop int // an eventfd
	name string
}

// Notification is one message.
type Notification struct {
	PID   int  // of the sender, in our namespace; the kernel says so
	UID   int  // the same
	Ready bool // READY=1 is in it

	fds []int
}

// maxNotification is how much of a message is read, in bytes.
const maxNotification = 4096

// NewNotify makes such a socket, with an abstract name of its own. The caller closes it.
func NewNotify() (*Notify, error) {
	n := &Notify{fd: -1}
	var err error
	n.stop, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("make notification socket: eventfd: %w", err)
	}
	n.fd, err = unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make notification socket: %w", err), unix.Close(n.stop))
	}
	random := make([]byte, 16)
	_, _ = rand.Read(random) // never fails
	n.name = "@hibergated/notify/" + hex.EncodeToString(random)
	err = unix.SetsockoptInt(n.fd, unix.SOL_SOCKET, unix.SO_PASSCRED, 1)
	if err == nil {
		err = unix.Bind(n.fd, &unix.SockaddrUnix{Name: n.name})
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make notification socket: %w", err), n.Close())
	}
	return n, nil
}

// Address is what NOTIFY_SOCKET has to say.
func (n *Notify) Address() string { return n.name }

// Stop ends Receive, now or later. It does not block.
func (n *Notify) Stop() {
	one := [8]byte{1}
	_, _ = unix.Write(n.stop, one[:]) // there is room for it
}

// Receive waits for a message; ok is false after Stop, or where the socket is of no use any more. Release has to follow: the sender may wait for that
// (BARRIER=1), and is there until then.
func (n *Notify) Receive() (m Notification, ok bool) {
	buf, oob := make([]byte, maxNotification), make([]byte, 4096)
	fds := []unix.PollFd{{Fd: int32(n.fd), Events: unix.POLLIN}, {Fd: int32(n.stop), Events: unix.POLLIN}}
	for {
		if _, err := unix.Poll(fds, -1); err != nil && !errors.Is(err, unix.EINTR) || fds[1].Revents != 0 {
			return m, false
		}
		size, oobn, flags, _, err := unix.Recvmsg(n.fd, buf, oob, unix.MSG_CMSG_CLOEXEC|unix.MSG_DONTWAIT)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return m, false
		}
		m = sender(oob[:oobn])
		if m.PID == 0 || flags&unix.MSG_TRUNC != 0 {
			m.Release()
			continue
		}
		for line := range bytes.Lines(buf[:size]) {
			m.Ready = m.Ready || string(bytes.TrimSuffix(line, []byte("\n"))) == "READY=1"
		}
		return m, true
	}
}

// Release closes the descriptors that came with the message: nobody asked for them.
func (m *Notification) Release() {
	for _, fd := range m.fds {
		_ = unix.Close(fd)
	}
	m.fds = nil
}

// sender finds who sent a message, and the descriptors that it carries.
func sender(oob []byte) (m Notification) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return m
	}
	for i := range messages {
		if cred, err := unix.ParseUnixCredentials(&messages[i]); err == nil {
			m.PID, m.UID = int(cred.Pid), int(cred.Uid)
		}
		if fds, err := unix.ParseUnixRights(&messages[i]); err == nil {
			m.fds = append(m.fds, fds...)
		}
	}
	return m
}

// Close closes the socket. Messages that come later are refused.
func (n *Notify) Close() error {
	err := os.NewSyscallError("close", unix.Close(n.stop))
	if n.fd >= 0 {
		err = errors.Join(err, os.NewSyscallError("close", unix.Close(n.fd)))
	}
	return err
}
