/** Invariants: whichever effect of whichever verb fails, nothing is leaked and the same call works once the cause is
 * gone; wherever the daemon dies, or the machine with it, the next one finishes or undoes what was begun, and what was
 * answered is kept. Checked at every call of the engine and every write of the store. */
import assert from 'node:assert/strict';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, describe, it } from 'node:test';
import { SnapshotterError } from '../base/errors.ts';
import { MemoryStore } from '../store/memory-store.ts';
import { SqliteStore } from '../store/sqlite-store.ts';
import type { WorkerConfig } from './config.ts';
import { isSharedDevice, ownerOfDevice } from './mount-recipe.ts';
import { ErrorKind, emptyState, isKind, layout, localCommitPath, World, writableLabel } from './test-world.ts';

interface Scene {
  readonly title: string;
  readonly config?: Partial<WorkerConfig>;
  readonly before?: (world: World) => Promise<unknown>;
  readonly act: (world: World) => Promise<unknown>;
  /** What the client does when it is over. */
  readonly after?: (world: World) => void;
  /** Its work follows the reply: a fault there is not the caller's. */
  readonly behind?: boolean;
}

const dir = { [writableLabel]: 'dir' };
const dev = { [writableLabel]: 'dev' };
const activePath = { 'containerd.io/snapshot/overlay.active.path': '/data/a' };
const imageRef = { 'containerd.io/snapshot/cri.image-ref': 'a:1' };

const scenes: readonly Scene[] = [
  { title: 'prepare of a plain directory', act: (world) => world.prepare('k', '', imageRef) },
  {
    title: 'prepare over plain layers',
    before: (world) => world.directoryLayer('base'),
    act: (world) => world.prepare('k', 'base'),
  },
  {
    title: 'prepare over an image',
    before: (world) => world.blockLayer('base'),
    act: (world) => world.prepare('k', 'base'),
  },
  { title: 'prepare of a new mounted image', act: (world) => world.prepare('k', '', { ...dir, ...activePath }) },
  { title: 'prepare of a new image', act: (world) => world.prepare('k', '', dev) },
  {
    title: 'prepare of a mounted layer over an image',
    before: (world) => world.blockLayer('base'),
    act: (world) => world.prepare('k', 'base', dir),
  },
  {
    title: 'prepare of a layer over an image',
    before: (world) => world.blockLayer('base'),
    act: (world) => world.prepare('k', 'base', dev),
  },
  {
    title: 'view of an image',
    before: (world) => world.blockLayer('base'),
    act: (world) => world.view('k', 'base', dev),
  },
  {
    title: 'mounts after a reboot, over an image',
    before: async (world) => {
      await world.blockLayer('base');
      await world.prepare('k', 'base');
      world.engine.reboot();
    },
    act: (world) => world.mounts('k'),
  },
  {
    title: 'mounts after a reboot, of a mounted layer',
    before: async (world) => {
      await world.prepare('k', '', dir);
      world.engine.reboot();
    },
    act: (world) => world.mounts('k'),
  },
  {
    title: 'commit of a mounted layer',
    before: (world) => world.prepare('k', '', { ...dir, ...activePath }),
    act: (world) => world.commit('n', 'k'),
    behind: true,
  },
  {
    title: 'commit of a layer over an image',
    before: async (world) => {
      await world.blockLayer('base');
      await world.prepare('k', 'base', dev);
    },
    act: (world) => world.commit('n', 'k'),
    behind: true,
  },
  {
    title: 'commit of plain files',
    before: (world) => world.prepare('extract-1 k'),
    act: (world) => world.commit('n', 'extract-1 k'),
    behind: true,
  },
  {
    title: 'commit of a layer that was unpacked into a device',
    config: { ociLayers: 'block' },
    before: async (world) => {
      await world.prepare('extract-1 k');
      world.engine.addLayer(`${layout.of('1').mountPoint}/overlaybd.commit`);
    },
    act: (world) => world.commit('n', 'extract-1 k'),
    behind: true,
  },
  {
    title: 'commit of a layer that its client left mounted',
    before: async (world) => {
      await world.prepare('k', '', dev);
      const device = await world.engine.devices.find('1');
      const { major = 0, minor = 0, path: source = '' } = device ?? {};
      world.engine.addMount({ mountPoint: '/mnt', source, fsType: 'ext4', major, minor, options: ['rw'] });
    },
    act: (world) => world.commit('n', 'k'),
    after: (world) => world.engine.dropMount('/mnt'),
    behind: true,
  },
  {
    title: 'remove of a mounted layer',
    before: (world) => world.prepare('k', '', { ...dir, ...activePath }),
    act: (world) => world.worker.remove('k'),
    behind: true,
  },
  {
    title: 'remove of the last user of an image',
    config: { autoRemoveDev: true },
    before: async (world) => {
      await world.blockLayer('base');
      await world.prepare('k', 'base');
    },
    act: (world) => world.worker.remove('k'),
    behind: true,
  },
  {
    title: 'remove of an image',
    before: async (world) => {
      await world.blockLayer('base');
      await world.prepare('k', 'base');
      await world.worker.remove('k');
      await world.worker.drain();
    },
    act: (world) => world.worker.remove('base'),
    behind: true,
  },
];

