package supervisor

import (
	"errors"
	"fmt"
	"log/slog"

	"hibergate/activation"
)

// openAll opens the sockets of all services, or none of them.
func openAll(services []*Service, opts Options) (opened [][]*activation.Socket, err error) {
	var failed []error
	for _, svc := range services {
		var sockets []*activation.Socket
		for _, spec := range svc.Sockets {
			sock, err := openOne(spec, opts.Inherited)
			if err != nil {
				failed = append(failed, fmt.Errorf("service %q: %w", svc.Name, err))
				continue
			}
			for _, w := range sock.Warnings() {
				opts.Logger.Warn("socket option not set", slog.String("service", svc.Name), slog.Any("err", w))
			}
			sockets = append(sockets, sock)
		}
		opened = append(opened, sockets)
	}
	if failed != nil {
		return nil, errors.Join(append(failed, closeAll(opened))...)
	}
	return opened, nil
}

func openOne(spec activation.Spec, inherited *activation.Inherited) (*activation.Socket, error) {
	if inherited != nil {
		if sock, ok, err := inherited.Take(spec); ok || err != nil {
			return sock, err
		}
	}
	return activation.Open(spec)
}

func closeAll(opened [][]*activation.Socket) error {
	var errs []error
	for _, sockets := range opened {
		for _, sock := range sockets {
			errs = append(errs, sock.Close())
		}
	}
	return errors.Join(errs...)
}
