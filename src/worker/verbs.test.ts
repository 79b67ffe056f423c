/** Invariants: the semantics of the reference metadata store for each verb; labels as the contract says; Commit and
 * Remove settle before their slow work, which survives a restart; busy is FailedPrecondition with nothing changed;
 * concurrent callers get one winner and one attach. */
import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { ErrorKind, emptyState, isKind, layout, localCommitPath, parseFs, World, writableLabel } from './test-world.ts';
import type { Labels } from './worker.ts';

const dir: Labels = { [writableLabel]: 'dir' };
const dev: Labels = { [writableLabel]: 'dev' };
const live = new AbortController().signal;

/** Lets everything run that needs no outside event: as many turns as the longest chain of effects has steps. */
async function settleDown(): Promise<void> {
  for (let turn = 0; turn < 200; turn += 1) await new Promise<void>((resolve) => setImmediate(resolve));
}

describe('Prepare and View', () => {
  it('refuse an unknown parent, a parent that is not committed, and a key in use, in this order', async () => {
    const world = new World();
    await world.prepare('active');
    await assert.rejects(world.prepare('x', 'none'), isKind(ErrorKind.NotFound, /prepare x.*none/));
    await assert.rejects(world.prepare('active', 'none'), isKind(ErrorKind.NotFound));
    await assert.rejects(world.prepare('x', 'active'), isKind(ErrorKind.InvalidArgument, /active.*not committed/));
    await world.view('view');
    await assert.rejects(world.view('x', 'view'), isKind(ErrorKind.InvalidArgument));
    for (const key of ['active', 'view']) {
      await assert.rejects(world.prepare(key), isKind(ErrorKind.AlreadyExists, new RegExp(key)));
      await assert.rejects(world.view(key), isKind(ErrorKind.AlreadyExists));
    }
    await assert.rejects(world.prepare(''), isKind(ErrorKind.InvalidArgument));
    await assert.rejects(world.prepare('a\0b'), isKind(ErrorKind.InvalidArgument));
  });

  it('share one name space with committed snapshots', async () => {
    const world = new World();
    await world.directoryLayer('taken');
    await assert.rejects(world.prepare('taken'), isKind(ErrorKind.AlreadyExists));
  });

  it('record kind, parent, labels and one time', async () => {
    const world = new World();
    await world.directoryLayer('base');
    const before = world.now;
    await world.prepare('k', 'base', { 'containerd.io/gc.root': 'x', empty: '', [localCommitPath]: '/etc' });
    const info = await world.worker.stat('k');
    assert.deepEqual([info.kind, info.name, info.parent], ['active', 'k', 'base']);
    assert.deepEqual(info.labels, { 'containerd.io/gc.root': 'x' });
    assert.equal(info.createdAt, info.updatedAt);
    assert.ok(info.createdAt > before && info.createdAt <= world.now);
    await world.view('v');
    assert.deepEqual([(await world.worker.stat('v')).kind, (await world.worker.stat('v')).parent], ['view', '']);
  });

  it('take the owner of the parent, and write the image reference as text', async () => {
    const world = new World();
    const id = await world.directoryLayer('base');
    world.engine.addDir(layout.of(id).fs, { uid: 12, gid: 34 });
    await world.prepare('k', 'base', { 'containerd.io/snapshot/cri.image-ref': '../../../etc/passwd' });
    const paths = layout.of(world.idOf('k'));
    assert.deepEqual(await world.engine.files.owner(paths.fs), { uid: 12, gid: 34 });
    assert.equal(world.engine.text(paths.imageRef), '../../../etc/passwd');
  });

  it('never use a key as a path', async () => {
    const world = new World();
    for (const key of ['../../etc', '/etc/passwd', 'a b/c:d', 'é\u{1f600}', 'x'.repeat(1024), '__proto__', "'; --"]) {
      await world.prepare(key);
      assert.equal((await world.worker.stat(key)).name, key);
    }
    const outside = world.engine.calls.filter((call) => call.includes('etc') || call.includes('proto'));
    assert.deepEqual(outside, []);
  });

  it('keep labels of any text up to the limit of a pair', async () => {
    const world = new World();
    const labels = JSON.parse('{"__proto__":"x","constructor":"y","toString":"z"}') as Labels;
    await world.prepare('k', '', { ...labels, [`l/${'x'.repeat(2000)}`]: 'y'.repeat(2000) });
    const found = (await world.worker.stat('k')).labels;
    assert.equal(Object.keys(found).length, 4);
    assert.equal(found['constructor'], 'y');
    const long = { k: 'v'.repeat(4096) };
    await assert.rejects(world.prepare('long', '', long), isKind(ErrorKind.InvalidArgument, /prepare long.*4096/));
    await assert.rejects(world.prepare('nul', '', { k: 'a\0' }), isKind(ErrorKind.InvalidArgument));
  });

  it('let exactly one of many callers of one key win', async () => {
    const world = new World();
    await world.blockLayer('base');
    const results = await Promise.allSettled(
      Array.from({ length: 8 }, (_, n) => world.prepare('same', 'base', n % 2 === 0 ? dev : {})),
    );
    assert.equal(results.filter(({ status }) => status === 'fulfilled').length, 1);
    for (const result of results) {
      if (result.status === 'rejected') assert.ok(isKind(ErrorKind.AlreadyExists)(result.reason));
    }
  });

  it('attach a shared device once, however many ask', async () => {
    const world = new World();
    await world.blockLayer('base');
    world.engine.calls.length = 0;
    const release = world.engine.hold('devices.attach');
    const all = Promise.all(
      Array.from({ length: 10 }, (_, n) => (n % 2 ? world.view(`v${n}`, 'base') : world.prepare(`c${n}`, 'base'))),
    );
    await settleDown();
    release();
    await all;
    const attaches = world.engine.calls.filter((call) => /^(devices.attach|mounts.mount) /.test(call));
    assert.deepEqual(attaches, ['devices.attach 1-ro', `mounts.mount ${layout.of('1').mountPoint}`]);
  });

  it('do not exist for anybody before they are answered', async () => {
    const world = new World();
    const base = await world.directoryLayer('base');
    const release = world.engine.hold('files.makeSnapshotDir');
    const prepared = world.prepare('k', 'base');
    await settleDown();
    await assert.rejects(world.worker.stat('k'), isKind(ErrorKind.NotFound));
    await assert.rejects(world.mounts('k'), isKind(ErrorKind.NotFound));
    await assert.rejects(world.commit('n', 'k'), isKind(ErrorKind.FailedPrecondition));
    await assert.rejects(world.worker.remove('k'), isKind(ErrorKind.FailedPrecondition));
    // … but the parent they stand on is kept.
    await assert.rejects(world.worker.remove('base'), isKind(ErrorKind.FailedPrecondition, /remove/));
    assert.deepEqual(
      (await world.list()).map(({ name }) => name),
      ['base'],
    );
    release();
    await prepared;
    assert.equal((await world.worker.stat('k')).kind, 'active');
    assert.equal(base, '1');
  });

  it('are undone when the client gives up, at whichever step', async () => {
    for (const call of ['layers.createWritable', 'devices.attach', 'mounts.format', 'mounts.mount']) {
      const world = new World();
      const release = world.engine.hold(call);
      const controller = new AbortController();
      const prepared = world.prepare('k', '', dir, controller.signal);
      await settleDown();
      assert.ok(world.engine.calls.at(-1)?.startsWith(call));
      controller.abort();
      release();
      if (call === 'mounts.mount') await prepared;
      else await assert.rejects(prepared, isKind(ErrorKind.Cancelled, /prepare k/));
      await world.removeAll();
      assert.deepEqual(world.engine.state(), emptyState);
      await world.prepare('k', '', dir);
    }
  });

  it('of a client that gives up stop waiting for a shared device that others want', async () => {
    const world = new World();
    await world.blockLayer('base');
    const release = world.engine.hold('devices.attach');
    const controller = new AbortController();
    const first = world.prepare('first', 'base', {}, controller.signal);
    const second = world.prepare('second', 'base');
    await settleDown();
    controller.abort();
    release();
    await assert.rejects(first, isKind(ErrorKind.Cancelled));
    await second;
    assert.deepEqual(world.engine.state().devices, ['1-ro']);
    assert.deepEqual(world.engine.state().mounts, [layout.of('1').mountPoint]);
  });

  it('before anything is written say Cancelled', async () => {
    const world = new World();
    await assert.rejects(world.prepare('k', '', {}, AbortSignal.abort()), isKind(ErrorKind.Cancelled));
    assert.equal(world.store.count().snapshots, 0);
  });
});

