package apiserver

import (
	"net/http" //nolint:depguard // this is a server for tests
	"strings"
)

// resource is one that discovery tells of.
type resource struct {
	Name         string   `json:"name"`
	SingularName string   `json:"singularName"`
	Namespaced   bool     `json:"namespaced"`
	Group        string   `json:"group,omitempty"`
	Version      string   `json:"version,omitempty"`
	Kind         string   `json:"kind"`
	Verbs        []string `json:"verbs"`
	ShortNames   []string `json:"shortNames,omitempty"`
}

// discover answers a request for what the server has. It is what kubectl begins with.
func (s *Server) discover(r *http.Request) (any, *status) {
	list := func(version string, resources ...resource) any {
		if resources == nil {
			resources = []resource{}
		}
		return map[string]any{"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": resources}
	}
	group := func(name string) any {
		v := map[string]string{"groupVersion": name + "/v1", "version": "v1"}
		return map[string]any{"name": name, "versions": []any{v}, "preferredVersion": v}
	}
	if r.Method != http.MethodGet {
		return nil, refusal(http.StatusMethodNotAllowed, "MethodNotAllowed", "the server does not allow this method on the requested resource", &details{})
	}
	switch strings.TrimSuffix(r.URL.Path, "/") {
	case "/version":
		return map[string]string{"major": "1", "minor": "32", "gitVersion": "v1.32.0"}, nil
	case "/api":
		return map[string]any{"kind": "APIVersions", "versions": []string{"v1"}}, nil
	case "/apis":
		return map[string]any{
			"kind": "APIGroupList", "apiVersion": "v1",
			"groups": []any{group("apps"), group("discovery.k8s.io")},
		}, nil
	case "/api/v1":
		return list("v1"), nil
	case "/apis/apps/v1":
		return list("apps/v1",
			resource{
				Name: "deployments", SingularName: "deployment", Namespaced: true, Kind: "Deployment",
				Verbs: []string{"get"}, ShortNames: []string{"deploy"},
			},
			resource{
				Name: "deployments/scale", Namespaced: true, Group: "autoscaling", Version: "v1", Kind: "Scale",
				Verbs: []string{"get", "patch", "update"},
			}), nil
	case "/apis/discovery.k8s.io/v1":
		return list("discovery.k8s.io/v1",
			resource{Name: "endpointslices", SingularName: "endpointslice", Namespaced: true, Kind: "EndpointSlice", Verbs: []string{"list"}}), nil
	}
	return nil, refusal(http.StatusNotFound, "NotFound", "the server could not find the requested resource", &details{})
}
