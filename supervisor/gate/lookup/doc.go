// Package lookup has the kernel hand new connections to a listening address of ours straight to the listening socket of a destination on
// this machine: a BPF program (sk_lookup, Linux 5.9) answers the kernel's question which socket a SYN is for. No address is
// translated and no connection tracked: the destination sees its client, and a connection is as fast as one that was made with it directly.
//
// The socket is found with sock_diag(7) and /proc, taken from its process for a moment, and put into a map of the kernel's. We keep no copy:
// it dies with its owner, and then its place in the map is empty. Where there is nothing in the map, or nothing that can take the packet, the
// kernel goes on to our listening socket, which stays open and is to be served: those clients come there always whose IP version the
// destination does not take, and everybody once the destination has closed its socket.
//
// A SYN decides, for the whole connection. What is handed over is no business of ours any more: it goes on after [Table.Remove], after
// [Table.Close], and after our death. It has the port of our listening socket as its local one, so whoever lists the connections
// of that (sock_diag) lists these too; in the list of the other family, where the destination's socket is of that (HandedOver of activity.Socket). No connection is lost if the caller keeps to this order:
//
//   - The destination listens, then [Table.Add].
//   - Remove, then look at the account of our listening socket until it has nothing open and nothing queued; then the destination may stop.
//     Clients that come in between wait at our socket.
//
// A destination that dies takes with it what it had, as ever, and nobody who comes later. One that listens anew by itself, with
// another socket, gets nothing until the next Add.
//
// It works where the destination is in our network namespace, its process can be seen in /proc and traced (CAP_SYS_PTRACE), and
// its socket is one of TCP: not of MPTCP, which programs in Go listen with since Go 1.24. Our process needs CAP_BPF and CAP_NET_ADMIN of the machine.
//
// Limits:
//
//   - Filters of our socket (access lists) are not asked, its options do not matter: these are the destination's.
//   - Where the destination does not set SO_REUSEADDR, our listening address can be bound again only after its connections have ended, and
//     their TIME_WAIT.
//   - With SYN cookies, in a flood of SYNs, the kernel knows nothing of a connection before its handshake has ended. Those that
//     are half done at Remove are reset.
//   - Packets that come through a VRF count for a socket on all interfaces, whatever net.ipv4.tcp_l3mdev_accept says.
package lookup
