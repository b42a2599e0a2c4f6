package activity

import (
	"context"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/activation"
	"hibergate/supervisor/activity/ledger"
	"hibergate/supervisor/activity/sockdiag"
)

// tick is the longest clock tick of Linux (HZ=100). Ages that the kernel tells in
// ticks can be too long by one; taking it off errs to the busy side.
const tick = 10 * time.Millisecond

// look is one Look on its way. Tracker.mu is held.
type look struct {
	*Tracker
	ctx context.Context
	now time.Time // of the call
	due []due
}

// due is a socket that is looked at.
type due struct {
	*watched
	*Summary
}

// fail says that a witness which sees the socket did not answer.
func (d due) fail(why string) {
	d.Known = false
	d.note(why)
}

// note says that less is known than was asked for.
func (d due) note(why string) {
	if d.Why != "" {
		d.Why += "; "
	}
	d.Why += why
}

// ago returns the time of something that the kernel has just said to be so old. It counts
// from this moment: since the call there may have been a long wait for Tracker.mu. What came
// after the call is dated at the call, which is as busy as can be.
func (l *look) ago(age time.Duration) time.Time {
	return l.now.Add(min(time.Since(l.now)-max(age-tick, 0), 0))
}

// run asks the witnesses, cheapest first.
func (l *look) run() {
	var inet, unixes []due
	for _, d := range l.due {
		switch d.Address.Network {
		case activation.FIFO:
			l.lookAtFIFO(d)
		case activation.TCP, activation.UDP:
			inet = append(inet, d)
		case activation.Unix, activation.Unixgram, activation.Unixpacket:
			unixes = append(unixes, d)
		}
	}
	l.askLedger(inet)
	if len(inet)+len(unixes) > 0 {
		l.missing[sockdiagWitness] = "" // until it fails
	}
	for _, domain := range []uint8{unix.AF_INET, unix.AF_INET6} {
		for _, protocol := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
			var some []due
			for _, d := range inet {
				if d.isIn(domain) && d.protocol == protocol {
					some = append(some, d)
				}
			}
			if len(some) > 0 {
				l.askInet(sockdiag.Query{Family: domain, Protocol: protocol}, some)
			}
		}
	}
	if len(unixes) > 0 {
		l.askUnix(unixes)
	}
}

// lookAtFIFO asks the pipe what is in it, and its inode when it was written to. That time is
// for display: a writer that came through a read-only mount does not move it, and it is the wall clock's.
// Tracker.Read has the evidence.
func (l *look) lookAtFIFO(d due) {
	queued, err := unix.IoctlGetInt(d.FD, unix.TIOCINQ) // FIONREAD
	if err != nil {
		d.fail(fmt.Sprintf("look into FIFO: %v", err))
		return
	}
	var st unix.Stat_t
	if err := unix.Fstat(d.FD, &st); err != nil {
		d.fail(fmt.Sprintf("look at FIFO: %v", err))
		return
	}
	d.Queued = queued
	if age := time.Since(time.Unix(st.Mtim.Unix())); age >= 0 {
		d.Last = l.ago(age)
	}
}

// askLedger reads the ledger for those who want it.
func (l *look) askLedger(inet []due) {
	var asked []due
	var keys []ledger.Key
	for _, d := range inet {
		if d.Accounting != SockDiag {
			asked = append(asked, d)
			keys = append(keys, d.account)
		} else if d.protocol == unix.IPPROTO_UDP {
			d.fail(`UDP services are never stopped for idleness with accounting = "sock-diag"`)
		}
	}
	if len(asked) == 0 {
		return
	}
	l.openLedger(l.now)
	if l.ledger == nil {
		why := l.missing[nftablesWitness]
		for _, d := range asked {
			switch {
			case d.protocol == unix.IPPROTO_UDP:
				d.fail("UDP services are never stopped for idleness without nftables (" + why + ")")
			case d.Accounting == Conntrack:
				d.fail(why)
			default:
				d.note(why)
			}
		}
		return
	}
	others := l.onOtherDevices(asked)
	for _, some := range others {
		keys = append(keys, some...)
	}
	if err := l.ledger.Read(keys); err != nil {
		why := explain("nftables", err)
		if err := l.loseLedger(l.now); err != nil {
			why += fmt.Sprintf(" (%v)", err)
		}
		for _, d := range asked {
			d.In, d.Out = d.counted.in, d.counted.out
			d.fail(why)
		}
		return
	}
	for _, d := range asked {
		if d.Accounting == Conntrack && !l.mayAskConntrack() {
			d.fail(l.missing[conntrackWitness])
		}
		r := l.ledger.Reading(d.account)
		d.count(r)
		d.In, d.Out = d.counted.in, d.counted.out
		quiet := r.Quiet
		for _, key := range others[d.watched] {
			quiet = min(quiet, l.ledger.Reading(key).Quiet)
		}
		d.Last, d.Exact = l.ago(quiet), true
	}
}

