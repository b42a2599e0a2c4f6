package storm

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// options are the flags. Immutable once the storm began.
type options struct {
	hibergated string
	services   int
	kinds      []*kind
	missing    []string // kinds that cannot run here, with the reason
	ipv6       bool
	netns      bool

	cycles    int
	duration  time.Duration // 0: cycles count
	stopAfter time.Duration
	byHand    float64
	parallel  int
	patience  time.Duration
	seed      uint64

	parking string
	set     []string // lines for every service

	nofile int
	memory int // MB
	cpu    bool
	pids   int

	configOnly, json, keep, verbose bool
}

// kind is a kind of service: how its program ends.
type kind struct {
	name    string
	needs   string // a program that runs it; empty: this one
	args    []string
	accept  bool // one process for each connection
	meaning string
}

func kinds() []*kind {
	return []*kind{
		{"default", "python3", []string{"service.py", "default"}, false, "dies of SIGTERM by default action"},
		{"graceful", "", []string{"graceful"}, false, "goes on accepting for a moment after SIGTERM, and finishes what it accepted (Go)"},
		{"node", "node", []string{"service.js"}, false, "exits in its event loop, where it learns of SIGTERM"},
		{"python", "python3", []string{"service.py", "loop"}, false, "the same with asyncio"},
		{"workers", "", []string{"workers"}, false, "a master and two workers that share the socket; graceful"},
		{"handler", "python3", []string{"service.py", "handler"}, false, "exits at once from its signal handler"},
		{"stdio", "", []string{"stdio"}, true, "accept = true, one process per connection on its stdin and stdout"},
	}
}

