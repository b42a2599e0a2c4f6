package apiserver_test

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"hibergate/activation/nettest"
	"hibergate/testdata/kubernetes/apiserver"
)

const recipe = "../../../contrib/gate/kubernetes"

// cluster is a server and a pod's way to it.
type cluster struct {
	*apiserver.Server
	account string // directory
	environ []string
}

func start(t *testing.T, opts apiserver.Options) *cluster {
	t.Helper()
	s, err := apiserver.Start(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	c := &cluster{Server: s, account: t.TempDir()}
	c.credentials(t)
	c.environ = append(c.Environ(c.account), "PATH="+os.Getenv("PATH"), "HOME="+t.TempDir(), "DEPLOYMENT=web", "SERVICE=web-pods")
	return c
}

func (c *cluster) credentials(t *testing.T) {
	t.Helper()
	if err := c.WriteCredentials(c.account); err != nil {
		t.Fatal(err)
	}
}

// run runs a program and returns its exit status, and what it wrote.
func (c *cluster) run(t *testing.T, environ []string, name string, args ...string) (int, string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Env = append(slices.Clone(c.environ), environ...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), out.String()
}

// script runs deployment.sh and fails the test unless it ends with the status and says what is wanted.
func (c *cluster) script(t *testing.T, command string, want int, says string, environ ...string) {
	t.Helper()
	got, out := c.run(t, environ, filepath.Join(recipe, "deployment.sh"), command)
	if got != want || (says == "") != (out == "") || !strings.Contains(out, says) {
		t.Errorf("deployment.sh %s, with %q: got status %d and %q, want %d and %q", command, environ, got, out, want, says)
	}
}

// answers returns nil if the backend does.
func (c *cluster) answers() error {
	resp, err := http.Get("http://" + c.Backend() + "/x")
	if err != nil {
		return err
	}
	b, err := io.ReadAll(resp.Body)
	return errors.Join(err, resp.Body.Close(), map[bool]error{false: errors.New(string(b))}[string(b) == "hello from web /x\n"])
}

// A Deployment is woken, asked whether it is ready, and put to sleep, and again; each as often as somebody likes.
func TestScript(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Tool("curl"))
	c := start(t, apiserver.Options{})
	for range 2 {
		c.script(t, "ready", 1, "")
		if err := c.answers(); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("asleep: got %v, want that it is refused", err)
		}
		c.script(t, "launch", 0, "")
		c.script(t, "launch", 0, "")
		nettest.Eventually(t, func() error {
			if status, out := c.run(t, nil, filepath.Join(recipe, "deployment.sh"), "ready"); status != 0 {
				return errors.New("not ready " + out)
			}
			return nil
		})
		if err := c.answers(); err != nil {
			t.Errorf("ready: %v", err)
		}
		// The token is replaced while the pod runs.
		c.Rotate()
		c.script(t, "ready", 2, "401 Unauthorized")
		c.credentials(t)
		c.script(t, "stop", 0, "")
		c.script(t, "stop", 0, "")
	}
	if got := c.Replicas(); got != 0 {
		t.Errorf("got %d replicas after all, want none", got)
	}
}

// Addresses of IPv6 are bracketed where they have to be.
func TestScriptIPv6(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Tool("curl"))
	c := start(t, apiserver.Options{Listen: "[::1]:0", Backend: "[::1]:0"})
	c.script(t, "launch", 0, "")
	nettest.Eventually(t, c.answers)
	c.script(t, "stop", 0, "")
}

// Replicas that somebody else has set are not changed by a launch, and a change just before ours is noticed.
func TestScriptWithOthers(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Tool("curl"))
	c := start(t, apiserver.Options{Replicas: 3})
	c.script(t, "launch", 0, "")
	if got := c.Replicas(); got != 3 {
		t.Errorf("got %d replicas, want the 3 that there were", got)
	}
	c.Scale(0)
	c.Conflict(3)
	c.script(t, "launch", 0, "", "REPLICAS=2")
	if got := c.Replicas(); got != 2 {
		t.Errorf("got %d replicas, want 2", got)
	}
	conflicts := 0
	for _, r := range c.Requests() {
		if strings.HasPrefix(r, "PATCH ") && strings.HasSuffix(r, " 409") {
			conflicts++
		}
	}
	if conflicts != 3 {
		t.Errorf("got %d conflicts, want 3, of %q", conflicts, c.Requests())
	}
	c.Scale(0)
	c.Conflict(1000)
	c.script(t, "launch", 2, "409 Operation cannot be fulfilled on deployments.apps")
}

// A pod that does not get ready is not; one that does not end is waited for, but not for ever.
func TestScriptWaits(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Tool("curl"))
	slow := start(t, apiserver.Options{StartDelay: time.Hour})
	slow.script(t, "launch", 0, "")
	slow.script(t, "ready", 1, "")
	slow.script(t, "stop", 0, "")
	stubborn := start(t, apiserver.Options{StopDelay: time.Hour, Replicas: 1})
	nettest.Eventually(t, stubborn.answers)
	stubborn.script(t, "stop", 2, "the Service web-pods still has endpoints, 1 s after web was scaled to 0", "STOP_WAIT=1")
	stubborn.script(t, "ready", 1, "")
	// It is woken while it still ends.
	stubborn.script(t, "launch", 0, "")
	nettest.Eventually(t, stubborn.answers)
}

