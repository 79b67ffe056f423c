#!/usr/bin/env bash
# launchers.sh BIN_DIR HOME NODE
# Writes the launchers of the Node programs (overlaybd-snapshotter, overlaybd-blockd, overlaybd) into BIN_DIR.
# HOME holds build/js, build/bin/overlaybd.node and node_modules; NODE is the interpreter. All three become absolute.
set -euo pipefail
mkdir -p "$1"
bin=$(cd "$1" && pwd)
home=$(cd "$2" && pwd)
node=$3

launcher() { # name, entry below build/js
  local target="$bin/$1"
  # umask-independent, and replaced by rename: a running launcher must not change under its shell
  printf '#!/bin/sh\nexec %q %q "$@"\n' "$node" "$home/build/js/$2" > "$target.new"
  chmod 755 "$target.new"
  mv -f "$target.new" "$target"
}
launcher overlaybd-snapshotter main.js
launcher overlaybd-blockd blockd/main.js
launcher overlaybd cli/main.js
