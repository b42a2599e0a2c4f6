package config

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"hibergate/activation"
	"hibergate/supervisor"
	"hibergate/supervisor/activity"
)

// minIdle is the shortest idle timeout that is honoured.
const minIdle = 50 * time.Millisecond

// maxName is how many bytes the name of a service has at most.
const maxName = 64

// isLetter and isDigit know ASCII only: names end up in file names and variables.
func isLetter(c byte) bool { return 'a' <= c|0x20 && c|0x20 <= 'z' }
func isDigit(c byte) bool  { return '0' <= c && c <= '9' }

// validName says whether a service may be called s.
func validName(s string) bool {
	for i := range len(s) {
		if c := s[i]; !isLetter(c) && !isDigit(c) && (i == 0 || c != '.' && c != '_' && c != '-') {
			return false
		}
	}
	return s != "" && len(s) <= maxName
}

// validVariable says whether an environment variable may be called s, as POSIX has it.
func validVariable(s string) bool {
	for i := range len(s) {
		if c := s[i]; !isLetter(c) && c != '_' && (i == 0 || !isDigit(c)) {
			return false
		}
	}
	return s != ""
}

// services reads the services of a file in the order of its text.
func (d *decoder) services(raw any) {
	all, ok := raw.(map[string]any)
	if !ok {
		d.wrongType("a table for each service, [service.NAME]", raw)
		return
	}
	if d.book.ports == nil {
		d.book = newAddressBook(len(all))
	}
	for _, k := range d.keys {
		if len(k) < 2 || k[0] != "service" || all[k[1]] == nil {
			continue
		}
		d.path = append(d.path, k[1])
		if _, isTable := all[k[1]].(map[string]any); !isTable && d.schema.service.byName[k[1]] != nil {
			d.wrongAt(d.path, d.path[:1], "%q is a key of a service; the table of a service is [service.NAME]", k[1])
		} else {
			d.oneService(k[1], all[k[1]])
		}
		d.path = d.path[:len(d.path)-1]
		delete(all, k[1]) // its next key is no next service
	}
}

// oneService reads a service and checks the rules about more than one of its keys.
func (d *decoder) oneService(name string, raw any) {
	since := len(d.findings)
	if !validName(name) {
		d.wrong("a name has letters, digits and . _ -, begins with a letter or digit and has at most 64 bytes")
	}
	first, again := d.named[name]
	if again {
		d.wrong("is already defined")
		d.other(first, "service", name)
	}
	s := &supervisor.Service{
		Name:    strings.Clone(name),
		Start:   supervisor.Start{Timeout: supervisor.DefaultStartTimeout},
		Stop:    supervisor.DefaultStop(),
		Restart: supervisor.DefaultRestart(),
		Limits:  supervisor.Limits{SourcePrefix: supervisor.DefaultSourcePrefix},
	}
	// What listen may say depends on it, and the keys of a table are read in any order.
	switch m, _ := raw.(map[string]any); m["handoff"] {
	case "adopt":
		s.Handoff = supervisor.Adopt
	case "gate":
		s.Handoff = supervisor.Gate
	}
	d.service, d.elements, d.meant, d.access = s, d.elements[:0], d.meant[:0], activation.Access{}
	d.gate = defaultGate()
	// The service is read even so: its own problems are to be told too.
	if !again {
		d.named[s.Name] = d.source
	}
	keys, ok := d.table(&d.schema.service, raw)
	if !ok {
		return
	}
	hint := ""
	if d.adopts() {
		hint = `; "auto" stands for whatever the program binds`
	}
	d.missing(keys, "listen", hint)
	if !d.gates() {
		d.missing(keys, "command", "")
	}
	if keys["accounting"] == nil && !d.gates() {
		d.unaccounted = append(d.unaccounted, s)
	}
	d.checkHandoff(since)
	d.checkAdopt(since, keys)
	d.checkGate(since, keys)
	d.checkReady(since, keys)
	d.checkIdle(since, keys)
	d.checkWake(since, keys)
	d.checkLifecycle(since, keys)
	d.checkLimits(since, keys)
	d.checkAccess(since)
	d.settle()
	if !again { // a copy of a service conflicts with all that the service has
		d.checkConflicts(keys)
	}
	d.config.Services = append(d.config.Services, s)
}

