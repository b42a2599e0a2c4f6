package apiserver

import (
	"fmt"
	"net/http" //nolint:depguard // this is a server for tests
	"slices"
	"strings"
)

// Rule is one of a Role.
type Rule struct {
	Group, Resource string // "apps" and "deployments/scale"
	Verbs           []string
	Name            string // empty: every object
}

// LeastPrivileges returns the rules that deployment.sh of contrib/gate/kubernetes can do with.
func LeastPrivileges(deployment string) []Rule {
	return []Rule{
		{Group: "apps", Resource: "deployments/scale", Verbs: []string{"get", "patch"}, Name: deployment},
		{Group: "discovery.k8s.io", Resource: "endpointslices", Verbs: []string{"list"}},
	}
}

// attributes say what a request is about. Without a resource it is about discovery.
type attributes struct {
	verb, group, resource, namespace, name string
}

const (
	user      = "system:serviceaccount:%s:hibergated"
	anonymous = "system:anonymous"
)

// authorize returns nil if the request may do what it is about, and what it is refused with otherwise.
func (s *Server) authorize(r *http.Request, a attributes) *status {
	who := anonymous
	if header := r.Header.Get("Authorization"); header != "" {
		s.mu.Lock()
		good := header == "Bearer "+s.token
		s.mu.Unlock()
		if !good {
			return refusal(http.StatusUnauthorized, "Unauthorized", "Unauthorized", nil)
		}
		who = fmt.Sprintf(user, s.opts.Namespace)
	}
	if a.resource == "" {
		if who != anonymous || r.URL.Path == "/version" {
			return nil
		}
		return refusal(http.StatusForbidden, "Forbidden",
			fmt.Sprintf("forbidden: User %q cannot get path %q", who, r.URL.Path), &details{})
	}
	if who != anonymous && a.namespace == s.opts.Namespace && slices.ContainsFunc(s.opts.Rules, a.allowed) {
		return nil
	}
	kind, _, _ := strings.Cut(a.resource, "/")
	object := kind + "." + a.group
	if a.name != "" {
		object += fmt.Sprintf(" %q", a.name)
	}
	return refusal(http.StatusForbidden, "Forbidden",
		fmt.Sprintf("%s is forbidden: User %q cannot %s resource %q in API group %q in the namespace %q",
			object, who, a.verb, a.resource, a.group, a.namespace), &details{Name: a.name, Group: a.group, Kind: kind})
}

func (a attributes) allowed(r Rule) bool {
	return r.Group == a.group && r.Resource == a.resource && slices.Contains(r.Verbs, a.verb) && (r.Name == "" || r.Name == a.name)
}
