/** Invariants: every cell of the contract's mount tables, for Prepare and View, by label and by rwMode, with both types
 * of writable layer. Mounts answers the same as Prepare; so does the next daemon with another configuration. */
import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { WritableLayerType } from '../engine/engine.ts';
import type { WorkerConfig } from './config.ts';
import { ErrorKind, isKind, layout, World, writableLabel } from './test-world.ts';
import type { Labels, Mount } from './worker.ts';

type Parent = 'none' | 'plain1' | 'plain3' | 'block1' | 'block3' | 'mixed';
type Ask = { readonly rwMode?: string; readonly label?: string };

/** Symbols of the contract's notation, filled in when the ids are known. */
interface Places {
  readonly F: string;
  readonly W: string;
  readonly MP: string;
  readonly lower: (n: number) => string;
  readonly image: string;
}
type Cell = (places: Places) => Omit<Mount, 'source'> & { readonly source: string | RegExp };

const device = /^\/dev\/loop\d+$/;
const bind = (source: string, ...options: string[]) => ({ type: 'bind', source, options });
const overlay = (...options: string[]) => ({ type: 'overlay', source: 'overlay', options: ['index=off', ...options] });

const n0: Cell = ({ F }) => bind(F, 'rw', 'rbind');
const n0ro: Cell = ({ F }) => bind(F, 'ro', 'rbind');
const n1 =
  (count: number): Cell =>
  ({ F, W, lower }) =>
    overlay(`workdir=${W}`, `upperdir=${F}`, `lowerdir=${Array.from({ length: count }, (_, n) => lower(n)).join(':')}`);
const n2: Cell = ({ lower }) => bind(lower(0), 'ro', 'rbind');
const n3 =
  (count: number): Cell =>
  ({ lower }) =>
    overlay(`lowerdir=${Array.from({ length: count }, (_, n) => lower(n)).join(':')}`);
const b1: Cell = ({ F, W, image }) => overlay(`workdir=${W}`, `upperdir=${F}`, `lowerdir=${image}`);
const b2: Cell = ({ image }) => bind(image, 'ro', 'rbind');
const d1: Cell = ({ MP }) => bind(MP, 'rw', 'rbind');
const v1rw: Cell = () => ({ type: 'ext4', source: device, options: ['rw', 'discard'] });
const v1ro: Cell = () => ({ type: 'ext4', source: device, options: ['ro', 'discard'] });
const mixed: Cell = ({ F, W, lower, image }) =>
  overlay(`workdir=${W}`, `upperdir=${F}`, `lowerdir=${lower(0)}:${image}`);
const mixedRo: Cell = ({ lower, image }) => overlay(`lowerdir=${lower(0)}:${image}`);

const overlayfs: readonly Ask[] = [
  {},
  { rwMode: 'anything' },
  { label: 'overlayfs' },
  { label: 'some text' },
  { rwMode: 'dev', label: 'overlayfs' },
  { rwMode: 'dir', label: 'other' },
];
const dir: readonly Ask[] = [{ rwMode: 'dir' }, { label: 'dir' }, { rwMode: 'dev', label: 'dir' }];
const dev: readonly Ask[] = [{ rwMode: 'dev' }, { label: 'dev' }, { rwMode: 'dir', label: 'dev' }];
const byConfig: readonly Ask[] = [{ rwMode: 'dir' }, { rwMode: 'dev' }];
const byLabel: readonly Ask[] = [{ label: 'dir' }, { label: 'dev' }];

interface TableRow {
  readonly parent: Parent;
  readonly asks: readonly Ask[];
  readonly prepare: Cell | 'refused';
  readonly view: Cell;
}

/** Table 3.6, with the fixed cells: Views read-only and without a writable layer, labels not ignored in silence. */
const rootfs: readonly TableRow[] = [
  { parent: 'none', asks: overlayfs, prepare: n0, view: n0ro },
  { parent: 'none', asks: dir, prepare: d1, view: n0ro },
  { parent: 'none', asks: dev, prepare: v1rw, view: n0ro },
  { parent: 'plain1', asks: overlayfs, prepare: n1(1), view: n2 },
  { parent: 'plain1', asks: byConfig, prepare: n1(1), view: n2 },
  { parent: 'plain1', asks: byLabel, prepare: 'refused', view: n2 },
  { parent: 'plain3', asks: overlayfs, prepare: n1(3), view: n3(3) },
  { parent: 'plain3', asks: byConfig, prepare: n1(3), view: n3(3) },
  { parent: 'plain3', asks: byLabel, prepare: 'refused', view: n3(3) },
  { parent: 'block1', asks: overlayfs, prepare: b1, view: b2 },
  { parent: 'block1', asks: dir, prepare: d1, view: b2 },
  { parent: 'block1', asks: dev, prepare: v1rw, view: v1ro },
  { parent: 'block3', asks: overlayfs, prepare: b1, view: b2 },
  { parent: 'block3', asks: dir, prepare: d1, view: b2 },
  { parent: 'block3', asks: dev, prepare: v1rw, view: v1ro },
  { parent: 'mixed', asks: overlayfs, prepare: mixed, view: mixedRo },
  { parent: 'mixed', asks: byConfig, prepare: mixed, view: mixedRo },
  { parent: 'mixed', asks: byLabel, prepare: 'refused', view: mixedRo },
];

