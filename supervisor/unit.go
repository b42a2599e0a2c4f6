package supervisor

import (
	"slices"
	"time"

	"hibergate/activation"
	"hibergate/activation/adopt"
	"hibergate/supervisor/process"
)

// unit is one service at work: its policy, its sockets, its processes.
// Everything in it is owned by Supervisor.Run.
type unit struct {
	spec   *Service
	policy policy
	ports  ports
	procs  []*instance
	door   *door    // nil: its processes are our children
	tree   Tree     // nil before the first start
	end    *treeEnd // set while others live than those in procs
	scans  int      // times in a row that the end of some of those was not that of the last one

	run     uint64 // counts launches, so that late answers about an earlier run are known as such
	starts  uint64
	fails   uint64
	refused Refused
	sources *sources // nil: no limits for each source

	sessions  []*adopt.Session // answer this run, and what is left of others
	stuck     bool             // a process holds up the session: the sockets stay open
	notify    *process.Notify  // hears what the run says (sd_notify(3)); nil: nothing is to be heard
	saidReady bool             // it has said READY=1
	trouble   string           // why a bind of this run was not granted
	ioUring   bool             // this run has set up io_uring
	notes     []string         // what people should know about this run
	fresh     bool             // something was learned that is not written down
	keeping   bool             // what was learned is being written down
	keepAgain bool             // and has changed since

	queue    bool              // this run is bracketed (stuckness)
	reaching int               // freezes and kills of all processes under way; a new process must not meet them
	deferred []func(time.Time) // what ended meanwhile, to be told when they are over

	park    bool   // what the policy wants: new connections are parked
	parking bool   // parkPorts is under way
	noPark  string // why they cannot be parked; empty: they can, or it was not tried
	paused  bool   // in Supervisor.paused

	counted Counts    // what it adds to Supervisor.counts
	index   int       // in Supervisor.units
	due     time.Time // the deadline under which it stands in the timer queue
	place   int       // in the timer queue; -1: not there
	waiters []waiter
}

// port is one socket of a unit.
type port struct {
	sock     *activation.Socket
	slot     int    // its number in the unit, which stays its own
	key      uint32 // in the activity tracker
	gen      uint32 // counts arms, so that a late report of an earlier one is known as such
	armed    bool
	hangups  int // reported in a row
	accepted uint64
	held     *connection // accepted, but no process could be started for it yet

	// handoff = "adopt".
	learned bool // not in the configuration as such: a program has bound it, in this run or one before
	bound   bool // the process has it
	listens bool // and has called listen(2)

	taking    bool // takeAway is under way
	screening bool // who waits is being looked at (screen.go)
	again     bool // somebody came meanwhile
	screens   int  // looks since the last arrival
	looks     int  // all of them: a look that was put off is given up where there was another meanwhile

	failed   error // why it is not open, or not as it should be
	restores int   // tries in a row to restore it
}

// instance is one process of a unit.
type instance struct {
	Process
	unit   *unit
	token  uint64
	source source
}

// treeEnd waits for the last process of a unit to end.
type treeEnd struct {
	unit  *unit
	token uint64
	fd    int // owned; -1: it could not be found out whether there is anybody
}

// connection is one that was accepted for a service with accept = true.
type connection struct {
	fd     int // owned until a process has it
	peer   activation.Peer
	source source
}

// waiter is somebody who wants to know what came of a request.
type waiter struct {
	wants request
	run   uint64 // the run at which the request came
	done  chan struct{}
}

// settled says whether the waiter has been waiting long enough.
func (u *unit) settled(w waiter) bool {
	state := u.policy.life().state
	m, isSolo := u.policy.(*solo)
	switch {
	case state == Starting, state == Confirming, state == Stopping, state == Killing, isSolo && m.freezing:
		return false
	case w.wants == requestSleep:
		return u.run != w.run || len(u.procs) == 0 && u.end == nil
	}
	return true
}

// at finds the port with a number; nil: it was given up.
func (u *unit) at(slot int) *port {
	for _, p := range u.ports {
		if p.slot == slot {
			return p
		}
	}
	return nil
}

// ports are the sockets of a unit. What is outside the loop has the ports of a certain moment, of which it
// reads the socket and the key; a port that is added later makes other ports of the unit's.
type ports []*port

func (all ports) keys() []uint32 {
	keys := make([]uint32, len(all))
	for i, p := range all {
		keys[i] = p.key
	}
	return keys
}

func (all ports) sockets() []*activation.Socket {
	sockets := make([]*activation.Socket, len(all))
	for i, p := range all {
		sockets[i] = p.sock
	}
	return sockets
}

// waits says whether something waits on one of the sockets.
func (all ports) waits() bool {
	return slices.ContainsFunc(all, func(p *port) bool {
		pending, err := p.sock.Pending()
		return err == nil && pending
	})
}

// Tokens tell the descriptors in the watcher apart: a process, or the socket
// of a unit in its generation.
const processToken = 1 << 63

// addressToken is that of the AddressWatch. No process has it.
const addressToken = 1<<64 - 2

func socketToken(unit, slot int, gen uint32) uint64 {
	return uint64(unit)<<40 | uint64(slot)<<32 | uint64(gen)
}

func splitToken(token uint64) (unit, slot int, gen uint32) {
	return int(token >> 40), int(token >> 32 & 0xff), uint32(token)
}
