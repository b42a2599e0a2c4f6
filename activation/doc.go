// Package activation owns listening sockets and knows how a process gets them.
//
// It opens, binds and closes the sockets of a service ([Open]), takes over
// those that systemd passes in ([Inherit]), waits for traffic on all of them in
// one epoll set ([Watcher]), accepts where a service wants one process per
// connection ([Socket.Accept]), mends what a process has shut down or changed
// ([Socket.Revive], [Socket.Restore]), keeps new connections from a process that
// is about to end ([Socket.Park]), hears when an address can be bound at last
// ([AddressWatch]), and says which file descriptors and which environment a
// process is started with ([Handoff]).
//
// It knows sockets, never services: nothing here decides when a process starts
// or stops. There is no goroutine but that of the caller of [Watcher.Run].
//
// # Descriptors
//
// Every descriptor that is made here is close-on-exec and non-blocking, except for
// accepted connections, which block. A Socket owns its descriptor; whoever asks
// for it borrows it. Only a Handoff crosses an exec, and it borrows too. Sockets
// never come into package net, which would poll them for ever, and change the flags
// that all processes with the same socket share.
//
// # The protocol of sd_listen_fds(3)
//
// A process finds its sockets at the descriptors from 3 on, without close-on-exec.
// LISTEN_FDS is how many there are, LISTEN_FDNAMES has their names with colons in
// between, and LISTEN_PID is the pid of the process itself: if it is another's, the
// variables were inherited by mistake and mean nothing. Only the child can know its
// pid in time, which is why a Handoff leaves that variable to who starts it.
package activation