describe('the size of a new image', () => {
  const vsize = 'containerd.io/snapshot/overlaybd/vsize';
  const maxSize = 'containerd.io/snapshot/max-size';
  const GiB = 1n << 30n;
  const good: readonly (readonly [Labels, bigint])[] = [
    [{}, 64n * GiB],
    [{ [vsize]: '0' }, 64n * GiB],
    [{ [vsize]: '' }, 64n * GiB],
    [{ [vsize]: 'large' }, 64n * GiB],
    [{ [vsize]: '3.5' }, 64n * GiB],
    [{ [vsize]: '10' }, 10n * GiB],
    [{ [vsize]: '10', [maxSize]: String(5n * GiB) }, 5n * GiB],
    [{ [vsize]: '10', [maxSize]: String(50n * GiB) }, 10n * GiB],
    [{ [maxSize]: String(100n * GiB + 17n) }, 100n * GiB],
  ];
  for (const [labels, size] of good) {
    it(`is ${size / GiB} GiB for ${JSON.stringify(labels)}`, async () => {
      const world = new World();
      await world.prepare('k', '', { ...dev, ...labels });
      const plan = JSON.parse(world.store.named('k')?.plan ?? '') as { writable: { virtualSizeBytes: string } };
      assert.equal(plan.writable.virtualSizeBytes, String(size));
      const config = JSON.parse(world.engine.text(layout.of('1').config) ?? '') as { upper: { vsize: number } };
      assert.equal(config.upper.vsize, Number(size / GiB));
    });
  }
  const bad: readonly Labels[] = [
    { [vsize]: '-1' },
    { [vsize]: String(2n ** 63n) },
    { [vsize]: '99999999999999999999999999' },
    { [maxSize]: '-1' },
    { [maxSize]: '0' },
    { [maxSize]: String(2n ** 63n) },
    { [maxSize]: 'ten' },
  ];
  for (const labels of bad) {
    it(`is refused for ${JSON.stringify(labels)}`, async () => {
      const world = new World();
      await assert.rejects(
        world.prepare('k', '', { ...dev, ...labels }),
        isKind(ErrorKind.InvalidArgument, /prepare k/),
      );
      assert.deepEqual(world.engine.state(), emptyState);
      await world.prepare('k', '', dev);
    });
  }

  it('is inherited on a parent', async () => {
    const world = new World();
    await world.blockLayer('base');
    await world.prepare('k', 'base', { ...dev, [vsize]: '7' });
    const plan = JSON.parse(world.store.named('k')?.plan ?? '') as { writable: unknown };
    assert.deepEqual(plan.writable, { type: 'append', virtualSizeBytes: '0', format: false });
  });
});

