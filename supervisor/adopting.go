package supervisor

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"hibergate/activation"
	"hibergate/activation/adopt"
)

// With handoff = "adopt" a session answers the processes of a run until the last of them has ended, which with
// stop.kill_mode = "process" may be after the run. This file hears what they did with the sockets, and says what a run still lacks
// to be ready.

// maxNotes is how many notes status shows of a service.
const maxNotes = 16

// maxPorts is how many sockets a service may have with those that are learned: a token has a byte for their number.
const maxPorts = 250

// attach begins to answer a process that was just started.
func (s *Supervisor) attach(u *unit, p Process) {
	listener := p.TakeListener()
	if listener < 0 {
		return
	}
	var have []adopt.Have
	for _, port := range u.ports {
		have = append(have, adopt.Have{Socket: port.sock, Learned: port.learned})
	}
	tree, run := u.tree, u.run
	session, err := adopt.Start(listener, adopt.Options{
		Have: have, Learn: learnOf(u.spec), RefuseIOUring: u.spec.RefuseIOUring,
		Held:    func(inode uint64) bool { return heldBy(tree, inode) },
		Release: func(sock *activation.Socket) bool { return s.release(u, sock) },
		Report:  func(e adopt.Event) { s.post(func(now time.Time) { s.adopted(now, u, run, e) }) },
		Ended:   func(session *adopt.Session) { s.post(func(time.Time) { u.sessions = without(u.sessions, session) }) },
	})
	if err != nil {
		closeFD(listener) // what is asked fails, and so does the program
		s.log.Error("program cannot be given sockets", slog.String("service", u.spec.Name), slog.Any("err", err))
		return
	}
	u.sessions = append(u.sessions, session)
}

// without returns a list that has not got one of its elements.
func without[T comparable](list []T, one T) []T {
	return slices.DeleteFunc(slices.Clone(list), func(other T) bool { return other == one })
}

// learnOf is what a session is to learn of.
func learnOf(svc *Service) []adopt.Learn {
	out := make([]adopt.Learn, len(svc.Learn))
	for i, l := range svc.Learn {
		l.Spec.Options.PacketInfo = true // of UDP sockets
		out[i] = adopt.Learn(l)
	}
	return out
}

// heldBy says whether a process of the tree has a socket. What cannot be found out counts as held.
func heldBy(tree Tree, inode uint64) bool {
	pids, err := tree.PIDs()
	if err != nil {
		return true
	}
	link := "socket:[" + strconv.FormatUint(inode, 10) + "]"
	for _, pid := range pids {
		dir := "/proc/" + strconv.Itoa(pid) + "/fd/"
		entries, err := os.ReadDir(dir)
		if errors.Is(err, fs.ErrPermission) {
			return true
		}
		if err != nil {
			continue // it has ended, and has nothing any more
		}
		for _, e := range entries {
			if to, err := os.Readlink(dir + e.Name()); err == nil && to == link {
				return true
			}
		}
	}
	return false
}

// adopted hears of a session what a program did.
func (s *Supervisor) adopted(now time.Time, u *unit, run uint64, e adopt.Event) {
	current := u.run == run
	switch e.Kind {
	case adopt.Bound:
		if p := u.port(e.Socket); p != nil && current {
			p.bound = true
		}
	case adopt.Listening:
		if p := u.port(e.Socket); p != nil && current {
			p.bound, p.listens = true, true
		}
	case adopt.Learned:
		s.learned(u, e.Socket, current)
	case adopt.Refused:
		if u.trouble = e.Text; u.note(e.Text) {
			s.log.Warn("bind not granted", slog.String("service", u.spec.Name), slog.String("why", e.Text))
		}
	case adopt.Incomplete:
		if u.note(e.Text) {
			s.log.Warn("socket of the program not imitated in all", slog.String("service", u.spec.Name), slog.String("why", e.Text))
		}
	case adopt.Elsewhere:
		u.note("listens on " + e.Text + " too, which is not in listen: connections there do not count")
	case adopt.IOUring:
		u.note("uses io_uring: what it binds with that cannot be adopted (adopt.io_uring)")
		u.ioUring = true
	}
	if current {
		s.tellReadiness(now, u)
	}
}

// note remembers something about a run that people should know, and says whether it is news. There are only so many.
func (u *unit) note(text string) bool {
	if len(u.notes) >= maxNotes || slices.Contains(u.notes, text) {
		return false
	}
	u.notes = append(u.notes, text)
	return true
}

// port finds the port of a socket; nil: it is not of this unit any more.
func (u *unit) port(sock *activation.Socket) *port {
	for _, p := range u.ports {
		if p.sock == sock {
			return p
		}
	}
	return nil
}

// beginRun forgets what the last run did.
func (u *unit) beginRun() {
	u.trouble, u.ioUring, u.saidReady = "", false, false
	u.notes = nil
	for _, p := range u.ports {
		p.bound, p.listens = false, false
	}
}

// tellReadiness tells the policy what the run lacks.
func (s *Supervisor) tellReadiness(now time.Time, u *unit) {
	if u.spec.Ready.Type == ReadyExec {
		return
	}
	ev := u.readiness()
	s.step(now, u, ev)
	if ev.lacks != "" {
		return
	}
	if u.fresh {
		u.fresh = false
		s.keep(u)
	}
}

