package main

import (
	"github.com/urfave/cli/v2"

	"hibergate/supervisor/control"
)

func resetCommand() *cli.Command {
	return requestCommand("reset", "forget the failures of a service, and let clients wake it at once", control.Client.Reset)
}
