package activation

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// ErrNotParkable says that a socket cannot be parked, however often one tries: it is not TCP, its port is
// shared by wish (ReusePort), another user has bound it, or the kernel does not move connections
// from one socket to another ([AllowParking]).
var ErrNotParkable = errors.New("socket cannot be parked")

// migratePath makes the kernel (5.14 and later) move what waits at a listening socket that
// is closed to another one of its group, for this network namespace (ip-sysctl).
const migratePath = "/proc/sys/net/ipv4/tcp_migrate_req"

// AllowParking switches on in this network namespace what [Socket.Park] needs. The caller calls
// release when it parks nothing any more: that switches it off again where it was off
// before and no other supervisor wants it. The error has ErrNotParkable in its chain.
func AllowParking() (release func() error, err error) {
	s := &Switch{Path: migratePath}
	if err := s.On(); err != nil {
		return nil, errors.Join(fmt.Errorf("%w: %w", ErrNotParkable, err), s.Restore())
	}
	return s.Restore, nil
}

// parkingPlace is the second socket of a parked one, and a third.
//
// In their group the first one is number 0. When it is shut down the last one gets its number, and when it listens
// again it becomes the last. A process can do both, and nothing in the kernel tells. But with
// three of them number 1 is never the first one.
type parkingPlace struct {
	fd, spare  int
	first      uint32 // the number of the first one, if no process has made it listen again: then that is the spare one's
	readmitted bool   // new connections come to the first socket
}

// parkedIndex is the number in the group that is ours at any time.
const parkedIndex = 1

// Park sends new connections to a second socket on the same address that nobody else
// has, where they wait. What is in the queue of the socket itself stays there, and so does a
// handshake that it has begun. Nobody is refused. It does nothing to a socket that is parked.
//
// While it is parked, another program of the same user can listen on the address too if it asks to
// share it (SO_REUSEPORT). The error is a *SocketError; with ErrNotParkable in its chain it
// is of no use to try again. After an error new connections come to the socket itself.
func (s *Socket) Park() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var err error
	if s.parking != nil {
		err = s.parking.readmit(false)
	} else if err = s.parkable(); err == nil {
		s.parking, err = s.openPlace()
	}
	if err != nil {
		return s.failure("park", err)
	}
	return nil
}

// Stow moves what waits in the queue of a parked socket to where it is parked, so that whoever gets the socket finds nothing in
// it until Unpark, though not in the order in which it came. Nobody is refused. It is for a moment when no process has the socket, and
// takes some 10 ms. The error is
// a *SocketError; nothing is lost by it, but the socket may not listen ([Socket.Revive]).
func (s *Socket) Stow() error {
	if !s.Parked() {
		return s.failure("stow queue of", unix.EINVAL)
	}
	// The kernel resets a client the last packet of whose handshake comes at this moment. Those that have begun before Park
	// are through after this.
	WaitForPackets()
	// The kernel moves the queue of a socket that leaves the group (tcp_migrate_req), and listen(2) takes it back in.
	if err := unix.Shutdown(s.fd, unix.SHUT_RDWR); err != nil {
		return s.failure("stow queue of", err)
	}
	_, err := s.Revive()
	return err
}

// Parked says whether the socket is parked.
func (s *Socket) Parked() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.parking != nil
}

// Readmit has new connections come to the socket itself again. Those that have come since Park wait
// on, until Unpark. It is for a caller that looks whether handshakes are under way (sock_diag(7),
// SYN_RECV) and gives them time. It does nothing to a socket that is not parked. Park takes it back. The
// error is a *SocketError.
func (s *Socket) Readmit() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.parking == nil {
		return nil
	}
	if err := s.parking.readmit(true); err != nil {
		return s.failure("unpark", err)
	}
	return nil
}

// Unpark has new connections come to the socket again, and moves there all that have come since
// Park, with what their clients have sent. Handshakes under way end there. Whoever waits for the
// socket hears of them. It does nothing to a socket that is not parked. It takes some
// 10 ms, as long as the kernel needs to be done with packets that it has begun with.
//
// The kernel resets a connection the last packet of whose handshake comes in the very moment of the
// move, a few microseconds. Fast handshakes have ended by then; Readmit is for the slow ones.
//
// A Park that comes before it is done wins.
//
// The error is a *SocketError; the socket is still parked then, and nothing is lost.
// ErrShutDown in its chain says that a process has shut the socket down: [Socket.Revive] first.
func (s *Socket) Unpark() error {
	if err := s.beginUnpark(); err != nil {
		return s.failure("unpark", err)
	}
	return s.FinishUnpark()
}

