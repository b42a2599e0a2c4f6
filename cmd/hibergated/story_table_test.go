package main

import (
	"encoding/binary"
	"errors"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
)

// Somebody flushes the ruleset, and deletes our table as only we could: nothing is stopped
// while a connection is open, and the account is made anew. Not parallel, as other tests have rules, too.
func TestTableDeleted(t *testing.T) {
	nettest.Need(t, nettest.Namespaces, nettest.Tool("nft"))
	d := startHibergated(t, `
[service.web]
listen       = ["tcp://127.0.0.1:0"]
command      = ["ECHO-SERVER"]
idle_timeout = "200ms"
[service.dns]
listen       = ["udp://127.0.0.1:0"]
command      = ["ECHO-SERVER"]
idle_timeout = "200ms"
`)
	c := mustHold(t, d, "web", 0)
	datagrams := mustDial(t, d, "dns", 0)
	table := ownTable(t)
	mustRun(t, "nft", "flush", "ruleset")
	if out, err := exec.Command("nft", "delete", "table", "inet", table).CombinedOutput(); err == nil {
		t.Log("this kernel lets others delete the table")
	} else {
		t.Logf("the kernel protects the table: %s", out)
	}
	for i := range 3 {
		if i > 0 {
			deleteTable(t, d.pid, table)
		}
		mustAsk(t, c, "hello\n")
		mustAsk(t, datagrams, "hello\n")
		time.Sleep(500 * time.Millisecond) // longer than the timeout: it has looked
		st := d.status("web")
		if st.State != "running" || st.Starts != 1 || !st.Sockets[0].Known || st.Sockets[0].Open != 1 {
			t.Errorf("with an open connection: %+v", st)
		}
		before := st.Sockets[0].In
		mustAsk(t, c, "hello\n")
		if after := d.status("web").Sockets[0].In; after.Packets <= before.Packets {
			t.Errorf("no longer counted: %+v, then %+v", before, after)
		}
		d.sleeps(t, "dns")
		ownTable(t)
	}
	c.Close()
	d.sleeps(t, "web")
	if st := d.status("web"); st.Starts != 1 || st.Failures != 0 {
		t.Errorf("at the end: %+v", st)
	}
}

// ownTable returns the name of the one table of hibergated.
func ownTable(t *testing.T) string {
	t.Helper()
	var names []string
	for line := range strings.Lines(mustRun(t, "nft", "list", "tables")) {
		if f := strings.Fields(line); len(f) == 3 && strings.HasPrefix(f[2], "hibergated-") {
			names = append(names, f[2])
		}
	}
	if len(names) != 1 {
		t.Fatalf("the tables of hibergated are %q", names)
	}
	return names[0]
}

// deleteTable deletes a table that belongs to a socket of a process, by borrowing that socket: the
// kernel lets nobody else.
func deleteTable(t *testing.T, pid int, table string) {
	t.Helper()
	owner, name := tableOwner(t, table)
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pidfd)
	for fd := range 64 {
		theirs, err := unix.PidfdGetfd(pidfd, fd, 0)
		if err != nil {
			continue
		}
		defer unix.Close(theirs)
		if sa, err := unix.Getsockname(theirs); err != nil {
			continue
		} else if sa, ok := sa.(*unix.SockaddrNetlink); !ok || sa.Pid != owner {
			continue
		}
		// Without NLM_F_ACK, so that no answer comes for which the process does not wait.
		var batch []byte
		for _, m := range []netlink.Message{
			nfMessage(unix.NFNL_MSG_BATCH_BEGIN, []byte{unix.AF_UNSPEC, 0, 0, unix.NFNL_SUBSYS_NFTABLES}),
			nfMessage(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_DELTABLE, name),
			nfMessage(unix.NFNL_MSG_BATCH_END, []byte{unix.AF_UNSPEC, 0, 0, unix.NFNL_SUBSYS_NFTABLES}),
		} {
			b, err := m.MarshalBinary()
			if err != nil {
				t.Fatal(err)
			}
			batch = append(batch, b...)
		}
		if err := unix.Sendto(theirs, batch, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Fatal("no socket of hibergated owns its table")
}

// tableOwner returns the netlink port that owns a table, and the body of a message about the table.
func tableOwner(t *testing.T, table string) (port uint32, body []byte) {
	t.Helper()
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	name, err := netlink.MarshalAttributes([]netlink.Attribute{{Type: unix.NFTA_TABLE_NAME, Data: append([]byte(table), 0)}})
	if err != nil {
		t.Fatal(err)
	}
	body = append([]byte{unix.NFPROTO_INET, 0, 0, 0}, name...)
	replies, err := conn.Execute(nfMessage(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETTABLE, body))
	if err != nil {
		t.Fatal(err)
	}
	const ownedBy = 7 // NFTA_TABLE_OWNER
	for _, reply := range replies {
		attributes, err := netlink.UnmarshalAttributes(reply.Data[4:])
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range attributes {
			if a.Type == ownedBy {
				return binary.BigEndian.Uint32(a.Data), body
			}
		}
	}
	nettest.Need(t, func() error { return errors.New("tables have no owners in this kernel") })
	return 0, nil
}

func nfMessage(typ uint16, body []byte) netlink.Message {
	return netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(typ), Flags: netlink.Request, Length: uint32(unix.SizeofNlMsghdr + len(body))},
		Data:   body,
	}
}
