// Command hello is the service of `make demo`: a small HTTP server on the
// listening socket that it finds at descriptor 3, as sd_listen_fds(3) says.
// "hello get URL" is a client for machines without curl.
package main

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"time"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "hello:", err)
		os.Exit(1)
	}
}

func run() error {
	if len(os.Args) == 3 && os.Args[1] == "get" {
		return get(os.Args[2])
	}
	if os.Getenv("LISTEN_PID") != strconv.Itoa(os.Getpid()) {
		return fmt.Errorf("no socket was handed over: start me by hibergated")
	}
	l, err := net.FileListener(os.NewFile(3, "listener"))
	if err != nil {
		return err
	}
	started := time.Now()
	return http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Connection", "close") // so that the service is idle once it has answered
		fmt.Fprintf(w, "hello %s, from process %d, awake for %s\n", r.RemoteAddr, os.Getpid(), time.Since(started).Round(time.Millisecond))
	}))
}

func get(url string) error {
	begin := time.Now()
	resp, err := http.Get(url)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	fmt.Printf("%s(answered within %s)\n", b, time.Since(begin).Round(100*time.Microsecond))
	return err
}
