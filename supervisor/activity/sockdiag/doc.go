// Package sockdiag asks the kernel for its list of sockets (NETLINK_SOCK_DIAG, sock_diag(7)):
// connections, queues, and when they last carried data.
//
// It needs no privilege. It sees the sockets of this network namespace; of Unix
// connections only those whose client is in it too, because the kernel files
// the server's end under the client's namespace.
package sockdiag
