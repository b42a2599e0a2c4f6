package netlink

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

const (
	// The kernel fills at most 32 KB for one read of a dump, and cuts off what does
	// not fit into the reader's buffer.
	bufferSize = 64 << 10
	// A dump that was disturbed by a change is asked for again this often.
	attempts = 4
	// The kernel answers within the call that asks. If it does not, something is
	// broken, and the caller must hear of it rather than hang.
	answerSeconds = 5
)

// ErrInterrupted says that the kernel's table kept changing while it was read.
var ErrInterrupted = errors.New("the table kept changing while it was read")

// Conn is a netlink socket for one protocol. It is opened at its first use, and
// again after a failure, so that nothing of a broken answer is left in it. It is not
// safe for concurrent use.
type Conn struct {
	protocol int
	fd       int // -1: not open
	port     uint32
	sequence uint32
	buffer   []byte
}

// New returns a Conn for a protocol such as NETLINK_SOCK_DIAG. It opens nothing yet.
func New(protocol int) *Conn { return &Conn{protocol: protocol, fd: -1} }

// Close closes the socket. The Conn can be used afterwards; it opens a new one.
func (c *Conn) Close() error {
	if c.fd < 0 {
		return nil
	}
	err := unix.Close(c.fd)
	c.fd, c.buffer = -1, nil
	return err
}

func (c *Conn) open() error {
	if c.fd >= 0 {
		return nil
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, c.protocol)
	if err != nil {
		return fmt.Errorf("open netlink socket: %w", err)
	}
	c.fd, c.buffer = fd, make([]byte, bufferSize)
	err = func() error {
		timeout := unix.Timeval{Sec: answerSeconds}
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
			return err
		}
		if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
			return err
		}
		// Connected to the kernel (port 0), the socket takes messages of nobody else.
		if err := unix.Connect(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
			return err
		}
		name, err := unix.Getsockname(fd)
		if err != nil {
			return err
		}
		if nl, ok := name.(*unix.SockaddrNetlink); ok {
			c.port = nl.Pid
		}
		return nil
	}()
	if err != nil {
		return errors.Join(fmt.Errorf("open netlink socket: %w", err), c.Close())
	}
	return nil
}

// Ask sends one request and calls each with every message of the answer: its type
// and what follows the netlink header, valid during the call only. Where the kernel
// says that the answer is not of one piece, it is asked again; begin, which may be nil, is called
// before each attempt. The kernel's refusal is returned as a wrapped unix.Errno. An error
// from each ends the calls, and is returned.
func (c *Conn) Ask(r *Request, begin func(), each func(typ uint16, body []byte) error) error {
	var err error
	for range attempts {
		if err = c.open(); err != nil {
			return err
		}
		if begin != nil {
			begin()
		}
		var refused bool
		if refused, err = c.ask(r, each); err == nil {
			return nil
		}
		if refused && !errors.Is(err, unix.EINTR) {
			return err // a whole answer: the socket is good
		}
		// What is left of the answer goes with the socket.
		if closeErr := c.Close(); closeErr != nil {
			return errors.Join(err, closeErr)
		}
		if !errors.Is(err, ErrInterrupted) && !errors.Is(err, unix.ENOBUFS) && !errors.Is(err, unix.EINTR) {
			return err
		}
	}
	return err
}

// ask is one attempt. refused tells that the kernel answered with an error and nothing
// is left to be read.
func (c *Conn) ask(r *Request, each func(uint16, []byte) error) (refused bool, err error) {
	c.sequence++
	message := r.Bytes()
	binary.NativeEndian.PutUint32(message[8:], c.sequence)
	binary.NativeEndian.PutUint32(message[12:], c.port)
	for {
		if _, err = unix.Write(c.fd, message); !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		return false, fmt.Errorf("ask kernel: %w", err)
	}
	answer := answer{sequence: c.sequence, port: c.port, single: r.flags()&(unix.NLM_F_DUMP|unix.NLM_F_ACK) == 0}
	for {
		n, err := unix.Read(c.fd, c.buffer)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			return false, fmt.Errorf("read answer of the kernel: none within %d s", answerSeconds)
		case err != nil:
			return false, fmt.Errorf("read answer of the kernel: %w", err)
		}
		done, err := answer.read(c.buffer[:n], each)
		if done || err != nil {
			return done, err
		}
	}
}

// answer is the state of reading one answer. Pure.
type answer struct {
	sequence, port uint32
	single         bool // the first message is the whole answer
	interrupted    bool // NLM_F_DUMP_INTR was seen
}

// read takes what one read of the socket gave. done means that the answer ended,
// err then being the kernel's verdict; err without done that it cannot be followed.
func (a *answer) read(b []byte, each func(uint16, []byte) error) (done bool, err error) {
	for len(b) > 0 {
		if len(b) < unix.SizeofNlMsghdr {
			return false, ErrMalformed
		}
		n := int(binary.NativeEndian.Uint32(b))
		if n < unix.SizeofNlMsghdr || n > len(b) {
			return false, ErrMalformed
		}
		typ, flags := binary.NativeEndian.Uint16(b[4:]), binary.NativeEndian.Uint16(b[6:])
		ours := binary.NativeEndian.Uint32(b[8:]) == a.sequence && binary.NativeEndian.Uint32(b[12:]) == a.port
		body := b[unix.SizeofNlMsghdr:n]
		b = b[min(align(n), len(b)):]
		if !ours || typ == unix.NLMSG_NOOP {
			continue
		}
		a.interrupted = a.interrupted || flags&unix.NLM_F_DUMP_INTR != 0
		switch typ {
		case unix.NLMSG_DONE, unix.NLMSG_ERROR:
			// Both carry an errno, negative; an NLMSG_DONE of old kernels may lack it.
			if typ == unix.NLMSG_ERROR && len(body) < 4 {
				return false, ErrMalformed
			}
			if len(body) >= 4 {
				if code := int32(binary.NativeEndian.Uint32(body)); code != 0 {
					return true, unix.Errno(-code)
				}
			}
			if a.interrupted {
				return false, ErrInterrupted
			}
			return true, nil
		}
		if err := each(typ, body); err != nil {
			return false, err
		}
		if a.single {
			return true, nil
		}
	}
	return false, nil
}