func parse(args []string, stderr io.Writer) (*options, error) {
	o := &options{}
	f := flag.NewFlagSet("storm", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.Usage = func() {
		fmt.Fprintln(stderr, "usage: storm [FLAGS]")
		f.PrintDefaults()
		fmt.Fprintln(stderr, "kinds:")
		for _, k := range kinds() {
			fmt.Fprintf(stderr, "  %-9s %s\n", k.name, k.meaning)
		}
	}
	f.StringVar(&o.hibergated, "hibergated", "", "the hibergated to test; empty: built from ./cmd/hibergated")
	f.IntVar(&o.services, "services", 10, "how many services, of each kind in turn")
	list := f.String("kinds", "all", "kinds of services, with commas between; all: those whose programs are installed")
	f.BoolVar(&o.ipv6, "ipv6", true, "every second service of a kind listens on ::1")
	f.BoolVar(&o.netns, "netns", os.Geteuid() == 0, "run in a network namespace of its own")
	f.IntVar(&o.cycles, "cycles", 1000, "starts of processes, of all services together")
	f.DurationVar(&o.duration, "duration", 0, "how long, instead of -cycles")
	f.DurationVar(&o.stopAfter, "stop-after", 80*time.Millisecond, "idle.stop_after of the services")
	f.Float64Var(&o.byHand, "by-hand", 0.1, "fraction of the rounds in which hibergated is told to stop the service")
	f.IntVar(&o.parallel, "parallel", 4, "how many clients at most come to a service at once")
	f.DurationVar(&o.patience, "patience", 30*time.Second, "how long a client waits for its answer")
	f.Uint64Var(&o.seed, "seed", uint64(time.Now().UnixNano()), "of what is random in the behaviour of the clients")
	f.StringVar(&o.parking, "parking", "on", "on, or off: new connections are not parked while a service stops")
	f.Func("set", "a line of TOML for every service; may be repeated", func(line string) error {
		o.set = append(o.set, line)
		return nil
	})
	f.IntVar(&o.nofile, "nofile", 0, "limit of open files of hibergated, and so of its services")
	f.IntVar(&o.memory, "memory-pressure", 0, "megabytes that another process writes to over and over")
	f.BoolVar(&o.cpu, "cpu-pressure", false, "another process keeps all processors busy")
	f.IntVar(&o.pids, "pids", 0, "limit of tasks of hibergated and its services, on and off during the storm; needs a writable pids cgroup")
	f.BoolVar(&o.configOnly, "config-only", false, "print the configuration and do nothing")
	f.BoolVar(&o.json, "json", false, "report as JSON")
	f.BoolVar(&o.keep, "keep", false, "keep the configuration, the log of hibergated and those of the services")
	f.BoolVar(&o.verbose, "v", false, "list every unanswered client, also those that the program dropped")
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	if f.NArg() > 0 {
		return nil, fmt.Errorf("unknown argument %q", f.Arg(0))
	}
	if o.parking != "on" && o.parking != "off" {
		return nil, fmt.Errorf("-parking is on or off, not %q", o.parking)
	}
	if o.services < 1 || o.parallel < 1 || o.patience <= 0 || o.cycles < 1 || o.stopAfter <= 0 {
		return nil, fmt.Errorf("-services, -parallel, -patience, -cycles and -stop-after are above 0")
	}
	return o, o.choose(*list)
}

// choose sets which kinds there are.
func (o *options) choose(list string) error {
	all := kinds()
	if list != "all" {
		for name := range strings.SplitSeq(list, ",") {
			i := slices.IndexFunc(all, func(k *kind) bool { return k.name == name })
			if i < 0 {
				return fmt.Errorf("unknown kind %q", name)
			}
			o.kinds = append(o.kinds, all[i])
		}
		all = o.kinds
	}
	o.kinds = nil
	for _, k := range all {
		if k.needs == "" || interpreter(k.needs) != "" {
			o.kinds = append(o.kinds, k)
			continue
		}
		if list != "all" {
			return fmt.Errorf("%s is not installed", k.needs)
		}
		o.missing = append(o.missing, k.name+": "+k.needs+" is not installed")
	}
	return nil
}

// interpreter returns the path of a program, empty where there is none. Wrappers, which
// may come first in $PATH, cost each start a shell.
func interpreter(name string) string {
	if path := "/usr/bin/" + name; isFile(path) {
		return path
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return ""
	}
	return path
}

func isFile(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular()
}

// target is one service of the storm.
type target struct {
	kind    *kind
	name    string
	listen  string
	journal string // the path of its log
	address string // where it listens; known once hibergated runs
}

// plan makes the services, whose files are in dir.
func (o *options) plan(ctx context.Context, dir string) []*target {
	six := o.ipv6 && hasIPv6(ctx)
	var list []*target
	for i := range o.services {
		k, nth := o.kinds[i%len(o.kinds)], i/len(o.kinds)
		t := &target{kind: k, name: fmt.Sprintf("%s-%d", k.name, nth+1), listen: "tcp://127.0.0.1:0"}
		if six && nth%2 == 1 {
			t.listen = "tcp://[::1]:0"
		}
		t.journal = filepath.Join(dir, t.name+".log")
		list = append(list, t)
	}
	return list
}

// config is the configuration of hibergated.
func (o *options) config(targets []*target, dir string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "[hibergated]\ncontrol = %q\n", filepath.Join(dir, "control.sock"))
	if o.parking == "off" {
		b.WriteString("parking = \"off\"\n")
	}
	for _, t := range targets {
		fmt.Fprintf(&b, "\n[service.%s]\nlisten       = [%q]\ncommand      = [", t.name, t.listen)
		for _, arg := range t.command(dir) {
			fmt.Fprintf(&b, "%q, ", arg)
		}
		// Built for the race detector, a program would sleep for a second before its exit.
		fmt.Fprintf(&b, "%q]\nenvironment  = { %s = %q, GORACE = \"atexit_sleep_ms=0\" }\n", t.journal, token, dir)
		if t.kind.accept {
			b.WriteString("accept       = true\nhandoff      = \"stdio\"\n")
		} else {
			fmt.Fprintf(&b, "idle_timeout = %q\n", o.stopAfter)
		}
		for _, line := range o.set {
			b.WriteString(line + "\n")
		}
	}
	return b.String()
}

// command is the program of a service and its arguments, less the last, its journal.
func (t *target) command(dir string) []string {
	switch {
	case t.kind.needs == "python3": // nothing of the user's, no site packages: faster
		return []string{interpreter("python3"), "-I", "-S", filepath.Join(dir, t.kind.args[0]), t.kind.args[1]}
	case t.kind.needs != "":
		return []string{interpreter(t.kind.needs), filepath.Join(dir, t.kind.args[0])}
	}
	me, err := self()
	if err != nil {
		me = os.Args[0] // hibergated will say what is wrong with it
	}
	return append([]string{me, "service"}, t.kind.args...)
}
