package config

import (
	"fmt"
	"strings"
)

// A key is one key of a table: how it is read, and what the reference says of it.
type key struct {
	name    string
	kind    string // its type in words
	def     string // its default in words; empty: none
	meaning string // one line
	fits    kinds  // which sockets it is for; only in tables of listen, 0: every socket

	set func(d *decoder, raw any) // stores the value, or notes what is wrong with it
}

// A table is a kind of table that the configuration has.
type table struct {
	title string // as the reference calls it
	keys  []key

	byName map[string]*key
}

// A schema is every table that the configuration has. It drives decoding, suggestions
// and the reference.
type schema struct {
	root, hibergated, service, listen                       table
	idle, wake, start, ready, stop, restart, limits, access table
	adopt, gate, gateReady                                  table
}

func newSchema() *schema {
	s := &schema{
		root:       table{title: "the top level", keys: rootKeys()},
		hibergated: table{title: "[hibergated]", keys: hibergatedKeys()},
		service:    table{title: "[service.NAME]", keys: serviceKeys()},
		listen:     table{title: "a table in listen", keys: listenKeys()},
		idle:       table{title: "[service.NAME.idle]", keys: idleKeys()},
		wake:       table{title: "[service.NAME.wake]", keys: wakeKeys()},
		start:      table{title: "[service.NAME.start]", keys: startKeys()},
		ready:      table{title: "[service.NAME.ready]", keys: readyKeys()},
		stop:       table{title: "[service.NAME.stop]", keys: stopKeys()},
		restart:    table{title: "[service.NAME.restart]", keys: restartKeys()},
		limits:     table{title: "[service.NAME.limits]", keys: limitsKeys()},
		access:     table{title: "[service.NAME.access]", keys: accessKeys()},
		adopt:      table{title: "[service.NAME.adopt]", keys: adoptKeys()},
		gate:       table{title: "[service.NAME.gate]", keys: gateKeys()},
		gateReady:  table{title: "[service.NAME.gate.ready]", keys: gateReadyKeys()},
	}
	for _, t := range s.tables() {
		t.byName = make(map[string]*key, len(t.keys))
		for i := range t.keys {
			t.byName[t.keys[i].name] = &t.keys[i]
		}
	}
	return s
}

func (s *schema) tables() []*table {
	return []*table{
		&s.root, &s.hibergated, &s.service, &s.listen,
		&s.idle, &s.wake, &s.start, &s.ready, &s.stop, &s.restart, &s.limits, &s.access, &s.adopt, &s.gate, &s.gateReady,
	}
}

// The keys are functions and no variables: what a setter writes to is found through the
// decoder, so that a schema has no state and a Load shares nothing with another.

func rootKeys() []key {
	return []key{
		{"hibergated", "table", "", "settings of hibergated itself; once in all files", 0, (*decoder).hibergated},
		{"service", "table of tables", "", "the services, by their names", 0, (*decoder).services},
	}
}

func hibergatedKeys() []key {
	return []key{
		{
			"control", `absolute path or "off"`, "`/run/hibergated/control.sock`; for an ordinary user `$XDG_RUNTIME_DIR/hibergated/control.sock`",
			"the socket on which `hibergated status` and the other commands reach it; off: they cannot", 0,
			(*decoder).control,
		},
		{
			"state", "absolute path", "`/var/lib/hibergated`; for an ordinary user `$XDG_STATE_HOME/hibergated`, or `~/.local/state/hibergated`",
			"the directory where hibergated keeps which sockets it has learned of", 0,
			func(d *decoder, raw any) { d.absolute(raw, &d.config.State) },
		},
		{
			"accounting", `"auto", "conntrack" or "sock-diag"`, `"auto"`, "`accounting` of the services that do not set it", 0,
			func(d *decoder, raw any) { d.accounting(raw, &d.defaultAccounting) },
		},
		{
			"max_processes", "integer", "no limit", "how many processes that hibergated started may run at a time, of all services together; more starts wait; 0: no limit", 0,
			func(d *decoder, raw any) { d.integer(raw, 0, maxProcesses, &d.config.Global.MaxProcesses) },
		},
		{
			"max_load", "number", "no limit", "nothing is started while the load average of the last minute is above it", 0,
			(*decoder).maxLoad,
		},
		{
			"parking", `"auto" or "off"`, `"auto"`,
			"whether new TCP connections are parked in a second socket while a service stops; needs `net.ipv4.tcp_migrate_req = 1`, which hibergated sets where it may", 0,
			(*decoder).parking,
		},
	}
}

