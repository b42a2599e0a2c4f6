package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/urfave/cli/v2"

	"hibergate/supervisor/config"
)

const flagPrintConfig = "print-config"

// maxIdleSecs is the longest idle timeout that a configuration may have, ten years.
const maxIdleSecs = 3650 * 24 * 60 * 60

func gateCommand() *cli.Command {
	printConfig := &cli.BoolFlag{Name: flagPrintConfig, Usage: "print the configuration that says the same, and end"}
	return &cli.Command{
		Name:  "gate",
		Usage: "run as hibergate does: one service, configured by its environment variables",
		Description: "The service listens on a TCP port and leads to a destination. Its first client has the launch command run, and is\n" +
			"connected as soon as the readiness command ends with status 0; when nobody has been connected for long enough, the\n" +
			"stop command is run. The commands are lines for /bin/sh, and have the environment, the working directory and the\n" +
			"user of hibergated. All six variables are needed:\n" +
			"\n" + variablesHelp(),
		Flags: append([]cli.Flag{printConfig}, logFlags()...),
		Action: func(c *cli.Context) error {
			if err := noArgs(c); err != nil {
				return err
			}
			if _, given := stringFlag(c, flagConfig); given {
				return usagef("gate: --%s is not for this command, which reads no configuration but its environment", flagConfig)
			}
			logger, err := newLogger(c.App.ErrWriter, c.String(flagLogFormat), c.String(flagLogLevel))
			if err != nil {
				return err
			}
			text, err := gateConfig(c.Context, os.LookupEnv, os.Getwd)
			if err != nil {
				return err
			}
			for _, name := range unknownVariables(os.Environ()) {
				logger.Warn("variable is not known, and ignored", slog.String("variable", name))
			}
			if c.Bool(flagPrintConfig) {
				if _, err := loadGate(text); err != nil {
					return err
				}
				_, err := io.WriteString(c.App.Writer, text)
				return err
			}
			queue := newLogQueue()
			defer queue.close()
			load := func() (*config.Config, error) { return loadGate(text) }
			return run(c.Context, load, slog.New(asyncHandler{logger.Handler(), queue}))
		},
	}
}

// A gateVariable is a variable of hibergate's interface.
type gateVariable struct {
	name, meaning string
	key           string // of the service, whose value it is
}

func gateVariables() []gateVariable {
	return []gateVariable{
		{"HIBERGATE_LISTENPORT", "the port to listen on, on all addresses", "listen"},
		{"HIBERGATE_DESTINATION", "where connections go, HOST:PORT", "gate.destination"},
		{"HIBERGATE_LAUNCHCMD", "launches the destination", "gate.launch"},
		{"HIBERGATE_STOPCMD", "stops it", "gate.stop"},
		{"HIBERGATE_READINESSCMD", "ends with status 0 when it is ready; repeated until then", "gate.ready"},
		{"HIBERGATE_IDLESECS", "how many seconds after its last connection it is stopped", "idle_timeout"},
	}
}

func variablesHelp() string {
	var b strings.Builder
	for _, v := range gateVariables() {
		fmt.Fprintf(&b, "%-24s %s\n", v.name, v.meaning)
	}
	return strings.TrimSuffix(b.String(), "\n")
}

// gateConfig writes the configuration of what the environment asks for. The error is of type config.Problems where a variable
// is wrong.
func gateConfig(ctx context.Context, lookup func(name string) (string, bool), getwd func() (string, error)) (string, error) {
	env := gateEnvironment{ctx: ctx, lookup: lookup}
	port := env.integer("HIBERGATE_LISTENPORT", 1, 65535)
	destination := env.destination("HIBERGATE_DESTINATION")
	launch, stop, ready := env.command("HIBERGATE_LAUNCHCMD"), env.command("HIBERGATE_STOPCMD"), env.command("HIBERGATE_READINESSCMD")
	idle := env.integer("HIBERGATE_IDLESECS", 1, maxIdleSecs)
	if len(env.problems) > 0 {
		return "", env.problems
	}
	dir, err := getwd()
	switch {
	case err != nil:
		return "", fmt.Errorf("find working directory: %w", err)
	case !utf8.ValidString(dir):
		return "", fmt.Errorf("working directory %q: not UTF-8", dir)
	}
	return fmt.Sprintf(gateTemplate, port, tomlString(dir), idle, tomlString(destination), tomlString(launch), tomlString(stop), tomlString(ready)), nil
}

