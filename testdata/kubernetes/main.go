// Command kubernetes is as much of a Kubernetes API server as a gate needs, with one Deployment behind one
// Service: see the package apiserver. It prints the environment in which the scripts of contrib/gate/kubernetes find it,
// one variable a line, and serves until it is interrupted.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"hibergate/testdata/kubernetes/apiserver"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err := run(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "kubernetes:", err)
		os.Exit(1) //nolint:forbidigo // this is main
	}
}

func run(ctx context.Context) error {
	var opts apiserver.Options
	flag.StringVar(&opts.Listen, "listen", "127.0.0.1:0", "address of the API")
	flag.StringVar(&opts.Backend, "backend", "127.0.0.1:0", "address of the Service, where its pods answer HTTP requests while they are ready")
	flag.StringVar(&opts.Namespace, "namespace", "web", "the namespace")
	flag.StringVar(&opts.Deployment, "deployment", "web", "the name of the Deployment")
	flag.StringVar(&opts.Service, "service", "web-pods", "the name of the Service")
	flag.IntVar(&opts.Replicas, "replicas", 0, "how many there are at first")
	flag.DurationVar(&opts.StartDelay, "start-delay", 0, "how long it takes until a pod is ready")
	flag.DurationVar(&opts.StopDelay, "stop-delay", 0, "how long it takes until a pod has ended")
	dir := flag.String("dir", "", "directory for the token, the certificate, the namespace and a kubeconfig, as a pod has them; required")
	flag.Parse()
	if *dir == "" || flag.NArg() > 0 {
		return fmt.Errorf("usage: kubernetes --dir DIRECTORY [options]")
	}
	account, err := filepath.Abs(*dir)
	if err != nil {
		return err
	}
	server, err := apiserver.Start(ctx, opts)
	if err != nil {
		return err
	}
	if err := server.WriteCredentials(account); err != nil {
		return err
	}
	for _, v := range server.Environ(account) {
		fmt.Println(v) //nolint:forbidigo // what it prints is what it is for
	}
	fmt.Println("BACKEND=" + server.Backend()) //nolint:forbidigo // likewise
	<-ctx.Done()
	return server.Close()
}
