// Command storm runs services under a real hibergated through stop cycles, with clients that
// arrive at the worst moments, and says what became of every client. See docs/stopping.md.
package main

import (
	"os"

	"hibergate/testdata/storm/storm"
)

func main() {
	os.Exit(storm.Main(os.Args, os.Stdout, os.Stderr)) //nolint:forbidigo // this is main
}
