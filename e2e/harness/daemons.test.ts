/** The harness around our own daemons, as built: they start, restart, are killed, and nothing stays. */
import assert from 'node:assert/strict';
import { writeFileSync } from 'node:fs';
import path from 'node:path';
import { test } from 'node:test';
import { leaked, machineState, ourLoops } from './leaks.ts';
import { mounted } from './mounts.ts';
import { runAny } from './processes.ts';
import { removeAll, servedDevices, untilNothingIsLeft } from './settled.ts';
import { Blockd, Snapshotter } from './snapshotter.ts';
import { Workdir } from './workdir.ts';

const dev = { 'containerd.io/snapshot/overlaybd.writable': 'dev' };

test('a device outlives restarts and a kill -9 of the snapshotter', async () => {
  await using work = new Workdir('daemons');
  const blockd = await Blockd.start(work);
  const snapshotter = await Snapshotter.start(work, blockd, { rwMode: 'dev' });
  using client = snapshotter.client();
  const [mount] = await client.prepare('active', '', dev);
  assert.ok(mount !== undefined);
  {
    await using target = await mounted(work, [mount], work.dir('mnt'));
    await snapshotter.restart();
    assert.deepEqual(await client.mounts('active'), [mount]);
    await snapshotter.kill();
    writeFileSync(path.join(target.path, 'file'), 'written while no snapshotter lives', { flush: true });
    await snapshotter.start();
    assert.deepEqual(await client.mounts('active'), [mount]);
    assert.equal((await servedDevices(blockd.address)).length, 1);
  }
  await removeAll(client);
  await untilNothingIsLeft(snapshotter, client);
});

test('the loop devices of a blockd that was killed go with the run', async () => {
  const before = await machineState();
  const loopsBefore = ourLoops();
  let tag = '';
  {
    await using work = new Workdir('daemons');
    tag = work.tag;
    const blockd = await Blockd.start(work);
    const snapshotter = await Snapshotter.start(work, blockd, { rwMode: 'dev' });
    using client = snapshotter.client();
    const [mount] = await client.prepare('active', '', dev);
    await blockd.kill();
    const read = await runAny('dd', [`if=${mount?.source}`, 'of=/dev/null', 'bs=4096', 'count=1', 'iflag=direct']);
    assert.notEqual(read.code, 0, 'a dead server answers');
  }
  assert.deepEqual(
    ourLoops().filter((node) => !loopsBefore.includes(node)),
    [],
  );
  assert.deepEqual(leaked(before, await machineState(), [tag]), []);
});

test('a run that forgets its devices is told so', async () => {
  const work = new Workdir('daemons');
  const blockd = await Blockd.start(work);
  const snapshotter = await Snapshotter.start(work, blockd, { rwMode: 'dir' });
  using client = snapshotter.client();
  await client.prepare('forgotten');
  const problems = await work.close();
  assert.match(problems.join('\n'), /had to detach \/dev\/loop/);
});
