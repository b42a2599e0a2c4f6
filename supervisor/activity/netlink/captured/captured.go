// Package captured reads the netlink messages that were recorded from a real kernel
// into testdata/netlink. It is for the tests of the packages beside it.
package captured

import (
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"
)

// TB is what is needed of a testing.TB.
type TB interface {
	Helper()
	Fatal(args ...any)
}

// Messages returns the messages of one file, without their netlink headers. The test runs
// in the directory of a witness, supervisor/activity/*.
func Messages(tb TB, name string) [][]byte {
	tb.Helper()
	text, err := os.ReadFile(filepath.Join("..", "..", "..", "testdata", "netlink", name))
	if err != nil {
		tb.Fatal(err)
	}
	var messages [][]byte
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		message, err := hex.DecodeString(line)
		if err != nil {
			tb.Fatal(name, err)
		}
		messages = append(messages, message)
	}
	return messages
}
