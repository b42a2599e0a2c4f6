// Package supervisor owns the lives of services: when a process starts, when it
// is put to sleep, what follows when it fails.
//
// The decisions are pure: a policy (solo or perConnection, see machine.go) is
// told what happened and returns what to do. One goroutine, [Supervisor.Run],
// owns every policy, does what they return, and waits in one place: for traffic,
// for a message, or for the earliest deadline. Launching, accepting, freezing
// and looking at the kernel happen in goroutines that bring back one message each. A
// sleeping service costs a struct, and there is no ticker.
//
//	goroutine             how many                      owns
//	Supervisor.Run        1                             every unit, the deadlines, the Watcher's Wait
//	launch, serve         at most 1 for each socket     one call of the Launcher
//	look                  at most 1                     one pass over the witnesses
//	confirm               at most 1 for each service    one freeze and one look
//	callers               any                           nothing: they send a request and get copies
//
// The states of a service with one process, and what leads from one to the
// next; a test reads this table and compares it with what the policy does:
//
//	listening  -> starting    traffic, requested
//	listening  -> stopped     supervisor stops
//	listening  -> backoff     socket is shut down
//	starting   -> running     launched
//	starting   -> backoff     start failed
//	running    -> confirming  idle
//	running    -> stopping    requested, supervisor stops
//	running    -> killing     supervisor stops
//	running    -> listening   exited
//	running    -> backoff     failed, took no traffic
//	confirming -> stopping    idle, requested, supervisor stops
//	confirming -> killing     supervisor stops
//	confirming -> running     busy after all, cannot be frozen
//	confirming -> listening   exited
//	confirming -> backoff     failed, took no traffic
//	stopping   -> killing     stop timed out, supervisor stops
//	stopping   -> listening   stopped
//	killing    -> listening   stopped
//	backoff    -> listening   backoff over
//	backoff    -> starting    requested
//	backoff    -> stopped     supervisor stops
//
// With accept = true, "running" means that connections are served, and
// several processes may run:
//
//	listening  -> running     serving
//	listening  -> stopping    requested, supervisor stops
//	listening  -> killing     supervisor stops
//	listening  -> stopped     supervisor stops
//	listening  -> backoff     start failed, out of resources, socket is shut down
//	running    -> listening   served
//	running    -> backoff     start failed, out of resources, socket is shut down
//	running    -> stopping    requested, supervisor stops
//	running    -> killing     supervisor stops
//	stopping   -> killing     stop timed out, supervisor stops
//	stopping   -> listening   stopped
//	stopping   -> stopped     supervisor stops
//	killing    -> listening   stopped
//	killing    -> stopped     supervisor stops
//	backoff    -> listening   backoff over
//	backoff    -> running     backoff over
//	backoff    -> stopping    requested, supervisor stops
//	backoff    -> killing     supervisor stops
//	backoff    -> stopped     supervisor stops
//
// What always holds: a solo service has at most one process; sockets are armed
// only in listening, and with accept = true in running; a service is stopped for
// idleness only after a look in which every socket was known and quiet while the
// process was frozen; a listening socket is closed only when the supervisor ends.
package supervisor
