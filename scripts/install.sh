#!/usr/bin/env bash
# install.sh PREFIX [DESTDIR]
# Puts executables into PREFIX/bin (default layout: /opt/overlaybd/bin, where containerd's and BuildKit's clients look
# for overlaybd-commit), everything the daemons need into PREFIX/lib/overlaybd-worker, unit files and sample
# configurations into PREFIX/share/overlaybd-worker. An existing /etc/overlaybd-snapshotter/config.json is kept.
set -euo pipefail
cd "$(dirname "$0")/.."
prefix=${1:?usage: install.sh PREFIX [DESTDIR]}
dest=${2:-}
root=$dest$prefix
home=$root/lib/overlaybd-worker

[ -x build/bin/overlaybd-commit ] && [ -f build/js/main.js ] || { echo 'install: run "make build" first' >&2; exit 1; }
install -d "$root/bin" "$home/build/bin" "$home/node/bin" "$root/share/overlaybd-worker"

for program in build/bin/overlaybd-*; do
  case "$(basename "$program")" in overlaybd-snapshotter | overlaybd-blockd) continue ;; esac
  # A new file and a rename: a running copy keeps its inode.
  install -m 755 -T "$program" "$root/bin/.$(basename "$program").new"
  mv -f "$root/bin/.$(basename "$program").new" "$root/bin/$(basename "$program")"
done
install -m 755 .toolchain/node/bin/node "$home/node/bin/node"
install -m 644 build/bin/overlaybd.node "$home/build/bin/overlaybd.node"
install -m 644 package.json package-lock.json "$home/"
rm -rf "$home/build/js.new" && cp -r build/js "$home/build/js.new"
rm -rf "$home/build/js" && mv "$home/build/js.new" "$home/build/js"

# Run-time npm packages only: the ones package.json names as dependencies, and theirs. What npm nested inside a package
# goes along with it.
rm -rf "$home/node_modules.new" && mkdir "$home/node_modules.new"
npm ls --omit=dev --all --parseable | sed -n "s|^$PWD/node_modules/||p" | grep -v /node_modules/ | sort -u |
  while read -r package; do
    mkdir -p "$home/node_modules.new/$(dirname "$package")"
    cp -r "node_modules/$package" "$home/node_modules.new/$package"
  done
rm -rf "$home/node_modules" && mv "$home/node_modules.new" "$home/node_modules"

# The launchers name final paths, not those below DESTDIR.
PREFIX_HOME=$prefix/lib/overlaybd-worker
for pair in overlaybd-snapshotter:main.js overlaybd-blockd:blockd/main.js overlaybd:cli/main.js; do
  name=${pair%%:*}
  printf '#!/bin/sh\nexec %q %q "$@"\n' "$PREFIX_HOME/node/bin/node" "$PREFIX_HOME/build/js/${pair#*:}" > "$root/bin/.$name.new"
  chmod 755 "$root/bin/.$name.new"
  mv -f "$root/bin/.$name.new" "$root/bin/$name"
done

for unit in deploy/*.service; do
  sed "s|/opt/overlaybd|$prefix|g" "$unit" > "$root/share/overlaybd-worker/$(basename "$unit")"
done
cp deploy/*.json deploy/*.toml "$root/share/overlaybd-worker/"
if [ "$(id -u)" = 0 ] && [ ! -e "$dest/etc/overlaybd-snapshotter/config.json" ]; then
  install -d "$dest/etc/overlaybd-snapshotter"
  install -m 644 deploy/config.json "$dest/etc/overlaybd-snapshotter/config.json"
fi
echo "installed into $root; unit files and samples: $root/share/overlaybd-worker"