// FinishUnpark is Unpark after [Socket.Readmit], and does nothing if Park has come since.
func (s *Socket) FinishUnpark() error {
	WaitForPackets()
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.parking
	if p == nil || !p.readmitted {
		return nil
	}
	if err := s.canTake(); err != nil {
		return s.failure("unpark", err)
	}
	p.close()
	s.parking = nil
	s.letNobodyJoin()
	// Not every kernel tells those who wait that connections have moved (Linux 6.18.44 does). This
	// shuts nothing down of a socket that listens, but it wakes them (inet_shutdown in the kernel).
	_ = unix.Shutdown(s.fd, unix.SHUT_WR)
	return nil
}

// beginUnpark is Readmit, if the rest can follow.
func (s *Socket) beginUnpark() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.parking == nil {
		return nil
	}
	if err := s.canTake(); err != nil {
		return err
	}
	return s.parking.readmit(true)
}

// canTake says why the queue of the second socket cannot move to the first one.
func (s *Socket) canTake() error {
	listening, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	if err == nil && listening == 0 {
		err = ErrShutDown
	}
	if err != nil {
		return err
	}
	// What cannot be read, for lack of descriptors for instance, was on when the socket was parked.
	if on, err := isOn(migratePath); err == nil && !on {
		return fmt.Errorf("%w: somebody has set %s to 0", ErrNotParkable, migratePath)
	}
	return nil
}

// parkable says why the socket cannot be parked.
func (s *Socket) parkable() error {
	if s.addr.Network != TCP || s.spec.Options.ReusePort {
		return fmt.Errorf("%w: it is not TCP, or shares its port", ErrNotParkable)
	}
	protocol, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_PROTOCOL)
	if err != nil {
		return err
	}
	if protocol != unix.IPPROTO_TCP {
		return fmt.Errorf("%w: it is of protocol %d", ErrNotParkable, protocol) // MPTCP, inherited
	}
	if s.joint {
		return fmt.Errorf("%w: it was inherited with a shared port", ErrNotParkable) // with strangers in the group
	}
	on, err := isOn(migratePath)
	switch {
	case errors.Is(err, unix.ENOENT):
		return fmt.Errorf("%w: the kernel is too old: %w", ErrNotParkable, err)
	case err == nil && !on:
		return fmt.Errorf("%w: %s is 0", ErrNotParkable, migratePath)
	}
	return err
}

// openPlace opens the two sockets and has one chosen for all new connections.
func (s *Socket) openPlace() (*parkingPlace, error) {
	p := &parkingPlace{fd: -1, spare: -1}
	err := s.letJoin()
	for _, fd := range []*int{&p.fd, &p.spare} {
		if err == nil {
			*fd, err = s.listenBeside()
		}
	}
	if errors.Is(err, unix.EADDRINUSE) {
		err = fmt.Errorf("%w: another user has bound it: %w", ErrNotParkable, err)
	}
	if err == nil {
		err = p.choose(parkedIndex)
	}
	if err != nil {
		p.close()
		s.letNobodyJoin()
		return nil, err
	}
	s.grouped = true
	return p, nil
}

// listenBeside opens a socket that listens on the same address.
func (s *Socket) listenBeside() (int, error) {
	t, err := s.twin()
	if err != nil {
		return -1, err
	}
	err = s.filterAccess(s.spec.Options.Access, t.fd)
	if err == nil {
		err = t.bind()
	}
	if err == nil {
		err = unix.Listen(t.fd, s.backlog())
	}
	if err != nil {
		return -1, errors.Join(err, unix.Close(t.fd))
	}
	return t.fd, nil
}

// rejoin prepares a parked socket that was shut down for listen(2), which makes it the last of
// the group again.
func (s *Socket) rejoin() error {
	p := s.parking
	if p == nil {
		return nil
	}
	if err := s.letJoin(); err != nil { // where a process has changed that too
		return err
	}
	p.first = 2
	return p.readmit(p.readmitted)
}

// readmit chooses the first socket, or one of ours.
func (p *parkingPlace) readmit(yes bool) error {
	index := uint32(parkedIndex)
	if yes {
		index = p.first
	}
	err := p.choose(index)
	if err == nil {
		p.readmitted = yes
	}
	return err
}

// choose has the kernel give every new connection to the socket of the group with this index. An
// index that nobody has means any socket of the group.
func (p *parkingPlace) choose(index uint32) error {
	program := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: index}}
	err := unix.SetsockoptSockFprog(p.fd, unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_CBPF,
		&unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]})
	if err != nil {
		return fmt.Errorf("choose between two sockets: %w", err)
	}
	return nil
}

// close moves the queues to the other socket of the group. What of the one goes to the spare one, by chance, or comes there
// meanwhile, moves with that.
func (p *parkingPlace) close() {
	for _, fd := range []int{p.fd, p.spare} {
		if fd < 0 {
			continue
		}
		// A process that is being started has a copy of every descriptor until its exec. The queue moves
		// at once all the same. Nothing else can come of it: nobody is connected to a socket that listens.
		_ = unix.Shutdown(fd, unix.SHUT_RDWR)
		_ = unix.Close(fd)
	}
}
