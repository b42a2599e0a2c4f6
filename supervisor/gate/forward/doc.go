// Package forward has the kernel lead new connections past us: an nftables table of our own translates the destination
// address of those that come to a listening TCP address (DNAT), and connection tracking tells what has become of them.
//
// A packet decides once, as the first of its connection: what began before [Table.Add] stays with the listening socket, and
// what began before [Table.Remove] stays with the destination. That holds as long as the Table is open: the chains, and the
// tracking of all connections of the network namespace that they bring with them, are there from [Open] on, and a gate is one element of
// a map. With [Table.Close], or our death, what is forwarded ends with a reset.
//
// No connection is lost at either switch if the caller keeps to this order:
//
//   - The destination accepts connections, then Add. The listening socket stays open and goes on to be served: some clients
//     always come that way, see below.
//   - Remove, then [Table.Drain] until it says that nothing is open, then the destination may stop. Clients that come
//     in between wait at the listening socket.
//
// Who is forwarded: clients of this machine and of others that connect to the address, in the IP version of the destination. Clients
// of 127.0.0.0/8 and ::1 go to a destination there, and only they. So a socket on all addresses that leads to another address keeps its clients on
// loopback, and those of the other IP version, for the relay.
//
// Where the destination is on another machine (or in a container, with an address of its own), it sees our address in the place
// of the client's: the answers must come back through us. The machine must forward packets (net.ipv4.ip_forward), and
// its firewall must let these pass.
//
// What connection tracking cannot keep breaks: a connection half closed for longer than
// net.netfilter.nf_conntrack_tcp_timeout_close_wait or _fin_wait without a packet, or silent for
// nf_conntrack_tcp_timeout_established (5 days).
package forward
