// Package ledger keeps an account of sockets inside the kernel: one nftables
// table of our own, with a packet and byte counter for each direction and a clock
// for each socket.
//
// Counting costs a set lookup for each packet of this network namespace,
// whatever the number of sockets; reading costs microseconds, whatever the
// number of flows. Nothing is read or woken until [Ledger.Read] is called.
//
// For each kind of key (IPv4 address, IPv6 address, every address, dual stack) there are three
// sets: "in" and "out" count every packet, "last" holds an element whose
// timeout is restarted by every packet that matters, so that the timeout minus what is left
// of it is the time since that packet. Of TCP only packets with FIN, SYN, RST or PSH
// matter, so that keep-alive probes and bare acknowledgements are no activity.
// The rules add no elements: a packet for a port that is not ours changes nothing.
//
// An account can ignore peers: their packets are counted, but do not touch the clock. For these there are
// sets of ranges, "ignored", which only packets for accounts of such a kind are looked up in.
package ledger
