// Package netlink asks the kernel one question at a time over a raw netlink
// socket, and hands over the messages of the answer without copying them.
//
// It exists beside a general netlink library because a dump can have hundreds of
// thousands of messages: here a message costs no allocation. It knows framing and
// attributes, never the meaning of a message. See netlink(7).
package netlink
