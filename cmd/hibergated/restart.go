package main

import (
	"github.com/urfave/cli/v2"

	"hibergate/supervisor/control"
)

func restartCommand() *cli.Command {
	return requestCommand("restart", "stop a service that runs, whoever uses it, start it again and wait until it runs", control.Client.Restart)
}
