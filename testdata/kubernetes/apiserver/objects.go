package apiserver

import (
	"fmt"
	"net"
	"strconv"
)

// The objects of the API, as far as they are used.

type typeMeta struct {
	Kind       string `json:"kind"`
	APIVersion string `json:"apiVersion"`
}

type objectMeta struct {
	Name              string            `json:"name,omitempty"`
	Namespace         string            `json:"namespace,omitempty"`
	UID               string            `json:"uid,omitempty"`
	ResourceVersion   string            `json:"resourceVersion,omitempty"`
	CreationTimestamp string            `json:"creationTimestamp,omitempty"`
	Labels            map[string]string `json:"labels,omitempty"`
}

type status struct {
	typeMeta
	Metadata struct{} `json:"metadata"`
	Status   string   `json:"status"`
	Message  string   `json:"message"`
	Reason   string   `json:"reason"`
	Details  *details `json:"details,omitempty"`
	Code     int      `json:"code"`
}

type details struct {
	Name  string `json:"name,omitempty"`
	Group string `json:"group,omitempty"`
	Kind  string `json:"kind,omitempty"`
}

func refusal(code int, reason, message string, d *details) *status {
	return &status{
		typeMeta: typeMeta{Kind: "Status", APIVersion: "v1"},
		Status:   "Failure", Message: message, Reason: reason, Details: d, Code: code,
	}
}

type scale struct {
	typeMeta
	Metadata objectMeta  `json:"metadata"`
	Spec     scaleSpec   `json:"spec"`
	Status   scaleStatus `json:"status"`
}

// scaleSpec has no replicas if there are 0, as in the real one.
type scaleSpec struct {
	Replicas int `json:"replicas,omitempty"`
}

type scaleStatus struct {
	Replicas int    `json:"replicas"`
	Selector string `json:"selector,omitempty"`
}

// meta returns the metadata of the Deployment, which its scale has as well.
func (s *Server) meta(at scaled) objectMeta {
	return objectMeta{
		Name: s.opts.Deployment, Namespace: s.opts.Namespace, UID: "6f1c2a52-6a4e-4d1b-9e0e-0d7c5a1d7c11",
		ResourceVersion: strconv.Itoa(at.version), CreationTimestamp: "2026-01-01T00:00:00Z",
	}
}

func (s *Server) scaleObject(at scaled) scale {
	running := at.replicas
	if at.phase == absent || at.phase == terminating {
		running = 0
	}
	return scale{
		typeMeta: typeMeta{Kind: "Scale", APIVersion: "autoscaling/v1"}, Metadata: s.meta(at),
		Spec:   scaleSpec{Replicas: at.replicas},
		Status: scaleStatus{Replicas: running, Selector: "app=" + s.opts.Deployment},
	}
}

// deploymentObject is what kubectl wants to see before it scales something.
func (s *Server) deploymentObject(at scaled) map[string]any {
	labels := map[string]string{"app": s.opts.Deployment}
	return map[string]any{
		"kind": "Deployment", "apiVersion": "apps/v1", "metadata": s.meta(at),
		"spec": map[string]any{
			"replicas": at.replicas, "selector": map[string]any{"matchLabels": labels},
			"template": map[string]any{
				"metadata": map[string]any{"labels": labels},
				"spec":     map[string]any{"containers": []any{map[string]any{"name": "web", "image": "web"}}},
			},
		},
		"status": map[string]any{"replicas": s.scaleObject(at).Status.Replicas},
	}
}

type sliceList struct {
	typeMeta
	Metadata objectMeta `json:"metadata"`
	Items    []slice    `json:"items"`
}

type slice struct {
	Metadata    objectMeta `json:"metadata"`
	AddressType string     `json:"addressType"`
	Endpoints   []endpoint `json:"endpoints"` // null without endpoints, as in the real one
	Ports       []port     `json:"ports"`
}

type endpoint struct {
	Addresses  []string   `json:"addresses"`
	Conditions conditions `json:"conditions"`
}

type conditions struct {
	Ready       bool `json:"ready"`
	Serving     bool `json:"serving"`
	Terminating bool `json:"terminating"`
}

type port struct {
	Name     string `json:"name"`
	Port     int    `json:"port"`
	Protocol string `json:"protocol"`
}

// sliceObjects returns the EndpointSlices of a Service: one, or none for a Service that does not exist.
func (s *Server) sliceObjects(at scaled, service string) sliceList {
	list := sliceList{
		typeMeta: typeMeta{Kind: "EndpointSliceList", APIVersion: "discovery.k8s.io/v1"},
		Metadata: objectMeta{ResourceVersion: strconv.Itoa(at.version)}, Items: []slice{},
	}
	if service != s.opts.Service {
		return list
	}
	host, number, err := net.SplitHostPort(s.deployment.address)
	if err != nil {
		panic("unreachable: " + err.Error()) // it was the address of a listener
	}
	n, err := strconv.Atoi(number)
	if err != nil {
		panic("unreachable: " + err.Error())
	}
	meta := s.meta(at)
	meta.Name = service + "-x7k2p"
	meta.Labels = map[string]string{"kubernetes.io/service-name": service}
	one := slice{Metadata: meta, AddressType: "IPv4"}
	if net.ParseIP(host).To4() == nil {
		one.AddressType = "IPv6"
	}
	if at.phase != absent {
		for i := range max(at.replicas, 1) {
			one.Endpoints = append(one.Endpoints, endpoint{
				Addresses: []string{pod(host, i)},
				Conditions: conditions{
					Ready: at.phase == ready, Serving: at.phase == ready || at.phase == terminating, Terminating: at.phase == terminating,
				},
			})
		}
		one.Ports = []port{{Name: "http", Port: n, Protocol: "TCP"}}
	}
	list.Items = append(list.Items, one)
	return list
}

// pod returns an address for the pod with the number. The first is where one can really connect.
func pod(host string, i int) string {
	if i == 0 {
		return host
	}
	return fmt.Sprintf("192.0.2.%d", i%250)
}