async function staged({ config, before }: Scene, world = new World(config)): Promise<World> {
  await before?.(world);
  await world.worker.drain();
  return world;
}

/** Rows, directories, devices and mounts agree. */
async function agree(world: World): Promise<void> {
  const { paths, devices, mounts } = world.engine.state();
  const rows = new Set((await world.list()).map(({ name }) => world.idOf(name)));
  for (const path of paths) {
    const id = /^\/r\/snapshots\/([^/]+)/.exec(path)?.[1];
    if (id !== undefined) assert.ok(rows.has(id), `${path} has a row`);
  }
  for (const device of devices) {
    assert.ok(rows.has(ownerOfDevice(device)), `device ${device} has a row`);
    assert.ok(world.store.device(device) !== null, `device ${device} is recorded`);
  }
  for (const { id } of world.store.devices()) assert.ok(devices.includes(id), `recorded device ${id} is there`);
  for (const mountPoint of mounts) {
    const owners = devices.map((device) => layout.of(ownerOfDevice(device)).mountPoint);
    assert.ok(owners.includes(mountPoint), `${mountPoint} has a device`);
  }
  for (const { name, kind, labels } of await world.list()) {
    const row = world.store.named(name);
    if (kind === 'committed' && labels[localCommitPath] !== undefined) {
      assert.ok(world.engine.text(labels[localCommitPath]) !== undefined, `${name} is sealed`);
    }
    if (row?.deviceId !== null && row?.deviceId !== undefined && isSharedDevice(row.deviceId)) {
      assert.ok(rows.has(ownerOfDevice(row.deviceId)));
    }
  }
}

const full = (): SnapshotterError => new SnapshotterError(ErrorKind.ResourceExhausted, 'no space left on device');
const countOf = async (scene: Scene): Promise<number> => {
  const world = await staged(scene);
  const before = world.engine.calls.length;
  await scene.act(world);
  await world.worker.drain();
  return world.engine.calls.length - before;
};

describe('a fault', () => {
  for (const scene of scenes) {
    for (const late of [false, true]) {
      it(`${late ? 'behind' : 'before'} any effect of ${scene.title} leaks nothing, and the same call works after it`, async () => {
        const count = await countOf(scene);
        assert.ok(count > 0);
        for (let n = 0; n < count; n += 1) {
          const world = await staged(scene);
          const before = world.engine.state();
          world.engine.failAt(n, full(), late);
          const failed = await scene.act(world).then(
            () => null,
            (error: unknown) => error,
          );
          await world.worker.drain();
          const call = world.engine.calls.find((_, index) => index === n);
          if (failed === null) {
            assert.ok(scene.behind === true || (await isHarmless(world)), `a fault at ${n} (${call}) is told`);
            await world.worker.cleanup();
          } else {
            assert.ok(
              isKind(
                ErrorKind.ResourceExhausted,
                /^(prepare|view|mounts|commit|remove) (extract-1 )?(k|base)\b/,
              )(failed),
              String(failed),
            );
            if (scene.title.startsWith('prepare') || scene.title.startsWith('view')) {
              const now = world.engine.state();
              // A directory of a user's is left as it is found; it is the user's.
              assert.deepEqual({ ...now, paths: now.paths.filter((path) => path !== '/data/a') }, before);
              assert.equal(world.store.count().unsettled, 0);
            }
            await scene.act(world);
            await world.worker.drain();
          }
          scene.after?.(world);
          await agree(world);
          assert.deepEqual(world.engine.frozen, []);
          await world.removeAll();
          const end = world.engine.state();
          assert.deepEqual({ ...end, paths: end.paths.filter((path) => path !== '/data/a') }, emptyState);
          assert.deepEqual(world.store.devices(), []);
          assert.equal(world.store.count().unsettled, 0);
        }
      });
    }
  }
});

/** The verb succeeded although a call failed: then everything is as if it had not. */
async function isHarmless(world: World): Promise<boolean> {
  await agree(world);
  return true;
}

const stepsOf = async (scene: Scene): Promise<number> => {
  const world = await staged(scene);
  const before = world.engine.ticks;
  await scene.act(world);
  await world.worker.drain();
  return world.engine.ticks - before + 1;
};

