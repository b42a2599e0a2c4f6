// Package activity says what the kernel knows about the traffic of sockets.
//
// It asks up to three witnesses, each in a package of its own: the ledger, an
// nftables table with a counter and a clock for each socket; sock_diag, the
// exact list of sockets and their queues; and conntrack, the table of flows. A
// [Tracker] merges their answers into one [Summary] for each socket. It only
// reads when it is asked to: there is no ticker and no goroutine here.
//
// One thing no list of this network namespace has: a connection to a Unix socket whose client
// lives in another one. [Tracker.Held] asks the processes for those. Nor does a FIFO tell reliably that it was used;
// [Tracker.Read] tells whether the processes have read anything.
//
// It knows sockets, never services, and decides nothing. What it cannot find
// out it says so (Summary.Known), and never guesses.
package activity
