// Package process launches, freezes, signals and reaps the processes of services.
//
// It owns the way from a description ([Exec]) to a running program
// ([Spawner.Start]), the handle on it ([Process]) and on all that comes of it ([Tree]). It
// knows cgroups and descriptors, never sockets, services or policy. It starts no goroutine,
// except one that reaps orphans where they come to this program: without cgroups, and as
// process 1. (Those of [SpareThreads] end at once.)
//
// A program is started by a vfork of our own (vfork.go) and not by os/exec, for
// two reasons. A process started by socket activation must find its own pid in its
// environment, which only code between fork and exec can put there without running
// a second program. And package syscall copies the whole descriptor table, which
// with 5,000 sockets takes ten times longer than all the rest of a start.
package process