/** Makes the chain; answers the name of its top. */
async function chain(world: World, parent: Parent): Promise<string> {
  if (parent === 'none') return '';
  const count = parent.endsWith('3') ? 3 : 1;
  let top = '';
  for (let n = 0; n < count; n += 1) {
    const name = `layer${n}`;
    await (parent.startsWith('plain') ? world.directoryLayer(name, top) : world.blockLayer(name, top));
    top = name;
  }
  if (parent !== 'mixed') return top;
  await world.directoryLayer('above', top);
  return 'above';
}

function places(world: World, key: string): Places {
  const id = world.idOf(key);
  const ancestors = world.store.ancestors(id);
  const image = ancestors.find(({ storage }) => storage === 'block');
  return {
    F: layout.of(id).fs,
    W: layout.of(id).work,
    MP: layout.of(id).mountPoint,
    lower: (n) => layout.of(ancestors[n]?.id ?? '').fs,
    image: image === undefined ? '' : layout.of(image.id).mountPoint,
  };
}

function same(found: readonly Mount[], cell: Cell, where: Places): void {
  const expected = cell(where);
  assert.equal(found.length, 1);
  const [mount] = found;
  assert.equal(mount?.type, expected.type);
  if (typeof expected.source === 'string') assert.equal(mount?.source, expected.source);
  else assert.match(mount?.source ?? '', expected.source);
  assert.deepEqual(mount?.options, expected.options);
}

const labelsOf = ({ label }: Ask): Labels => (label === undefined ? {} : { [writableLabel]: label });
const titleOf = ({ rwMode, label }: Ask): string => `rwMode ${rwMode ?? 'overlayfs'}, label ${label ?? 'absent'}`;

for (const type of [WritableLayerType.Append, WritableLayerType.Sparse]) {
  describe(`a rootfs with ${type} layers`, () => {
    for (const { parent, asks, prepare, view } of rootfs) {
      for (const ask of asks) {
        it(`on ${parent}, ${titleOf(ask)}`, async () => {
          const world = new World({ writableLayerType: type });
          const top = await chain(world, parent);
          await world.restart(ask.rwMode === undefined ? {} : { rwMode: ask.rwMode });
          if (prepare === 'refused') {
            await assert.rejects(
              world.prepare('c', top, labelsOf(ask)),
              isKind(ErrorKind.FailedPrecondition, new RegExp(`c.*${top}.*ociLayers: "block"`)),
            );
            assert.equal(world.store.named('c'), null);
          } else {
            const first = await world.prepare('c', top, labelsOf(ask));
            same(first, prepare, places(world, 'c'));
            assert.deepEqual(await world.mounts('c'), first);
          }
          const seen = await world.view('v', top, labelsOf(ask));
          same(seen, view, places(world, 'v'));
          assert.deepEqual(await world.mounts('v'), seen);

          // The mode is part of the snapshot: another configuration changes nothing.
          await world.restart({ rwMode: 'dev', writableLayerType: 'append', ociLayers: 'block' });
          assert.deepEqual(await world.mounts('v'), seen);
          if (prepare !== 'refused') same(await world.mounts('c'), prepare, places(world, 'c'));
          // After a reboot every device is another one; the mounts still are what they were.
          world.engine.reboot();
          same(await world.mounts('v'), view, places(world, 'v'));
          if (prepare !== 'refused') same(await world.mounts('c'), prepare, places(world, 'c'));
        });
      }
    }

    it('makes a View without a writable layer, whatever it is asked for', async () => {
      for (const label of ['dir', 'dev']) {
        const world = new World({ writableLayerType: type });
        await world.blockLayer('base');
        world.engine.calls.length = 0;
        await world.view('v', 'base', { [writableLabel]: label });
        await world.view('empty', '', { [writableLabel]: label });
        assert.ok(!world.engine.calls.some((call) => /createWritable|format/.test(call)));
        assert.deepEqual(world.engine.state().devices, ['1-ro']);
      }
    });
  });
}

