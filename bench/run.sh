#!/usr/bin/env bash
# Compares our devices and daemons with their peers in one run and prints tables. See bench/README.md.
# BENCH_ONLY=devices,attach,rpc,memory   BENCH_SECONDS=1   BENCH_ROUNDS=3   BENCH_MEDIA=disk,tmpfs   BENCH_OUT=FILE.json
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.toolchain/node/bin:$PWD/node_modules/.bin:$PATH"
exec node bench/main.ts "$@"
