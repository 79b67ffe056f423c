/** A4 and A5: a plain OCI image by the label-less pull of ctr 1.6, run, exported, imported, mounted, collected; with its
 * layers kept as directories and as block layers. */
import assert from 'node:assert/strict';
import { cpSync, rmSync } from 'node:fs';
import path from 'node:path';
import { describe, it } from 'node:test';
import { untilNothingIsLeft } from '../harness/settled.ts';
import { busyboxImage, push } from './images.ts';
import { Stand, told, writableLabel } from './stand.ts';
import { treeOf } from './trees.ts';

for (const ociLayers of ['overlayfs', 'block'] as const) {
  describe(`a plain OCI image with ociLayers=${ociLayers}`, () => {
    it(
      'is pulled, run, exported, removed without a trace, imported and mounted',
      told(async () => {
        await using stand = await Stand.start(`oci-${ociLayers}`, { containerd: 'plain', registry: true, ociLayers });
        const { work, client } = stand;
        const reference = await push(stand.registry.host, 't/bb', 'latest', await busyboxImage(work));
        const expected = path.join(work.path, 'expected');
        cpSync(work.dir('trees', 'busybox'), expected, { recursive: true, verbatimSymlinks: true });
        cpSync(work.dir('trees', 'upper'), expected, { recursive: true });
        for (const gone of ['etc/removed-later', 'etc/.wh.removed-later']) rmSync(path.join(expected, gone));

        await stand.ctr('images', 'pull', '--plain-http', '--snapshotter', 'overlaybd', reference);
        const layers = await client.list('kind==committed');
        assert.equal(layers.length, 2);
        for (const layer of layers)
          assert.match(layer.name, new RegExp(`^${stand.containerd.namespace}/\\d+/sha256:[0-9a-f]{64}$`));
        assert.deepEqual(
          layers.map((layer) => layer.parent).filter((parent) => parent !== ''),
          layers.filter((layer) => layer.parent === '').map((layer) => layer.name),
        );
        assert.deepEqual(await client.list('kind==active'), [], 'the extract- snapshots are all committed');

        const run = (id: string, ...command: string[]): Promise<string> =>
          stand.ctr('run', '--rm', '--snapshotter', 'overlaybd', reference, id, ...command);
        assert.equal(await run('c1', '/bin/cat', '/hello'), 'hello\n');
        assert.equal(await run('c2', '/bin/cat', '/etc/added'), 'added by the second layer\n');
        await assert.rejects(run('c3', '/bin/cat', '/etc/removed-later'), /No such file/);
        assert.match(await run('c4', '/bin/grep', ' / ', '/proc/mounts'), /^overlay \/ overlay rw/m);

        const archive = path.join(work.path, 'x.tar');
        await stand.ctr('images', 'export', archive, reference);
        await stand.ctr('images', 'rm', '--sync', reference);
        await stand.collectGarbage();
        await untilNothingIsLeft(stand.snapshotter, client);

        await stand.ctr('images', 'import', '--snapshotter', 'overlaybd', archive);
        const target = work.dir('mounted');
        await using _mounted = await stand.mountImage(target);
        assert.deepEqual(treeOf(target), treeOf(expected));
        assert.throws(() => rmSync(path.join(target, 'hello')), /EROFS|Read-only file system/);
      }),
    );
  });
}

it(
  'a plain image runs on a block device of its own when its layers are block layers',
  told(async () => {
    await using stand = await Stand.start('oci-dev', { containerd: 'plain', registry: true, ociLayers: 'block' });
    const reference = await push(stand.registry.host, 't/bb', 'latest', await busyboxImage(stand.work));
    await stand.ctr('images', 'pull', '--plain-http', '--snapshotter', 'overlaybd', reference);
    for (const mode of ['dev', 'dir']) {
      const label = `${writableLabel}=${mode}`;
      const args = ['run', '--rm', '--snapshotter', 'overlaybd', '--snapshotter-label', label, reference, `c-${mode}`];
      assert.match(await stand.ctr(...args, '/bin/grep', ' / ', '/proc/mounts'), /^\/dev\/\S+ \/ ext4 rw/m);
      assert.equal(await stand.ctr(...args, '/bin/cat', '/hello'), 'hello\n');
    }
  }),
);
