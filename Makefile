# overlaybd-worker. Two commands: `make demo` (shows it at work) and `make test` (proves it).
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
export PATH := $(CURDIR)/.toolchain/node/bin:$(CURDIR)/node_modules/.bin:$(PATH)

PREFIX ?= /opt/overlaybd
JOBS ?= $(shell nproc)
# Targets of native/CMakeLists.txt, without their prefix.
PROGRAMS := node create commit merge resize zfile attacher export

.PHONY: help bootstrap gen native programs js build demo test test-native test-sanitizers test-js test-e2e lint bench install clean docs

help: ## what can be made
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

bootstrap: ## install what a fresh Debian 12 lacks (root)
	@scripts/bootstrap.sh

gen: bootstrap ## message types from proto/
	buf generate

native: bootstrap ## C++ library, executables and addon -> build/bin, and their tests
	cd native && cmake --preset release > /dev/null && cmake --build ../build/native-release -j $(JOBS)

# Compiling the tests takes as long as the rest.
programs: bootstrap ## executables and addon alone -> build/bin
	cd native && cmake --preset release > /dev/null && \
	  cmake --build ../build/native-release -j $(JOBS) --target $(PROGRAMS:%=overlaybd-%)

js: bootstrap ## TypeScript -> build/js
	tsc -p tsconfig.build.json
	mkdir -p build/js && cp -r src/gen build/js/
	scripts/launchers.sh build/bin . "$(CURDIR)/.toolchain/node/bin/node"

build: native js ## everything

demo: programs js ## a redis container on a writable block device, from an empty machine
	@node e2e/demo/demo.ts

test: build ## every check, warnings are errors
	@scripts/test.sh

lint: bootstrap
	biome check --error-on-warnings .
	tsc -p tsconfig.json --noEmit

bench: build ## comparisons with peers; prints tables
	@bench/run.sh

install: programs js ## PREFIX=/opt/overlaybd
	scripts/install.sh "$(PREFIX)"

clean:
	rm -rf build
