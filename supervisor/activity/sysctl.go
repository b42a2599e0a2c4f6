package activity

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// acctPath turns the counters of flows on for this network namespace.
const acctPath = "/proc/sys/net/netfilter/nf_conntrack_acct"

// accountingSwitch turns the counters of flows on, and off again where they were off before
// and nobody else wants them. All supervisors of a network namespace hold a shared
// lock (flock(2)) on the file, so that the one that leaves sees the others.
type accountingSwitch struct {
	file     *os.File // holds the lock; nil: not yet
	turnedOn bool
}

// on turns the counters on. Only flows that begin later are counted. It may be called again, and
// should: somebody else may have turned them off.
func (s *accountingSwitch) on() error {
	if s.file == nil {
		f, err := os.Open(acctPath)
		if errors.Is(err, fs.ErrNotExist) {
			return errors.New("the kernel has no connection tracking")
		}
		if err != nil {
			return err
		}
		s.file = f
		// Where the lock is refused, somebody is about to turn them off: the next call sets it right.
		_ = unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB)
	}
	b, err := os.ReadFile(acctPath)
	if err != nil {
		return err
	}
	if strings.TrimSpace(string(b)) != "0" {
		return nil
	}
	if err := os.WriteFile(acctPath, []byte("1\n"), 0); err != nil {
		return fmt.Errorf("%w; set it to 1 for them", err)
	}
	s.turnedOn = true
	return nil
}

// restore turns the counters off if on turned them on and nobody else holds the lock.
func (s *accountingSwitch) restore() error {
	if s.file == nil {
		return nil
	}
	var err error
	if s.turnedOn && unix.Flock(int(s.file.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
		err = os.WriteFile(acctPath, []byte("0\n"), 0)
	}
	err = errors.Join(err, s.file.Close())
	*s = accountingSwitch{}
	return err
}
