package main

import (
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/urfave/cli/v2"

	"hibergate/supervisor"
	"hibergate/supervisor/config"
)

func checkCommand() *cli.Command {
	return &cli.Command{
		Name:  "check",
		Usage: "validate the configuration and print every problem, or one line per service",
		Flags: []cli.Flag{configFlag()},
		Action: func(c *cli.Context) error {
			if err := noArgs(c); err != nil {
				return err
			}
			path, _ := stringFlag(c, flagConfig)
			cfg, err := config.Load(path)
			if err != nil {
				return err
			}
			return printServices(c.App.Writer, cfg.Services)
		},
	}
}

func printServices(w io.Writer, services []*supervisor.Service) error {
	for _, s := range services {
		if _, err := fmt.Fprintln(w, describe(s)); err != nil {
			return err
		}
	}
	return nil
}

// describe says in one line what a service is.
func describe(s *supervisor.Service) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s:", s.Name)
	var where []string
	for i := range s.Sockets {
		where = append(where, s.Sockets[i].Address.String())
	}
	for _, l := range s.Learn {
		where = append(where, l.Pattern.String())
	}
	fmt.Fprintf(&b, " %s", strings.Join(where, ", "))
	fmt.Fprintf(&b, " -> %s %s", s.Handoff, commandLine(s.Exec.Command))
	if s.Accept {
		b.WriteString(", one process per connection")
	}
	switch {
	case s.Idle.StopAfter > 0:
		fmt.Fprintf(&b, ", sleeps after %s", s.Idle.StopAfter)
	case !s.Accept: // a process that serves one connection ends with it
		b.WriteString(", never put to sleep")
	}
	return b.String()
}

// commandLine prints a command on one line. What would be ambiguous is quoted.
func commandLine(args []string) string {
	words := make([]string, len(args))
	for i, arg := range args {
		words[i] = arg
		if quoted := strconv.Quote(arg); arg == "" || strings.Contains(arg, " ") || quoted != `"`+arg+`"` {
			words[i] = quoted
		}
	}
	return strings.Join(words, " ")
}
