package main

import "github.com/urfave/cli/v2"

func wakeCommand() *cli.Command {
	return &cli.Command{
		Name:      "wake",
		Usage:     "start a service now and wait until it runs",
		ArgsUsage: "SERVICE",
		Flags:     []cli.Flag{configFlag(), controlFlag()},
		Action: func(c *cli.Context) error {
			name, err := oneService(c)
			if err != nil {
				return err
			}
			client, err := newClient(c)
			if err != nil {
				return err
			}
			ctx, stop := interruptible(c)
			defer stop()
			_, err = client.Wake(ctx, name)
			return err
		},
	}
}
