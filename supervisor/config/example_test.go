package config_test

import (
	"fmt"
	"os"
	"path/filepath"

	"hibergate/supervisor/config"
)

func ExampleLoad() {
	dir, err := os.MkdirTemp("", "")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	file := filepath.Join(dir, "wiki.toml")
	const text = `
[service.wiki]
listen = "tcp://:8080"
command = ["/usr/bin/wiki"]
idle_timeout = "5m"
`
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		panic(err)
	}
	c, err := config.Load(dir)
	if err != nil {
		panic(err)
	}
	for _, s := range c.Services {
		fmt.Println(s.Name, s.Sockets[0].Address, s.Exec.Command, s.Idle.StopAfter)
	}
	// Output: wiki tcp://:8080 [/usr/bin/wiki] 5m0s
}
