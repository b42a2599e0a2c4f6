package control

import (
	"context"
	"errors"
	"net/http"

	"hibergate/supervisor"
)

// The requests. A reply is JSON and ends in a newline:
//
//	GET  /v1/status?service=NAME&flows=1   200: []supervisor.Status; both parameters are optional
//	POST /v1/services/NAME/wake            200: supervisor.Status, once the service runs
//	POST /v1/services/NAME/sleep           200: supervisor.Status, once the service sleeps
//	POST /v1/services/NAME/restart         200: supervisor.Status, once the service runs again; at once where it sleeps
//	POST /v1/services/NAME/freeze          200: supervisor.Status, once the service stands still
//	POST /v1/services/NAME/thaw            200: supervisor.Status
//	POST /v1/services/NAME/reset           200: supervisor.Status
//	POST /v1/services/NAME/learn           200: []supervisor.LearnedSocket, once it is known where the program listens
//	GET  /v1/version                       200: Version
//
// Everything else is an [ErrorReply]. None of them takes a body.
const (
	pathStatus  = "/v1/status"
	pathWake    = "/v1/services/{name}/wake"
	pathSleep   = "/v1/services/{name}/sleep"
	pathRestart = "/v1/services/{name}/restart"
	pathFreeze  = "/v1/services/{name}/freeze"
	pathThaw    = "/v1/services/{name}/thaw"
	pathReset   = "/v1/services/{name}/reset"
	pathLearn   = "/v1/services/{name}/learn"
	pathVersion = "/v1/version"

	paramService = "service" // the name of one service; absent: all, in the order of the configuration
	paramFlows   = "flows"   // a boolean: list the connections of each socket too
)

// ErrorReply is the body of every reply whose status is not 200.
type ErrorReply struct {
	Error string `json:"error"`
}

// Version says what answers.
type Version struct {
	Version string `json:"version"`
}

// Supervisor is what the server needs of one; *supervisor.Supervisor is one. The
// methods are called from many goroutines at once, and return when ctx ends.
type Supervisor interface {
	Status(ctx context.Context, name string, flows bool) ([]supervisor.Status, error)
	Wake(ctx context.Context, name string) (supervisor.Status, error)
	Sleep(ctx context.Context, name string) (supervisor.Status, error)
	Restart(ctx context.Context, name string) (supervisor.Status, error)
	Freeze(ctx context.Context, name string) (supervisor.Status, error)
	Thaw(ctx context.Context, name string) (supervisor.Status, error)
	Reset(ctx context.Context, name string) (supervisor.Status, error)
	Learn(ctx context.Context, name string) ([]supervisor.LearnedSocket, error)
}

// statusCode says how HTTP calls an error of the supervisor.
func statusCode(err error) int {
	switch {
	case errors.Is(err, supervisor.ErrUnknownService):
		return http.StatusNotFound
	case errors.Is(err, supervisor.ErrPerConnection), errors.Is(err, supervisor.ErrNotRunning), errors.Is(err, supervisor.ErrNothingToLearn):
		return http.StatusConflict
	case errors.Is(err, supervisor.ErrShuttingDown):
		return http.StatusServiceUnavailable
	default:
		return http.StatusInternalServerError
	}
}
