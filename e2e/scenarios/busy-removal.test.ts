/** A11: what is still in use is not removed, and says so with the one code that lets a garbage collection go on. */
import assert from 'node:assert/strict';
import { mkdirSync } from 'node:fs';
import { it } from 'node:test';
import { status } from '@grpc/grpc-js';
import { mount, mounted, unmount } from '../harness/mounts.ts';
import { run, until } from '../harness/processes.ts';
import { busyboxImage, push } from './images.ts';
import { refused, Stand, told, writableLabel } from './stand.ts';

const small = { 'containerd.io/snapshot/overlaybd/vsize': '1' };

for (const mode of ['dev', 'dir'] as const) {
  it(
    `removing a ${mode} snapshot that a client has mounted is FailedPrecondition until it lets go`,
    told(async () => {
      await using stand = await Stand.start(`busy-${mode}`);
      const { client, work } = stand;
      const mounts = await client.prepare('held', '', { [writableLabel]: mode, ...small });
      await client.prepare('other', '', { [writableLabel]: mode, ...small });
      await client.prepare('plain');
      const target = work.dir('held');
      {
        await using _held = await mounted(work, mounts, target);
        await refused(client.remove('held'), status.FAILED_PRECONDITION, /held/);
        assert.equal((await client.stat('held')).name, 'held', 'a refused removal removes nothing');
        // Others are removed meanwhile, and Cleanup passes by what is in use.
        await client.remove('other');
        await client.remove('plain');
        await client.cleanup();
        await run('sh', ['-c', `echo still > ${target}/file && sync ${target}/file`]);
      }
      await client.remove('held');
      await client.cleanup();
    }),
  );
}

it(
  'garbage collection goes on around a busy device, and a later one frees it',
  told(async () => {
    await using stand = await Stand.start('busy-gc', { containerd: 'plain', registry: true, ociLayers: 'block' });
    const { client, work } = stand;
    const reference = await push(stand.registry.host, 't/bb', 'latest', await busyboxImage(work));
    await stand.ctr('images', 'pull', '--plain-http', '--snapshotter', 'overlaybd', reference);
    const label = `${writableLabel}=dev`;
    for (const id of ['c1', 'c2']) {
      await stand.ctr(
        'run',
        '-d',
        '--snapshotter',
        'overlaybd',
        '--snapshotter-label',
        label,
        reference,
        id,
        '/bin/sleep',
        '600',
      );
    }
    const row = async (id: string): Promise<string | undefined> =>
      (await client.list('kind==active')).find((info) => info.name.endsWith(`/${id}`))?.name;
    const key = await row('c1');
    assert.ok(key !== undefined);
    const target = work.dir('shell');
    mkdirSync(target, { recursive: true });
    await mount(await client.mounts(key), target);
    try {
      for (const id of ['c1', 'c2']) {
        await stand.ctr('tasks', 'rm', '--force', id);
        await stand.ctr('containers', 'rm', id);
      }
      await stand.collectGarbage();
      await until('the other container is collected', async () => (await row('c2')) === undefined);
      assert.equal(await row('c1'), key, 'the busy one is kept');
      assert.match(stand.containerd.daemon.log(), /failed to remove snapshot/i);
    } finally {
      await unmount(target);
    }
    await stand.collectGarbage();
    await until('the busy one is collected once it is free', async () => (await row('c1')) === undefined);
  }),
);
