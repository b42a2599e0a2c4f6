package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"

	"golang.org/x/sys/unix"

	"hibergate/supervisor"
)

// Client asks the supervisor whose control socket is at Path. Each call is one connection; there is nothing
// to close. It is safe for concurrent use. An error that the supervisor
// replied is a [*ReplyError].
type Client struct {
	Path string
}

// ReplyError is an error in the words of the supervisor.
type ReplyError struct {
	Code int // HTTP status
	Text string
}

func (e *ReplyError) Error() string { return e.Text }

// Status returns what one service does, or all of them where name is empty.
func (c Client) Status(ctx context.Context, name string, flows bool) ([]supervisor.Status, error) {
	body, err := c.StatusJSON(ctx, name, flows)
	if err != nil {
		return nil, err
	}
	var list []supervisor.Status
	if err := json.Unmarshal(body, &list); err != nil {
		return nil, fmt.Errorf("read status: %w", err)
	}
	return list, nil
}

// StatusJSON is Status as the supervisor put it: a JSON array and a newline.
func (c Client) StatusJSON(ctx context.Context, name string, flows bool) ([]byte, error) {
	query := url.Values{}
	if name != "" {
		query.Set(paramService, name)
	}
	if flows {
		query.Set(paramFlows, "1")
	}
	return c.do(ctx, http.MethodGet, (&url.URL{Path: pathStatus, RawQuery: query.Encode()}).String())
}

// Wake returns once the service runs.
func (c Client) Wake(ctx context.Context, name string) (supervisor.Status, error) {
	return c.act(ctx, pathWake, name)
}

// Sleep returns once the service sleeps.
func (c Client) Sleep(ctx context.Context, name string) (supervisor.Status, error) {
	return c.act(ctx, pathSleep, name)
}

// Restart returns once the service runs again. One that sleeps stays asleep.
func (c Client) Restart(ctx context.Context, name string) (supervisor.Status, error) {
	return c.act(ctx, pathRestart, name)
}

// Freeze returns once the processes of the service stand still.
func (c Client) Freeze(ctx context.Context, name string) (supervisor.Status, error) {
	return c.act(ctx, pathFreeze, name)
}

// Thaw lets a frozen service run on.
func (c Client) Thaw(ctx context.Context, name string) (supervisor.Status, error) {
	return c.act(ctx, pathThaw, name)
}

// Reset makes the supervisor forget the failures of the service.
func (c Client) Reset(ctx context.Context, name string) (supervisor.Status, error) {
	return c.act(ctx, pathReset, name)
}

// Learn returns where the program of the service listens. It returns once that is known.
func (c Client) Learn(ctx context.Context, name string) ([]supervisor.LearnedSocket, error) {
	body, err := c.do(ctx, http.MethodPost, strings.Replace(pathLearn, "{name}", url.PathEscape(name), 1))
	if err != nil {
		return nil, err
	}
	var list []supervisor.LearnedSocket
	if err := json.Unmarshal(body, &list); err != nil {
		return nil, fmt.Errorf("read learned sockets: %w", err)
	}
	return list, nil
}

func (c Client) act(ctx context.Context, path, name string) (supervisor.Status, error) {
	var st supervisor.Status
	body, err := c.do(ctx, http.MethodPost, strings.Replace(path, "{name}", url.PathEscape(name), 1))
	if err != nil {
		return st, err
	}
	if err := json.Unmarshal(body, &st); err != nil {
		return st, fmt.Errorf("read status: %w", err)
	}
	return st, nil
}

// do makes one request and returns the body of its reply.
func (c Client) do(ctx context.Context, method, target string) ([]byte, error) {
	// The host is for the eye only: the dialer goes to the socket.
	req, err := http.NewRequestWithContext(ctx, method, "http://hibergated"+target, nil)
	if err != nil {
		return nil, err
	}
	resp, err := (&http.Transport{DialContext: c.dial, DisableKeepAlives: true}).RoundTrip(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, fmt.Errorf("read reply: %w", err)
	}
	if resp.StatusCode == http.StatusOK {
		return body, nil
	}
	var reply ErrorReply
	if json.Unmarshal(body, &reply) != nil || reply.Error == "" {
		return nil, fmt.Errorf("%s answered %s: is this hibergated?", c.Path, resp.Status)
	}
	return nil, &ReplyError{Code: resp.StatusCode, Text: reply.Error}
}

func (c Client) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "unix", c.Path)
	if err == nil {
		return conn, nil
	}
	var cause unix.Errno
	if !errors.As(err, &cause) {
		return nil, err // the context ended
	}
	hint := ""
	switch {
	case errors.Is(cause, unix.ENOENT), errors.Is(cause, unix.ECONNREFUSED):
		hint = "; is hibergated running?"
	case errors.Is(cause, unix.EACCES):
		hint = "; only root and the user that hibergated runs as may connect"
	}
	return nil, fmt.Errorf("connect %s: %w%s", c.Path, cause, hint)
}
