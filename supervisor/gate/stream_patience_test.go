package gate

import (
	"testing"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
)

// frozen calls f while no loop does anything, so that what f causes is seen at once.
func (r *rig) frozen(f func()) {
	r.t.Helper()
	stopped, goOn := make(chan struct{}), make(chan struct{})
	go r.ask(0, func(*loop) {
		close(stopped)
		<-goOn
	})
	<-stopped
	defer close(goOn)
	f()
}

// control calls f with the descriptor of a connection.
func control(tb testing.TB, c stream, f func(fd int) error) {
	tb.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		tb.Fatal(err)
	}
	if e := raw.Control(func(fd uintptr) { err = f(int(fd)) }); e != nil || err != nil {
		tb.Fatal(e, err)
	}
}

// inStage waits until a pair is in a stage.
func (r *rig) inStage(want stage) {
	r.t.Helper()
	nettest.Eventually(r.t, func() error {
		found := error(unix.ENOENT)
		r.ask(0, func(l *loop) {
			if l.lists[want].first != nil {
				found = nil
			}
		})
		return found
	})
}

func TestStreamHalfSlowReader(t *testing.T) {
	t.Parallel()
	r := newRig(t, &Spec{})
	b := backend(t, "tcp")
	r.to(b)
	client, server := r.through(b)
	control(t, client, func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 4096) })
	answer := string(noise(1, 100_000))
	mustWrite(t, server, answer)
	if err := server.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	r.inStage(stageHalf)
	for range 3 { // the client has not got everything
		r.age(halfTime)
		r.settled()
	}
	mustWrite(t, client, "thanks")
	mustRead(t, server, "thanks")
	wantEnd(t, client, answer)
	r.settled()
}

func TestStreamHalfSlowServer(t *testing.T) {
	t.Parallel()
	r := newRig(t, &Spec{})
	b := backend(t, "tcp")
	r.to(b)
	client, server := r.through(b)
	r.ask(0, func(l *loop) { l.lent = maxPipes })
	if err := server.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	wantEnd(t, client, "")
	sent := r.jam(client)
	r.inStage(stageHalf)
	for range 3 { // the server has not taken everything
		r.age(halfTime)
		r.settled()
	}
	if err := client.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	wantEnd(t, server, string(sent))
}

func TestStreamUrgentInBulk(t *testing.T) {
	t.Parallel()
	r := newRig(t, &Spec{})
	b := backend(t, "tcp")
	r.to(b)
	client, server := r.through(b)
	bulk := string(noise(2, 40_000))
	r.frozen(func() {
		mustWrite(t, client, bulk)
		control(t, client, func(fd int) error { return unix.Sendto(fd, []byte("!"), unix.MSG_OOB, nil) })
		mustWrite(t, client, "after")
	})
	mustRead(t, server, bulk+"after") // the urgent byte itself is not passed on
}

func TestStreamLastWordsBeforeReset(t *testing.T) {
	t.Parallel()
	r := newRig(t, &Spec{})
	b := backend(t, "tcp")
	r.to(b)
	client, server := r.through(b)
	r.frozen(func() {
		mustWrite(t, client, "bye")
		if err := client.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		reset(t, client)
	})
	mustRead(t, server, "bye")
	wantReset(t, server)
}
