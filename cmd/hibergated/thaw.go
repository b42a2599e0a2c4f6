package main

import (
	"github.com/urfave/cli/v2"

	"hibergate/supervisor/control"
)

func thawCommand() *cli.Command {
	return requestCommand("thaw", "let a frozen service run on", control.Client.Thaw)
}
