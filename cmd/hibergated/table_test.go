package main

import (
	"bytes"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"hibergate/activation"
	"hibergate/supervisor"
	"hibergate/supervisor/activity"
	"hibergate/supervisor/process"
)

// lines makes text of many lines easy to read in a test: what follows the first newline, without the tabs
// that indent all of it.
func lines(text string) string {
	return strings.ReplaceAll(strings.TrimPrefix(text, "\n"), "\n\t\t", "\n")
}

// Two services that sleep or fail and one that runs, at noon.
func example() (now time.Time, list []supervisor.Status) {
	now = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)
	before := func(d time.Duration) *time.Time { t := now.Add(-d); return &t }
	return now, []supervisor.Status{
		{
			Name: "web", State: "running", Reason: "launched", Since: *before(192 * time.Second), Handoff: "listen-fds", PIDs: []int{4711}, Starts: 1,
			Idle: supervisor.IdleStatus{When: "no-connections", StopAfter: "5m0s", StopsAt: before(-288 * time.Second)},
			Sockets: []supervisor.SocketStatus{
				{
					Name: "http", Address: "tcp://:8080", Known: true, Open: 1, Queued: 2, LastActivity: before(12 * time.Second),
					In: activity.Counters{Packets: 12, Bytes: 1300}, Out: activity.Counters{Packets: 1, Bytes: 5 << 20},
					Flows: []activity.Flow{{
						Protocol: "tcp", Peer: netip.MustParseAddrPort("192.0.2.7:50000"), Original: netip.MustParseAddrPort("198.51.100.1:80"),
						Local: netip.MustParseAddrPort("10.0.0.1:8080"), State: "established", Counted: true,
						In: activity.Counters{Packets: 10, Bytes: 900}, Out: activity.Counters{Packets: 1, Bytes: 2048}, PID: 4711, Process: "web",
					}, {
						Protocol: "tcp", Peer: netip.MustParseAddrPort("[2001:db8::1]:50001"), Original: netip.MustParseAddrPort("[2001:db8::2]:8080"),
						Local: netip.MustParseAddrPort("[2001:db8::2]:8080"), State: "established",
					}},
				},
				{Name: "admin", Address: "unix:///run/web.sock", Known: true, Open: 2, LastActivity: before(time.Hour), FlowsWhy: "not permitted"},
			},
		},
		{
			Name: "dns", State: "backoff", Reason: "failed", Since: *before(250 * time.Millisecond), Handoff: "listen-fds", Starts: 2, Failures: 2, Error: "exit status 3",
			Idle: supervisor.IdleStatus{When: "no-connections", StopAfter: "1m0s"},
			Sockets: []supervisor.SocketStatus{
				{Name: "dns", Address: "udp://:53", Why: "conntrack: operation not permitted"},
				{Name: "dns", Address: "tcp://:53", Why: "conntrack: operation not permitted"},
			},
		},
		{
			Name: "git", State: "listening", Reason: "supervisor started", Since: *before(50 * time.Hour), Handoff: "stdio", Accept: true,
			Idle:    supervisor.IdleStatus{When: "no-connections"},
			Sockets: []supervisor.SocketStatus{{Name: "git", Address: "tcp://:9418", Known: true}},
		},
		{
			Name: "app", State: "failed", Reason: "failed", Since: *before(50 * time.Second), Handoff: "listen-fds", Starts: 1, Failures: 1, Error: "failed: exit status 3",
			RetryAt: before(-250 * time.Second), Tracking: "process tree: no cgroup v2", Parking: "off: net.ipv4.tcp_migrate_req = 0",
			Refused: supervisor.Refused{
				Access: 1, MaxConnections: 2, PerSource: 3, SourceRate: 4, Failed: 5, Datagrams: 1, Ignored: 7, Pauses: 8,
			},
			Idle:    supervisor.IdleStatus{When: "no-connections"},
			Sockets: []supervisor.SocketStatus{{Name: "app", Address: "udp://:9", Known: true, Dropped: 9}},
		},
		{
			Name: "chat", State: "frozen", Reason: "requested", Since: *before(2 * time.Second), Handoff: "listen-fds", PIDs: []int{9}, Starts: 1,
			Tracking: "cgroup", Parking: "on",
			Idle:    supervisor.IdleStatus{When: "no-connections", StopAfter: "1m0s", Busy: "1 open connection"},
			Sockets: []supervisor.SocketStatus{{Name: "chat", Address: "tcp://:5222", Known: true, Open: 1}},
		},
	}
}

