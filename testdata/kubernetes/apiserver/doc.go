// Package apiserver is as much of a Kubernetes API server as a gate needs: discovery, the scale subresource of one
// Deployment, and the EndpointSlices of the Service in front of its pods. Paths, replies, refusals and conflicts are
// those of the real one, over HTTPS with a certificate of its own, and a token must be sent that may do what is asked for.
//
// There are no pods. In their place one HTTP server listens at the address of the Service while the Deployment
// has a ready replica. Nothing listens there otherwise, so that connections are refused, as kube-proxy refuses
// them for a Service without endpoints.
package apiserver