// checkHandoff checks accept and handoff against the sockets. A socket whose address is
// wrong has no network and is left out: its problem is told already.
func (d *decoder) checkHandoff(since int) {
	s := d.service
	if s.Accept && !d.adopts() && !d.gates() { // which go with no socket at all
		var without []string
		for i := range d.elements {
			if e := &d.elements[i]; e.spec.Address.Network != 0 && !e.spec.Address.Network.Connections() {
				without = append(without, e.String())
			}
		}
		if len(without) > 0 {
			d.wrongKey("accept", "needs %s, not %s", forTCP|forUnix|forUnixpacket, strings.Join(without, ", "))
		}
	}
	// With a bad value in accept the rules below would speak of an accept = false
	// that nobody wrote.
	if d.failed(since, "accept", "handoff") {
		return
	}
	if n := len(d.elements); s.Handoff == supervisor.Stdio && !s.Accept && n > 1 {
		d.wrongKey("handoff", `"stdio" hands over one socket, and there are %d; write accept = true or use "listen-fds"`, n)
	}
	if d.adopts() {
		d.checkBindable()
	}
	if s.Exec.UCSPIEnv && !s.Accept && !d.gates() {
		d.wrongKey("ucspi_env", "needs accept = true")
	}
}

// checkBindable checks that the program can get its sockets by binding them.
func (d *decoder) checkBindable() {
	if d.service.Accept {
		d.wrongKey("handoff", `"adopt" needs accept = false: with accept = true a process gets a connection, and binds nothing`)
	}
	var fifos []string
	for i := range d.elements {
		if e := &d.elements[i]; e.spec.Address.Network == activation.FIFO {
			fifos = append(fifos, e.String())
		}
	}
	if len(fifos) > 0 {
		d.wrongKey("handoff", `"adopt" is for what programs bind, not for %s`, strings.Join(fifos, ", "))
	}
}

// checkIdle checks the idle timeout against the rest.
func (d *decoder) checkIdle(since int, keys map[string]any) {
	key := "idle.stop_after"
	idle, _ := keys["idle"].(map[string]any)
	if keys["idle_timeout"] != nil {
		key = "idle_timeout"
		if idle["stop_after"] != nil {
			d.wrongKey(key, "is short for idle.stop_after, which is given too")
		}
	} else if idle["stop_after"] == nil {
		return
	}
	if d.service.Accept && !d.failed(since, "accept") {
		d.wrongKey(key, "makes no sense with accept = true: each process serves one connection and ends with it")
	}
	// Unix datagrams leave no trace but their queue, which the service empties.
	for i := range d.elements {
		if a := d.elements[i].spec.Address; a.Network == activation.Unixgram {
			d.wrongKey(key, "cannot be used with %s: the kernel keeps no account of Unix datagrams, so that nobody can tell when it is idle", a)
		}
	}
}

// checkConflicts looks for sockets that cannot be opened beside those of the services
// before: for each socket the first one, which is enough to find the mistake.
func (d *decoder) checkConflicts(keys map[string]any) {
	_, single := keys["listen"].(string)
	next := 0
	for i := range d.elements {
		e := entry{service: d.service, source: d.source, listed: !single, index: i}
		if s := &d.elements[i]; s.learn {
			e.pattern = s.pattern.String()
			d.occupy(e, s.occupied()...)
			continue
		}
		d.occupy(e, &d.service.Sockets[next])
		next++
	}
}

// occupy gives the specs to an element of listen, and notes the first of them that somebody has.
func (d *decoder) occupy(element entry, specs ...*activation.Spec) {
	told := false
	for _, spec := range specs {
		if spec.Address.Network == 0 {
			continue
		}
		e := element
		e.spec = spec
		if o := d.book.conflict(spec); o != nil && !told {
			told = true
			how := "is already used by"
			if o.String() != e.String() {
				how = "overlaps with " + o.String() + " of"
			}
			d.wrongAt(e.path(), e.path(), "%s %s service %q", &e, how, o.service.Name)
			d.other(o.source, o.path()...)
		}
		d.book.add(&e)
	}
}

// handoff reads how the process gets its sockets.
func (d *decoder) handoff(raw any) {
	var word string
	if d.choice(raw, &word, "listen-fds", "stdio", "adopt", "gate") {
		d.service.Handoff = map[string]supervisor.Handoff{
			"listen-fds": supervisor.ListenFDs, "stdio": supervisor.Stdio, "adopt": supervisor.Adopt, "gate": supervisor.Gate,
		}[word]
	}
}

