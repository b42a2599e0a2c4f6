# What each target needs: a Go toolchain. race needs a C compiler too; the tests say what they skip without
# (nft, conntrack, python3 ...), and HIBERGATED_TEST_REQUIRE=all makes them fail instead.

GOLANGCI_VERSION := 2.15.0
LINT             := bin/tools/golangci-lint-$(GOLANGCI_VERSION)

PREFIX   ?= /usr/local
UNITDIR  ?= $(PREFIX)/lib/systemd/system
FUZZTIME ?= 10s
BENCH    ?= .
STORM    ?=
ADOPT    ?= .
GATE     ?= .

# "./..." leaves testdata out.
PACKAGES := ./... ./testdata/storm/... ./testdata/adopt/... ./testdata/kubernetes/...

.PHONY: all build test race e2e fuzz bench storm adopt gate lint fmt fmt-diff vet mod docs check demo install clean
all: build

build:
	CGO_ENABLED=0 go build -trimpath -o bin/hibergated ./cmd/hibergated

# All tests, as root or as an ordinary user, with or without a C compiler.
test:
	CGO_ENABLED=0 go test $(PACKAGES)

race:
	CGO_ENABLED=1 go test -race -shuffle=on $(PACKAGES)

# The stories under testdata, with the real binary and real programs.
e2e:
	CGO_ENABLED=0 go test -count=1 -v ./cmd/...

# Every fuzzer for FUZZTIME: a duration, or a number of inputs such as 1000x.
fuzz:
	@set -e; grep -rEo --include='*_test.go' '^func Fuzz[A-Za-z0-9_]+' . | sort | while IFS=: read -r file name; do \
		name=$${name#func }; echo "== $${file%/*} $$name"; \
		go test -run '^$$' -fuzz "^$$name\$$" -fuzztime $(FUZZTIME) "$${file%/*}" </dev/null; \
	done

bench:
	CGO_ENABLED=0 go test -run '^$$' -bench '$(BENCH)' -benchmem ./...

# Services through stop cycles, with clients that come at the worst moments; docs/stopping.md says how to read it.
#   make storm STORM="-cycles 20000"
storm: build
	CGO_ENABLED=0 go build -trimpath -o bin/storm ./testdata/storm
	bin/storm -hibergated bin/hibergated $(STORM)

# Programs that know nothing of hibergated through 200 cycles each, one program after the other, and how long their clients wait.
#   make adopt ADOPT=nginx HIBERGATED_CYCLES=1000
adopt:
	HIBERGATED_CYCLES=$${HIBERGATED_CYCLES:-200} CGO_ENABLED=0 go test -count=1 -v -parallel 1 -timeout 0 -run '^TestAdopt$$/$(ADOPT)' ./cmd/hibergated

# The same for gates, whoever moves the bytes.
#   make gate GATE=lookup HIBERGATED_CYCLES=1000
gate:
	HIBERGATED_CYCLES=$${HIBERGATED_CYCLES:-500} CGO_ENABLED=0 go test -count=1 -v -timeout 0 -run '^TestGateCycles$$/$(GATE)' ./cmd/hibergated

lint: $(LINT)
	$(LINT) config verify
	$(LINT) run $(PACKAGES)

fmt: $(LINT)
	$(LINT) fmt

fmt-diff: $(LINT)
	$(LINT) fmt --diff

# Building it takes minutes, so one of the same version that go install left behind is good enough.
$(LINT):
	@mkdir -p $(@D)
	@have="$$(go env GOPATH)/bin/golangci-lint"; \
	if "$$have" version 2>/dev/null | grep -qF 'version $(GOLANGCI_VERSION) '; then \
		cp "$$have" $@; \
	else \
		GOBIN="$(CURDIR)/$(@D)" go install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v$(GOLANGCI_VERSION) && \
		mv $(@D)/golangci-lint $@; \
	fi

vet:
	go vet $(PACKAGES)

mod:
	go mod verify
	go mod tidy -diff

# Writes what the program says of itself into docs/; the tests compare it.
docs:
	go test ./cmd/hibergated -run '^TestDocs$$' -count=1 -args -write-docs
	go test ./supervisor/config -run '^TestDocs$$' -count=1 -args -update

# What CI runs. A number of inputs ends the fuzzers, as a duration may end them with an error
# of its own ("context deadline exceeded"). That docs/ is up to date and that the fuzz seeds pass is part of the tests.
check: build vet mod fmt-diff lint test race
	$(MAKE) fuzz FUZZTIME=20000x

# The main job in one terminal; no root needed.
demo: build
	CGO_ENABLED=0 go build -trimpath -o bin/demo-hello ./testdata/demo/hello
	@testdata/demo/run.sh bin/hibergated "$(CURDIR)/bin/demo-hello"

# "make, then make install as root": root needs no Go for it.
install:
	@test -x bin/hibergated || { echo 'run "make" first' >&2; exit 1; }
	install -D -m 0755 bin/hibergated '$(DESTDIR)$(PREFIX)/bin/hibergated'
	install -d -m 0755 '$(DESTDIR)/etc/hibergated' '$(DESTDIR)$(UNITDIR)'
	sed 's,/usr/bin/hibergated,$(PREFIX)/bin/hibergated,' contrib/systemd/hibergated.service >'$(DESTDIR)$(UNITDIR)/hibergated.service'
	chmod 0644 '$(DESTDIR)$(UNITDIR)/hibergated.service'
	install -D -m 0644 docs/hibergated.8 '$(DESTDIR)$(PREFIX)/share/man/man8/hibergated.8'
	install -D -m 0644 docs/hibergated.toml.5 '$(DESTDIR)$(PREFIX)/share/man/man5/hibergated.toml.5'

clean:
	rm -rf bin
