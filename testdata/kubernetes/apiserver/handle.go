package apiserver

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http" //nolint:depguard // this is a server for tests
	"strings"
)

// largest is the size of the largest body that is read, in bytes.
const largest = 1 << 20

// parse returns what the request is about.
func parse(r *http.Request) attributes {
	// "", "apis", GROUP, VERSION, "namespaces", NAMESPACE, RESOURCE, NAME, SUBRESOURCE
	part := strings.Split(r.URL.Path, "/")
	if len(part) < 7 || len(part) > 9 || part[1] != "apis" || part[3] != "v1" || part[4] != "namespaces" {
		return attributes{}
	}
	a := attributes{group: part[2], namespace: part[5], resource: part[6]}
	a.verb = map[string]string{
		http.MethodGet: "get", http.MethodPatch: "patch", http.MethodPut: "update", http.MethodPost: "create", http.MethodDelete: "delete",
	}[r.Method]
	if len(part) > 7 {
		a.name = part[7]
	} else if a.verb == "get" {
		a.verb = "list"
	}
	if len(part) > 8 {
		a.resource += "/" + part[8]
	}
	return a
}

// serve answers one request.
func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	a := parse(r)
	var answer any
	refused := s.authorize(r, a)
	if refused == nil {
		if a.resource == "" {
			answer, refused = s.discover(r)
		} else {
			answer, refused = s.handle(r, a)
		}
	}
	code := http.StatusOK
	if refused != nil {
		answer, code = refused, refused.Code
	}
	if a.resource != "" {
		s.mu.Lock()
		s.requests = append(s.requests, fmt.Sprintf("%s %s %d", r.Method, r.URL.Path, code))
		s.mu.Unlock()
	}
	b, err := json.Marshal(answer)
	if err != nil {
		panic("unreachable: " + err.Error()) // all objects are our own
	}
	// The real one indents what it sends to curl.
	if strings.HasPrefix(r.UserAgent(), "curl") && r.URL.Query().Get("pretty") == "" {
		if indented, err := json.MarshalIndent(answer, "", "  "); err == nil {
			b = indented
		}
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_, _ = w.Write(b) // the client may be gone
}

// handle answers a request about an object.
func (s *Server) handle(r *http.Request, a attributes) (any, *status) {
	at := s.deployment.get()
	switch a.verb + " " + a.resource {
	case "get deployments", "get deployments/scale", "patch deployments/scale", "update deployments/scale":
		if a.name != s.opts.Deployment {
			return nil, refusal(http.StatusNotFound, "NotFound", fmt.Sprintf("%s.%s %q not found", a.resource, a.group, a.name),
				&details{Name: a.name, Group: a.group, Kind: a.resource})
		}
	}
	switch a.verb + " " + a.resource {
	case "get deployments":
		return s.deploymentObject(at), nil
	case "get deployments/scale":
		return s.scaleObject(at), nil
	case "patch deployments/scale", "update deployments/scale":
		return s.write(r, a)
	case "list endpointslices":
		service := ""
		if key, value, _ := strings.Cut(r.URL.Query().Get("labelSelector"), "="); key == "kubernetes.io/service-name" {
			service = value
		}
		return s.sliceObjects(at, service), nil
	}
	return nil, refusal(http.StatusNotFound, "NotFound", "the server could not find the requested resource", &details{})
}

// change is what a merge patch of a scale, or a whole one, can have.
type change struct {
	Metadata struct {
		ResourceVersion string `json:"resourceVersion"`
	} `json:"metadata"`
	Spec struct {
		Replicas *int `json:"replicas"`
	} `json:"spec"`
}

// write answers a PATCH or PUT of the scale.
func (s *Server) write(r *http.Request, a attributes) (any, *status) {
	want := map[string]string{"patch": "application/merge-patch+json", "update": "application/json"}[a.verb]
	if got, _, _ := mime.ParseMediaType(r.Header.Get("Content-Type")); got != want {
		return nil, refusal(http.StatusUnsupportedMediaType, "UnsupportedMediaType", "415: Unsupported Media Type", &details{})
	}
	b, err := io.ReadAll(io.LimitReader(r.Body, largest))
	if err != nil {
		return nil, refusal(http.StatusBadRequest, "BadRequest", err.Error(), nil)
	}
	var c change
	if err := json.Unmarshal(b, &c); err != nil {
		return nil, refusal(http.StatusBadRequest, "BadRequest", err.Error(), nil)
	}
	replicas := s.deployment.get().replicas
	switch {
	case c.Spec.Replicas != nil:
		replicas = *c.Spec.Replicas
	case a.verb == "update":
		replicas = 0
	}
	if replicas < 0 {
		return nil, refusal(http.StatusUnprocessableEntity, "Invalid",
			fmt.Sprintf("Scale.autoscaling %q is invalid: spec.replicas: Invalid value: %d: must be greater than or equal to 0", a.name, replicas),
			&details{Name: a.name, Group: "autoscaling", Kind: "Scale"})
	}
	at, err := s.deployment.scale(c.Metadata.ResourceVersion, replicas)
	if errors.Is(err, errConflict) {
		return nil, refusal(http.StatusConflict, "Conflict",
			fmt.Sprintf("Operation cannot be fulfilled on deployments.apps %q: %v", a.name, err),
			&details{Name: a.name, Group: a.group, Kind: "deployments"})
	}
	return s.scaleObject(at), nil
}
