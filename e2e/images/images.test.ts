/** Images are the same bytes every time, and containerd's own overlayfs snapshotter runs them. */
import assert from 'node:assert/strict';
import { readFileSync, rmSync } from 'node:fs';
import path from 'node:path';
import { test } from 'node:test';
import { Containerd } from '../harness/containerd.ts';
import { startRegistry } from '../harness/registry.ts';
import { Workdir } from '../harness/workdir.ts';
import { busyboxContents, busyboxImage } from './busybox.ts';
import { chainIds, pushImage, readManifest } from './oci.ts';
import { redisImage } from './redis.ts';

test('building an image again gives the same manifest', async () => {
  const first = await busyboxImage();
  const index = readFileSync(path.join(first.layout, 'index.json'), 'utf8');
  rmSync(first.layout, { recursive: true });
  const second = await busyboxImage();
  assert.equal(readFileSync(path.join(second.layout, 'index.json'), 'utf8'), index);
});

test('the busybox image pulled through a registry shows exactly its contents', async () => {
  await using work = new Workdir('images');
  const registry = await startRegistry(work);
  const containerd = await Containerd.start(work, { plugins: [] });
  const image = await busyboxImage();
  const reference = await pushImage(image, registry.host, 'test/busybox');
  await containerd.ctr(['images', 'pull', '--plain-http', reference]);
  const names = (await containerd.ctr(['snapshots', 'ls'])).trim().split('\n').slice(1);
  assert.deepEqual(names.map((line) => line.split(/\s+/)[0]).sort(), [...chainIds(image)].sort());
  for (const [file, content] of Object.entries(busyboxContents)) {
    const script = `if [ -e "$1" ]; then cat "$1"; else echo absent; fi`;
    const id = `c-${Math.random().toString(36).slice(2)}`;
    const said = await containerd.ctr(['run', '--rm', reference, id, '/bin/sh', '-c', script, 'sh', file]);
    assert.equal(said, content ?? 'absent\n', file);
  }
});

test('the redis image runs and answers', async () => {
  await using work = new Workdir('images');
  const registry = await startRegistry(work);
  const containerd = await Containerd.start(work, { plugins: [] });
  const image = await redisImage();
  assert.equal(readManifest(image).layers.length, 3);
  const reference = await pushImage(image, registry.host, 'test/redis');
  await containerd.ctr(['images', 'pull', '--plain-http', reference]);
  // ctr mounts a tmpfs on /run.
  const script = `mkdir -p /run/redis; redis-server /etc/redis/redis.conf > /log &
    for i in $(seq 100); do redis-cli -s /run/redis/redis.sock ping 2>&1 && break; sleep 0.1; done; cat /log
    ls /usr/bin /etc/redis`;
  const said = await containerd.ctr(['run', '--rm', reference, 'redis', '/bin/sh', '-c', script]);
  assert.match(said, /PONG\n/);
  assert.doesNotMatch(said, /redis-benchmark|\.wh\./);
  assert.match(said, /redis\.conf/);
  assert.doesNotMatch(said, /packages/);
});
