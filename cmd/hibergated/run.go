package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"

	"hibergate/activation"
	"hibergate/supervisor"
	"hibergate/supervisor/config"
	"hibergate/supervisor/control"
	"hibergate/supervisor/process"
)

// gcPercent trades CPU of a supervisor that is busy for memory of one that holds thousands of
// sleeping services: the heap is small, and most of it lives as long as we do.
const gcPercent = 50

func runCommand() *cli.Command {
	return &cli.Command{
		Name:  "run",
		Usage: "hold the sockets, wake services and put them to sleep, until SIGTERM or SIGINT; a second one kills what still runs",
		Flags: append([]cli.Flag{configFlag()}, logFlags()...),
		Action: func(c *cli.Context) error {
			if err := noArgs(c); err != nil {
				return err
			}
			logger, err := newLogger(c.App.ErrWriter, c.String(flagLogFormat), c.String(flagLogLevel))
			if err != nil {
				return err
			}
			queue := newLogQueue()
			defer queue.close()
			path, _ := stringFlag(c, flagConfig)
			load := func() (*config.Config, error) { return config.Load(path) }
			return run(c.Context, load, slog.New(asyncHandler{logger.Handler(), queue}))
		},
	}
}

// run is the life of a supervisor. It returns nil after a shutdown that was asked for.
func run(ctx context.Context, load func() (*config.Config, error), logger *slog.Logger) (err error) {
	// From the start, so that a signal during it is not lost. SIGHUP and SIGPIPE (somebody
	// closed our stderr) must not end a process that holds the sockets of others; they are caught rather than ignored
	// because children inherit what is ignored.
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGPIPE)
	defer signal.Stop(signals)
	debug.SetGCPercent(gcPercent)
	threads, err := process.SpareThreads()
	if err != nil {
		logger.Warn("limit on tasks not known", slog.Any("err", err))
	}
	logger.Debug("threads made in advance", slog.Int("threads", threads))

	inherited, err := activation.Inherit()
	if err != nil {
		return fmt.Errorf("take over sockets of systemd: %w", err)
	}
	defer func() { err = errors.Join(err, inherited.Close()) }()
	cfg, err := load()
	if err != nil {
		return err
	}
	// Before any socket is opened: it makes us the only supervisor of this control path, whose
	// sockets, nftables table and cgroup would otherwise be taken from the one that runs.
	var server *control.Server // nil: there is to be none
	if cfg.Control != "" {
		server, err = control.Listen(ctx, control.Options{Path: cfg.Control, Version: version(), Logger: logger})
		if err != nil {
			return err
		}
	}
	var helpers sync.WaitGroup
	defer helpers.Wait()
	// Last: who finds the path free may be sure that everything else is.
	defer func() {
		if server != nil {
			err = errors.Join(err, server.Close(ctx))
		}
	}()

	notify := newNotifier(logger)
	sup, err := supervisor.New(cfg.Services, supervisor.Options{
		Logger:    logger,
		Inherited: inherited,
		Name:      machineName(cfg.Control),
		Global:    cfg.Global,
		State:     cfg.State,
		Changed:   notify.changed,
	})
	if err != nil {
		return err
	}
	for _, unused := range inherited.Unused() {
		logger.Warn("inherited socket not used: no service has its name or address", slog.String("socket", unused))
	}
	asked, shutdown := context.WithCancel(ctx)
	defer shutdown()
	ended, notified := make(chan struct{}), make(chan struct{})
	defer func() {
		select {
		case <-notified:
		case <-time.After(lastWords): // systemd does not read
		}
	}()
	defer close(ended)
	if server != nil {
		helpers.Go(func() {
			if err := server.Serve(sup); err != nil {
				logger.Error("control socket not served", slog.Any("err", err))
			}
		})
	}
	helpers.Go(func() { watchSignals(signals, ended, logger, func() { shutdown(); notify.stopping() }, sup.KillNow) })
	go func() {
		defer close(notified)
		notify.run(ctx, ended, sup.Ping)
	}()

	// What it took to read the configuration and to open the sockets is not needed again.
	debug.FreeOSMemory()
	notify.ready(len(cfg.Services))
	logger.Info("hibergated started", slog.String("version", version()), slog.Int("services", len(cfg.Services)), slog.String("control", cmp.Or(cfg.Control, "off")))
	if err := sup.Run(asked); err != nil {
		return err
	}
	logger.Info("hibergated ended")
	return nil
}

// watchSignals shuts down at the first request to end, and kills at the next. It returns when ended is closed.
func watchSignals(signals <-chan os.Signal, ended <-chan struct{}, logger *slog.Logger, shutdown, kill func()) {
	asked := false
	for {
		select {
		case <-ended:
			return
		case sig := <-signals:
			switch {
			case sig == syscall.SIGPIPE:
			case sig == syscall.SIGHUP:
				logger.Warn("signal ignored: restart to read the configuration again", slog.String("signal", "SIGHUP"))
			case !asked:
				asked = true
				logger.Info("shutting down; the same again kills what still runs", slog.String("signal", sig.String()))
				shutdown()
			default:
				logger.Warn("killing what still runs", slog.String("signal", sig.String()))
				kill()
			}
		}
	}
}

// machineName is what the supervisor with this control path calls its nftables table and its cgroup: the same at
// each of its runs, and another one for every other supervisor. Of those without a control path nobody can tell which are the
// same, so each process has a name of its own.
func machineName(control string) string {
	if control == "" {
		control = "process " + strconv.Itoa(os.Getpid())
	}
	sum := sha256.Sum256([]byte(control))
	return fmt.Sprintf("hibergated-%x", sum[:4])
}
