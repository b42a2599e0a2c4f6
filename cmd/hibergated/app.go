package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"github.com/urfave/cli/v2"

	"hibergate/supervisor/config"
)

// Exit statuses.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
)

const defaultConfig = "/etc/hibergated"

// Names of the flags that every command takes, before its name or after it.
const (
	flagConfig  = "config"
	flagControl = "control"
)

// usageError is a command line that cannot be understood.
type usageError struct{ text string }

func (e usageError) Error() string { return e.text }

func usagef(format string, args ...any) error { return usageError{fmt.Sprintf(format, args...)} }

// execute runs one command line, prints its error and returns the exit status.
func execute(args []string, stdout, stderr io.Writer) int {
	app := newApp(stdout, stderr)
	err := app.Run(flagsFirst(app, args))
	var problems config.Problems
	var usage usageError
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &usage):
		fmt.Fprintf(stderr, "hibergated: %v\nTry 'hibergated --help'.\n", err)
		return exitUsage
	case errors.As(err, &problems):
		// One line each, in the form that editors jump to: nothing before the file name.
		fmt.Fprintln(stderr, strings.TrimRight(problems.Error(), "\n"))
		return exitFailed
	default:
		fmt.Fprintln(stderr, "hibergated:", err)
		return exitFailed
	}
}

func newApp(stdout, stderr io.Writer) *cli.App {
	usage := func(_ *cli.Context, err error, _ bool) error { return usagef("%v", err) }
	app := &cli.App{
		Name:            "hibergated",
		HelpName:        "hibergated",
		Usage:           "let network services sleep while nobody uses them",
		Version:         version(),
		HideHelpCommand: true,
		Writer:          stdout,
		ErrWriter:       stderr,
		OnUsageError:    usage,
		ExitErrHandler:  func(*cli.Context, error) {}, // execute prints and decides
		Flags:           []cli.Flag{configFlag(), controlFlag()},
		Commands: []*cli.Command{
			runCommand(), gateCommand(), checkCommand(), statusCommand(), wakeCommand(), sleepCommand(), restartCommand(),
			freezeCommand(), thawCommand(), resetCommand(), learnCommand(), versionCommand(),
		},
		Action: func(c *cli.Context) error {
			if name := c.Args().First(); name != "" {
				return usagef("unknown command %q", name)
			}
			return usagef("no command given")
		},
	}
	for _, cmd := range app.Commands {
		cmd.OnUsageError = usage
		cmd.HideHelpCommand = true
	}
	return app
}

func configFlag() cli.Flag {
	return &cli.StringFlag{
		Name: flagConfig, Aliases: []string{"c"}, Value: defaultConfig,
		Usage: "read the configuration from this `FILE` or directory",
	}
}

func controlFlag() cli.Flag {
	return &cli.StringFlag{
		Name: flagControl, DefaultText: "as the configuration says",
		Usage: "talk to the supervisor at this socket `PATH`",
	}
}

// stringFlag returns a flag that may stand before the command or after it; after it wins.
func stringFlag(c *cli.Context, name string) (value string, given bool) {
	for _, level := range c.Lineage() {
		if level.IsSet(name) {
			return level.String(name), true
		}
	}
	return c.String(name), false
}

// noArgs refuses arguments.
func noArgs(c *cli.Context) error {
	if c.NArg() > 0 {
		return usagef("%s: unexpected argument %q", c.Command.Name, c.Args().First())
	}
	return nil
}

// oneService returns the argument of commands that act on one service.
func oneService(c *cli.Context) (string, error) {
	if c.NArg() != 1 || c.Args().First() == "" {
		return "", usagef("%s: give the name of one service", c.Command.Name)
	}
	return c.Args().First(), nil
}

// interruptible returns a context for the requests of a client, which end when the user has had enough.
func interruptible(c *cli.Context) (context.Context, context.CancelFunc) {
	return signal.NotifyContext(c.Context, syscall.SIGINT, syscall.SIGTERM)
}

// flagsFirst moves the flags of a command before its arguments, because package flag
// stops at the first argument: "status web --json" becomes "status --json web".
func flagsFirst(app *cli.App, args []string) []string {
	if len(args) == 0 {
		return args
	}
	first, rest := splitFlags(app.Flags, args[1:], true)
	if len(rest) == 0 {
		return args
	}
	cmd := app.Command(rest[0])
	if cmd == nil {
		return args
	}
	flags, operands := splitFlags(cmd.Flags, rest[1:], false)
	if lacksValue(cmd.Flags, flags) {
		return args // what would come after the flag is not its value; the command says what is wrong
	}
	out := slices.Concat(args[:1], first, rest[:1], flags)
	if len(operands) > 0 && operands[0] != "--" {
		out = append(out, "--") // the operands may begin with a dash now
	}
	return append(out, operands...)
}

// splitFlags parts args in flags with their values and the others: all of them, or, with
// leading, those from the first argument that is not a flag.
func splitFlags(known []cli.Flag, args []string, leading bool) (flags, others []string) {
	for i := 0; i < len(args); i++ {
		arg := args[i]
		switch {
		case arg == "--":
			return flags, append(others, args[i:]...)
		case len(arg) < 2 || arg[0] != '-':
			if leading {
				return flags, args[i:]
			}
			others = append(others, arg)
		default:
			flags = append(flags, arg)
			if takesValue(known, arg) && i+1 < len(args) {
				i++
				flags = append(flags, args[i])
			}
		}
	}
	return flags, others
}

// lacksValue says whether the last of the flags should be followed by a value.
func lacksValue(known []cli.Flag, flags []string) bool {
	for i := 0; i < len(flags); i++ {
		if takesValue(known, flags[i]) {
			i++ // its value
			if i == len(flags) {
				return true
			}
		}
	}
	return false
}

// takesValue says whether the value of a flag is the argument after it.
func takesValue(known []cli.Flag, arg string) bool {
	name := strings.TrimLeft(arg, "-")
	for _, f := range known {
		if _, boolean := f.(*cli.BoolFlag); !boolean && slices.Contains(f.Names(), name) {
			return true
		}
	}
	return false
}
