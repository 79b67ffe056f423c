/** A6: an image of overlaybd.commit layers, pulled by a client that sends no labels: recognised by content. */
import assert from 'node:assert/strict';
import { mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { it } from 'node:test';
import { mount, unmount } from '../harness/mounts.ts';
import { run } from '../harness/processes.ts';
import { binDir } from '../harness/snapshotter.ts';
import { repository, type Workdir } from '../harness/workdir.ts';
import { busyboxTree, imageOf, type Layer, layerOf, layerOfTar, push } from './images.ts';
import { localCommitPathLabel, Stand, told, writableLabel } from './stand.ts';
import { sha256, treeOf } from './trees.ts';

/** The blob as the only member of an ordinary tar: what a registry carries. */
async function wrapped(work: Workdir, name: string, blob: Uint8Array): Promise<Layer> {
  const dir = work.dir('wrapped', name);
  writeFileSync(path.join(dir, 'overlaybd.commit'), blob);
  return layerOf(work, dir, 'none');
}

it(
  'layers written by upstream are recognised, and the tree is the one upstream wrote',
  told(async () => {
    await using stand = await Stand.start('obd-fixture', { containerd: 'plain', registry: true });
    const fixture = path.join(repository, 'native/testdata/fixtures/ext4-apply-2');
    const layers = await Promise.all(
      ['layer00', 'layer01'].map((name) => wrapped(stand.work, name, readFileSync(path.join(fixture, name)))),
    );
    const reference = await push(stand.registry.host, 't/fixture', 'latest', imageOf(layers));
    await stand.ctr('images', 'pull', '--plain-http', '--snapshotter', 'overlaybd', reference);
    const target = stand.work.dir('mounted');
    await using _mounted = await stand.mountImage(target);
    const tree = treeOf(target);
    const expected = JSON.parse(readFileSync(path.join(fixture, 'tree1.json'), 'utf8')) as readonly {
      readonly path: string;
      readonly mode: string;
      readonly uid: number;
      readonly gid: number;
      readonly sha256?: string;
    }[];
    const files = expected.filter((entry) => entry.mode.startsWith('100'));
    assert.ok(files.length > 5);
    for (const file of files) {
      const mode = (Number.parseInt(file.mode, 8) & 0o7777).toString(8);
      assert.equal(tree.get(file.path), `file ${mode} ${file.uid}:${file.gid} ${file.sha256}`, file.path);
    }
    assert.deepEqual(
      [...tree.keys()].sort(),
      expected
        .map((entry) => entry.path)
        .filter((name) => name !== 'lost+found')
        .sort(),
    );
    assert.ok(readdirSync(path.join(stand.snapshotter.root, 'snapshots')).length >= 2);
  }),
);

it(
  'an image we exported ourselves runs in every mode on a machine that never saw its labels',
  told(async () => {
    await using stand = await Stand.start('obd-roundtrip', { containerd: 'plain', registry: true });
    const { work, client } = stand;
    // The layer: a writable device without a parent, filled, committed, exported as clients export it.
    const tree = busyboxTree(work);
    const target = work.dir('filling');
    await mount(
      await client.prepare('filling', '', { [writableLabel]: 'dir', 'containerd.io/snapshot/overlaybd/vsize': '1' }),
      target,
    );
    try {
      await run('cp', ['-a', `${tree}/.`, target]);
    } finally {
      await unmount(target);
    }
    await client.commit('filled', 'filling', { [writableLabel]: 'dir' });
    const sealed = (await client.stat('filled')).labels[localCommitPathLabel];
    assert.ok(sealed !== undefined, 'a committed block layer says where it lies');
    mkdirSync(work.dir('export'), { recursive: true });
    const blobs: Buffer[] = [];
    for (const name of ['once', 'twice']) {
      const out = path.join(work.dir('export'), name);
      await run(path.join(binDir, 'overlaybd-commit'), ['--commit_sealed', sealed, out, '-z', '-t']);
      blobs.push(readFileSync(out));
    }
    const [once = Buffer.alloc(0), twice = Buffer.alloc(0)] = blobs;
    assert.equal(sha256(once), sha256(twice), 'the export is reproducible');

    // The blob is a tar already, whose only member is overlaybd.commit: the layer of an image as it stands.
    const reference = await push(stand.registry.host, 't/ours', 'latest', imageOf([layerOfTar(once, 'none')]));
    await stand.ctr('images', 'pull', '--plain-http', '--snapshotter', 'overlaybd', reference);
    const runs = {
      overlayfs: /^overlay \/ overlay rw/m,
      dir: /^\/dev\/\S+ \/ ext4 rw/m,
      dev: /^\/dev\/\S+ \/ ext4 rw/m,
    };
    for (const [mode, table] of Object.entries(runs)) {
      const label = mode === 'overlayfs' ? [] : ['--snapshotter-label', `${writableLabel}=${mode}`];
      const args = ['run', '--rm', '--snapshotter', 'overlaybd', ...label, reference, `c-${mode}`];
      assert.equal(await stand.ctr(...args, '/bin/cat', '/hello'), 'hello from a lower layer\n');
      assert.match(await stand.ctr(...args, '/bin/grep', ' / ', '/proc/mounts'), table, mode);
    }
  }),
);
