//go:build !linux || (!amd64 && !arm64)

package nofile

// How a process is started is written for the two architectures of
// vfork_amd64.s and vfork_arm64.s. Elsewhere this line stops the build and says so.
const sysPrlimit64 = hibergated_runs_on_linux_amd64_and_linux_arm64_only
