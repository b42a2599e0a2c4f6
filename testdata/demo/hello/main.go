// Command hello is the service of `make demo`: a small HTTP server like any other, which opens its port by itself
// and knows nothing of hibergated: "hello serve ADDRESS". "hello get URL" is a client for machines without curl.
package main

import (
	"fmt"
	"io"
	"net/http"
	"os"
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
	if len(os.Args) != 3 || os.Args[1] != "serve" {
		return fmt.Errorf("usage: hello serve ADDRESS, or hello get URL")
	}
	started := time.Now()
	return http.ListenAndServe(os.Args[2], http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
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