describe('overlay.active.path', () => {
  const label = 'containerd.io/snapshot/overlay.active.path';

  it('holds the writable pair until the layer is sealed, and only our two files are ours', async () => {
    const world = new World();
    world.engine.addFile('/data/a/other', 'kept');
    await world.prepare('k', '', { ...dir, [label]: '/data//a/' });
    assert.ok(world.engine.text('/data/a/writable_data') !== undefined);
    const config = JSON.parse(world.engine.text(layout.of('1').config) ?? '') as { upper: { data: string } };
    assert.equal(config.upper.data, '/data/a/writable_data');
    await assert.rejects(
      world.prepare('l', '', { ...dir, [label]: '/data/a' }),
      isKind(ErrorKind.FailedPrecondition, /\/data\/a.*k/),
    );
    await world.commit('n', 'k');
    await world.worker.drain();
    assert.ok(world.engine.text(layout.of('1').sealed) !== undefined);
    assert.equal(world.engine.text('/data/a/writable_data'), undefined);
    await world.prepare('l', '', { ...dir, [label]: '/data/a' });
    await world.worker.remove('l');
    await world.worker.drain();
    assert.equal(world.engine.text('/data/a/writable_data'), undefined);
    assert.equal(world.engine.text('/data/a/writable_index'), undefined);
    assert.equal(world.engine.text('/data/a/other'), 'kept');
  });

  for (const path of ['relative', '/a/../b', '..', '/', '/r', '/r/snapshots/1/fs', './x']) {
    it(`refuses ${path}`, async () => {
      const world = new World();
      await assert.rejects(
        world.prepare('k', '', { ...dir, [label]: path }),
        isKind(ErrorKind.InvalidArgument, /prepare k/),
      );
      assert.deepEqual(world.engine.state(), emptyState);
    });
  }
});

describe('Mounts', () => {
  it('is for active snapshots and views', async () => {
    const world = new World();
    await assert.rejects(world.mounts('k'), isKind(ErrorKind.NotFound));
    await world.directoryLayer('base');
    await assert.rejects(world.mounts('base'), isKind(ErrorKind.FailedPrecondition));
  });

  it('never hands out the path of another boot', async () => {
    const world = new World();
    const [before] = await world.prepare('k', '', dev);
    world.engine.reboot();
    const [after] = await world.mounts('k');
    assert.notEqual(after?.source, before?.source);
    assert.equal(after?.source, (await world.engine.devices.find('1'))?.path);
    assert.equal(world.engine.text(layout.of('1').mark), after?.source);
  });

  it('attaches again and mounts over what a dead block daemon left', async () => {
    const world = new World();
    await world.blockLayer('base');
    const first = await world.prepare('c', 'base');
    await world.prepare('d', 'base', dir);
    world.engine.restartBlockd();
    assert.deepEqual(await world.mounts('c'), first);
    await world.mounts('d');
    const table = await world.engine.mounts.table();
    for (const { id, device } of await world.engine.devices.list()) {
      assert.ok(
        table.some(({ minor }) => minor === device.minor),
        `device ${id} is mounted`,
      );
    }
    assert.equal(table.length, 2);
  });

  it('formats nothing a second time', async () => {
    const world = new World();
    await world.prepare('k', '', dir);
    world.engine.reboot();
    await world.mounts('k');
    assert.equal(world.engine.calls.filter((call) => call.startsWith('mounts.format')).length, 1);
  });

  it('asks the kernel only for what is missing', async () => {
    const world = new World();
    await world.prepare('k', '', dev);
    world.engine.calls.length = 0;
    await world.mounts('k');
    assert.deepEqual(world.engine.calls, ['devices.find 1', 'mounts.table']);
  });
});

