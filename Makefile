# overlaybd-worker. Two commands: `make demo` (shows it at work) and `make test` (proves it).
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
export PATH := $(CURDIR)/.toolchain/node/bin:$(CURDIR)/node_modules/.bin:$(PATH)

PREFIX ?= /opt/overlaybd
JOBS ?= $(shell nproc)

.PHONY: help bootstrap gen native js build demo test test-native test-sanitizers test-js test-e2e lint bench install clean docs

help: ## what can be made
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

bootstrap: ## install what a fresh Debian 12 lacks (root)
	@scripts/bootstrap.sh

gen: bootstrap ## message types from proto/
	buf generate

native: bootstrap ## C++ library, executables and addon -> build/bin
	cd native && cmake --preset release > /dev/null && cmake --build ../build/native-release -j $(JOBS)
	@mkdir -p build/bin && cp -p --remove-destination build/native-release/bin/* build/bin/

js: bootstrap ## TypeScript -> build/js
	tsc -p tsconfig.build.json
	mkdir -p build/js && cp -r src/gen build/js/
	scripts/launchers.sh build/bin . "$(CURDIR)/.toolchain/node/bin/node"

build: native js ## everything

demo: build ## a redis container on a writable block device, from an empty machine
	@node e2e/demo/demo.ts

test: build ## every check, warnings are errors
	@scripts/test.sh

lint: bootstrap
	biome check --error-on-warnings .
	tsc -p tsconfig.json --noEmit

bench: build ## comparisons with peers; prints tables
	@bench/run.sh

install: build ## PREFIX=/opt/overlaybd
	scripts/install.sh "$(PREFIX)"

clean:
	rm -rf build
