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
//	GET  /v1/version                       200: Version
//
// Everything else is an [ErrorReply]. None of them takes a body.
const (
	pathStatus  = "/v1/status"
	pathWake    = "/v1/services/{name}/wake"
	pathSleep   = "/v1/services/{name}/sleep"
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
}

// statusCode says how HTTP calls an error of the supervisor.
func statusCode(err error) int {
	switch {
	case errors.Is(err, supervisor.ErrUnknownService):
		return http.StatusNotFound
	case errors.Is(err, supervisor.ErrPerConnection):
		return http.StatusConflict
	case errors.Is(err, supervisor.ErrShuttingDown):
		return http.StatusServiceUnavailable
	default:
		return http.StatusInternalServerError
	}
}