// onOtherDevices returns the other accounts on the ports of sockets that packets for those may be in: the
// ledger goes by the address alone where the kernel chooses among sockets by the device, too.
func (l *look) onOtherDevices(asked []due) map[*watched][]ledger.Key {
	others := make(map[*watched][]ledger.Key)
	for _, protocol := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
		var some []due
		var ports []uint16
		for _, d := range asked {
			if d.protocol == protocol {
				some, ports = append(some, d), append(ports, d.port)
			}
		}
		if len(some) == 0 {
			continue
		}
		candidates := l.candidates(protocol, []uint8{unix.AF_INET, unix.AF_INET6}, ports)
		for _, d := range some {
			for _, w := range candidates[d.port] {
				if w.device != d.device && w.accounted() && w.account != d.account {
					others[d.watched] = append(others[d.watched], w.account)
				}
			}
		}
	}
	return others
}

// mayAskConntrack says whether the table of flows can be read; where it could not, it tries again.
func (t *Tracker) mayAskConntrack() bool {
	if t.missing[conntrackWitness] != "" {
		t.probeConntrack()
	}
	return t.missing[conntrackWitness] == ""
}

// connected are the states in which a connection may still carry something, or is
// held by a process that has not closed it.
func connected() []sockdiag.State {
	return []sockdiag.State{
		sockdiag.Established, sockdiag.FinWait1, sockdiag.FinWait2, sockdiag.CloseWait, sockdiag.LastAck, sockdiag.Closing,
	}
}

// askInet asks sock_diag for one family and protocol.
func (l *look) askInet(q sockdiag.Query, some []due) {
	byPort := make(map[uint16][]due, len(some))
	for _, d := range some {
		if byPort[d.port] == nil {
			q.Ports = append(q.Ports, d.port)
		}
		byPort[d.port] = append(byPort[d.port], d)
	}
	if q.Protocol == unix.IPPROTO_TCP {
		// A handshake that is nearly done is about to be queued: who stops a service must know. (With
		// TCP_DEFER_ACCEPT it is not done before the client sends something.)
		q.States = append(connected(), sockdiag.SynReceived)
	}
	candidates := l.candidates(q.Protocol, []uint8{q.Family}, q.Ports)
	youngest := make(map[*watched]time.Duration) // age of the newest payload
	before := make([]Summary, len(some))         // with what the list of the other family had
	for i, d := range some {
		before[i] = *d.Summary
	}
	begin := func() {
		clear(youngest)
		for i, d := range some {
			d.Open, d.Queued, d.Peers = before[i].Open, before[i].Queued, before[i].Peers
		}
	}
	err := l.ctx.Err()
	if err == nil {
		err = l.sockdiag.Inet(q, begin, func(row *sockdiag.Inet) {
			port := row.Local.Port()
			owning := owners(candidates[port], row.Local, row.Device)
			for _, d := range byPort[port] {
				if slices.Contains(owning, d.watched) {
					d.see(q.Protocol, row, youngest)
				}
			}
		})
	}
	if err != nil {
		l.missing[sockdiagWitness] = explain("sock_diag", err)
		for _, d := range some {
			d.fail(l.missing[sockdiagWitness])
		}
		return
	}
	for _, d := range some {
		if age, ok := youngest[d.watched]; ok {
			if last := l.ago(age); last.After(d.LastPayload) {
				d.LastPayload = last
			}
		}
	}
}

// see adds one row of sock_diag to the summary.
func (d due) see(protocol uint8, row *sockdiag.Inet, youngest map[*watched]time.Duration) {
	switch {
	case protocol == unix.IPPROTO_UDP:
		if row.ReceiveQ != 0 {
			d.Queued = 1
		}
	case d.ignores(row.Peer.Addr()):
	case row.Inode != 0:
		d.Open++
		d.Peers ^= mix(row.Cookie)
		if row.Timed {
			age := min(row.SinceReceived, row.SinceSent)
			if known, ok := youngest[d.watched]; !ok || age < known {
				youngest[d.watched] = age
			}
		}
	case row.State == sockdiag.Established, row.State == sockdiag.CloseWait, row.State == sockdiag.SynReceived:
		d.Queued++ // other states without a process were closed by theirs
	}
}

// askUnix asks sock_diag about Unix sockets.
func (l *look) askUnix(some []due) {
	byName := make(map[string][]due, len(some))
	for _, d := range some {
		if err := d.identify(); err != nil {
			d.fail(err.Error())
		}
		byName[d.name] = append(byName[d.name], d)
	}
	begin := func() {
		for _, d := range some {
			d.Open, d.Queued, d.Peers = 0, 0, 0
		}
	}
	err := l.ctx.Err()
	if err == nil {
		err = l.sockdiag.Unix(begin, func(row *sockdiag.Unix) {
			if len(row.Name) == 0 {
				return
			}
			for _, d := range byName[string(row.Name)] {
				switch {
				case row.Inode == d.inode:
					d.Queued = int(row.ReceiveQ)
				case row.State == sockdiag.Established && d.Address.Network != activation.Unixgram:
					d.Open++
					d.Peers ^= mix(row.Cookie)
				}
			}
		})
	}
	if err != nil {
		l.missing[sockdiagWitness] = explain("sock_diag", err)
	}
	for _, d := range some {
		switch {
		case err != nil:
			d.fail(l.missing[sockdiagWitness])
		case d.Address.Network == activation.Unixgram:
			d.fail("the kernel keeps no account of Unix datagrams")
		default:
			d.PayloadUnseen = d.Open > 0
		}
	}
}

// mix spreads the bits of an identity, so that the XOR of several says which they are.
func mix(x uint64) uint64 {
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}
