package main

import (
	"context"
	"errors"
	"io"
	"io/fs"

	"github.com/urfave/cli/v2"

	"hibergate/supervisor"
	"hibergate/supervisor/config"
	"hibergate/supervisor/control"
)

// newClient finds the control socket: the one that is given, else the configured one, else the
// default. A configuration that is not there or may not be read is none; one that
// is given must be right.
func newClient(c *cli.Context) (control.Client, error) {
	if path, given := stringFlag(c, flagControl); given {
		return control.Client{Path: path}, nil
	}
	path, given := stringFlag(c, flagConfig)
	cfg, err := config.Load(path)
	switch {
	case err == nil && cfg.Control == "":
		return control.Client{}, errNoControl
	case err == nil:
		return control.Client{Path: cfg.Control}, nil
	case given:
		return control.Client{}, err
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, fs.ErrPermission):
		return control.Client{Path: config.DefaultControl()}, nil
	default:
		return control.Client{}, err
	}
}

var errNoControl = errors.New(`the configuration turns the control socket off: control = "off" in [hibergated]`)

// requestCommand makes a command that asks for something to be done with one service.
func requestCommand(name, usage string, request func(control.Client, context.Context, string) (supervisor.Status, error)) *cli.Command {
	return serviceCommand(name, usage, func(ctx context.Context, client control.Client, service string, _ io.Writer) error {
		_, err := request(client, ctx, service)
		return err
	})
}

// serviceCommand makes a command that asks a running hibergated about one service.
func serviceCommand(name, usage string, ask func(ctx context.Context, client control.Client, service string, stdout io.Writer) error) *cli.Command {
	return &cli.Command{
		Name:      name,
		Usage:     usage,
		ArgsUsage: "SERVICE",
		Flags:     []cli.Flag{configFlag(), controlFlag()},
		Action: func(c *cli.Context) error {
			service, err := oneService(c)
			if err != nil {
				return err
			}
			client, err := newClient(c)
			if err != nil {
				return err
			}
			ctx, stop := interruptible(c)
			defer stop()
			return ask(ctx, client, service, c.App.Writer)
		},
	}
}