describe('Commit', () => {
  it('refuses as the reference store does', async () => {
    const world = new World();
    await world.prepare('a');
    await world.view('v');
    await world.directoryLayer('c');
    await assert.rejects(world.commit('n', 'none'), isKind(ErrorKind.NotFound));
    await assert.rejects(world.commit('c', 'a'), isKind(ErrorKind.AlreadyExists));
    await assert.rejects(world.commit('v', 'a'), isKind(ErrorKind.AlreadyExists));
    await assert.rejects(world.commit('n', 'v'), isKind(ErrorKind.FailedPrecondition));
    await assert.rejects(world.commit('n', 'c'), isKind(ErrorKind.FailedPrecondition));
    await assert.rejects(world.commit('', 'a'), isKind(ErrorKind.InvalidArgument));
  });

  it('keeps id and parent, replaces labels and times, and frees the key', async () => {
    const world = new World();
    await world.directoryLayer('base');
    await world.prepare('k', 'base', { old: '1' });
    const id = world.idOf('k');
    const before = await world.worker.stat('k');
    await world.commit('n', 'k', { fresh: '2', empty: '', [writableLabel]: 'dev', [localCommitPath]: '/etc' });
    const info = await world.worker.stat('n');
    assert.deepEqual([info.kind, info.parent, info.labels], ['committed', 'base', { fresh: '2' }]);
    assert.ok(info.createdAt > before.createdAt);
    assert.equal(info.createdAt, info.updatedAt);
    assert.equal(world.idOf('n'), id);
    await assert.rejects(world.worker.stat('k'), isKind(ErrorKind.NotFound));
    await world.prepare('k', 'n');
    assert.notEqual(world.idOf('k'), id);
  });

  it('is answered before the layer is sealed; only those who need the layer wait', async () => {
    const world = new World();
    await world.prepare('k', '', dev);
    await world.prepare('other', '', dev);
    const release = world.engine.hold('layers.seal');
    await world.commit('n', 'k', { l: '1' });
    assert.equal(world.store.named('n')?.kind, 'committed');
    await world.worker.stat('other');
    await world.prepare('unrelated');

    let statted = false;
    const waiting = world.worker.stat('n').then((info) => {
      statted = true;
      return info;
    });
    const child = world.prepare('child', 'n', dev);
    await settleDown();
    assert.equal(statted, false);
    assert.equal(world.engine.text(layout.of('1').sealed), undefined);
    // List does not wait; what it says is what Stat will say.
    const listed = (await world.list()).find(({ name }) => name === 'n');
    release();
    const info = await waiting;
    assert.deepEqual(listed, info);
    assert.deepEqual(info.labels, { l: '1', [localCommitPath]: layout.of('1').sealed });
    assert.ok(world.engine.text(layout.of('1').sealed) !== undefined);
    await child;
  });

  it('leaves a config that children copy, with the new layer on top', async () => {
    const world = new World();
    await world.blockLayer('one');
    await world.blockLayer('two', 'one');
    const config = JSON.parse(world.engine.text(layout.of('2').config) ?? '') as unknown;
    assert.deepEqual(config, {
      repoBlobUrl: '',
      lowers: [{ dir: layout.of('1').fs }, { dir: layout.of('2').fs }],
      upper: null,
      resultFile: layout.of('2').result,
    });
    assert.deepEqual(world.engine.state().devices, []);
    assert.deepEqual(world.engine.state().mounts, []);
  });

  it('seals by the mode of the snapshot, not by its labels', async () => {
    for (const rwMode of ['dir', 'dev']) {
      const world = new World({ rwMode });
      await world.prepare('k');
      await world.commit('n', 'k');
      assert.equal((await world.worker.stat('n')).labels[localCommitPath], layout.of('1').sealed);
      assert.deepEqual(world.engine.state().devices, []);
    }
  });

  it('waits shortly for the last user and then refuses with nothing changed', async () => {
    const world = new World();
    await world.prepare('k', '', dev);
    const letGo = world.engine.holdOpen('1');
    const before = await world.worker.stat('k');
    await assert.rejects(world.commit('n', 'k'), isKind(ErrorKind.FailedPrecondition, /commit k.*in use/));
    assert.deepEqual(await world.worker.stat('k'), before);
    await assert.rejects(world.worker.stat('n'), isKind(ErrorKind.NotFound));
    letGo();
    await world.commit('n', 'k');
  });

  for (const [mode, labels] of [
    ['dev', dev],
    ['dir', dir],
  ] as const) {
    it(`in ${mode} mode of a device that its client left mounted takes it away, written down first`, async () => {
      const world = new World();
      await world.prepare('k', '', labels);
      const device = await world.engine.devices.find('1');
      const { major = 0, minor = 0, path: source = '' } = device ?? {};
      const entry = { mountPoint: '/mnt', source, fsType: 'ext4', major, minor, options: ['rw'] };
      const unmount = world.engine.addMount(entry);
      await world.commit('n', 'k');
      await world.prepare('child', 'n', dev);
      const { mountPoint, data } = layout.of('1');
      const order = [
        `mounts.freeze ${mountPoint}`,
        'devices.sever 1',
        `mounts.thaw ${mountPoint}`,
        `layers.seal ${data}`,
      ];
      assert.deepEqual(
        world.engine.calls.filter((call) => order.includes(call)),
        order,
      );
      assert.deepEqual(world.engine.frozen, []);
      unmount();
      await world.removeAll();
      assert.deepEqual(world.engine.state(), emptyState);
    });
  }

  it('takes an unpacked overlaybd layer for what it is', async () => {
    const world = new World();
    await world.prepare('extract-1 a');
    world.engine.addLayer(layout.of('1').commit);
    await world.commit('a', 'extract-1 a');
    await world.prepare('extract-2 b', 'a');
    world.engine.addLayer(layout.of('2').commit);
    await world.commit('b', 'extract-2 b');
    await world.worker.drain();
    const config = JSON.parse(world.engine.text(layout.of('2').config) ?? '') as { lowers: unknown };
    assert.deepEqual(config.lowers, [{ dir: layout.of('1').fs }, { dir: layout.of('2').fs }]);
    // Nothing was sealed: no label, and no device was needed.
    assert.deepEqual((await world.worker.stat('b')).labels, {});
    assert.ok(!world.engine.calls.some((call) => call.startsWith('devices.attach')));
  });

  it('takes a layer out of the device that it was unpacked into', async () => {
    const world = new World({ ociLayers: 'block' });
    await world.prepare('extract-1 a');
    world.engine.addLayer(`${layout.of('1').mountPoint}/overlaybd.commit`);
    await world.commit('a', 'extract-1 a');
    const child = await world.prepare('c', 'a', dev);
    assert.equal(child.length, 1);
    const config = JSON.parse(world.engine.text(layout.of('1').config) ?? '') as unknown;
    const { fs, result, data, index, commit } = layout.of('1');
    assert.deepEqual(config, { repoBlobUrl: '', lowers: [{ dir: fs }], upper: null, resultFile: result });
    assert.deepEqual(
      [data, index].map((path) => world.engine.text(path)),
      [undefined, undefined],
    );
    assert.ok(world.engine.text(commit) !== undefined);
    assert.deepEqual((await world.worker.stat('a')).labels, {});
    assert.deepEqual(world.engine.state().devices, ['2']);
    await world.removeAll();
    assert.deepEqual(world.engine.state(), emptyState);
  });

  it('takes no directory with more in it, and no other file, for a layer', async () => {
    const world = new World();
    await world.prepare('extract-1 a');
    world.engine.addLayer(layout.of('1').commit);
    world.engine.addDir(`${layout.of('1').fs}/usr`);
    await world.commit('a', 'extract-1 a');
    await world.prepare('extract-2 b');
    world.engine.addFile(layout.of('2').commit, 'text');
    await world.commit('b', 'extract-2 b');
    assert.deepEqual([world.store.named('a')?.storage, world.store.named('b')?.storage], ['directory', 'directory']);
  });

  it('refuses an overlaybd layer on plain directories', async () => {
    const world = new World();
    await world.directoryLayer('base');
    await world.prepare('extract-1 a', 'base');
    world.engine.addLayer(layout.of(world.idOf('extract-1 a')).commit);
    await assert.rejects(world.commit('a', 'extract-1 a'), isKind(ErrorKind.InvalidArgument, /base/));
    assert.equal((await world.worker.stat('extract-1 a')).kind, 'active');
  });

  it('rebases only what was prepared on nothing and is made of files', async () => {
    const world = new World();
    await world.directoryLayer('base');
    await world.directoryLayer('other');
    await world.prepare('free');
    await assert.rejects(world.commit('n', 'free', {}, 'none'), isKind(ErrorKind.NotFound));
    await assert.rejects(world.commit('n', 'free', {}, 'free'), isKind(ErrorKind.InvalidArgument));
    await world.commit('n', 'free', {}, 'base');
    assert.equal((await world.worker.stat('n')).parent, 'base');
    await world.prepare('bound', 'base');
    await assert.rejects(world.commit('m', 'bound', {}, 'other'), isKind(ErrorKind.InvalidArgument, /base/));
    await world.commit('m', 'bound', {}, 'base');
    await world.prepare('block', '', dev);
    await assert.rejects(world.commit('b', 'block', {}, 'base'), isKind(ErrorKind.FailedPrecondition));
    const [mount] = await world.view('v', 'n');
    assert.ok(mount?.options.at(-1)?.endsWith(`:${layout.of('1').fs}`));
  });

  it('keeps a snapshot whose seal fails, shows no path, and seals when a child asks', async () => {
    const world = new World();
    await world.prepare('k', '', dev);
    world.engine.failNext('layers.seal', new Error('disk on fire'));
    await world.commit('n', 'k');
    assert.deepEqual((await world.worker.stat('n')).labels, {});
    assert.equal(world.store.named('n')?.state, 'faulty');
    world.engine.failNext('layers.seal', new Error('disk on fire'));
    await assert.rejects(
      world.prepare('child', 'n', dev),
      isKind(ErrorKind.FailedPrecondition, /child.*n.*disk on fire/),
    );
    await world.prepare('child', 'n', dev);
    assert.equal((await world.worker.stat('n')).labels[localCommitPath], layout.of('1').sealed);
  });

  it('refuses to be done twice at once', async () => {
    const world = new World();
    await world.prepare('k', '', dev);
    const results = await Promise.allSettled([
      world.commit('a', 'k'),
      world.commit('b', 'k'),
      world.worker.remove('k'),
    ]);
    assert.equal(results.filter(({ status }) => status === 'fulfilled').length, 1);
    await world.removeAll();
    assert.deepEqual(world.engine.state(), emptyState);
  });
});

