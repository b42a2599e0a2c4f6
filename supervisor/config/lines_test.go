package config

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestIndexLines(t *testing.T) {
	t.Parallel()
	const text = "\ufeff# [no]\r\n" + `a = 1 # b = 2
"q\u0021" = "x = \" # 1" # comment
'l.l'.d . e = """
[no]
no = 1 \"""
""""" # two quotes of its own

[t . "u"]
x = [ 1, [ 'a', # ]
  'b' ], { y = 2, z.w = [ {
    v = 1979-05-27 07:32:00 } ] } ]
[t]
last = ''''''
[[r]]
n = 1
[[ r ]]
[r.s]
n = 2
[[r.k]]
m = { }
[[r.k]]
`
	want := map[string]int{
		"a": 2, "q!": 3, "l.l": 4, "l.l d": 4, "l.l d e": 4,
		"t": 13, "t u": 9, "t u x": 10, "t u x #0": 10, "t u x #1": 10, "t u x #1 #0": 10, "t u x #1 #1": 11,
		"t u x #2": 11, "t u x #2 y": 11, "t u x #2 z": 11, "t u x #2 z w": 11, "t u x #2 z w #0": 11, "t u x #2 z w #0 v": 12,
		"t last": 14,
		"r":      15, "r #0": 15, "r #0 n": 16, "r #1": 17, "r #1 s": 18, "r #1 s n": 19,
		"r #1 k": 20, "r #1 k #0": 20, "r #1 k #0 m": 21, "r #1 k #1": 22,
	}
	if _, _, err := parse(text); err != nil {
		t.Fatal(err)
	}
	index := indexLines(text)
	got := map[string]int{}
	for path, line := range index {
		got[strings.ReplaceAll(path, pathSeparator, " ")] = line
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("lines (-want +got):\n%s", diff)
	}
	for path, line := range map[string]int{"t u x #2 y z": 11, "t u no": 9, "no": 1} {
		if got := index.find(strings.Split(path, " ")); got != line {
			t.Errorf("find %s: got %d, want %d", path, got, line)
		}
	}
}

// Every key that the decoder finds is in the index, on a line on which it is written;
// every service is in the decoder's list of keys; and broken text does no harm.
func FuzzIndexLines(f *testing.F) {
	for _, pattern := range []string{"valid/*.toml", "invalid/*.toml"} {
		files, _ := filepath.Glob(filepath.Join(testdata, pattern))
		for _, name := range files {
			text, err := os.ReadFile(name)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(string(text))
		}
	}
	f.Add("service = { a = {}, 'b' = { c.d = [] } }\n[x]\n[x.y]\n[[x.z]]\n[x.z.z]\n")
	f.Add("a = [[{}], {\n b=\"\"\"\n\"\"\", # }\n}]\n\"\\\"\" = '''''''\nc=-inf\nd.\"\".e=0x1")
	f.Fuzz(func(t *testing.T, text string) {
		index := indexLines(text)
		tree, keys, err := parse(text)
		if err != nil {
			return
		}
		lines := strings.Split(text, "\n")
		walk(tree, nil, func(path []string) {
			line, ok := index[strings.Join(path, pathSeparator)]
			if !ok {
				t.Fatalf("key %q of %q is not found", path, text)
			}
			if line < 1 || line > len(lines) {
				t.Fatalf("key %q of %q: there is no line %d", path, text, line)
			}
			if name := path[len(path)-1]; validVariable(name) && !strings.Contains(lines[line-1], `\`) && !strings.Contains(lines[line-1], name) {
				t.Fatalf("key %q of %q is not on line %d", path, text, line)
			}
		})
		services, _ := tree["service"].(map[string]any)
		for _, k := range keys {
			if len(k) > 1 && k[0] == "service" {
				delete(services, k[1])
			}
		}
		if len(services) > 0 {
			t.Fatalf("not in the list of keys of %q: %v", text, services)
		}
	})
}

// walk visits every key and array element of a tree.
func walk(v any, path []string, visit func(path []string)) {
	if len(path) > 0 {
		visit(path)
	}
	path = slices.Clip(path)
	switch v := v.(type) {
	case map[string]any:
		for k, v := range v {
			walk(v, append(path, k), visit)
		}
	case []any:
		for i, v := range v {
			walk(v, append(path, fmt.Sprintf("#%d", i)), visit)
		}
	case []map[string]any:
		for i, v := range v {
			walk(v, append(path, fmt.Sprintf("#%d", i)), visit)
		}
	}
}