func TestPrintTable(t *testing.T) {
	t.Parallel()
	now, list := example()
	want := lines(`
		NAME  STATE      SINCE  PIDS  OPEN  IN    OUT   LAST-ACTIVITY  SLEEPS
		web   running    3m12s  4711  3     1.3K  5.0M  12s ago        in 4m48s
		dns   backoff    250ms  -     ?     0     0     -              -
		  error: exit status 3
		  traffic not known: conntrack: operation not permitted
		git   listening  2d2h   -     0     0     0     -              -
		app   failed     50s    -     0     0     0     -              -
		  error: failed: exit status 3
		chat  frozen     2s     9     1     0     0     -              -
		`)
	var got bytes.Buffer
	if err := printTable(&got, now, list); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(strings.TrimPrefix(want, "\t\t"), got.String()); diff != "" {
		t.Error(diff)
	}
}

func TestPrintService(t *testing.T) {
	t.Parallel()
	now, list := example()
	want := []string{lines(`
		service          web
		state            running for 3m12s: launched
		handoff          listen-fds
		processes        4711
		started          once, 0 failures
		idle             sleeps after 5m0s of no-connections; in 4m48s

		socket           tcp://:8080 (http)
		  open           1, and 2 waiting
		  in             1.3K bytes in 12 packets
		  out            5.0M bytes in 1 packet
		  last activity  12s ago
		  PROTO  PEER                 ASKED-FOR        STATE        IN   OUT   PROCESS
		  tcp    192.0.2.7:50000      198.51.100.1:80  established  900  2.0K  4711 web
		  tcp    [2001:db8::1]:50001  -                established  ?    ?     -

		socket           unix:///run/web.sock (admin)
		  open           2
		  in             0 bytes in 0 packets
		  out            0 bytes in 0 packets
		  last activity  1h0m ago
		  flows          not permitted
		`), "", lines(`
		service          git
		state            listening for 2d2h: supervisor started
		handoff          stdio, one process per connection
		processes        -
		started          0 times, 0 failures
		idle             each process ends with its connection

		socket           tcp://:9418 (git)
		  open           0
		  accepted       0
		  in             0 bytes in 0 packets
		  out            0 bytes in 0 packets
		  last activity  -
		`), lines(`
		service          app
		state            failed for 50s: failed
		error            failed: exit status 3
		tried again      in 4m10s, or by hibergated reset
		handoff          listen-fds
		processes        -
		started          once, 1 failure
		idle             never put to sleep
		refused          1 by access, 2 over max_connections, 3 over max_connections_per_source, 4 over accept_rate_per_source, 5 while failed
		dropped          1 datagram that no process took
		ignored          7 clients that left without waking it
		paused           8 times for want of resources
		tracking         process tree: no cgroup v2
		parking          off: net.ipv4.tcp_migrate_req = 0

		socket           udp://:9 (app)
		  open           0
		  dropped        9 packets: no access, or the queue was full
		  in             0 bytes in 0 packets
		  out            0 bytes in 0 packets
		  last activity  -
		`), lines(`
		service          chat
		state            frozen for 2s: requested
		handoff          listen-fds
		processes        9
		started          once, 0 failures
		idle             sleeps after 1m0s of no-connections

		socket           tcp://:5222 (chat)
		  open           1
		  in             0 bytes in 0 packets
		  out            0 bytes in 0 packets
		  last activity  -
		`)}
	for i, want := range want {
		if want == "" {
			continue
		}
		var got bytes.Buffer
		if err := printService(&got, now, list[i]); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(strings.TrimPrefix(want, "\t\t"), got.String()); diff != "" {
			t.Error(diff)
		}
	}
}

