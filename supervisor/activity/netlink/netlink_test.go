package netlink

import (
	"encoding/binary"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// message makes what the kernel would send: header and body.
func message(typ, flags uint16, sequence, port uint32, body ...byte) []byte {
	b := binary.NativeEndian.AppendUint32(nil, uint32(unix.SizeofNlMsghdr+len(body)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = binary.NativeEndian.AppendUint16(b, flags)
	b = binary.NativeEndian.AppendUint32(b, sequence)
	b = binary.NativeEndian.AppendUint32(b, port)
	b = append(b, body...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

func errno(e unix.Errno) []byte { return binary.NativeEndian.AppendUint32(nil, uint32(-int32(e))) }

func TestAnswer(t *testing.T) {
	t.Parallel()
	const row, seq, port = 20, 5, 77
	join := func(parts ...[]byte) (all []byte) {
		for _, p := range parts {
			all = append(all, p...)
		}
		return all
	}
	for name, c := range map[string]struct {
		single bool
		bytes  []byte
		want   []string
		done   bool
		err    error
	}{
		"a dump":                      {bytes: join(message(row, 2, seq, port, 'a'), message(row, 2, seq, port, 'b', 'c'), message(unix.NLMSG_DONE, 2, seq, port, errno(0)...)), want: []string{"a", "bc"}, done: true},
		"a dump that goes on":         {bytes: message(row, 2, seq, port, 'a'), want: []string{"a"}},
		"one message":                 {single: true, bytes: message(row, 0, seq, port, 'a'), want: []string{"a"}, done: true},
		"an acknowledgement":          {bytes: message(unix.NLMSG_ERROR, 0, seq, port, errno(0)...), done: true},
		"a refusal":                   {bytes: message(unix.NLMSG_ERROR, 0, seq, port, errno(unix.EPERM)...), done: true, err: unix.EPERM},
		"a dump that failed":          {bytes: message(unix.NLMSG_DONE, 2, seq, port, errno(unix.ENOMEM)...), done: true, err: unix.ENOMEM},
		"an end without a code":       {bytes: message(unix.NLMSG_DONE, 2, seq, port), done: true},
		"a disturbed dump":            {bytes: join(message(row, 2|unix.NLM_F_DUMP_INTR, seq, port, 'a'), message(unix.NLMSG_DONE, 2, seq, port, errno(0)...)), want: []string{"a"}, err: ErrInterrupted},
		"of an earlier question":      {bytes: join(message(row, 2, seq-1, port, 'x'), message(unix.NLMSG_ERROR, 0, seq-1, port, errno(unix.EPERM)...))},
		"for another port":            {bytes: message(row, 2, seq, port+1, 'x')},
		"nothing":                     {},
		"half a header":               {bytes: []byte{16, 0, 0}, err: ErrMalformed},
		"longer than what there is":   {bytes: message(row, 2, seq, port, 'a', 'b', 'c', 'd')[:18], err: ErrMalformed},
		"shorter than its own header": {bytes: append([]byte{8, 0, 0, 0}, make([]byte, 12)...), err: ErrMalformed},
		"an error without a code":     {bytes: message(unix.NLMSG_ERROR, 0, seq, port), err: ErrMalformed},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var got []string
			a := answer{sequence: seq, port: port, single: c.single}
			done, err := a.read(c.bytes, func(_ uint16, body []byte) error {
				got = append(got, string(body))
				return nil
			})
			if done != c.done || !errors.Is(err, c.err) || (err != nil) != (c.err != nil) {
				t.Errorf("got done %v, %v, want %v, %v", done, err, c.done, c.err)
			}
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestAnswerEndsWithTheCaller(t *testing.T) {
	t.Parallel()
	mine := errors.New("mine")
	a := answer{sequence: 1, port: 1}
	if done, err := a.read(message(20, 2, 1, 1), func(uint16, []byte) error { return mine }); done || !errors.Is(err, mine) {
		t.Errorf("got %v, %v, want the caller's own error", done, err)
	}
}

func TestRequest(t *testing.T) {
	t.Parallel()
	r := NetfilterRequest(unix.NFNL_SUBSYS_CTNETLINK, 1, unix.NLM_F_DUMP, unix.AF_INET).
		String(1, "ab").
		Nested(2, func(r *Request) { r.Attribute(3, 9, 8, 7, 6).Attribute(4) })
	want := message(0x101, 0x301, 0, 0, 2, 0, 0, 0,
		7, 0, 1, 0, 'a', 'b', 0, 0,
		16, 0, 2, 0x80, 8, 0, 3, 0, 9, 8, 7, 6, 4, 0, 4, 0)
	if diff := cmp.Diff(want, r.Bytes()); diff != "" {
		t.Error(diff)
	}
}

func TestAttributes(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		bytes []byte
		want  map[uint16]string
		err   error
	}{
		"none":                   {},
		"two, the last unpadded": {bytes: []byte{5, 0, 1, 0x80, 'a', 0, 0, 0, 6, 0, 2, 0, 'b', 'c'}, want: map[uint16]string{1: "a", 2: "bc"}},
		"empty":                  {bytes: []byte{4, 0, 3, 0}, want: map[uint16]string{3: ""}},
		"too short":              {bytes: []byte{4, 0, 3}, err: ErrMalformed},
		"too long":               {bytes: []byte{9, 0, 3, 0, 1, 2, 3, 4}, err: ErrMalformed},
		"length below header":    {bytes: []byte{3, 0, 3, 0}, err: ErrMalformed},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var got map[uint16]string
			as := Attributes{Rest: c.bytes}
			for as.Next() {
				if got == nil {
					got = map[uint16]string{}
				}
				got[as.Type] = string(as.Value)
			}
			if !errors.Is(as.Err(), c.err) {
				t.Errorf("got %v, want %v", as.Err(), c.err)
			}
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// FuzzAnswer: whatever the bytes are, nothing panics, and every body lies within them.
func FuzzAnswer(f *testing.F) {
	f.Add(message(20, 2, 1, 1, 'a'), false)
	f.Add(message(unix.NLMSG_DONE, 2, 1, 1, errno(0)...), false)
	f.Fuzz(func(t *testing.T, b []byte, single bool) {
		a := answer{sequence: 1, port: 1, single: single}
		total := 0
		_, err := a.read(b, func(_ uint16, body []byte) error {
			total += len(body) + unix.SizeofNlMsghdr
			as := Attributes{Rest: body}
			for as.Next() {
				total += 0 * len(as.Value)
			}
			return nil
		})
		if total > len(b) {
			t.Errorf("bodies of %d bytes out of %d (%v)", total, len(b), err)
		}
	})
}
