package storm

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// behaviour is how a client treats its service.
type behaviour uint8

const (
	normal    behaviour = iota // sends its line at once
	slow                       // sends it in pieces
	halfClose                  // shuts its side down after the line, and wants the answer all the same
	reset                      // resets the connection at some moment, and gets nothing
)

func (b behaviour) String() string {
	return [...]string{"normal", "slow", "half-closing", "resetting"}[b]
}

// outcome is what became of a client.
type outcome uint8

const (
	canceled   outcome = iota // the storm ended first
	answered                  // it got its answer
	unanswered                // it connected, and did not
	wasReset                  // as it wanted
	refused                   // nobody listened
)

// client is one client: its script, and then what became of it.
type client struct {
	id     string
	how    behaviour
	byHand bool            // the service was told to stop at about that time
	after  time.Duration   // how long it waits before it connects
	pieces []string        // of its line
	gaps   []time.Duration // before each piece, and one before a reset

	begin, end time.Time
	port       uint16 // its own; 0: not even connected
	pid        int    // of the answer
	outcome    outcome
	err        error
}

// script decides what a client will do. Everything random is decided here.
func script(r *rand.Rand, id string, byHand bool, after time.Duration) client {
	c := client{id: id, byHand: byHand, after: after, pieces: []string{id + "\n"}, gaps: []time.Duration{0}}
	switch n := r.IntN(10); {
	case n < 4:
	case n < 6:
		c.how = halfClose
	case n < 8:
		c.how = slow
		line := id + "\n"
		cut1 := 1 + r.IntN(len(line)-2)
		cut2 := cut1 + r.IntN(len(line)-cut1) // may be cut1: the piece between is empty
		c.pieces = []string{line[:cut1], line[cut1:cut2], line[cut2:]}
		c.gaps = []time.Duration{rand0(r, 3), rand0(r, 6), rand0(r, 6)}
	default:
		c.how = reset
		c.gaps = []time.Duration{rand0(r, 2), rand0(r, 8)}
		switch r.IntN(3) {
		case 0:
			c.pieces = []string{""}
		case 1:
			c.pieces = []string{id} // half a line
		}
	}
	return c
}

// rand0 returns up to so many milliseconds; as likely as not nothing.
func rand0(r *rand.Rand, ms int) time.Duration {
	if r.IntN(2) == 0 {
		return 0
	}
	return time.Duration(r.Int64N(int64(ms) * int64(time.Millisecond)))
}

// run plays the client.
func (c *client) run(ctx context.Context, address string, patience time.Duration) {
	c.begin = time.Now()
	c.outcome, c.err = c.play(ctx, address, patience)
	c.end = time.Now()
	if ctx.Err() != nil && c.outcome == unanswered {
		c.outcome = canceled
	}
}

func (c *client) play(ctx context.Context, address string, patience time.Duration) (outcome, error) {
	deadline := c.begin.Add(patience)
	conn, err := (&net.Dialer{Deadline: deadline}).DialContext(ctx, "tcp", address)
	if errors.Is(err, unix.ECONNREFUSED) {
		return refused, err
	}
	if err != nil {
		return unanswered, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })() //nolint:errcheck // nothing to do
	tcp := conn.(*net.TCPConn)
	c.port = peerPort(tcp.LocalAddr())
	if err := tcp.SetDeadline(deadline); err != nil {
		return unanswered, err
	}
	for i, piece := range c.pieces {
		if !pause(ctx, c.gaps[i]) {
			return unanswered, ctx.Err()
		}
		if _, err := io.WriteString(tcp, piece); err != nil && c.how != reset {
			return unanswered, err
		}
	}
	switch c.how {
	case reset:
		pause(ctx, c.gaps[1])
		return wasReset, tcp.SetLinger(0) // the close then resets
	case halfClose:
		if err := tcp.CloseWrite(); err != nil {
			return unanswered, err
		}
	case normal, slow:
	}
	answer := bufio.NewReader(tcp)
	line, err := answer.ReadString('\n')
	if err != nil {
		return unanswered, err
	}
	name, pid, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
	if c.pid, err = strconv.Atoi(pid); err != nil || name != c.id {
		return unanswered, fmt.Errorf("answer %q", line)
	}
	// The service closes first, so this is when it is done with us.
	_, err = io.Copy(io.Discard, answer)
	return answered, err
}
