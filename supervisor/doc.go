// Package supervisor owns the lives of services: when a process starts, when it
// is put to sleep, what follows when it fails.
//
// The decisions are pure: a policy (solo, perConnection or gated, see machine.go) is
// told what happened and returns what to do. One goroutine, [Supervisor.Run],
// owns every policy, does what they return, and waits in one place: for traffic,
// for a message, or for the earliest deadline. Launching, accepting, freezing
// and looking at the kernel happen in goroutines that bring back one message each. A
// sleeping service costs a struct, and there is no ticker.
//
// A policy: solo.go with soloask.go and soloend.go, perconn.go, gated.go, and what both have in machine.go; idleness.go, stuck.go and sources.go
// judge. Its actions: actions.go (sockets, starts, looks), stop.go, refuse.go, screen.go, open.go, for gates door.go, rouse.go and bypass.go. What comes
// back: supervisor.go, notice.go, reap.go, timers.go, adopting.go, notifying.go. What is learned of a program, and kept: learned.go. What users ask: request.go.
//
//	goroutine                how many                      owns
//	Supervisor.Run           1                             every unit, the deadlines, the Watcher's Wait
//	launch, serve            at most 1 for each socket     one call of the Launcher
//	look                     at most 1                     one pass over the witnesses
//	confirm, drain, freeze   at most 1 for each service    parking, one freeze, one look
//	stop command             at most 1 for each service    its process
//	rouse, launch command    at most 1 each for each gate  the start of a destination, one process
//	work of a door           at most 1 for each gate       the gate: opening, shutting, a look, the stop command
//	relay                    a few for each gate that is open, or has connections; see package gate
//	screen                   at most 1 for each socket     one look at a queue
//	adopt.Session            1 for each adopting process   its questions, from the start to the end of the last descendant
//	callers                  any                           nothing: they send a request and get copies
//
// The states of a service with one process, and what leads from one to the
// next; a test reads this table and compares it with what the policy does:
//
//	listening  -> starting    addresses not known, requested, traffic
//	listening  -> backoff     address not to be had, rate limit, socket is shut down
//	listening  -> failed      socket is shut down
//	listening  -> stopped     supervisor stops
//	starting   -> running     launched, ready
//	starting   -> stopping    failed, not ready, requested, supervisor stops
//	starting   -> killing     supervisor stops
//	starting   -> backoff     failed, not ready, out of resources, start failed
//	starting   -> failed      failed, not ready, start failed
//	running    -> listening   exited
//	running    -> confirming  idle
//	running    -> frozen      requested
//	running    -> stopping    failed, requested, supervisor stops, took no traffic
//	running    -> killing     supervisor stops
//	running    -> backoff     failed, took no traffic
//	running    -> failed      failed, took no traffic
//	confirming -> listening   exited
//	confirming -> running     busy after all, cannot be frozen
//	confirming -> frozen      requested
//	confirming -> stopping    failed, idle, requested, supervisor stops
//	confirming -> killing     supervisor stops
//	confirming -> backoff     failed, took no traffic
//	confirming -> failed      failed, took no traffic
//	frozen     -> listening   exited
//	frozen     -> running     cannot be frozen, requested, thawed, traffic
//	frozen     -> stopping    failed, requested, supervisor stops
//	frozen     -> killing     supervisor stops
//	frozen     -> backoff     failed, took no traffic
//	frozen     -> failed      failed, took no traffic
//	stopping   -> listening   stopped
//	stopping   -> killing     stop timed out, supervisor stops
//	stopping   -> backoff     failed, not ready, took no traffic
//	stopping   -> failed      failed, not ready, took no traffic
//	killing    -> listening   stopped
//	killing    -> backoff     failed, not ready, took no traffic
//	killing    -> failed      failed, not ready, took no traffic
//	backoff    -> listening   address is there, backoff over, reset
//	backoff    -> starting    addresses not known, requested
//	backoff    -> stopped     supervisor stops
//	failed     -> listening   backoff over, reset
//	failed     -> starting    addresses not known, requested
//	failed     -> stopped     supervisor stops
//
// With accept = true, "running" means that connections are served, and
// several processes may run:
//
//	listening  -> running     serving
//	listening  -> stopping    requested, supervisor stops
//	listening  -> killing     supervisor stops
//	listening  -> backoff     address not to be had, out of resources, socket is shut down, start failed
//	listening  -> failed      socket is shut down, start failed
//	listening  -> stopped     supervisor stops
//	running    -> listening   served
//	running    -> stopping    requested, supervisor stops
//	running    -> killing     supervisor stops
//	running    -> backoff     out of resources, socket is shut down, start failed
//	running    -> failed      socket is shut down, start failed
//	stopping   -> listening   stopped
//	stopping   -> killing     stop timed out, supervisor stops
//	stopping   -> stopped     supervisor stops
//	killing    -> listening   stopped
//	killing    -> stopped     supervisor stops
//	backoff    -> listening   address is there, backoff over, reset
//	backoff    -> running     backoff over, reset
//	backoff    -> stopping    requested, supervisor stops
//	backoff    -> killing     supervisor stops
//	backoff    -> stopped     supervisor stops
//	failed     -> listening   backoff over, reset
//	failed     -> running     backoff over, reset
//	failed     -> stopping    requested, supervisor stops
//	failed     -> killing     supervisor stops
//	failed     -> stopped     supervisor stops
//
// With handoff = "gate" there is no process of ours: "starting" launches the destination, or waits until it is ready, and
// "running" means that it is up and that who comes is led there:
//
//	listening  -> starting    requested, traffic
//	listening  -> running     already up
//	listening  -> backoff     address not to be had, rate limit, socket is shut down
//	listening  -> failed      socket is shut down
//	listening  -> stopped     supervisor stops
//	starting   -> listening   stopped
//	starting   -> running     already up, ready
//	starting   -> stopping    not ready, requested
//	starting   -> backoff     out of resources, start failed
//	starting   -> failed      start failed
//	starting   -> stopped     supervisor stops
//	running    -> listening   destination gone
//	running    -> confirming  idle
//	running    -> stopping    requested
//	running    -> backoff     destination gone
//	running    -> failed      destination gone
//	running    -> stopped     supervisor stops
//	confirming -> listening   destination gone
//	confirming -> running     busy after all
//	confirming -> stopping    idle, requested
//	confirming -> backoff     destination gone
//	confirming -> failed      destination gone
//	confirming -> stopped     supervisor stops
//	stopping   -> listening   stopped
//	stopping   -> running     stop failed
//	stopping   -> backoff     not ready
//	stopping   -> failed      not ready
//	stopping   -> stopped     supervisor stops
//	backoff    -> listening   address is there, backoff over, reset
//	backoff    -> starting    requested
//	backoff    -> stopped     supervisor stops
//	failed     -> listening   backoff over, reset
//	failed     -> starting    requested
//	failed     -> stopped     supervisor stops
//
// What always holds: a solo service has at most one process that was started, and no other of its
// processes is left when the next one is (but with stop.kill_mode = "process"); sockets are armed
// only in listening and frozen, with accept = true in running, and in failed where clients are refused; a service is
// stopped for idleness only after a look in which every socket was known and quiet while all its processes
// were frozen, or its gate was shut; a gate is open only in running; new connections are parked only in confirming, stopping and killing, and with ready.hold in starting; a listening socket is
// closed only when the supervisor ends.
package supervisor
