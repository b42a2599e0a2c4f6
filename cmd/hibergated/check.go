package main

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strconv"
	"strings"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"hibergate/activation"
	"hibergate/supervisor"
	"hibergate/supervisor/config"
	"hibergate/supervisor/gate"
	"hibergate/supervisor/gate/forward"
	"hibergate/supervisor/gate/lookup"
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
			return errors.Join(printServices(c.App.Writer, cfg.Services), checkMachine(cfg.Services))
		},
	}
}

// checkMachine says of which services this machine, as it is now, cannot do what the configuration asks for.
func checkMachine(services []*supervisor.Service) error {
	var failed []error
	for _, s := range services {
		if s.Gate == nil || s.Gate.Forward != gate.Kernel {
			continue
		}
		if err := checkKernel(s); err != nil {
			failed = append(failed, fmt.Errorf(`service %q: forward = "kernel": %w`, s.Name, err))
		}
	}
	return errors.Join(failed...)
}

// checkKernel says why the kernel of this machine cannot lead to the destination of a gate; nil: it can, for who is permitted to
// have it do so.
func checkKernel(s *supervisor.Service) error {
	d := &s.Gate.Destinations[0]
	ip, err := netip.ParseAddr(d.Host)
	if err != nil {
		return err
	}
	to := netip.AddrPortFrom(ip, d.Port)
	address := activation.Address{Network: d.Network, IP: ip, Port: d.Port}
	for i := range s.Sockets {
		if lookup.Local(to) && lookup.Possible(s.Sockets[i], address) == nil {
			continue
		}
		if err := forward.Check(s.Sockets[i], address); err != nil {
			return err
		}
		if err := forward.CheckMachine(to); err != nil && !errors.Is(err, unix.EPERM) {
			return err
		}
	}
	return nil
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
	fmt.Fprintf(&b, " -> %s %s", s.Handoff, target(s))
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

// target says what the traffic of a service goes to.
func target(s *supervisor.Service) string {
	if s.Gate == nil {
		return commandLine(s.Exec.Command)
	}
	where := make([]string, len(s.Gate.Destinations))
	for i, t := range s.Gate.Destinations {
		where[i] = t.String()
	}
	return strings.Join(where, ", ")
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
