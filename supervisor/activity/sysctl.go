package activity

import (
	"errors"
	"io/fs"

	"hibergate/activation"
)

// countFlows turns the counters of flows on for this network namespace. Only flows that begin later are
// counted. It may be called again, and should: somebody else may have turned them off.
func countFlows(s *activation.Switch) error {
	s.Path = "/proc/sys/net/netfilter/nf_conntrack_acct"
	err := s.On()
	if errors.Is(err, fs.ErrNotExist) {
		return errors.New("the kernel has no connection tracking")
	}
	return err
}
