package activity

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// holders maps the inodes of sockets to the processes that hold them, among roots and their
// descendants. Where several hold one, it is the farthest descendant.
func holders(roots []int) map[uint32]int {
	found := make(map[uint32]int)
	eachSocket(roots, func(pid, _ int, inode uint32) { found[inode] = pid })
	return found
}

// eachSocket calls each for every socket that roots and their descendants hold, with the number of
// its descriptor there. What cannot be read (the process is gone, or another user's) is left out.
func eachSocket(roots []int, each func(pid, fd int, inode uint32)) {
	eachProcess(roots, func(pid int, dir string) {
		eachSocketOf(dir, func(fd int, inode uint32) { each(pid, fd, inode) })
	})
}

// eachProcess calls each once for each of roots and their descendants, parents first, with its
// directory in /proc. roots may repeat, and be descendants of one another.
func eachProcess(roots []int, each func(pid int, dir string)) {
	isRoot := make(map[int]bool, len(roots))
	for _, pid := range roots {
		isRoot[pid] = true
	}
	var tops, others []int // of roots: those whose parent is another one come later
	for _, pid := range roots {
		if len(roots) > 1 && isRoot[parentOf(pid)] {
			others = append(others, pid)
		} else {
			tops = append(tops, pid)
		}
	}
	seen := make(map[int]bool)
	for _, next := range [][]int{tops, others} {
		for len(next) > 0 {
			var children []int
			for _, pid := range next {
				if seen[pid] {
					continue
				}
				seen[pid] = true
				dir := "/proc/" + strconv.Itoa(pid)
				each(pid, dir)
				children = append(children, childrenOf(dir)...)
			}
			next = children
		}
	}
}

// parentOf returns the parent of a process; zero where that cannot be read.
func parentOf(pid int) int {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0
	}
	var state string
	var parent int
	// The name of the program is in parentheses, and may hold some.
	if _, err := fmt.Sscan(string(b[bytes.LastIndexByte(b, ')')+1:]), &state, &parent); err != nil {
		return 0
	}
	return parent
}

func eachSocketOf(dir string, each func(fd int, inode uint32)) {
	entries, err := os.ReadDir(dir + "/fd")
	if err != nil {
		return
	}
	for _, e := range entries {
		to, err := os.Readlink(dir + "/fd/" + e.Name())
		if err != nil {
			continue
		}
		number, ok := strings.CutPrefix(to, "socket:[")
		if !ok {
			continue
		}
		inode, err := strconv.ParseUint(strings.TrimSuffix(number, "]"), 10, 32)
		fd, fdErr := strconv.Atoi(e.Name())
		if err == nil && fdErr == nil {
			each(fd, uint32(inode))
		}
	}
}

func childrenOf(dir string) []int {
	files, err := filepath.Glob(dir + "/task/*/children")
	if err != nil {
		return nil
	}
	var pids []int
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		for word := range strings.FieldsSeq(string(b)) {
			if pid, err := strconv.Atoi(word); err == nil {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

func processName(pid int) string {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/comm")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}