// Every refusal is told with its reason.
func TestScriptRefused(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Tool("curl"))
	c := start(t, apiserver.Options{})
	forbidden := `403 deployments.apps "other" is forbidden: User "system:serviceaccount:web:hibergated" cannot `
	c.script(t, "launch", 2, forbidden+`get resource "deployments/scale" in API group "apps" in the namespace "web"`, "DEPLOYMENT=other")
	c.script(t, "stop", 2, forbidden+`patch resource "deployments/scale"`, "DEPLOYMENT=other")
	c.script(t, "ready", 2, `403 endpointslices.discovery.k8s.io is forbidden`, "NAMESPACE=default")
	c.script(t, "ready", 1, "", "SERVICE=other")
	c.script(t, "ready", 2, "DEPLOYMENT must be the name of a Kubernetes object", "DEPLOYMENT=..")
	c.script(t, "ready", 2, "SERVICE must be the name of a Kubernetes object", "SERVICE=a&b")
	c.script(t, "launch", 2, "REPLICAS must be a number", "REPLICAS=many")
	c.script(t, "launch", 2, "REPLICAS must be at least 1", "REPLICAS=0")
	c.script(t, "sleep", 2, "usage: ")
	c.script(t, "ready", 2, "no answer of [::1]:1", "KUBERNETES_SERVICE_HOST=::1", "KUBERNETES_SERVICE_PORT=1")
	c.script(t, "ready", 2, "read the namespace of this pod", "SERVICEACCOUNT="+t.TempDir())
	c.script(t, "ready", 2, "read the token", "SERVICEACCOUNT="+t.TempDir(), "NAMESPACE=web")
	other := start(t, apiserver.Options{}) // with a certificate of its own
	c.script(t, "ready", 2, "no answer of ", other.Environ(c.account)[:2]...)
	missing := start(t, apiserver.Options{Rules: apiserver.LeastPrivileges("")})
	missing.script(t, "launch", 2, `404 deployments/scale.apps "other" not found`, "DEPLOYMENT=other")
}

// kubectl can do what kubectl.toml asks for with the same few rights, and "kubectl scale" with one more.
func TestKubectl(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Tool("kubectl"))
	if help, err := exec.CommandContext(t.Context(), "kubectl", "patch", "--help").Output(); err != nil || !bytes.Contains(help, []byte("--subresource")) {
		t.Skipf("kubectl is older than 1.24, and does not know subresources: %v", err)
	}
	patch := []string{"patch", "deployment/web", "--subresource=scale", "--type=merge"}
	get := []string{"get", "endpointslices", "--selector=kubernetes.io/service-name=web-pods"}
	c := start(t, apiserver.Options{})
	kubectl := func(c *cluster, want int, args ...string) string {
		t.Helper()
		got, out := c.run(t, nil, "kubectl", append([]string{"--namespace=web", "--request-timeout=10s"}, args...)...)
		if got != want {
			t.Errorf("kubectl %q: got status %d and %q, want %d", args, got, out, want)
		}
		return out
	}
	if out := kubectl(c, 0, append(get, "--output=jsonpath={.items[*].endpoints[*].conditions.ready}")...); out != "" {
		t.Errorf("asleep: got the endpoints %q, want none", out)
	}
	kubectl(c, 0, append(patch, `--patch={"spec":{"replicas":1}}`)...)
	nettest.Eventually(t, c.answers)
	nettest.Eventually(t, func() error {
		if out := kubectl(c, 0, append(get, "--output=jsonpath={.items[*].endpoints[*].conditions.ready}")...); out != "true" {
			return errors.New(out)
		}
		return nil
	})
	kubectl(c, 0, append(patch, `--patch={"spec":{"replicas":0}}`)...)
	nettest.Eventually(t, func() error {
		if out := kubectl(c, 0, append(get, "--output=jsonpath={.items[*].endpoints[*].addresses}")...); out != "" {
			return errors.New(out)
		}
		return nil
	})
	if out := kubectl(c, 1, "scale", "deployment/web", "--replicas=1"); !strings.Contains(out, `cannot get resource "deployments"`) {
		t.Errorf("kubectl scale without the right to see the Deployment: %s", out)
	}
	more := start(t, apiserver.Options{
		Rules: append(apiserver.LeastPrivileges("web"), apiserver.Rule{Group: "apps", Resource: "deployments", Verbs: []string{"get"}, Name: "web"}),
	})
	kubectl(more, 0, "scale", "deployment/web", "--replicas=2")
	if got := more.Replicas(); got != 2 {
		t.Errorf("after kubectl scale: got %d replicas, want 2", got)
	}
	kubectl(more, 1, "scale", "deployment/web", "--current-replicas=1", "--replicas=0")
	if got := more.Replicas(); got != 2 {
		t.Errorf("after kubectl scale with other replicas than there are: got %d, want 2", got)
	}
}

// The manifests are what kubectl makes of them, and their Role allows exactly what the server allows here.
func TestManifests(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Tool("kubectl"))
	c := start(t, apiserver.Options{})
	status, out := c.run(t, nil, "kubectl", "kustomize", recipe)
	if status != 0 {
		t.Fatal(out)
	}
	for _, want := range []string{
		"- apiGroups:\n  - apps\n  resourceNames:\n  - web\n  resources:\n  - deployments/scale\n  verbs:\n  - get\n  - patch\n" +
			"- apiGroups:\n  - discovery.k8s.io\n  resources:\n  - endpointslices\n  verbs:\n  - list\n---\n",
		"runAsNonRoot: true", "readOnlyRootFilesystem: true", "allowPrivilegeEscalation: false",
		"  deployment.sh: ", "  web.toml: ",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("the manifests have no %q:\n%s", want, out)
		}
	}
}
