package supervisor

// State is where a service is in its life, as users see it.
type State uint8

// The states. See doc.go for the transitions between them.
const (
	Listening  State = iota // the sockets are open, no process runs
	Starting                // a process is being started, or is not ready yet
	Running                 // a process has the sockets; accept = true: at least one connection is served
	Confirming              // looked idle; frozen for one last look
	Frozen                  // stopped in memory by request; the next traffic thaws it
	Stopping                // it was asked to end
	Killing                 // it did not, and is made to
	Backoff                 // it waits to be tried again; so do clients, in the queue
	Failed                  // given up after too many failures, for a while
	Stopped                 // the supervisor is going down and this service is done
)

// String returns the state's name, as status and logs show it.
func (s State) String() string {
	switch s {
	case Listening:
		return "listening"
	case Starting:
		return "starting"
	case Running:
		return "running"
	case Confirming:
		return "confirming"
	case Frozen:
		return "frozen"
	case Stopping:
		return "stopping"
	case Killing:
		return "killing"
	case Backoff:
		return "backoff"
	case Failed:
		return "failed"
	case Stopped:
		return "stopped"
	}
	return "unknown"
}

// Reason says why a service is in its state.
type Reason string

// The reasons, as status and logs show them.
const (
	ReasonStarted     Reason = "supervisor started"
	ReasonTraffic     Reason = "traffic"               // something waits on a socket
	ReasonRequested   Reason = "requested"             // somebody asked for it by the control socket
	ReasonLearn       Reason = "addresses not known"   // only the program can tell where it listens
	ReasonLaunched    Reason = "launched"              // the program was executed
	ReasonReady       Reason = "ready"                 // and is ready
	ReasonNotReady    Reason = "not ready"             // the program ended, or was given its time, before it was ready
	ReasonServing     Reason = "serving"               // accept = true: a connection was accepted
	ReasonIdle        Reason = "idle"                  // no activity for stop_after
	ReasonBusy        Reason = "busy after all"        // the last look, while frozen, found activity
	ReasonFreeze      Reason = "cannot be frozen"      // so the last look was not possible
	ReasonThawed      Reason = "thawed"                // somebody asked for it
	ReasonExited      Reason = "exited"                // the last process ended by itself
	ReasonStopped     Reason = "stopped"               // the processes ended as they were told to
	ReasonServed      Reason = "served"                // accept = true: the last connection's process ended
	ReasonFailed      Reason = "failed"                // the process ended with an error
	ReasonStartFailed Reason = "start failed"          // there is no process
	ReasonNothingRead Reason = "took no traffic"       // the process ended, or was given its time, and what woke it still waits
	ReasonBroken      Reason = "socket is shut down"   // by a process, and it cannot be revived
	ReasonUnopened    Reason = "address not to be had" // yet
	ReasonOpened      Reason = "address is there"      // the sockets could be opened at last
	ReasonResources   Reason = "out of resources"      // descriptors, memory, processes, load
	ReasonRate        Reason = "rate limit"            // limits.wake_rate
	ReasonTimeout     Reason = "stop timed out"        // still there after stop.timeout
	ReasonRetry       Reason = "backoff over"          // the next try may begin
	ReasonReset       Reason = "reset"                 // somebody asked to forget the failures
	ReasonUp          Reason = "already up"            // gate: the destination was ready without our doing
	ReasonLost        Reason = "destination gone"      // gate: it refuses connections
	ReasonNotStopped  Reason = "stop failed"           // gate: the stop command did, so that the destination may still be up
	ReasonShutdown    Reason = "supervisor stops"      // the supervisor is going down
)