const ref = 'containerd.io/snapshot.ref';
const overlaybd = 'containerd.io/snapshot/overlaybd';
const remote: Labels = {
  [ref]: 'sha256:c',
  [`${overlaybd}/blob-digest`]: 'sha256:d',
  [`${overlaybd}/blob-size`]: '4096',
  'containerd.io/snapshot/cri.image-ref': 'registry.example.com/a:1',
};

interface ExtractionRow {
  readonly title: string;
  readonly key: string;
  readonly labels?: Labels;
}
const extractions: readonly ExtractionRow[] = [
  { title: 'a reference', key: 'c', labels: { [ref]: 'sha256:c' } },
  { title: 'the key of an unpack behind containerd', key: 'default/7/extract-12-ab sha256:c' },
  { title: 'the key of an unpack of a direct user', key: 'extract-12-ab sha256:c' },
  { title: 'the type image', key: 'c', labels: { 'containerd.io/snapshot/type': 'image' } },
  { title: 'a remote layer', key: 'c', labels: remote },
  { title: "BuildKit's probe", key: 'buildkit/7/tmp-1 sha256:c', labels: { [ref]: 'sha256:c' } },
  { title: 'a writable label on an unpack', key: 'extract-1 c', labels: { [writableLabel]: 'dev' } },
];

describe('an extraction', () => {
  const cells: readonly (readonly [Parent, Cell])[] = [
    ['none', n0],
    ['plain1', n1(1)],
    ['plain3', n1(3)],
    ['block1', b1],
    ['mixed', mixed],
  ];
  for (const { title, key, labels = {} } of extractions) {
    for (const [parent, cell] of cells) {
      for (const rwMode of ['overlayfs', 'dir', 'dev']) {
        it(`by ${title} on ${parent} in rwMode ${rwMode} gets a plain writable directory and no device`, async () => {
          const world = new World();
          const top = await chain(world, parent);
          await world.restart({ rwMode });
          const before = world.engine.state().devices;
          const first = await world.prepare(key, top, labels);
          same(first, cell, places(world, key));
          assert.deepEqual(world.engine.state().devices, before);
          assert.equal((await world.worker.stat(key)).labels[writableLabel], undefined);
          // Only who really mounts needs the image below.
          assert.deepEqual(await world.mounts(key), first);
        });
      }
    }
  }

  it('that a client downloads itself gets the bare directory', async () => {
    const world = new World();
    const labels = { ...remote, [`${overlaybd}/download-remote-blob`]: 'download' };
    same(await world.prepare('c', '', labels), ({ F }) => bind(F, 'rw', 'bind'), places(world, 'c'));
  });

  it('of an acceleration layer gets the bare directory, and needs an image below', async () => {
    const world = new World();
    const labels = { [ref]: 'sha256:t', [`${overlaybd}/acceleration-layer`]: 'yes' };
    await assert.rejects(world.prepare('c', '', labels), isKind(ErrorKind.FailedPrecondition));
    await world.blockLayer('base');
    same(await world.prepare('c', 'base', labels), ({ F }) => bind(F, 'rw', 'bind'), places(world, 'c'));
    await world.commit('traced', 'c');
    // A trace is no data layer: what stands above sees the image below it.
    same(await world.prepare('run', 'traced', { [writableLabel]: 'dev' }), v1rw, places(world, 'run'));
  });

  it('that is turned into a turbo layer gets the bare directory', async () => {
    const world = new World();
    await world.directoryLayer('base');
    const labels = { [ref]: 'x', [`${overlaybd}/convert2turbo-oci`]: 'yes' };
    same(await world.prepare('c', 'base', labels), n0, places(world, 'c'));
  });
});

describe('an extraction with ociLayers "block"', () => {
  const config: Partial<WorkerConfig> = { ociLayers: 'block' };

  it('gets a writable block layer of its own, made once and stacked on its parent', async () => {
    const world = new World(config);
    same(await world.prepare('extract-1 a'), d1, places(world, 'extract-1 a'));
    await world.commit('a', 'extract-1 a');
    same(await world.prepare('c2', 'a', { [ref]: 'sha256:b' }), d1, places(world, 'c2'));
    await world.commit('b', 'c2');
    same(await world.prepare('run', 'b', { [writableLabel]: 'dev' }), v1rw, places(world, 'run'));
    assert.equal(world.engine.calls.filter((call) => call.startsWith('mounts.format')).length, 1);
  });

  it('touches no device for a layer that could be remote', async () => {
    const world = new World(config);
    same(await world.prepare('c', '', remote), n0, places(world, 'c'));
    assert.deepEqual(world.engine.state().devices, []);
  });

  it('stays a directory on directories', async () => {
    const world = new World();
    await world.directoryLayer('base');
    await world.restart(config);
    same(await world.prepare('extract-1 x', 'base'), n1(1), places(world, 'extract-1 x'));
  });
});

