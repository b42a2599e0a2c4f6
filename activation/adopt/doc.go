// Package adopt puts our listening sockets in the place of those that a program binds itself, so that a
// program which knows neither LISTEN_FDS nor inetd can be started by its first client.
//
// A program is started with a seccomp filter ([Filter]) that asks us about each bind(2) and listen(2), and
// about unlink(2) where a socket has a path (seccomp_unotify(2)). A [Session] answers, for one process and all
// that descend from it. It owns the descriptor on which the kernel asks and one goroutine, which blocks a thread, and knows
// sockets, never services: it reports what it has seen ([Event]).
//
//   - bind() of an address that we have: our socket takes the number of the program's
//     own (SECCOMP_IOCTL_NOTIF_ADDFD), with the options and flags that the program had set on that, and the call succeeds.
//   - bind() of an address that matches a [Pattern]: it goes on in the kernel. When the program
//     listens, we get a descriptor of its socket (pidfd_getfd(2)) and own it from then on. A datagram socket
//     is bound by us instead, with the rights that the program has.
//   - listen() on one of ours: the socket listens already, so this is only noted.
//   - unlink() of the path of one of ours: nothing is done, as programs remove it before they bind, and at
//     their end, when it is ours.
//   - Everything else goes on as if nobody had asked.
//
// What is decided is decided on our own copy of the address, and a program is never given more than
// a socket of its own service: to change the memory after that, or to ask for what is not there, gains nothing.
// Calls of i386 programs are told apart by their architecture. Those of x32 are not caught, and
// neither is what io_uring binds, for it makes no system call; that a program has set io_uring up is reported.
//
// A process can make a Session wait (for a FUSE file system of its own that is slow to close a descriptor, for
// instance), but only its own. When the Session has ended and processes are left, what they would be
// asked about fails with ENOSYS.
//
// It needs Linux 5.9; from 5.19 on, signals do not interrupt a bind() that we have begun with.
package adopt
