package activation

import (
	"os"
	"path/filepath"
	"testing"

	"hibergate/activation/nettest"
)

// Whoever leaves last turns the setting off, no matter who turned it on and how that one ended.
func TestSwitch(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		before string
		leave  []int // -1 - i: killed
		want   bool
	}{
		"first leaves first": {"0\n", []int{0, 1, 2}, false},
		"first leaves last":  {"0\n", []int{2, 1, 0}, false},
		"first is killed":    {"0\n", []int{-1, 1, 2}, false},
		"two are killed":     {"0\n", []int{-1, 2, -2}, true}, // nobody is left who could
		"last one remembers": {"0\n", []int{-1, -2, 2}, false},
		"was on":             {"1\n", []int{0, 1, 2}, true},
		"one stays":          {"0\n", []int{0, 2}, true},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			file := filepath.Join(t.TempDir(), "switch")
			if err := os.WriteFile(file, []byte(test.before), 0o600); err != nil {
				t.Fatal(err)
			}
			var all [3]Switch
			for i := range all {
				all[i].Path = file
				if err := all[i].On(); err != nil {
					t.Fatal(err)
				}
				defer all[i].file.Close()
			}
			if on, err := isOn(file); !on || err != nil {
				t.Fatalf("got %v, %v", on, err)
			}
			for _, i := range test.leave {
				var err error
				if i < 0 {
					err = all[-1-i].file.Close() // which is all that the others see of it
				} else {
					err = all[i].Restore()
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			if on, err := isOn(file); on != test.want || err != nil {
				t.Errorf("got %v, %v, want %v", on, err, test.want)
			}
		})
	}
}

// Files under /proc/sys take the same locks.
func TestSwitchKernel(t *testing.T) {
	t.Parallel()
	nettest.Need(t, parkable)
	inOwnNetwork(t, func() {
		first, second := Switch{Path: migratePath}, Switch{Path: migratePath}
		for _, s := range []*Switch{&first, &second} {
			if err := s.On(); err != nil {
				t.Error(err)
				return
			}
		}
		if err := first.file.Close(); err != nil { // as when it is killed
			t.Error(err)
		}
		if err := second.Restore(); err != nil {
			t.Error(err)
		}
		if on, err := isOn(migratePath); on || err != nil {
			t.Errorf("got %v, %v after the last", on, err)
		}
	})
}
