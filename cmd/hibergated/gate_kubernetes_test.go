package main

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"hibergate/activation/nettest"
	"hibergate/testdata/kubernetes/apiserver"
)

// The recipe for Kubernetes, with a server that speaks the API: the Deployment is scaled up by the first client, who waits for its
// endpoint, and to nothing when it is idle.
func TestGateKubernetes(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces, nettest.Tool("curl"))
	api, err := apiserver.Start(t.Context(), apiserver.Options{StartDelay: 50 * time.Millisecond, StopDelay: 50 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := api.Close(); err != nil {
			t.Error(err)
		}
	})
	account := t.TempDir()
	if err := api.WriteCredentials(account); err != nil {
		t.Fatal(err)
	}
	d := startHibergated(t, kubernetesRecipe(t, api.Backend(), api.Environ(account)))
	get := func() error {
		_, address := d.address("web", 0)
		hello := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
		resp, err := hello.Get("http://" + address + "/x")
		if err != nil {
			return err
		}
		text, err := io.ReadAll(resp.Body)
		if err = errors.Join(err, resp.Body.Close()); err == nil && string(text) != "hello from web /x\n" {
			err = fmt.Errorf("%s: %q", resp.Status, text)
		}
		return err
	}
	for range 2 {
		var clients sync.WaitGroup
		for range 10 {
			clients.Go(func() {
				if err := get(); err != nil {
					t.Error(err)
				}
			})
		}
		clients.Wait()
		if n := api.Replicas(); n != 1 {
			t.Errorf("%d replicas while it is used", n)
		}
		d.sleeps(t, "web")
		if n := api.Replicas(); n != 0 {
			t.Errorf("%d replicas while it sleeps", n)
		}
	}
	if st := d.status("web"); st.Starts != 2 || st.Failures != 0 {
		t.Errorf("status: %+v", st)
	}
}

// kubernetesRecipe is contrib/gate/kubernetes/web.toml as it is outside a cluster.
func kubernetesRecipe(t *testing.T, backend string, environ []string) string {
	t.Helper()
	dir, err := filepath.Abs("../../contrib/gate/kubernetes")
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(dir, "web.toml"))
	if err != nil {
		t.Fatal(err)
	}
	_, text, _ := strings.Cut(string(b), "[service.web]") // what is before is about hibergated itself
	for _, change := range [][2]string{
		{`"tcp://:8080"`, `"tcp://127.0.0.1:0"`},
		{`"10m"`, `"300ms"`},
		{`{ DEPLOYMENT = "web", SERVICE = "web-pods", REPLICAS = "1" }`, stringList(slices.Concat(environ, []string{"DEPLOYMENT=web", "SERVICE=web-pods", "REPLICAS=1"}))},
		{`pass_environment = ["KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT"]`, ""},
		{"tcp://web-pods:80", "tcp://" + backend},
		{"/scripts/deployment.sh", filepath.Join(dir, "deployment.sh")},
	} {
		if !strings.Contains(text, change[0]) {
			t.Fatalf("the recipe has no %s any more", change[0])
		}
		text = strings.ReplaceAll(text, change[0], change[1])
	}
	return "[service.web]" + text
}
