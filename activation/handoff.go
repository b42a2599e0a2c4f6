package activation

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// Handoff says what a process is started with. The descriptors are borrowed.
type Handoff struct {
	FDs    []int    // in the order of the child's descriptors; one may occur twice
	First  int      // the child's descriptor for FDs[0]; the others follow
	Env    []string // "NAME=value", to be added to the environment
	PIDEnv string   // the variable that must carry the child's own pid, "LISTEN_PID"; empty: none
}

// The variables of sd_listen_fds(3), and the first descriptor that it speaks of.
const (
	listenPID     = "LISTEN_PID"
	listenFDs     = "LISTEN_FDS"
	listenFDNames = "LISTEN_FDNAMES"
	listenStart   = 3
)

// ListenFDs hands over listening sockets as sd_listen_fds(3) describes.
func ListenFDs(sockets []*Socket) Handoff {
	fds, names := make([]int, len(sockets)), make([]string, len(sockets))
	for i, s := range sockets {
		fds[i], names[i] = s.fd, s.spec.Name
	}
	return listen(fds, names)
}

// ListenConnection hands over an accepted connection as systemd does with Accept=yes.
func ListenConnection(fd int, peer Peer) Handoff {
	h := listen([]int{fd}, []string{"connection"})
	h.Env = append(h.Env, remote(peer)...)
	return h
}

// listen builds what sd_listen_fds(3) expects. It may change names.
func listen(fds []int, names []string) Handoff {
	for i, name := range names {
		if name == "" {
			names[i] = "unknown" // as systemd says; an empty name would shift the others
		}
	}
	return Handoff{
		FDs:    fds,
		First:  listenStart,
		Env:    []string{listenFDs + "=" + strconv.Itoa(len(fds)), listenFDNames + "=" + strings.Join(names, ":")},
		PIDEnv: listenPID,
	}
}

// StdioSocket hands over a listening or datagram socket as standard input and
// output, as inetd does with "wait".
func StdioSocket(s *Socket) Handoff { return Handoff{FDs: []int{s.fd, s.fd}} }

// StdioConnection hands over an accepted connection as standard input and
// output, as inetd does with "nowait".
func StdioConnection(fd int, peer Peer) Handoff {
	return Handoff{FDs: []int{fd, fd}, Env: remote(peer)}
}

// remote returns the variables that systemd and xinetd (REMOTE_HOST) set for an
// accepted connection. There are none for an unnamed Unix client.
func remote(p Peer) []string {
	switch {
	case p.Remote.IsValid():
		a := p.Remote.Addr().String()
		return []string{"REMOTE_ADDR=" + a, "REMOTE_PORT=" + strconv.Itoa(int(p.Remote.Port())), "REMOTE_HOST=" + a}
	case p.Path != "":
		return []string{"REMOTE_ADDR=" + p.Path}
	}
	return nil
}

// UCSPI returns the variables of the UCSPI protocol as tcpserver and
// s6-ipcserver set them. Nothing is looked up: the hosts are the addresses.
// Variables whose value is not known are left out.
func UCSPI(p Peer, network Network) []string {
	if network == TCP {
		env := []string{"PROTO=TCP"}
		if p.Local.IsValid() {
			a := p.Local.Addr().String()
			env = append(env, "TCPLOCALIP="+a, "TCPLOCALPORT="+strconv.Itoa(int(p.Local.Port())), "TCPLOCALHOST="+a)
		}
		if p.Remote.IsValid() {
			a := p.Remote.Addr().String()
			env = append(env, "TCPREMOTEIP="+a, "TCPREMOTEPORT="+strconv.Itoa(int(p.Remote.Port())), "TCPREMOTEHOST="+a)
		}
		return env
	}
	if !network.Unix() {
		return nil
	}
	env := []string{"PROTO=UNIX"}
	if p.Known {
		uid, gid := strconv.FormatUint(uint64(p.UID), 10), strconv.FormatUint(uint64(p.GID), 10)
		env = append(env,
			"UNIXREMOTEEUID="+uid, "UNIXREMOTEEGID="+gid, "UNIXREMOTEPID="+strconv.Itoa(int(p.PID)),
			"IPCREMOTEEUID="+uid, "IPCREMOTEEGID="+gid)
	}
	if p.Path != "" {
		env = append(env, "UNIXREMOTEPATH="+p.Path, "IPCREMOTEPATH="+p.Path)
	}
	return env
}

// CheckName says why a text cannot be the name of a socket in LISTEN_FDNAMES: it
// must be 1 to 255 printable ASCII characters without a colon.
func CheckName(name string) error {
	switch {
	case name == "":
		return errors.New("name is empty")
	case len(name) > 255:
		return fmt.Errorf("name is %d bytes long, more than 255", len(name))
	case strings.Contains(name, ":"):
		return fmt.Errorf("name %q contains a colon, which separates names", name)
	case strings.ContainsFunc(name, func(r rune) bool { return r < ' ' || r > '~' }):
		return fmt.Errorf("name %q contains what is not printable ASCII", name)
	}
	return nil
}