func serviceKeys() []key {
	return []key{
		{
			"listen", "address, or array of addresses and tables", "required", "the sockets, in the order in which the process gets them; with `handoff = \"adopt\"` also `\"auto\"`, which stands for whatever the program binds", 0,
			(*decoder).listen,
		},
		{
			"accept", "boolean", "false", "true: one process for each connection; false: one process for all sockets", 0,
			func(d *decoder, raw any) { d.boolean(raw, &d.service.Accept) },
		},
		{
			"handoff", `"listen-fds", "stdio", "adopt" or "gate"`, `"listen-fds"`, "how the process gets its sockets: from descriptor 3 on with `LISTEN_FDS`, as standard input and output, or where it binds them itself; gate: what hibergated does not start itself gets what comes to them", 0,
			(*decoder).handoff,
		},
		{
			"command", "array of strings", "required", "the program, as an absolute path, and its arguments; no shell; with `handoff = \"gate\"` there is none", 0,
			func(d *decoder, raw any) { d.command(raw, &d.service.Exec.Command) },
		},
		{
			"argv0", "string", "the path of the program", "the name under which the program sees itself", 0,
			func(d *decoder, raw any) { d.text(raw, &d.service.Exec.Argv0) },
		},
		{
			"user", "string", "the user of hibergated", "name or number; looked up at each start", 0,
			func(d *decoder, raw any) { d.account(raw, &d.service.Exec.User) },
		},
		{
			"group", "string", "the group of `user`", "name or number", 0,
			func(d *decoder, raw any) { d.account(raw, &d.service.Exec.Group) },
		},
		{
			"supplementary_groups", "array of strings", "none", "groups beside those that `user` is in", 0,
			func(d *decoder, raw any) { d.texts(raw, &d.service.Exec.SupplementaryGroups, (*decoder).account) },
		},
		{
			"working_directory", "absolute path or `~`", "`/`", "where the process starts; `~` is the home of `user`", 0,
			(*decoder).workingDirectory,
		},
		{
			"environment", `table of strings, or array of "NAME=value"`, "none", "variables beside those that hibergated sets", 0,
			(*decoder).environment,
		},
		{
			"pass_environment", "array of strings", "none", "names of variables that the process gets from the environment of hibergated, unless another key sets them; `*`: all", 0,
			(*decoder).passEnvironment,
		},
		{
			"environment_files", "array of absolute paths", "none", "files with `NAME=value` lines, read at each start, later ones win; a leading `-` allows a file to be missing", 0,
			func(d *decoder, raw any) { d.texts(raw, &d.service.Exec.EnvironmentFiles, (*decoder).environmentFile) },
		},
		{
			"ucspi_env", "boolean", "false", "sets `PROTO`, `TCPREMOTEIP` and the other UCSPI variables; needs `accept = true`", 0,
			func(d *decoder, raw any) { d.boolean(raw, &d.service.Exec.UCSPIEnv) },
		},
		{
			"accounting", `"auto", "conntrack" or "sock-diag"`, "that of `[hibergated]`", "which accounts of the kernel are read to know when the service is idle; a gate has its own", 0,
			func(d *decoder, raw any) { d.accounting(raw, &d.service.Accounting) },
		},
		{
			"idle_timeout", "duration", "never", "short for `idle.stop_after`", 0,
			(*decoder).stopAfter,
		},
		{
			"idle", "table", "", "when the service is put to sleep", 0,
			func(d *decoder, raw any) { d.table(&d.schema.idle, raw) },
		},
		{
			"wake", "table", "", "which clients wake it", 0,
			func(d *decoder, raw any) { d.table(&d.schema.wake, raw) },
		},
		{
			"start", "table", "", "what a start may take", 0,
			func(d *decoder, raw any) { d.table(&d.schema.start, raw) },
		},
		{
			"ready", "table", "", "when a start is over", 0,
			func(d *decoder, raw any) { d.table(&d.schema.ready, raw) },
		},
		{
			"stop", "table", "", "how its processes are ended", 0,
			func(d *decoder, raw any) { d.table(&d.schema.stop, raw) },
		},
		{
			"restart", "table", "", "what follows when it fails", 0,
			func(d *decoder, raw any) { d.table(&d.schema.restart, raw) },
		},
		{
			"limits", "table", "", "what clients can make it cost", 0,
			func(d *decoder, raw any) { d.table(&d.schema.limits, raw) },
		},
		{
			"access", "table", "", "which clients may connect", 0,
			func(d *decoder, raw any) { d.table(&d.schema.access, raw) },
		},
		{
			"adopt", "table", "", "what the program may do with `handoff = \"adopt\"`", 0,
			func(d *decoder, raw any) { d.table(&d.schema.adopt, raw) },
		},
		{
			"gate", "table", "", "where a service with `handoff = \"gate\"` leads, and how that is launched and stopped", 0,
			func(d *decoder, raw any) { d.table(&d.schema.gate, raw) },
		},
	}
}

