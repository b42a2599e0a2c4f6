package main

import (
	"github.com/urfave/cli/v2"

	"hibergate/supervisor/control"
)

func sleepCommand() *cli.Command {
	return requestCommand("sleep", "stop a service now, whoever uses it, and wait until it sleeps", control.Client.Sleep)
}
