// Package gate leads to services that are not our children: containers, virtual machines, programs of another init, other
// machines. It moves what comes to the sockets of a service to a destination, and tells how busy that is; when to launch and to stop the
// destination is for package supervisor to decide.
package gate