// gateTemplate is a configuration with the values of gateConfig. Silent clients are probed, or one that has vanished would keep
// the destination awake for ever. Starts may take as long as it takes to get a machine.
const gateTemplate = `# What the variables HIBERGATE_* say, as a configuration of hibergated: hibergated run --config FILE
[hibergated]
control = "off"

[service.hibergate]
listen            = [{ address = "tcp://:%d", nodelay = true, keepalive = true, keepalive_time = "15s", keepalive_interval = "15s" }]
handoff           = "gate"
working_directory = %s
pass_environment  = ["*"]
idle_timeout      = "%ds"
start.timeout     = "15m"
stop.timeout      = "15m"

[service.hibergate.gate]
destination = %s
launch      = %s
stop        = %s
ready       = { command = %s, timeout = "1m" }
`

// loadGate reads what gateConfig wrote. What is wrong with a value is told of the variable that has it.
func loadGate(text string) (*config.Config, error) {
	cfg, err := config.Parse("environment", text)
	var problems config.Problems
	if !errors.As(err, &problems) {
		return cfg, err
	}
	for i := range problems {
		p := &problems[i]
		for _, v := range gateVariables() {
			if rest, ok := strings.CutPrefix(p.Key, v.key); ok && (rest == "" || rest[0] == '.' || rest[0] == '[') {
				p.Line, p.Service, p.Key = 0, "", v.name
			}
		}
	}
	return nil, problems
}

// unknownVariables returns those that look like ours and are not, but for those by which Kubernetes tells of a service that is
// called hibergate.
func unknownVariables(environ []string) []string {
	var names []string
	for _, v := range environ {
		name, _, _ := strings.Cut(v, "=")
		rest, ours := strings.CutPrefix(name, "HIBERGATE_")
		known := slices.ContainsFunc(gateVariables(), func(v gateVariable) bool { return v.name == name })
		if ours && !known && rest != "PORT" && !strings.HasPrefix(rest, "PORT_") && !strings.HasPrefix(rest, "SERVICE_") {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// gateEnvironment reads variables. A value that is wrong becomes a problem.
type gateEnvironment struct {
	ctx      context.Context // for the names of ports
	lookup   func(name string) (string, bool)
	problems config.Problems
}

func (e *gateEnvironment) wrong(name, format string, args ...any) {
	e.problems = append(e.problems, config.Problem{File: "environment", Key: name, Text: fmt.Sprintf(format, args...)})
}

// value returns the value of a variable, which may be empty but not missing.
func (e *gateEnvironment) value(name string) (value string, ok bool) {
	value, ok = e.lookup(name)
	switch {
	case !ok:
		e.wrong(name, "is missing")
	case !utf8.ValidString(value):
		e.wrong(name, "is not UTF-8")
		ok = false
	}
	return value, ok
}

// integer reads a number, also one that is written as in a Go program: 0x1F90, 8_080.
func (e *gateEnvironment) integer(name string, low, high int64) int64 {
	text, ok := e.value(name)
	if !ok {
		return 0
	}
	n, err := strconv.ParseInt(text, 0, 64)
	if err != nil || n < low || n > high {
		e.wrong(name, "must be a whole number from %d to %d, got %q", low, high, text)
	}
	return n
}

// command reads a line for the shell. An empty one does nothing, and does it well.
func (e *gateEnvironment) command(name string) string {
	line, ok := e.value(name)
	if ok && line == "" {
		return ":"
	}
	return line
}

// destination reads HOST:PORT as a program connects to it: without a host it is this machine, and the port may be the name
// of a service.
func (e *gateEnvironment) destination(name string) string {
	text, ok := e.value(name)
	if !ok {
		return ""
	}
	host, port, err := net.SplitHostPort(text)
	if err != nil {
		e.wrong(name, "must be HOST:PORT, got %q", text)
		return ""
	}
	n, err := net.DefaultResolver.LookupPort(e.ctx, "tcp", port)
	if err != nil || n == 0 {
		e.wrong(name, "the port of %q is neither a number from 1 to 65535 nor the name of a service", text)
		return ""
	}
	switch ip, err := netip.ParseAddr(host); {
	case host == "":
		host = "localhost"
	case err != nil || !ip.Unmap().IsUnspecified():
	case ip.Is6() && !ip.Is4In6():
		host = "::1"
	default:
		host = "127.0.0.1"
	}
	return "tcp://" + net.JoinHostPort(host, strconv.Itoa(n))
}