func idleKeys() []key {
	return []key{
		{
			"when", `"no-connections" or "no-traffic"`, `"no-connections"`, "idle since the last connection closed, or since the last byte of payload", 0,
			(*decoder).idleWhen,
		},
		{
			"stop_after", "duration", "never", "how long a service is idle before it is stopped; at least 50ms", 0,
			(*decoder).stopAfter,
		},
	}
}

// names returns the names of the keys, in the order of the reference.
func (t *table) names() []string {
	names := make([]string, len(t.keys))
	for i, k := range t.keys {
		names[i] = k.name
	}
	return names
}

// nearest returns the word that was probably meant; empty where none is near: more
// than a third of the letters would have to change.
func nearest(word string, words []string) string {
	best, near := max(1, len(word)/3)+1, "" // one letter of a short word may be wrong too
	if len(word) > 64 {                     // no key is that long, and the cost grows with it
		return ""
	}
	for _, w := range words {
		if n := distance(word, w); n < best {
			best, near = n, w
		}
	}
	return near
}

// distance is the least number of bytes to insert, delete, replace or swap with their
// neighbour: Damerau's and Levenshtein's, each byte touched once.
func distance(a, b string) int {
	rows := [3][]int{make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)}
	for j := range rows[0] {
		rows[0][j] = j
	}
	for i := 1; i <= len(a); i++ {
		before, above, row := rows[(i+1)%3], rows[(i+2)%3], rows[i%3]
		row[0] = i
		for j := 1; j <= len(b); j++ {
			same := above[j-1]
			if a[i-1] != b[j-1] {
				same++
			}
			row[j] = min(same, row[j-1]+1, above[j]+1)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				row[j] = min(row[j], before[j-2]+1)
			}
		}
	}
	return rows[len(a)%3][len(b)]
}

// Reference describes every key as Markdown, a table for each table of the configuration,
// so that the documentation cannot say something else than the decoder does.
func Reference() string {
	var b strings.Builder
	cell := func(s string) string { return strings.ReplaceAll(s, "|", `\|`) }
	for i, t := range newSchema().tables()[1:] {
		if i > 0 {
			b.WriteByte('\n')
		}
		fmt.Fprintf(&b, "### %s\n\n| key | type | default | meaning |\n| --- | --- | --- | --- |\n", cell(strings.ToUpper(t.title[:1])+t.title[1:]))
		for _, k := range t.keys {
			meaning := k.meaning
			if k.fits != 0 {
				meaning += "; for " + k.fits.String()
			}
			fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", k.name, cell(k.kind), cell(k.def), cell(meaning))
		}
	}
	b.WriteString("\nA duration is a string with units: `\"50ms\"`, `\"5s\"`, `\"1m30s\"`, `\"2d\"`. A size is a number of bytes or\n" +
		"a string with a unit of base 1024: `\"64K\"`, `\"1M\"`, `\"1G\"`. An octal string is `\"0660\"`.\n" +
		"A rate is a number and a duration: `\"100/1s\"`, `\"5/10m\"`; `\"100/s\"` is short for `\"100/1s\"`. A prefix is an\n" +
		"IP address, or one with the number of its leading bits that count: `\"192.0.2.7\"`, `\"192.0.2.0/24\"`, `\"2001:db8::/32\"`.\n")
	return b.String()
}