describe('Remove', () => {
  it('refuses unknown snapshots and parents', async () => {
    const world = new World();
    await assert.rejects(world.worker.remove('none'), isKind(ErrorKind.NotFound));
    await world.directoryLayer('a');
    await world.directoryLayer('b', 'a');
    await world.prepare('c', 'b');
    for (const parent of ['a', 'b']) {
      await assert.rejects(world.worker.remove(parent), isKind(ErrorKind.FailedPrecondition, /remove.*children/));
    }
    await world.removeAll();
    assert.deepEqual(world.engine.state(), emptyState);
  });

  it('frees the key at once, while the directory goes behind it', async () => {
    const world = new World();
    await world.prepare('k', '', dev);
    const release = world.engine.hold('files.removeTree');
    await world.worker.remove('k');
    await assert.rejects(world.worker.stat('k'), isKind(ErrorKind.NotFound));
    await world.prepare('k');
    assert.equal(world.idOf('k'), '2');
    assert.ok(world.engine.state().paths.includes(layout.of('1').dir));
    release();
    await world.worker.drain();
    assert.ok(!world.engine.state().paths.includes(layout.of('1').dir));
  });

  it('leaves the directory to Cleanup when asked to', async () => {
    const world = new World({ asyncRemove: true });
    await world.prepare('k', '', dev);
    await world.worker.remove('k');
    await world.worker.drain();
    assert.ok(world.engine.state().paths.includes(layout.of('1').dir));
    await world.worker.cleanup();
    assert.deepEqual(world.engine.state(), emptyState);
  });

  it('refuses while a device is in use, and nothing is changed', async () => {
    const world = new World();
    await world.prepare('k', '', dev);
    const letGo = world.engine.holdOpen('1');
    await assert.rejects(world.worker.remove('k'), isKind(ErrorKind.FailedPrecondition, /remove k/));
    assert.deepEqual(world.engine.state().devices, ['1']);
    await world.mounts('k');
    letGo();
    await world.worker.remove('k');
    await world.worker.drain();
    assert.deepEqual(world.engine.state(), emptyState);
  });

  it('refuses while an overlay of the snapshot or over its image is mounted', async () => {
    const world = new World();
    await world.blockLayer('base');
    const [mount] = await world.prepare('c', 'base');
    const options = mount?.options ?? [];
    const entry = { mountPoint: '/run/c', source: 'overlay', fsType: 'overlay', major: 0, minor: 99, options };
    const unmount = world.engine.addMount(entry);
    await assert.rejects(world.worker.remove('c'), isKind(ErrorKind.FailedPrecondition, /\/run\/c/));
    await assert.rejects(world.worker.remove('base'), isKind(ErrorKind.FailedPrecondition, /children/));
    unmount();
    await world.worker.remove('c');
    const again = world.engine.addMount(entry);
    await assert.rejects(world.worker.remove('base'), isKind(ErrorKind.FailedPrecondition, /\/run\/c/));
    again();
    await world.worker.remove('base');
    await world.worker.drain();
    assert.deepEqual(world.engine.state(), emptyState);
  });

  it('of parent and child erases the child first', async () => {
    const world = new World();
    await world.blockLayer('base');
    await world.prepare('c', 'base', dev);
    const release = world.engine.hold('devices.detach');
    await world.worker.remove('c');
    await world.worker.remove('base');
    await settleDown();
    assert.ok(world.engine.state().paths.includes(layout.of('1').dir));
    release();
    await world.worker.drain();
    assert.deepEqual(world.engine.state(), emptyState);
    assert.equal(world.store.count().unsettled, 0);
  });

  it('that finds the device busy after all is tried again by Cleanup', async () => {
    const world = new World();
    await world.prepare('k', '', dev);
    const release = world.engine.hold('devices.detach');
    await world.worker.remove('k');
    const letGo = world.engine.holdOpen('1');
    release();
    await world.worker.drain();
    assert.deepEqual(world.engine.state().devices, ['1']);
    assert.ok(world.engine.state().paths.includes(layout.of('1').dir));
    await world.worker.cleanup();
    assert.deepEqual(world.engine.state().devices, ['1']);
    letGo();
    await world.worker.cleanup();
    assert.deepEqual(world.engine.state(), emptyState);
  });

  it('while the layer is being sealed waits for the seal and then erases', async () => {
    const world = new World();
    await world.prepare('k', '', dev);
    const release = world.engine.hold('layers.seal');
    await world.commit('n', 'k');
    await settleDown();
    await world.worker.remove('n');
    release();
    await world.worker.drain();
    assert.deepEqual(world.engine.state(), emptyState);
    assert.equal(world.store.count().unsettled, 0);
  });
});

