package storm

import (
	"bufio"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"
)

// A client tells what became of it, whatever the service does.
func TestOutcomes(t *testing.T) {
	t.Parallel()
	answer := func(text string) func(net.Conn) {
		return func(c net.Conn) {
			line, _ := bufio.NewReader(c).ReadString('\n')
			fmt.Fprintf(c, text, strings.TrimSuffix(line, "\n"))
		}
	}
	for name, test := range map[string]struct {
		serve func(net.Conn)
		how   behaviour
		want  outcome
	}{
		"answered":               {answer("%s 7\n"), normal, answered},
		"answered in pieces":     {answer("%s 7\n"), slow, answered},
		"answered, half closed":  {answer("%s 7\n"), halfClose, answered},
		"closed":                 {answer(""), normal, unanswered},
		"closed at once":         {func(net.Conn) {}, slow, unanswered},
		"half an answer":         {answer("%s 7"), normal, unanswered},
		"another's answer":       {answer("not %s 7\n"), normal, unanswered},
		"reset":                  {answer("%s 7\n"), reset, wasReset},
		"reset, and closed":      {func(net.Conn) {}, reset, wasReset},
		"refused":                {nil, normal, refused},
		"refused before a reset": {nil, reset, refused},
	} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		if test.serve == nil {
			l.Close()
			close(done)
		} else {
			go func() {
				defer close(done)
				if c, err := l.Accept(); err == nil {
					test.serve(c)
					c.Close()
				}
			}()
		}
		c := client{id: "a.1", how: test.how, pieces: []string{"a.1\n"}, gaps: []time.Duration{0, 0}}
		if test.how == slow {
			c.pieces, c.gaps = []string{"a", "", ".1\n"}, []time.Duration{0, time.Millisecond, time.Millisecond}
		}
		c.run(t.Context(), l.Addr().String(), 10*time.Second)
		if c.outcome != test.want || test.want == answered && c.pid != 7 {
			t.Errorf("%s: outcome %d, pid %d, %v; want outcome %d", name, c.outcome, c.pid, c.err, test.want)
		}
		l.Close()
		<-done
	}
}
