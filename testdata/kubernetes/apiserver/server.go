package apiserver

import (
	"context"
	"crypto/tls"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http" //nolint:depguard // this is a server for tests
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"
)

// Options say what a Server serves.
type Options struct {
	Listen     string        // of the API; empty: a free port of 127.0.0.1
	Backend    string        // of the Service; empty: a free port of 127.0.0.1
	Namespace  string        // empty: "web"
	Deployment string        // empty: "web"
	Service    string        // empty: "web-pods"
	Replicas   int           // at first
	StartDelay time.Duration // from a scale above 0 until the endpoint is ready
	StopDelay  time.Duration // from a scale to 0 until the endpoint is gone; meanwhile it terminates, and serves
	Rules      []Rule        // what the service account may do; nil: those of LeastPrivileges
}

// Server is a running API server. Its methods may be called by any goroutine.
type Server struct {
	opts       Options
	address    string // of the API
	http       *http.Server
	deployment *deployment
	ca         []byte // PEM
	served     sync.WaitGroup

	mu       sync.Mutex // for what follows
	token    string
	rotated  int
	requests []string
}

// Start returns a server that serves. It ends with Close, which must be called.
func Start(ctx context.Context, opts Options) (*Server, error) {
	defaults := func(s *string, value string) {
		if *s == "" {
			*s = value
		}
	}
	defaults(&opts.Listen, "127.0.0.1:0")
	defaults(&opts.Backend, "127.0.0.1:0")
	defaults(&opts.Namespace, "web")
	defaults(&opts.Deployment, "web")
	defaults(&opts.Service, "web-pods")
	if opts.Rules == nil {
		opts.Rules = LeastPrivileges(opts.Deployment)
	}
	pair, der, err := certificate()
	if err != nil {
		return nil, fmt.Errorf("make a certificate: %w", err)
	}
	d, err := newDeployment(ctx, opts)
	if err != nil {
		return nil, err
	}
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", opts.Listen)
	if err != nil {
		return nil, errors.Join(err, d.close())
	}
	s := &Server{
		opts: opts, address: l.Addr().String(), deployment: d,
		ca: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
	}
	s.Rotate()
	s.http = &http.Server{
		Handler: http.HandlerFunc(s.serve), ReadHeaderTimeout: 10 * time.Second,
		ErrorLog:  slog.NewLogLogger(slog.DiscardHandler, slog.LevelError), // what goes wrong, the client tells
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12},
	}
	s.served.Go(func() { _ = s.http.ServeTLS(l, "", "") }) // ErrServerClosed, always
	return s, nil
}

// Close ends the server, its Deployment included, and returns when no goroutine of theirs is left.
func (s *Server) Close() error {
	err := s.http.Close()
	s.served.Wait()
	return errors.Join(err, s.deployment.close())
}

// Address returns host and port of the API.
func (s *Server) Address() string { return s.address }

// Backend returns host and port of the Service.
func (s *Server) Backend() string { return s.deployment.address }

// Rotate gives the service account a new token. The one before is no longer good.
func (s *Server) Rotate() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rotated++
	s.token = fmt.Sprintf("token-%d", s.rotated)
}

// Replicas returns how many are wanted.
func (s *Server) Replicas() int { return s.deployment.get().replicas }

// Scale sets how many are wanted, as somebody else who may do anything.
func (s *Server) Scale(replicas int) { _, _ = s.deployment.scale("", replicas) } // no version, no conflict

// Conflict lets somebody else change the Deployment just before each of the next n writes to it.
func (s *Server) Conflict(n int) { s.deployment.conflict(n) }

// Requests returns what was asked for so far, each as "METHOD /path STATUS", without what discovery asked for.
func (s *Server) Requests() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.requests)
}

// WriteCredentials writes into dir, which must exist, what the kubelet writes for a pod: token, ca.crt and namespace.
// Beside them it writes kubeconfig, for those who are not in a pod.
func (s *Server) WriteCredentials(dir string) error {
	s.mu.Lock()
	token := s.token
	s.mu.Unlock()
	config := fmt.Sprintf(`apiVersion: v1
kind: Config
clusters:
- name: test
  cluster: {server: "https://%s", certificate-authority: %q}
users:
- name: test
  user: {tokenFile: %q}
contexts:
- name: test
  context: {cluster: test, user: test, namespace: %q}
current-context: test
`, s.address, filepath.Join(dir, "ca.crt"), filepath.Join(dir, "token"), s.opts.Namespace)
	for name, content := range map[string]string{
		"token": token, "ca.crt": string(s.ca), "namespace": s.opts.Namespace, "kubeconfig": config,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// Environ returns the variables with which the scripts find the server and what WriteCredentials has written.
func (s *Server) Environ(dir string) []string {
	host, port, err := net.SplitHostPort(s.address)
	if err != nil {
		panic("unreachable: " + err.Error()) // it is the address of a listener
	}
	return []string{
		"KUBERNETES_SERVICE_HOST=" + host, "KUBERNETES_SERVICE_PORT=" + port,
		"SERVICEACCOUNT=" + dir, "KUBECONFIG=" + filepath.Join(dir, "kubeconfig"),
	}
}