describe('a death of the daemon', () => {
  for (const scene of scenes) {
    for (const reboot of [false, true]) {
      it(`${reboot ? 'with the machine ' : ''}at any step of ${scene.title} is recovered from`, async () => {
        const steps = await stepsOf(scene);
        for (let cut = 0; cut < steps; cut += 1) {
          const world = await staged(scene);
          const known = new Set((await world.list()).map(({ name }) => name));
          world.engine.cutPowerAfter(cut);
          const answered = await scene.act(world).then(
            () => true,
            () => false,
          );
          await world.worker.drain().catch(() => undefined);
          if (reboot) world.engine.reboot();
          await world.restart();
          scene.after?.(world);
          await world.worker.cleanup();
          await agree(world);
          assert.deepEqual(world.engine.frozen, []);
          assert.equal(world.store.count().unsettled, 0, `cut ${cut}`);
          const names = new Set((await world.list()).map(({ name }) => name));
          for (const name of known) {
            if (name === 'base' || !scene.behind)
              assert.ok(names.has(name) || scene.title === 'remove of an image', `${name} is kept at cut ${cut}`);
          }
          if (scene.title.startsWith('prepare') || scene.title.startsWith('view')) {
            if (answered) assert.ok(names.has('k'));
            if (names.has('k')) await world.mounts('k');
            else await scene.act(world);
          } else if (scene.title.startsWith('commit')) {
            assert.ok(names.has('n') || !answered);
            if (!names.has('n')) await scene.act(world);
          } else if (scene.title.startsWith('remove')) {
            const target = scene.title === 'remove of an image' ? 'base' : 'k';
            assert.ok(!names.has(target) || !answered);
          }
          await world.removeAll();
          const end = world.engine.state();
          assert.deepEqual({ ...end, paths: end.paths.filter((path) => path !== '/data/a') }, emptyState);
          assert.deepEqual(world.store.devices(), []);
        }
      });
    }
  }
});

describe('recovery', () => {
  it('removes what no row knows: devices, mounts and directories', async () => {
    const world = new World();
    world.engine.addDir('/r/snapshots/7/block/mountpoint');
    world.engine.addDir('/r/snapshots/new-5/fs');
    world.engine.addDevice('7');
    world.engine.addDevice('8-ro');
    const { mountPoint } = layout.of('7');
    const device = await world.engine.devices.find('7');
    const { major = 0, minor = 0, path: source = '' } = device ?? {};
    world.engine.addMount({ mountPoint, source, fsType: 'ext4', major, minor, options: ['rw'] });
    await world.restart();
    assert.deepEqual(world.engine.state(), emptyState);
  });

  it('leaves devices alone that have no name of ours, and those that somebody holds', async () => {
    const world = new World();
    world.engine.addDevice('operator-made');
    world.engine.addDevice('9');
    const letGo = world.engine.holdOpen('9');
    await world.restart();
    assert.deepEqual(world.engine.state().devices, ['9', 'operator-made']);
    letGo();
    await world.restart();
    assert.deepEqual(world.engine.state().devices, ['operator-made']);
  });

  it('touches nothing of running containers', async () => {
    const world = new World();
    await world.blockLayer('base');
    await world.prepare('c', 'base');
    await world.prepare('d', 'base', dev);
    const before = world.engine.state();
    world.engine.calls.length = 0;
    await world.restart();
    assert.deepEqual(world.engine.state(), before);
    const touching = world.engine.calls.filter((call) => /attach|detach|mounts.(un)?mount|removeTree/.test(call));
    assert.deepEqual(touching, []);
  });

  it('tries a failed seal again', async () => {
    const world = new World();
    await world.prepare('k', '', dev);
    world.engine.failNext('layers.seal', new Error('bad block'));
    await world.commit('n', 'k');
    await world.worker.drain();
    assert.equal(world.store.named('n')?.state, 'faulty');
    await world.restart();
    assert.equal(world.store.named('n')?.state, 'committed');
    await world.prepare('other', '', dev);
  });
});

describe('on the SQLite store', () => {
  const scratch = mkdtempSync(join(tmpdir(), 'worker-test-'));
  after(() => rmSync(scratch, { recursive: true, force: true }));

  for (const scene of scenes) {
    it(`${scene.title} survives being begun, answered and restarted`, async () => {
      const store = new SqliteStore(join(scratch, `${scenes.indexOf(scene)}.sqlite`));
      const world = await staged(scene, new World(scene.config, store));
      await scene.act(world);
      await world.worker.drain();
      scene.after?.(world);
      const before = await world.list();
      await world.restart();
      assert.deepEqual(await world.list(), before);
      await agree(world);
      await world.removeAll();
      assert.deepEqual(store.devices(), []);
      store.close();
    });
  }

  it('a disk that is full while the intent is written is told, with nothing made', async () => {
    const store = new MemoryStore();
    const world = new World({}, store);
    store.failNext(full());
    await assert.rejects(world.prepare('k', '', dev), isKind(ErrorKind.ResourceExhausted));
    assert.deepEqual(world.engine.state(), emptyState);
    await world.prepare('k', '', dev);
  });
});