describe('the shared device of an image', () => {
  for (const autoRemoveDev of [false, true]) {
    it(`${autoRemoveDev ? 'goes with its last user' : 'stays until the image is removed'} when autoRemoveDev is ${autoRemoveDev}`, async () => {
      const world = new World({ autoRemoveDev });
      await world.blockLayer('base');
      await world.prepare('c', 'base');
      await world.view('v', 'base', dev);
      await world.worker.remove('c');
      await world.worker.drain();
      assert.deepEqual(world.engine.state().devices, ['1-ro']);
      await world.worker.remove('v');
      await world.worker.drain();
      assert.deepEqual(world.engine.state().devices, autoRemoveDev ? [] : ['1-ro']);
      await world.worker.remove('base');
      await world.worker.drain();
      assert.deepEqual(world.engine.state(), emptyState);
    });
  }
});

describe('Update', () => {
  it('replaces, sets and deletes labels, and changes nothing else', async () => {
    const world = new World();
    await world.directoryLayer('base');
    await world.prepare('k', 'base', { a: '1', 'b.c/d': '2' });
    const before = await world.worker.stat('k');
    const update = (paths: readonly string[], labels: Labels) => world.worker.update({ name: 'k', labels, paths });
    const set = await update(['labels.a', 'labels.x.y/z', 'labels.gone'], { a: '', 'x.y/z': '3', ignored: '4' });
    assert.deepEqual(set.labels, { 'b.c/d': '2', 'x.y/z': '3' });
    assert.deepEqual([set.name, set.parent, set.kind, set.createdAt], ['k', 'base', 'active', before.createdAt]);
    assert.ok(set.updatedAt > before.updatedAt);
    assert.deepEqual((await update(['labels'], { l: '1', e: '' })).labels, { l: '1' });
    assert.deepEqual((await update([], { m: '2' })).labels, { m: '2' });
    assert.deepEqual((await update(['labels.plain'], {})).labels, { m: '2' });
    for (const path of ['parent', 'name', 'kind', 'created', 'label.x', '']) {
      const last = await world.worker.stat('k');
      await assert.rejects(update(['labels.m', path], { m: 'no' }), isKind(ErrorKind.InvalidArgument, /update k/));
      assert.deepEqual(await world.worker.stat('k'), last);
    }
    await assert.rejects(world.worker.update({ name: 'none', labels: {}, paths: [] }), isKind(ErrorKind.NotFound));
  });

  it('lets nobody write the label that only we give', async () => {
    const world = new World();
    await world.blockLayer('n');
    const path = layout.of('1').sealed;
    const lie = { [localCommitPath]: '/etc/passwd', l: '1' };
    for (const paths of [[], ['labels'], [`labels.${localCommitPath}`]]) {
      const info = await world.worker.update({ name: 'n', labels: lie, paths });
      assert.equal(info.labels[localCommitPath], path);
    }
    // A replacement is a replacement; what was dropped can be had back.
    const dropped = await world.worker.update({ name: 'n', labels: { l: '1' }, paths: [] });
    assert.deepEqual(dropped.labels, { l: '1' });
    const again = await world.worker.update({ name: 'n', labels: lie, paths: [`labels.${localCommitPath}`] });
    assert.deepEqual(again.labels, { l: '1', [localCommitPath]: path });
    await world.prepare('k');
    assert.deepEqual((await world.worker.update({ name: 'k', labels: lie, paths: [] })).labels, { l: '1' });
  });
});

