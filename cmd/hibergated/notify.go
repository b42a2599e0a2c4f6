package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"hibergate/supervisor"
)

// notifier tells systemd how we are (sd_notify(3)), where systemd wants to know. Only
// run sends, as a receiver that reads no more makes the sender wait.
type notifier struct {
	logger   *slog.Logger
	send     func(state string)
	say      chan string            // what ready and stopping want to be sent; room for both
	changed  chan supervisor.Counts // nil: nobody wants to know
	watchdog time.Duration          // within which systemd wants a sign of life; 0: it does not
}

func newNotifier(logger *slog.Logger) *notifier {
	n := &notifier{logger: logger, send: func(string) {}, say: make(chan string, 2)}
	if os.Getenv("NOTIFY_SOCKET") == "" {
		return n
	}
	n.changed = make(chan supervisor.Counts, 1)
	n.send = func(state string) {
		if _, err := daemon.SdNotify(false, state); err != nil {
			logger.Warn("systemd not notified", slog.String("state", state), slog.Any("err", err))
		}
	}
	var err error
	if n.watchdog, err = daemon.SdWatchdogEnabled(false); err != nil {
		logger.Warn("watchdog not served", slog.Any("err", err))
	}
	return n
}

func (n *notifier) ready(services int) {
	n.say <- daemon.SdNotifyReady + "\nSTATUS=" + statusLine(supervisor.Counts{Total: services})
}

// stopping is to be called once at the most, as ready is.
func (n *notifier) stopping() { n.say <- daemon.SdNotifyStopping }

// run passes on how many services are awake, and as long as ping says that
// the supervisor's loop goes round, that we are alive. It returns when ended is closed.
//
// The watchdog is the only thing in this program that happens by the clock, and
// only where systemd asked for it.
func (n *notifier) run(ctx context.Context, ended <-chan struct{}, ping func(context.Context) error) {
	var alive <-chan time.Time
	if n.watchdog > 0 {
		ticker := time.NewTicker(n.watchdog / 2)
		defer ticker.Stop()
		alive = ticker.C
	}
	for {
		select {
		case <-ended:
			for {
				select {
				case state := <-n.say:
					n.send(state)
				default:
					return
				}
			}
		case state := <-n.say:
			n.send(state)
		case c := <-n.changed:
			n.send("STATUS=" + statusLine(c))
		case <-alive:
			timely, cancel := context.WithTimeout(ctx, n.watchdog/2)
			if err := ping(timely); err != nil {
				n.logger.Error("no sign of life for the watchdog", slog.Any("err", err))
			} else {
				n.send(daemon.SdNotifyWatchdog)
			}
			cancel()
		}
	}
}

func statusLine(c supervisor.Counts) string {
	s := fmt.Sprintf("%d of %d services awake", c.Awake, c.Total)
	if c.Total == 1 {
		s = fmt.Sprintf("%d of 1 service awake", c.Awake)
	}
	if c.Failing > 0 {
		s += fmt.Sprintf(", %d failing", c.Failing)
	}
	return s
}
