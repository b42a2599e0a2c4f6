package main

import (
	"time"

	"github.com/urfave/cli/v2"
)

const flagJSON = "json"

func statusCommand() *cli.Command {
	return &cli.Command{
		Name:      "status",
		Usage:     "show what the services do, or everything about one of them",
		ArgsUsage: "[SERVICE]",
		Flags: []cli.Flag{
			configFlag(), controlFlag(),
			&cli.BoolFlag{Name: flagJSON, Usage: "print the JSON array of the control socket"},
		},
		Action: func(c *cli.Context) error {
			if c.NArg() > 1 {
				return usagef("status: give the name of one service, or none")
			}
			client, err := newClient(c)
			if err != nil {
				return err
			}
			ctx, stop := interruptible(c)
			defer stop()
			name := c.Args().First()
			if c.Bool(flagJSON) {
				body, err := client.StatusJSON(ctx, name, name != "")
				if err != nil {
					return err
				}
				_, err = c.App.Writer.Write(body)
				return err
			}
			list, err := client.Status(ctx, name, name != "")
			switch {
			case err != nil:
				return err
			case name != "" && len(list) == 1:
				return printService(c.App.Writer, time.Now(), list[0])
			default:
				return printTable(c.App.Writer, time.Now(), list)
			}
		},
	}
}
