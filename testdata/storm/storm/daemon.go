package storm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/supervisor"
	"hibergate/supervisor/control"
)

// token is the variable in the environment of every process of a service, by which it is known. Its value is
// the directory of the storm.
const token = "STORM_DIR"

// startLimit bounds the start of hibergated, and its end beside what the services take.
const startLimit = 20 * time.Second

// daemon is the hibergated under test.
type daemon struct {
	cmd     *exec.Cmd
	dir     string
	log     string // its path
	control control.Client
	ended   chan struct{} // closed once it has ended; err is set before
	err     error
	group   *pidsGroup // that it is in; may be nil
}

// startDaemon starts hibergated with the services, and sets their addresses.
func startDaemon(ctx context.Context, o *options, targets []*target, dir string) (*daemon, error) {
	config := filepath.Join(dir, "storm.toml")
	if err := os.WriteFile(config, []byte(o.config(targets, dir)), 0o600); err != nil {
		return nil, err
	}
	d := &daemon{
		dir: dir, log: filepath.Join(dir, "hibergated.log"), ended: make(chan struct{}),
		control: control.Client{Path: filepath.Join(dir, "control.sock")},
	}
	log, err := os.Create(d.log)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	args := []string{"run", "--config", config, "--log-format", "json"}
	// Not of ctx: it is told to end once the storm is over, however that ends.
	lasting := context.WithoutCancel(ctx)
	if o.nofile > 0 {
		d.cmd = again(lasting, append([]string{"limit", strconv.Itoa(o.nofile), o.hibergated}, args...)...)
	} else {
		d.cmd = exec.CommandContext(lasting, o.hibergated, args...)
	}
	d.cmd.Stdout, d.cmd.Stderr = log, log
	// A group of its own: an interrupt from the terminal is for the storm.
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	if err := d.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		d.err = d.cmd.Wait()
		close(d.ended)
	}()
	if err := d.addresses(ctx, targets); err != nil {
		return nil, errors.Join(err, d.stop())
	}
	return d, nil
}

func (d *daemon) pid() int { return d.cmd.Process.Pid }

// addresses waits until hibergated answers, and notes where the services listen.
func (d *daemon) addresses(ctx context.Context, targets []*target) error {
	var list []supervisor.Status
	var err error
	ok := until(ctx, startLimit, func() bool {
		list, err = d.status(ctx)
		return err == nil || d.gone()
	})
	if !ok || d.gone() {
		log, _ := os.ReadFile(d.log)
		return fmt.Errorf("start hibergated: %w\n%s", err, log)
	}
	for _, t := range targets {
		i := slices.IndexFunc(list, func(st supervisor.Status) bool { return st.Name == t.name })
		if i < 0 || len(list[i].Sockets) != 1 {
			return fmt.Errorf("hibergated has no service %s", t.name)
		}
		t.address = strings.TrimPrefix(list[i].Sockets[0].Address, "tcp://")
	}
	return nil
}

func (d *daemon) gone() bool {
	select {
	case <-d.ended:
		return true
	default:
		return false
	}
}

func (d *daemon) status(ctx context.Context) ([]supervisor.Status, error) {
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	return d.control.Status(ctx, "", false)
}

// asleep waits until no service has a process.
func (d *daemon) asleep(ctx context.Context, limit time.Duration) ([]supervisor.Status, error) {
	var list []supervisor.Status
	var err error
	ok := until(ctx, limit, func() bool {
		list, err = d.status(ctx)
		return d.gone() || err == nil && !slices.ContainsFunc(list, awake)
	})
	switch {
	case d.gone():
		return nil, fmt.Errorf("hibergated has ended: %w", d.err)
	case ok, ctx.Err() != nil:
		return list, ctx.Err()
	case err != nil:
		return nil, err
	}
	for _, st := range list {
		if awake(st) {
			err = errors.Join(err, fmt.Errorf("%s does not sleep: %s (%s), processes %v, %s%s", st.Name, st.State, st.Reason, st.PIDs, st.Error, st.Idle.Busy))
		}
	}
	return list, err
}