// readiness says what the run lacks.
func (u *unit) readiness() readiness {
	var lacks []string
	spare := true
	if u.spec.Ready.Type == ReadyNotify && !u.saidReady {
		lacks, spare = append(lacks, "it did not say READY=1 (sd_notify)"), false
	}
	if u.spec.Handoff == Adopt {
		for _, p := range u.ports {
			a := p.sock.Address()
			switch {
			case !p.bound:
				lacks = append(lacks, "it did not bind "+a.String())
				spare = spare && p.learned
			case !p.listens && a.Network.Connections():
				lacks, spare = append(lacks, "it does not listen on "+a.String()), false
			}
		}
		for _, l := range u.spec.Learn {
			if !slices.ContainsFunc(u.ports, func(p *port) bool { return p.bound && l.Pattern.Matches(p.sock.Address()) }) {
				what := l.Pattern.String()
				if l.Pattern == adopt.Auto {
					what = "anything"
				}
				lacks, spare = append(lacks, "it did not listen on "+what), false
			}
		}
	}
	if len(lacks) == 0 {
		return readiness{}
	}
	if u.trouble != "" {
		lacks = append(lacks, u.trouble)
	}
	if u.ioUring {
		lacks = append(lacks, "it uses io_uring, and what it binds with that cannot be adopted (adopt.io_uring)")
	}
	return readiness{lacks: strings.Join(lacks, "; "), spare: spare}
}

// learned takes a socket into the unit that a program has bound.
func (s *Supervisor) learned(u *unit, sock *activation.Socket, current bool) {
	s.log.Info("socket learned", slog.String("service", u.spec.Name), slog.String("address", sock.Address().String()))
	warnAbout(s.log, u.spec, sock)
	p := &port{sock: sock, key: s.nextKey, learned: true, bound: current}
	s.nextKey++
	if len(u.ports) >= maxPorts { // each session has its limit, but there may be many
		sessions := u.sessions
		s.goDo(func() message {
			s.discard(u, p, sessions)
			return func(time.Time) {}
		}, nil)
		return
	}
	for u.at(p.slot) != nil {
		p.slot++
	}
	u.fresh = true
	u.ports = append(slices.Clone(u.ports), p)
	if err := s.watcher.Add(sock.FD(), socketToken(u.index, p.slot, 0)); err != nil {
		s.log.Error("socket not watched", slog.String("service", u.spec.Name), slog.Any("err", err)) // arming it says so again
	}
	if state := u.policy.life().state; state == Listening || state == Frozen { // what is left of an earlier run has bound it
		s.armPort(u, p)
	}
	watched := u.watched(p)
	s.goDo(func() message {
		s.looker.Add(watched)
		return func(now time.Time) { s.step(now, u, addresses{known: u.known()}) }
	}, nil)
}

// tellKnown tells the policy whether it is known where the program listens, and keeps it for the next supervisor.
func (s *Supervisor) tellKnown(now time.Time, u *unit) {
	s.step(now, u, addresses{known: u.known()})
	s.keep(u)
}

// known says whether there is a socket for each pattern.
func (u *unit) known() bool {
	return !slices.ContainsFunc(u.spec.Learn, func(l Learn) bool {
		return !slices.ContainsFunc(u.ports, func(p *port) bool { return p.learned && l.Pattern.Matches(p.sock.Address()) })
	})
}

// unlearn takes a learned socket out of the unit. What is left to be done for it must not hold up the loop.
func (s *Supervisor) unlearn(u *unit, p *port) {
	s.log.Info("learned socket given up: the program does not bind it any more", slog.String("service", u.spec.Name), slog.String("address", p.sock.Address().String()))
	u.ports = without(u.ports, p)
	if err := s.watcher.Remove(p.sock.FD()); err != nil {
		s.log.Error("socket left in the watcher", slog.String("service", u.spec.Name), slog.Any("err", err))
	}
}

// discard is the rest of unlearn. A session may give the socket to somebody until it has forgotten it.
func (s *Supervisor) discard(u *unit, p *port, sessions []*adopt.Session) {
	for _, session := range sessions {
		session.Forget(p.sock)
	}
	s.looker.Remove(p.key)
	if err := p.sock.Close(); err != nil {
		s.log.Error("socket not closed", slog.String("service", u.spec.Name), slog.Any("err", err))
	}
}

// release is called by a session in whose program's way a learned socket is. It is given up only where a start is under way:
// then nobody waits on it in vain, looks at it or is about to be woken by it.
func (s *Supervisor) release(u *unit, sock *activation.Socket) bool {
	var p *port
	var sessions []*adopt.Session
	err := s.ask(func() {
		if p = u.port(sock); p == nil || !p.learned || p.bound || p.armed || u.policy.life().state != Starting {
			p = nil
			return
		}
		s.unlearn(u, p)
		sessions = u.sessions
		s.step(time.Now(), u, addresses{known: u.known()})
	})
	if err != nil || p == nil {
		return false
	}
	s.discard(u, p, sessions)
	return true
}

// forget gives up the learned sockets that this run does not have.
func (s *Supervisor) forget(u *unit) {
	var gone ports
	for _, p := range u.ports {
		if p.learned && !p.bound {
			gone = append(gone, p)
			s.unlearn(u, p)
		}
	}
	sessions := u.sessions
	s.goDo(func() message {
		for _, p := range gone {
			s.discard(u, p, sessions)
		}
		return func(now time.Time) { s.tellKnown(now, u) }
	}, nil)
}

// endSessions has nobody be given a socket any more. Where a process holds that up, the sockets must stay open.
func (s *Supervisor) endSessions() error {
	var errs []error
	for _, u := range s.units {
		for _, session := range u.sessions {
			if err := session.Close(); err != nil {
				errs = append(errs, fmt.Errorf("service %q: %w", u.spec.Name, err))
				u.stuck = true
			}
		}
	}
	return errors.Join(errs...)
}