func TestRetry(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)
	at := now.Add(2500 * time.Millisecond)
	for want, st := range map[string]supervisor.Status{
		"":                                {State: "running"},
		"in 2.5s":                         {State: "backoff", RetryAt: &at},
		"in 2.5s, or by hibergated reset": {State: "failed", RetryAt: &at},
		"by hibergated reset only":        {State: "failed"},
	} {
		if got := retry(now, &st); got != want {
			t.Errorf("%+v: got %q, want %q", st, got, want)
		}
	}
}

func TestSpan(t *testing.T) {
	t.Parallel()
	for want, d := range map[string]time.Duration{
		"0s":    -time.Second,
		"120ms": 120*time.Millisecond + 5,
		"4.2s":  4250 * time.Millisecond,
		"59s":   59*time.Second + 999*time.Millisecond,
		"3m12s": 192 * time.Second,
		"5h40m": 5*time.Hour + 40*time.Minute + 59*time.Second,
		"12d3h": 291*time.Hour + time.Minute,
	} {
		if got := span(d); got != want {
			t.Errorf("%v: got %s, want %s", d, got, want)
		}
	}
}

func TestSize(t *testing.T) {
	t.Parallel()
	for want, n := range map[string]uint64{
		"0": 0, "1023": 1023, "1.0K": 1024, "9.9K": 10137, "10K": 10240, "999K": 1023487, "1.0M": 1023488, "1.5G": 3 << 29, "16E": 1<<64 - 1,
	} {
		if got := size(n); got != want {
			t.Errorf("%d: got %s, want %s", n, got, want)
		}
	}
}

func TestPIDs(t *testing.T) {
	t.Parallel()
	for want, list := range map[string][]int{"-": nil, "1": {1}, "1,2,3": {1, 2, 3}, "1,2,3+2": {1, 2, 3, 4, 5}} {
		if got := pids(list); got != want {
			t.Errorf("%v: got %s, want %s", list, got, want)
		}
	}
}

func TestSleeps(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)
	past := now.Add(-time.Second)
	for want, st := range map[string]supervisor.Status{
		"never":        {State: "running"},
		"now":          {State: "running", Idle: supervisor.IdleStatus{StopAfter: "1s", StopsAt: &past}},
		"busy: 2 open": {State: "running", Idle: supervisor.IdleStatus{StopAfter: "1s", StopsAt: &past, Busy: "2 open"}},
		"-":            {State: "listening", Idle: supervisor.IdleStatus{StopAfter: "1s"}},
	} {
		if got := sleeps(now, &st); got != want {
			t.Errorf("%+v: got %s, want %s", st, got, want)
		}
	}
}

func TestDescribe(t *testing.T) {
	t.Parallel()
	tcp := activation.Spec{Address: activation.Address{Network: activation.TCP, Port: 8080}}
	unix := activation.Spec{Address: activation.Address{Network: activation.Unix, Path: "/run/x.sock"}}
	run := process.Exec{Command: []string{"/usr/bin/web", "--port", "8080"}}
	for want, s := range map[string]supervisor.Service{
		`odd: unix:///run/x.sock -> listen-fds /bin/sh -c "echo\n\"hi\"" "" é, never put to sleep`: {
			Name: "odd", Sockets: []activation.Spec{unix}, Exec: process.Exec{Command: []string{"/bin/sh", "-c", "echo\n\"hi\"", "", "é"}},
		},
		"web: tcp://:8080 -> listen-fds /usr/bin/web --port 8080, sleeps after 5m0s": {
			Name: "web", Sockets: []activation.Spec{tcp}, Exec: run, Idle: supervisor.Idle{StopAfter: 5 * time.Minute},
		},
		"two: tcp://:8080, unix:///run/x.sock -> listen-fds /usr/bin/web --port 8080, never put to sleep": {
			Name: "two", Sockets: []activation.Spec{tcp, unix}, Exec: run,
		},
		"git: tcp://:8080 -> stdio /usr/bin/web --port 8080, one process per connection": {
			Name: "git", Sockets: []activation.Spec{tcp}, Exec: run, Handoff: supervisor.Stdio, Accept: true,
		},
	} {
		if got := describe(&s); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}
