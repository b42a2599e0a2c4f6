package main

import (
	"github.com/urfave/cli/v2"

	"hibergate/supervisor/control"
)

func wakeCommand() *cli.Command {
	return requestCommand("wake", "start a service now and wait until it runs", control.Client.Wake)
}
