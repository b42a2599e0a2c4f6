package main

import "github.com/urfave/cli/v2"

func sleepCommand() *cli.Command {
	return &cli.Command{
		Name:      "sleep",
		Usage:     "stop a service now, whoever uses it, and wait until it sleeps",
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
			_, err = client.Sleep(ctx, name)
			return err
		},
	}
}
