package main

import (
	"github.com/urfave/cli/v2"

	"hibergate/supervisor/control"
)

func freezeCommand() *cli.Command {
	return requestCommand("freeze", "stop the processes of a service in memory, until the next client or thaw", control.Client.Freeze)
}