describe('List', () => {
  it('answers what Stat answers, in byte order and in batches', async () => {
    const world = new World();
    for (const name of ['b', 'a', 'é', 'Z']) await world.prepare(name, '', { l: name });
    const sizes: number[] = [];
    const names: string[] = [];
    for await (const batch of world.worker.list(() => true, 3)) {
      sizes.push(batch.length);
      for (const info of batch) {
        names.push(info.name);
        // Stat from inside the walk.
        assert.deepEqual(await world.worker.stat(info.name), info);
      }
    }
    assert.deepEqual(names, ['Z', 'a', 'b', 'é']);
    assert.deepEqual(sizes, [3, 1]);
  });

  it('filters, and survives changes during the walk', async () => {
    const world = new World();
    for (let n = 0; n < 700; n += 1) await world.prepare(`k${String(n).padStart(4, '0')}`);
    const seen: string[] = [];
    for await (const batch of world.worker.list(({ name }) => name.endsWith('7'), 10)) {
      for (const { name } of batch) {
        seen.push(name);
        await world.worker.remove(name);
        await world.prepare(`a${name}`);
      }
    }
    assert.equal(seen.length, 70);
    assert.equal(new Set(seen).size, 70);
    await world.worker.drain();
  });

  it('of nothing is an empty stream', async () => {
    const world = new World();
    assert.deepEqual(await world.list(), []);
  });
});

