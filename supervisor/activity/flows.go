package activity

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"hibergate/activation"
	"hibergate/supervisor/activity/conntrack"
	"hibergate/supervisor/activity/sockdiag"
)

// maxFlows bounds what Flows returns: it is for people to read.
const maxFlows = 1000

// Flows returns the open connections and UDP exchanges of one socket, at most 1,000. roots are the
// processes (with their descendants) among which the owner of a connection is sought.
// The string says why the list is not the whole truth; empty where it is.
func (t *Tracker) Flows(ctx context.Context, key uint32, roots []int) ([]Flow, string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	w := t.sockets[key]
	if w == nil {
		return nil, notWatched
	}
	if t.closed {
		return nil, closedTracker
	}
	if why := w.unknowable(); why != "" {
		return nil, why
	}
	if err := ctx.Err(); err != nil {
		return nil, err.Error()
	}
	l := &flowList{Tracker: t, watched: w}
	switch w.Address.Network {
	case activation.FIFO, activation.Unixgram: // no connections, no exchanges
		return nil, ""
	case activation.TCP:
		l.addTCP(ctx)
	case activation.UDP:
		l.addUDP()
	case activation.Unix, activation.Unixpacket:
		l.addUnix()
	}
	if l.skipped > 0 {
		l.why = append(l.why, fmt.Sprintf("%d more are not shown", l.skipped))
	}
	if len(roots) > 0 && len(l.inodes) > 0 {
		pids := holders(roots)
		for i, inode := range l.inodes {
			if pid, ok := pids[inode]; ok && inode != 0 {
				l.flows[i].PID, l.flows[i].Process = pid, processName(pid)
			}
		}
	}
	return l.flows, strings.Join(l.why, "; ")
}

// flowList is the answer of Flows as it grows.
type flowList struct {
	*Tracker
	*watched
	flows   []Flow
	inodes  []uint32 // of the flows, where they have a socket of their own
	skipped int      // beyond maxFlows
	why     []string
}

// reset is called before each attempt to read a list.
func (l *flowList) reset() { l.flows, l.inodes, l.skipped = nil, nil, 0 }

func (l *flowList) add(f Flow, inode uint32) {
	if len(l.flows) == maxFlows {
		l.skipped++
		return
	}
	l.flows, l.inodes = append(l.flows, f), append(l.inodes, inode)
}

// failed adds a reason why a list is not whole; err may be nil.
func (l *flowList) failed(what string, err error) {
	if err != nil {
		l.why = append(l.why, explain(what, err))
	}
}

// addTCP takes the connections from sock_diag, and looks each up in the table of flows.
func (l *flowList) addTCP(ctx context.Context) {
	err := l.eachConnection(l.watched, connected(), l.reset, func(row *sockdiag.Inet) {
		if row.Inode != 0 || row.State == sockdiag.Established || row.State == sockdiag.CloseWait {
			l.add(Flow{Protocol: "tcp", Peer: row.Peer, Original: row.Local, Local: row.Local, State: row.State.String()}, row.Inode)
		}
	})
	l.failed("sock_diag", err)
	if l.Accounting == SockDiag || len(l.flows) == 0 {
		return
	}
	l.probeConntrack() // another supervisor may have turned the counters off as it left
	if m := l.missing[conntrackWitness]; m != "" {
		l.why = append(l.why, m)
		return
	}
	untracked := 0
	for i := range l.flows {
		f := &l.flows[i]
		var found conntrack.Flow
		ok, err := l.conntrack.Get(unix.IPPROTO_TCP, conntrack.Tuple{Source: f.Local, Destination: f.Peer}, &found)
		if err = errors.Join(err, ctx.Err()); err != nil {
			l.failed("conntrack", err)
			return
		}
		if !ok {
			untracked++
			continue
		}
		f.fill(&found)
		f.State = found.TCPState.String()
	}
	if untracked > 0 {
		l.why = append(l.why, fmt.Sprintf("%d connections are unknown to conntrack", untracked))
	}
}

// addUDP takes the exchanges from the table of flows.
func (l *flowList) addUDP() {
	if l.Accounting == SockDiag {
		l.why = append(l.why, `UDP exchanges are unknown with accounting = "sock-diag"`)
		return
	}
	l.probeConntrack()
	if m := l.missing[conntrackWitness]; m != "" {
		l.why = append(l.why, m)
		return
	}
	families := []uint8{l.account.Family} // NFPROTO_IPV4 and NFPROTO_IPV6 are AF_INET and AF_INET6
	if l.account.Family == unix.NFPROTO_UNSPEC {
		families = []uint8{unix.AF_INET, unix.AF_INET6}
	}
	candidates := l.candidates(unix.IPPROTO_UDP, []uint8{unix.AF_INET, unix.AF_INET6}, []uint16{l.port})[l.port]
	for _, family := range families {
		kept, inodes := l.flows, l.inodes
		err := l.conntrack.Dump(family, unix.IPPROTO_UDP, l.port, func() { l.flows, l.inodes = kept, inodes }, func(f *conntrack.Flow) {
			// Through which device it came is not told: where it may have been ours, it was.
			if !slices.Contains(owners(candidates, f.Reply.Source, l.device), l.watched) {
				return
			}
			flow := Flow{Protocol: "udp", Peer: f.Reply.Destination, Local: f.Reply.Source, State: "REPLIED"}
			switch {
			case f.Status&conntrack.SeenReply == 0:
				flow.State = "UNREPLIED"
			case f.Status&conntrack.Assured != 0:
				flow.State = "ASSURED"
			}
			flow.fill(f)
			l.add(flow, 0)
		})
		l.failed("conntrack", err)
	}
}

// addUnix takes the connections from sock_diag.
func (l *flowList) addUnix() {
	err := l.sockdiag.Unix(l.reset, func(row *sockdiag.Unix) {
		if string(row.Name) == l.name && row.State == sockdiag.Established {
			l.add(Flow{Protocol: "unix", State: row.State.String()}, row.Inode)
		}
	})
	l.failed("sock_diag", err)
}

// fill adds what conntrack knows.
func (f *Flow) fill(found *conntrack.Flow) {
	f.Original = found.Original.Destination
	f.Counted = found.Counted
	f.In, f.Out = Counters(found.OriginalCounters), Counters(found.ReplyCounters)
}