func awake(st supervisor.Status) bool {
	return st.State != supervisor.Listening.String() || len(st.PIDs) > 0
}

// stop ends hibergated, by force after a while.
func (d *daemon) stop() error {
	if d.gone() {
		return fmt.Errorf("hibergated has ended by itself: %w", d.err)
	}
	if err := d.cmd.Process.Signal(unix.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	timer := time.NewTimer(startLimit)
	defer timer.Stop()
	select {
	case <-d.ended:
		if d.err != nil {
			return fmt.Errorf("hibergated: %w", d.err)
		}
		return nil
	case <-timer.C:
		err := d.cmd.Process.Kill()
		<-d.ended
		return errors.Join(fmt.Errorf("hibergated did not end within %v", startLimit), err)
	}
}

// holdings is what hibergated has at one moment.
type holdings struct {
	FDs       int   `json:"fds"`
	RSS       int   `json:"rss_kb"`
	Processes []int `json:"processes,omitempty"` // its children, and whatever runs for a service
}

func (d *daemon) holdings() holdings {
	fds, _ := os.ReadDir(d.proc("fd"))
	h := holdings{FDs: len(fds), Processes: d.processes()}
	status, _ := os.ReadFile(d.proc("status"))
	for line := range strings.Lines(string(status)) {
		if _, err := fmt.Sscanf(line, "VmRSS: %d kB", &h.RSS); err == nil {
			break
		}
	}
	return h
}

func (d *daemon) proc(name string) string { return filepath.Join("/proc", strconv.Itoa(d.pid()), name) }

// processes lists the children of hibergated, zombies included, and all that were
// started for a service, whoever is their parent by now.
func (d *daemon) processes() []int {
	var list []int
	tasks, _ := filepath.Glob(d.proc("task/*/children"))
	for _, path := range tasks {
		b, _ := os.ReadFile(path)
		for word := range strings.FieldsSeq(string(b)) {
			if pid, err := strconv.Atoi(word); err == nil {
				list = append(list, pid)
			}
		}
	}
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err == nil && d.ours(pid) && !slices.Contains(list, pid) {
			list = append(list, pid)
		}
	}
	slices.Sort(list)
	return list
}

// ours says whether a process was started for a service of this storm.
func (d *daemon) ours(pid int) bool {
	environ, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "environ"))
	return err == nil && bytes.Contains(append([]byte{0}, environ...), []byte("\x00"+token+"="+d.dir+"\x00"))
}

// killLeft ends the processes of services that outlived hibergated, and returns them.
func (d *daemon) killLeft(ctx context.Context) []int {
	until(ctx, 2*time.Second, func() bool { return len(d.processes()) == 0 })
	left := d.processes()
	for _, pid := range left {
		unix.Kill(pid, unix.SIGKILL) //nolint:errcheck // it may be gone by now
	}
	return left
}

// complaints counts what hibergated logged above INFO, by message, and returns what the services
// printed on the standard error that they share with it.
func (d *daemon) complaints() (count map[string]int, printed []string, err error) {
	b, err := os.ReadFile(d.log)
	if err != nil {
		return nil, nil, err
	}
	count = map[string]int{}
	for line := range strings.Lines(string(b)) {
		var entry struct {
			Level, Msg, Reason, Err string
		}
		switch {
		case json.Unmarshal([]byte(line), &entry) != nil:
			printed = append(printed, strings.TrimSpace(line))
		case entry.Level != "INFO" && entry.Level != "DEBUG":
			text := entry.Level + " " + entry.Msg
			if entry.Reason != "" {
				text += ": " + entry.Reason
			}
			if _, cause, ok := cutLast(entry.Err, ": "); ok {
				text += ": " + cause
			}
			count[text]++
		}
	}
	return count, printed, nil
}

func cutLast(s, sep string) (before, after string, found bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return "", s, s != ""
	}
	return s[:i], s[i+len(sep):], true
}