describe('Usage', () => {
  it('is that of the snapshot alone: current for actives, fixed for committed, zero for views', async () => {
    const world = new World();
    await assert.rejects(world.worker.usage('none'), isKind(ErrorKind.NotFound));
    await world.directoryLayer('base');
    await world.prepare('k', 'base');
    const empty = await world.worker.usage('k');
    const paths = layout.of(world.idOf('k'));
    world.engine.addFile(`${paths.fs}/f`, 'x'.repeat(5000));
    const full = await world.worker.usage('k');
    assert.deepEqual(full, { sizeBytes: empty.sizeBytes + 5120n, inodes: empty.inodes + 1n });
    await world.commit('n', 'k');
    assert.deepEqual(await world.worker.usage('n'), full);
    world.engine.calls.length = 0;
    world.engine.addFile(`${paths.fs}/g`, 'x'.repeat(5000));
    assert.deepEqual(await world.worker.usage('n'), full);
    assert.deepEqual(world.engine.calls, []);
    await world.view('v', 'n');
    assert.deepEqual(await world.worker.usage('v'), { sizeBytes: 0n, inodes: 0n });
  });

  it('counts the layer files of a writable device', async () => {
    const world = new World();
    await world.prepare('k', '', dev);
    const before = await world.worker.usage('k');
    world.engine.addFile(layout.of('1').data, 'writable layer'.repeat(1000));
    assert.ok((await world.worker.usage('k')).sizeBytes > before.sizeBytes);
  });
});

describe('Cleanup', () => {
  it('removes directories without rows and never one that is mounted', async () => {
    const world = new World();
    await world.prepare('k');
    const kept = world.engine.state().paths;
    for (const name of ['77', 'new-123', 'stray']) world.engine.addFile(`/r/snapshots/${name}/fs/f`, 'x');
    for (const name of ['77', 'new-123', 'stray']) world.engine.addDir(`/r/snapshots/${name}/fs`);
    world.engine.addDir('/r/snapshots/new-9/fs');
    const entry = {
      mountPoint: '/r/snapshots/new-9/fs',
      source: 'x',
      fsType: 'tmpfs',
      major: 0,
      minor: 5,
      options: [],
    };
    const unmount = world.engine.addMount(entry);
    await world.worker.cleanup();
    assert.deepEqual(
      world.engine.state().paths.filter((path) => !kept.includes(path)),
      ['/r/snapshots/new-9/fs'],
    );
    unmount();
    await world.worker.cleanup();
    assert.deepEqual(world.engine.state().paths, kept);
  });

  it('takes no directory from a Prepare that runs at the same time', async () => {
    const world = new World();
    await world.blockLayer('base');
    const release = world.engine.hold('devices.attach');
    const prepared = world.prepare('k', 'base', dev);
    await settleDown();
    const cleaned = world.worker.cleanup();
    await settleDown();
    release();
    await Promise.all([prepared, cleaned]);
    assert.ok(world.engine.state().paths.includes(layout.of(world.idOf('k')).dir));
  });

  it("leaves the original's snapshots alone, and gives out ids above theirs", async () => {
    const world = new World();
    world.engine.addFile('/r/metadata.db', 'bolt');
    world.engine.addDir('/r/snapshots/41/fs');
    await world.restart();
    await world.worker.cleanup();
    assert.ok(world.engine.state().paths.includes('/r/snapshots/41/fs'));
    await world.prepare('k');
    assert.equal(world.idOf('k'), '42');
  });
});

describe('a writable device', () => {
  it('refuses more layers below than the format takes', async () => {
    const world = new World();
    await world.blockLayer('base');
    const lowers = Array.from({ length: 256 }, (_, n) => ({ dir: `/l/${n}` }));
    const config = { repoBlobUrl: '', lowers, upper: null, resultFile: '' };
    world.engine.addFile(layout.of('1').config, JSON.stringify(config));
    await assert.rejects(
      world.prepare('k', 'base', dev),
      isKind(ErrorKind.FailedPrecondition, /prepare k.*256 layers/),
    );
  });

  it('is made with the descriptor of the daemon when no label names one', async () => {
    const world = new World({ defaultFs: parseFs('xfs') });
    const [mount] = await world.prepare('k', '', dev);
    assert.equal(mount?.type, 'xfs');
    assert.ok(world.engine.calls.includes('mounts.format xfs'));
  });
});

describe('the worker', () => {
  it('counts what it holds, and drains without taking anything down', async () => {
    const world = new World();
    await world.blockLayer('base');
    await world.prepare('c', 'base');
    await world.prepare('d', 'base', dev);
    const release = world.engine.hold('layers.seal');
    await world.commit('n', 'd');
    assert.equal(world.worker.stats().pending, 1);
    let drained = false;
    const draining = world.worker.drain().then(() => {
      drained = true;
    });
    await settleDown();
    assert.equal(drained, false);
    release();
    await draining;
    assert.deepEqual(world.worker.stats(), {
      snapshots: 3,
      unsettled: 0,
      pending: 0,
      verbsInFlight: 0,
      devices: { attached: 0, mounted: 1 },
    });
    assert.deepEqual(await world.worker.mounts('c', live), await world.mounts('c'));
  });
});