describe('docker', () => {
  const init = `docker/3/${'a'.repeat(64)}-init`;

  it('gets the plain directory for its init layer and the overlay for the container above', async () => {
    const world = new World({ runtimeType: 'docker' });
    await world.blockLayer('top');
    same(await world.prepare(init, 'top'), n0, places(world, init));
    assert.deepEqual(world.engine.state().devices, ['1-ro']);
    await world.commit('init', init);
    const first = await world.prepare('c', 'init');
    same(first, mixed, places(world, 'c'));
    same(await world.view('v', 'init'), mixedRo, places(world, 'v'));
    world.engine.reboot();
    assert.deepEqual(await world.mounts('c'), first);
    assert.deepEqual(world.engine.state().mounts, [layout.of('1').mountPoint]);
  });

  it('gets plain overlays over a plain image', async () => {
    const world = new World({ runtimeType: 'docker' });
    await world.directoryLayer('top');
    same(await world.prepare(init, 'top'), n0, places(world, init));
    await world.commit('init', init);
    same(await world.prepare('c', 'init'), n1(2), places(world, 'c'));
  });

  it('has no meaning outside docker and outside overlayfs', async () => {
    const plainWorld = new World();
    await plainWorld.directoryLayer('top');
    same(await plainWorld.prepare(init, 'top'), n1(1), places(plainWorld, init));
    const devWorld = new World({ runtimeType: 'docker', rwMode: 'dev' });
    await devWorld.blockLayer('top');
    same(await devWorld.prepare(init, 'top'), v1rw, places(devWorld, init));
  });
});

describe("BuildKit's writable label", () => {
  it('degrades on images that are not overlaybd, and says so once', async () => {
    const world = new World();
    await world.directoryLayer('base');
    const labels = { [writableLabel]: 'dev' };
    same(await world.prepare('buildkit/3/a', 'base', labels), n1(1), places(world, 'buildkit/3/a'));
    await world.prepare('buildkit/4/b', 'base', labels);
    assert.deepEqual((await world.worker.stat('buildkit/3/a')).labels, {});
    assert.equal(world.logged.filter((line) => line.includes('writable label dropped')).length, 1);
  });

  it('gives a device on overlaybd images', async () => {
    const world = new World();
    await world.blockLayer('base');
    same(await world.prepare('buildkit/3/a', 'base', { [writableLabel]: 'dev' }), v1rw, places(world, 'buildkit/3/a'));
  });
});

describe('the file system of a device', () => {
  const fsType = `${overlaybd}/blob-fs-type`;

  it('is what the image holds, with its own mount options, also for children without the label', async () => {
    const world = new World();
    await world.blockLayer('base', '', { [fsType]: 'xfs' });
    const [mount] = await world.prepare('c', 'base', { [writableLabel]: 'dev' });
    assert.deepEqual([mount?.type, mount?.options], ['xfs', ['rw', 'nouuid', 'discard']]);
    const [seen] = await world.view('v', 'base', { [writableLabel]: 'dev' });
    assert.deepEqual([seen?.type, seen?.options], ['xfs', ['ro', 'nouuid', 'discard']]);
  });

  it('is not what a label wrongly says', async () => {
    const world = new World();
    await world.blockLayer('base', '', { [fsType]: 'xfs' });
    const [mount] = await world.prepare('c', 'base', { [writableLabel]: 'dev', [fsType]: 'ext4' });
    assert.equal(mount?.type, 'xfs');
  });

  it('takes mount options from the descriptor, but none that steer the mount', async () => {
    const world = new World();
    const [mount] = await world.prepare('c', '', {
      [writableLabel]: 'dev',
      [fsType]: 'ext4;noatime,rw,bind,remount,loop',
    });
    assert.deepEqual(mount?.options, ['rw', 'noatime']);
  });

  it('must be named like one', async () => {
    const world = new World();
    for (const text of ['../../bin/sh', 'ext4 -d', '']) {
      const labels = { [writableLabel]: 'dev', [fsType]: `${text};` };
      await assert.rejects(world.prepare('c', '', labels), isKind(ErrorKind.InvalidArgument, /prepare c/));
    }
  });
});
