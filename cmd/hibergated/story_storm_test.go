package main

import (
	"bytes"
	"os"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
)

// A short storm (see docs/stopping.md) over all kinds of services that can run here: no client is lost or refused, and
// nothing leaks. HIBERGATED_CYCLES says how many cycles; it takes as long as the machine needs for them.
func TestStorm(t *testing.T) {
	nettest.Need(t, nettest.Namespaces, nettest.Tool("nft"), nettest.Tool("python3"))
	cycles := "150"
	if n := os.Getenv("HIBERGATED_CYCLES"); n != "" {
		cycles = n
	}
	var out, progress bytes.Buffer
	cmd := exec.CommandContext(t.Context(), programPath("storm"), "-hibergated", programPath("hibergated"),
		"-netns=false", "-services", "8", "-by-hand", "0.2", "-cycles", cycles)
	cmd.Stdout, cmd.Stderr = &out, &progress
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) }
	cmd.WaitDelay = patience
	err := cmd.Run()
	t.Logf("%s%s", &progress, &out)
	if err != nil {
		t.Error("storm:", err)
	}
}
