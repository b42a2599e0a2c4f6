// Package control lets people and programs ask a running supervisor what its
// services do, and wake them, put them to sleep and so on: HTTP and JSON over a Unix
// socket, so that curl --unix-socket is a client too.
//
// It owns the control socket and the lock beside it, which makes the
// supervisor of one control path the only one. It decides nothing: every request is one call of a
// [Supervisor]. Only root and the user that the supervisor runs as may ask.
//
// This is the only package that speaks HTTP.
package control
