/** Invariant: the data path has no JavaScript. A device is written and read by another process while this one, which
 * serves it, does nothing but spin in a JavaScript loop. */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, mkdtempSync, readFileSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { it } from 'node:test';
import { loadNative, nativePath } from './native.ts';

const kStallMaxMs = 60_000;

it('a device is served while the event loop stands still', async () => {
  const native = loadNative(nativePath());
  const dir = mkdtempSync(join(tmpdir(), 'obd-stall-'));
  const upper = { data: join(dir, 'data'), index: join(dir, 'index') };
  await native.createUpper({ ...upper, virtualSizeBytes: 64n << 20n, sparse: false, parentUuid: null });
  writeFileSync(join(dir, 'config'), JSON.stringify({ repoBlobUrl: '', lowers: [], upper, resultFile: '' }));
  const device = await native.attachDevice({
    configPath: join(dir, 'config'),
    readOnly: false,
    directIo: false,
    sectorSizeBytes: 4096,
    threads: 2,
    name: `overlaybd-stall-${process.pid}`,
    runDir: dir,
  });
  try {
    const script = `
      set -e; cd "$0"
      head -c 16777216 /dev/urandom > given
      while [ ! -e stalled ]; do :; done
      dd if=given of="$1" bs=1M oflag=direct conv=fsync,notrunc 2> /dev/null
      dd if="$1" of=back bs=1M count=16 iflag=direct 2> /dev/null
      cmp given back && echo same > outcome || echo differs > outcome
      touch done`;
    const user = spawn('sh', ['-c', script, dir, device.path], { stdio: 'ignore' });
    const ended = once(user, 'exit');
    await once(user, 'spawn');
    writeFileSync(join(dir, 'stalled'), '');
    const deadline = performance.now() + kStallMaxMs;
    // No await in here: the loop below is the stall.
    while (!existsSync(join(dir, 'done')) && user.exitCode === null && performance.now() < deadline);
    assert.ok(existsSync(join(dir, 'done')), 'the other process finished during the stall');
    await ended;
    assert.equal(readFileSync(join(dir, 'outcome'), 'utf8'), 'same\n');
  } finally {
    await device.stop(true);
    await native.removeTree(dir);
  }
});
