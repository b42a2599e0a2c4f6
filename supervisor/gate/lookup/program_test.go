package lookup

import (
	"bytes"
	"runtime"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"hibergate/activation/nettest"
)

// infoOf asks the kernel about an object of BPF.
func infoOf(t *testing.T, fd int) []byte {
	t.Helper()
	var pin runtime.Pinner
	defer pin.Unpin()
	info := make([]byte, 80)
	attr := struct {
		fd, size uint32
		info     uint64
	}{uint32(fd), uint32(len(info)), pointer(&pin, &info[0])}
	if _, err := bpf(unix.BPF_OBJ_GET_INFO_BY_FD, unsafe.Pointer(&attr), unsafe.Sizeof(attr)); err != nil {
		t.Fatal(err)
	}
	return info
}

// The verifier takes both programs, and administrators see whose they are.
func TestProgram(t *testing.T) {
	t.Parallel()
	nettest.Need(t, nettest.Namespaces, nettest.RealRoot)
	table, err := createMap(unix.BPF_MAP_TYPE_SOCKHASH)
	if err != nil {
		nettest.Need(t, func() error { return err })
	}
	defer unix.Close(table)
	counts, err := createMap(unix.BPF_MAP_TYPE_HASH)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(counts)
	if got := infoOf(t, table)[24:40]; !bytes.Equal(bytes.TrimRight(got, "\x00"), []byte("hibergated")) {
		t.Errorf("map: got name %q", got)
	}
	for _, devices := range []bool{true, false} {
		code := program(table, counts, devices)
		fd, err := load(code)
		if err != nil {
			t.Errorf("devices %v: %v", devices, err)
			continue
		}
		if got := infoOf(t, fd)[64:80]; !bytes.Equal(bytes.TrimRight(got, "\x00"), []byte("hibergated")) {
			t.Errorf("program: got name %q", got)
		}
		t.Logf("devices %v: %d instructions", devices, len(code))
		unix.Close(fd)
	}
}
