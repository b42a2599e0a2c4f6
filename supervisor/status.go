package supervisor

import (
	"time"

	"hibergate/supervisor/activity"
	"hibergate/supervisor/gate"
)

// Status is what a service was doing at one moment: a copy, safe to keep.
type Status struct {
	Name     string         `json:"name"`
	State    string         `json:"state"`  // as State.String says: listening, starting, running, confirming, frozen, stopping, killing, backoff, failed
	Reason   string         `json:"reason"` // why it is in that state
	Since    time.Time      `json:"since"`  // when it came into that state
	Handoff  string         `json:"handoff"`
	Accept   bool           `json:"accept"`
	PIDs     []int          `json:"pids,omitempty"` // the processes that were started for it and still run; where the first one has ended, all that are left
	Starts   uint64         `json:"starts"`         // processes started since the supervisor began
	Failures uint64         `json:"failures"`       // starts and runs that failed
	Error    string         `json:"error,omitempty"`
	WaitsFor string         `json:"waits_for,omitempty"` // in starting: what the process lacks to be ready
	Notes    []string       `json:"notes,omitempty"`     // what people should know about the last run
	RetryAt  *time.Time     `json:"retry_at,omitempty"`  // in backoff and failed: when it is tried again by itself
	Tracking string         `json:"tracking"`            // how its descendants are found: "cgroup", or "process tree: " and why
	Parking  string         `json:"parking,omitempty"`   // whether new connections are parked while it stops: "on", or "off: " and why; empty: nothing to park
	Refused  Refused        `json:"refused"`
	Gate     *GateStatus    `json:"gate,omitempty"` // handoff = "gate"
	Idle     IdleStatus     `json:"idle"`
	Sockets  []SocketStatus `json:"sockets"`
}

// GateStatus says where a gate leads.
type GateStatus struct {
	Forward      string                   `json:"forward"`             // "relay"; "kernel", or "relay: " and why not the kernel
	Pending      int                      `json:"pending"`             // clients that were accepted and wait for the destination
	TimedOut     uint64                   `json:"timed_out,omitempty"` // clients that were accepted and have waited too long
	Destinations []gate.DestinationStatus `json:"destinations"`
}

// IdleStatus says whether and when the service will be put to sleep.
type IdleStatus struct {
	When      string     `json:"when"`                 // "no-connections" or "no-traffic"
	StopAfter string     `json:"stop_after,omitempty"` // a duration; empty: never stopped for idleness
	StopsAt   *time.Time `json:"stops_at,omitempty"`   // the earliest time at which it can be stopped, as far as is known
	Busy      string     `json:"busy,omitempty"`       // what keeps it awake at the last look, in words
}

// SocketStatus is the account of one socket.
type SocketStatus struct {
	Name         string            `json:"name"`
	Address      string            `json:"address"`         // where it listens, with the port the kernel chose
	Error        string            `json:"error,omitempty"` // why it is not open, or not as it should be
	Known        bool              `json:"known"`           // false: the kernel could not be asked; see Why
	Why          string            `json:"why,omitempty"`
	Open         int               `json:"open"`
	Queued       int               `json:"queued"`
	In           activity.Counters `json:"in"`
	Out          activity.Counters `json:"out"`
	LastActivity *time.Time        `json:"last_activity,omitempty"`
	Accepted     uint64            `json:"accepted,omitempty"` // accept = true: connections accepted
	Dropped      uint64            `json:"dropped,omitempty"`  // packets that the kernel dropped at the socket: from sources that may not use it, or with its queue full
	Flows        []activity.Flow   `json:"flows,omitempty"`
	FlowsWhy     string            `json:"flows_why,omitempty"` // why Flows is not the whole truth
}