// command reads the program and its arguments. A command line in one string is the
// mistake that everybody makes once: the problem shows the array to write.
func (d *decoder) command(raw any, to *[]string) {
	if line, ok := raw.(string); ok {
		d.wrong("must be an array of strings: %s", array(strings.Fields(line)))
		return
	}
	first := true
	d.texts(raw, to, func(d *decoder, raw any, to *string) bool {
		if first {
			first = false
			return d.absolute(raw, to)
		}
		if raw == "" {
			return true // an argument may be empty
		}
		return d.text(raw, to)
	})
}

// array writes strings as a TOML array.
func array(words []string) string {
	quoted := make([]string, len(words))
	for i, w := range words {
		quoted[i] = fmt.Sprintf("%q", w)
	}
	return "[" + strings.Join(quoted, ", ") + "]"
}

// workingDirectory reads an absolute path or "~", which is resolved at each start.
func (d *decoder) workingDirectory(raw any) {
	if raw == "~" {
		d.service.Exec.WorkingDirectory = "~"
		return
	}
	d.absolute(raw, &d.service.Exec.WorkingDirectory)
}

// environmentFile reads a path that may have a "-" in front, as systemd's EnvironmentFile=.
func (d *decoder) environmentFile(raw any, to *string) bool {
	var s string
	if !d.str(raw, &s) {
		return false
	}
	if !strings.HasPrefix(strings.TrimPrefix(s, "-"), "/") {
		return d.wrong("must be an absolute path, got %q", s)
	}
	*to = s
	return d.keep(to)
}

// passEnvironment reads names of variables of hibergated's own.
func (d *decoder) passEnvironment(raw any) {
	pass := &d.service.Exec.PassEnvironment
	ok := d.texts(raw, pass, func(d *decoder, raw any, to *string) bool {
		return d.text(raw, to) && (*to == "*" || d.variable(*to))
	})
	if ok && slices.Contains(*pass, "*") && len(*pass) > 1 {
		d.wrong(`"*" stands for all variables, and must be the only element`)
	}
}

// environment reads NAME = "value" pairs, sorted by name, or an array of "NAME=value".
func (d *decoder) environment(raw any) {
	env := &d.service.Exec.Environment
	table, isTable := raw.(map[string]any)
	if _, isArray := raw.([]any); !isTable && !isArray {
		d.wrongType(`a table of strings or an array of "NAME=value"`, raw)
		return
	}
	if !isTable {
		seen := map[string]bool{}
		d.texts(raw, env, func(d *decoder, raw any, to *string) bool {
			if !d.text(raw, to) {
				return false
			}
			name, _, found := strings.Cut(*to, "=")
			switch {
			case !found:
				return d.wrong(`must be "NAME=value", got %q`, *to)
			case seen[name]:
				return d.wrong("%s is given twice", name)
			}
			seen[name] = true
			return d.variable(name)
		})
		return
	}
	for _, name := range slices.Sorted(maps.Keys(table)) {
		d.path = append(d.path, name)
		var value string
		if d.variable(name) && (table[name] == "" || d.str(table[name], &value)) {
			pair := name + "=" + value
			d.keep(&pair)
			*env = append(*env, pair)
		}
		d.path = d.path[:len(d.path)-1]
	}
}

// variable checks the name of an environment variable. Those of sd_listen_fds(3) and
// sd_notify(3) would make the service take descriptors for sockets that are none.
func (d *decoder) variable(name string) bool {
	switch {
	case !validVariable(name):
		return d.wrong("%q is not a name of an environment variable", name)
	case strings.HasPrefix(name, "LISTEN_") || name == "NOTIFY_SOCKET":
		return d.wrong("%s is for hibergated to set", name)
	}
	return true
}

// idleWhen reads what counts as idle.
func (d *decoder) idleWhen(raw any) {
	var word string
	if d.choice(raw, &word, "no-connections", "no-traffic") && word == "no-traffic" {
		d.service.Idle.When = activity.NoTraffic
	}
}

// stopAfter reads the idle timeout, from either of the two keys it has.
func (d *decoder) stopAfter(raw any) { d.duration(raw, minIdle, &d.service.Idle.StopAfter) }
