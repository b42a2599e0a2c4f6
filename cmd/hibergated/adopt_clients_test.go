package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
)

// The clients of TestAdopt. Each asks one thing on a connection of its own, and says what is wrong with the answer.

// getHello asks a web server, and waits for the end of the connection.
func getHello(c net.Conn) error {
	if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"); err != nil {
		return err
	}
	r := bufio.NewReader(c)
	answer, err := http.ReadResponse(r, nil)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	if err != nil || answer.StatusCode != http.StatusOK || string(body) != "hello\n" {
		return fmt.Errorf("status %s, body %q: %w", answer.Status, body, err)
	}
	return atEnd(r)
}

// echoHello asks a program that sends back what it gets.
func echoHello(c net.Conn) error {
	if answer, err := ask(c, "hello\n"); err != nil || answer != "hello\n" {
		return fmt.Errorf("answer %q: %w", answer, err)
	}
	if err := c.(*visitor).CloseWrite(); err != nil {
		return err
	}
	return atEnd(c)
}

// atEnd checks that nothing follows, not even an error: the connection is open until both sides have closed it.
func atEnd(r io.Reader) error {
	if rest, err := io.ReadAll(r); len(rest) > 0 || err != nil {
		return fmt.Errorf("at the end: %q: %w", rest, err)
	}
	return nil
}

func pingRedis(c net.Conn) error {
	if answer, err := ask(c, "PING\r\n"); err != nil || answer != "+PONG\r\n" {
		return fmt.Errorf("answer %q: %w", answer, err)
	}
	return nil
}

// selectOne asks PostgreSQL for one row. That it is still starting, or stopping already, is no answer.
func selectOne(c net.Conn) error {
	startup := append(binary.BigEndian.AppendUint32(nil, 3<<16), "user\x00postgres\x00database\x00postgres\x00\x00"...)
	if _, err := c.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(startup)+4)), startup...)); err != nil {
		return err
	}
	message := func(kind byte, body string) error {
		_, err := c.Write(append(binary.BigEndian.AppendUint32([]byte{kind}, uint32(len(body)+4)), body...))
		return err
	}
	r := bufio.NewReader(c)
	for asked, row := false, false; ; {
		kind, body, err := readPostgres(r)
		if err != nil {
			return err
		}
		switch kind {
		case 'E':
			return fmt.Errorf("PostgreSQL says %q", body)
		case 'D':
			row = bytes.Equal(body, []byte{0, 1, 0, 0, 0, 1, '1'}) // one column, of one byte
		case 'Z': // ready for a query
			if asked && !row {
				return errors.New("no row")
			}
			if asked {
				return errors.Join(message('X', ""), atEnd(r))
			}
			asked = true
			if err := message('Q', "select 1\x00"); err != nil {
				return err
			}
		}
	}
}

func readPostgres(r io.Reader) (kind byte, body []byte, err error) {
	var head [5]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, nil, err
	}
	n := binary.BigEndian.Uint32(head[1:])
	if n < 4 || n > 1<<16 {
		return 0, nil, fmt.Errorf("a message of %d bytes", n)
	}
	body = make([]byte, n-4)
	_, err = io.ReadFull(r, body)
	return head[0], body, err
}

// askDNS asks for the address of test.example.
func askDNS(c net.Conn) error {
	const id = "\x12\x34"
	query := []byte(id + "\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x04test\x07example\x00\x00\x01\x00\x01")
	answer := make([]byte, 512)
	stream := c.LocalAddr().Network() == "tcp"
	if stream {
		query = append(binary.BigEndian.AppendUint16(nil, uint16(len(query))), query...)
	}
	if _, err := c.Write(query); err != nil {
		return err
	}
	if stream {
		if _, err := io.ReadFull(c, answer[:2]); err != nil {
			return err
		}
		answer = answer[:min(int(binary.BigEndian.Uint16(answer)), len(answer))]
	}
	n, err := c.Read(answer)
	if text := string(answer[:n]); err != nil || !strings.HasPrefix(text, id) || !strings.HasSuffix(text, "\x00\x04\xc0\x00\x02\x07") {
		return fmt.Errorf("answer %q: %w", text, err)
	}
	return nil
}
