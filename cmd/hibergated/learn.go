package main

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/urfave/cli/v2"

	"hibergate/supervisor"
	"hibergate/supervisor/control"
)

func learnCommand() *cli.Command {
	const usage = `print where the program of a service listens, as a configuration that says so; with handoff = "adopt" only`
	return serviceCommand("learn", usage, func(ctx context.Context, client control.Client, service string, stdout io.Writer) error {
		list, err := client.Learn(ctx, service)
		if err != nil {
			return err
		}
		return printLearned(stdout, service, list)
	})
}

// printLearned prints sockets as the configuration takes them.
func printLearned(w io.Writer, service string, list []supervisor.LearnedSocket) error {
	var out strings.Builder
	name := service
	if strings.Contains(name, ".") {
		name = strconv.Quote(name)
	}
	fmt.Fprintf(&out, "[service.%s]\nlisten = [\n", name)
	for i := range list {
		fmt.Fprintf(&out, "\t%s,\n", element(&list[i]))
	}
	out.WriteString("]\n")
	_, err := io.WriteString(w, out.String())
	return err
}

// element is one socket in TOML: its address, or a table where that is not all.
func element(l *supervisor.LearnedSocket) string {
	pairs := []string{"address = " + tomlString(l.Address)}
	for _, p := range []struct{ key, value string }{
		{"family", l.Family}, {"device", l.Device},
	} {
		if p.value != "" {
			pairs = append(pairs, p.key+" = "+tomlString(p.value))
		}
	}
	if l.FreeBind {
		pairs = append(pairs, "free_bind = true")
	}
	if l.Transparent {
		pairs = append(pairs, "transparent = true")
	}
	if len(pairs) == 1 {
		return tomlString(l.Address)
	}
	return "{ " + strings.Join(pairs, ", ") + " }"
}
