package supervisor

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation"
	"hibergate/activation/adopt"
)

// LearnedSocket is where a program was seen to listen, as far as it takes to open the same socket before the program
// is there. Paths are not learned: the place where a program has put a file need not be the same the next time, and the
// supervisor may do there what the program may not.
type LearnedSocket struct {
	Address  string `json:"address"`          // as in the configuration
	Family   string `json:"family,omitempty"` // of the IPv6 wildcard: "dual" or "ipv6"
	Device   string `json:"device,omitempty"`
	FreeBind bool   `json:"free_bind,omitempty"`
	// Transparent is IP_TRANSPARENT.
	Transparent bool `json:"transparent,omitempty"`
}

// learnedFile is what is kept of a service in the state directory.
type learnedFile struct {
	Sockets []LearnedSocket `json:"sockets"`
}

// maxLearnedFile bounds such a file in bytes.
const maxLearnedFile = 64 << 10

// describeSocket puts a socket into words for the next supervisor.
func describeSocket(sock *activation.Socket) (LearnedSocket, error) {
	spec, err := sock.Reopen()
	if err != nil {
		return LearnedSocket{}, err
	}
	o := &spec.Options
	l := LearnedSocket{Address: spec.Address.String(), Device: o.Device, FreeBind: o.FreeBind, Transparent: o.Transparent}
	switch o.Family {
	case activation.FamilyDual:
		l.Family = "dual"
	case activation.FamilyIPv6:
		l.Family = "ipv6"
	case activation.FamilyIPv4:
		l.Family = "ipv4"
	case activation.FamilyDefault:
	}
	return l, nil
}

// spec is the reverse of describeSocket. base has the name and the options of the configuration.
func (l *LearnedSocket) spec(base activation.Spec) (activation.Spec, error) {
	var err error
	if base.Address, err = activation.ParseAddress(l.Address); err != nil {
		return base, err
	}
	o := &base.Options
	switch l.Family {
	case "dual":
		o.Family = activation.FamilyDual
	case "ipv6":
		o.Family = activation.FamilyIPv6
	case "ipv4":
		o.Family = activation.FamilyIPv4
	case "":
	default:
		return base, fmt.Errorf("unknown family %q", l.Family)
	}
	o.Device, o.FreeBind, o.Transparent = l.Device, l.FreeBind, l.Transparent
	o.PacketInfo = base.Address.Network == activation.UDP
	return base, nil
}

// learnedPath is where the sockets of a service are kept; empty: nowhere.
func learnedPath(state, service string) string {
	if state == "" {
		return ""
	}
	return filepath.Join(state, "learned", service+".json")
}

// loadLearned reads what an earlier supervisor has learned of a service, as far as it is still wanted. Nothing is no error.
func loadLearned(state string, svc *Service) ([]activation.Spec, error) {
	name := learnedPath(state, svc.Name)
	if name == "" || len(svc.Learn) == 0 {
		return nil, nil
	}
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close() // it was only read
	b, err := io.ReadAll(io.LimitReader(f, maxLearnedFile))
	if err != nil {
		return nil, err
	}
	specs, err := parseLearned(b, svc)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	return specs, nil
}

// parseLearned reads the content of such a file.
func parseLearned(b []byte, svc *Service) ([]activation.Spec, error) {
	var file learnedFile
	if err := json.Unmarshal(b, &file); err != nil {
		return nil, err
	}
	var specs []activation.Spec
	for _, l := range file.Sockets {
		for _, pattern := range svc.Learn {
			spec, err := l.spec(pattern.Spec)
			if err != nil {
				break // what is wrong is learned again
			}
			if a := spec.Address; !pattern.Pattern.Matches(a) || a.Network.IP() && (a.Port == 0 || !a.IP.IsValid()) {
				continue
			}
			again := slices.ContainsFunc(specs, spec.Conflicts) || slices.ContainsFunc(svc.Sockets, spec.Conflicts)
			if !again && len(svc.Sockets)+len(specs) < adopt.MaxSockets {
				specs = append(specs, spec)
			}
			break
		}
	}
	return specs, nil
}

// keep writes down where the program of a unit listens.
func (s *Supervisor) keep(u *unit) {
	name := learnedPath(s.state, u.spec.Name)
	if name == "" || u.keeping {
		u.keepAgain = name != ""
		return
	}
	u.keeping = true
	var socks []*activation.Socket
	for _, p := range u.ports {
		if p.learned {
			socks = append(socks, p.sock)
		}
	}
	s.goDo(func() message {
		err := saveLearned(name, socks)
		return func(time.Time) {
			if err != nil {
				s.log.Warn("what was learned is not kept: the program is run again at the next start", slog.String("service", u.spec.Name), slog.Any("err", err))
			}
			if u.keeping = false; u.keepAgain {
				u.keepAgain = false
				s.keep(u)
			}
		}
	}, nil)
}

// saveLearned replaces a file as a whole.
func saveLearned(name string, socks []*activation.Socket) error {
	file := learnedFile{Sockets: []LearnedSocket{}}
	for _, sock := range socks {
		if l, err := describeSocket(sock); err == nil { // else it is closed by now
			file.Sockets = append(file.Sockets, l)
		}
	}
	b, err := json.MarshalIndent(file, "", "\t")
	if err != nil {
		return err
	}
	dir := filepath.Dir(name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, ".new-*")
	if err != nil {
		return err
	}
	_, err = f.Write(append(b, '\n'))
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}
