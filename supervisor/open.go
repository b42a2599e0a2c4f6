package supervisor

import (
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"hibergate/activation"
	"hibergate/supervisor/activity"
)

// listeners are the sockets of one service, open or not.
type listeners struct {
	sockets []*activation.Socket
	errs    []error // by socket: why it is not open yet
}

// openAll opens the sockets of all services. What may be there later is left to be opened then; with
// any other failure none is left open.
func openAll(services []*Service, opts Options) (opened []listeners, err error) {
	var failed []error
	for _, svc := range services {
		var l listeners
		for i := range svc.Sockets {
			sock, err := openOne(&svc.Sockets[i], opts.Inherited)
			if err != nil && !activation.MayOpenLater(err) {
				failed = append(failed, fmt.Errorf("service %q: %w", svc.Name, err))
				continue
			}
			warnAbout(opts.Logger, svc, sock)
			l.sockets, l.errs = append(l.sockets, sock), append(l.errs, err)
		}
		openLearned(svc, opts, &l)
		opened = append(opened, l)
	}
	if failed != nil {
		return nil, errors.Join(append(failed, closeAll(opened))...)
	}
	return opened, nil
}

// openLearned opens what was learned of a service before. What cannot be opened is learned again.
func openLearned(svc *Service, opts Options, l *listeners) {
	specs, err := loadLearned(opts.State, svc)
	if err != nil {
		opts.Logger.Warn("what was learned before is not known", slog.String("service", svc.Name), slog.Any("err", err))
	}
	for i := range specs {
		sock, err := openOne(&specs[i], opts.Inherited)
		if err != nil {
			opts.Logger.Warn("learned socket not opened", slog.String("service", svc.Name), slog.Any("err", err))
			continue
		}
		warnAbout(opts.Logger, svc, sock)
		l.sockets, l.errs = append(l.sockets, sock), append(l.errs, err)
	}
}

// openOne returns a socket that is open, or one that is not and an error.
func openOne(spec *activation.Spec, inherited *activation.Inherited) (*activation.Socket, error) {
	if inherited != nil {
		sock, ok, err := inherited.Take(spec)
		if err != nil {
			return activation.Prepare(spec), err
		}
		if ok {
			return sock, nil
		}
	}
	sock := activation.Prepare(spec)
	return sock, sock.Open()
}

func warnAbout(logger *slog.Logger, svc *Service, sock *activation.Socket) {
	for _, w := range sock.Warnings() {
		logger.Warn("socket option not set", slog.String("service", svc.Name), slog.Any("err", w))
	}
}

func closeAll(opened []listeners) error {
	var errs []error
	for _, l := range opened {
		for _, sock := range l.sockets {
			errs = append(errs, sock.Close())
		}
	}
	return errors.Join(errs...)
}

// open tries to open those sockets of a unit that are not.
func (s *Supervisor) open(u *unit) {
	var fresh []activity.Socket
	var failed error
	for i := range u.ports {
		p := u.ports[i]
		if p.sock.FD() >= 0 {
			continue
		}
		if p.failed = p.sock.Open(); p.failed != nil {
			failed = p.failed
			continue
		}
		fresh = append(fresh, u.watched(p))
		s.log.Info("socket opened", slog.String("service", u.spec.Name), slog.String("address", p.sock.Address().String()))
		warnAbout(s.log, u.spec, p.sock)
	}
	s.goDo(func() message {
		for _, sock := range fresh {
			s.looker.Add(sock)
		}
		return func(now time.Time) {
			if failed != nil {
				s.step(now, u, openFailed{failed})
				return
			}
			s.step(now, u, opened{})
			s.stopWaiting()
		}
	}, nil)
}

// waitForAddresses has the unit hear of new addresses of the machine.
func (s *Supervisor) waitForAddresses(u *unit) {
	if s.waitsFor != nil {
		return
	}
	watch, err := activation.NewAddressWatch()
	if err == nil {
		if err = s.watcher.Arm(watch.FD(), addressToken); err != nil {
			err = errors.Join(err, watch.Close())
		}
	}
	if err != nil {
		s.log.Warn("new addresses are not heard of", slog.Any("err", err)) // the backoff tries all the same
		return
	}
	s.waitsFor = watch
	// It may have come since it was tried.
	s.post(func(now time.Time) { s.step(now, u, addressAppeared{}) })
}

// addressAppeared is told that something about the addresses of the machine has changed.
func (s *Supervisor) addressAppeared(now time.Time) {
	if s.waitsFor == nil {
		return
	}
	changed, err := s.waitsFor.Drain()
	if err == nil {
		err = s.watcher.Arm(s.waitsFor.FD(), addressToken)
	}
	if err != nil {
		s.log.Warn("new addresses are not heard of", slog.Any("err", err))
	}
	if changed {
		for _, u := range s.units {
			if u.policy.life().unopened {
				s.step(now, u, addressAppeared{})
			}
		}
	}
}

// stopWaiting gives up the AddressWatch when every socket is open.
func (s *Supervisor) stopWaiting() {
	if s.waitsFor == nil || slices.ContainsFunc(s.units, func(u *unit) bool { return u.policy.life().unopened }) {
		return
	}
	if err := errors.Join(s.watcher.Remove(s.waitsFor.FD()), s.waitsFor.Close()); err != nil {
		s.log.Warn("address watch not closed", slog.Any("err", err))
	}
	s.waitsFor = nil
}
