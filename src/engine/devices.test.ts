// Invariants: what is written to a device is in the layer after sealing; a call survives the death of blockd; a failure
// carries the engine's reason; stores never meet; an attach is made once however many ask.
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { copyFileSync, mkdirSync, readFileSync, statSync, truncateSync, writeFileSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { describe, it, type TestContext } from 'node:test';
import { setTimeout as delay } from 'node:timers/promises';
import { ErrorKind } from '../base/errors.ts';
import type { AttachRequest, FsDescriptor, ImageConfig, LowerEntry, WritableLayerType } from './engine.ts';
import { loadNative, nativePath } from './native.ts';
import { createEngine, type RealEngine } from './real-engine.ts';
import { failsAs, makeScratch, makeStand, makeTmpfs, type Stand } from './scratch.test.ts';

const kFixtures = resolve(import.meta.dirname, '../../native/testdata/fixtures');
const never = new AbortController().signal;

const kExt4: FsDescriptor = {
  type: 'ext4',
  mountOptions: ['discard'],
  mkfsOptions: ['-O', '^has_journal,sparse_super,flex_bg', '-G', '1', '-E', 'discard', '-F'],
};
const kXfs: FsDescriptor = {
  type: 'xfs',
  mountOptions: ['nouuid', 'discard'],
  mkfsOptions: ['-f', '-l', 'size=4m', '-m', 'crc=0'],
};

interface Snapshot {
  readonly dir: string;
  readonly request: AttachRequest;
  readonly pair: { readonly data: string; readonly index: string };
  readonly mountPoint: string;
}

/** A snapshot directory with a config; `size` null = read-only. */
async function snapshot(
  stand: Stand,
  id: string,
  lowers: readonly LowerEntry[],
  writable: { type: WritableLayerType; virtualSizeBytes: bigint } | null,
): Promise<Snapshot> {
  const { engine } = stand;
  const dir = join(stand.dir, id);
  await engine.files.makeSnapshotDir(dir, { work: true, owner: null });
  const block = join(dir, 'block');
  const pair = { data: join(block, 'writable_data'), index: join(block, 'writable_index') };
  if (writable !== null) await engine.layers.createWritable({ ...pair, ...writable });
  const configPath = join(block, 'config.v1.json');
  const resultFile = join(block, 'init-debug.log');
  const upper = writable === null ? null : pair;
  const config: ImageConfig = { repoBlobUrl: '', lowers, upper, resultFile };
  await engine.layers.writeImageConfig(configPath, config);
  const readOnly = writable === null;
  const request: AttachRequest = { id, configPath, readOnly, sectorSizeBytes: 4096 };
  return { dir, request, pair, mountPoint: join(block, 'mountpoint') };
}

const kFresh = { virtualSizeBytes: 64n << 30n };

describe('a writable device', () => {
  for (const type of ['append', 'sparse'] as const) {
    for (const fs of [kExt4, kXfs]) {
      it(`of ${type} type with ${fs.type} keeps what was written through sealing and into a child`, async (t) => {
        const stand = makeStand(t);
        const { engine } = stand;
        const { mounts, devices, layers } = engine;
        const parent = await snapshot(stand, '1', [], { type, ...kFresh });
        const attachedMs = performance.now();
        const device = await devices.attach(parent.request, never);
        t.diagnostic(`attach, blockd started: ${(performance.now() - attachedMs).toFixed(0)} ms`);
        assert.equal(device.sizeBytes, kFresh.virtualSizeBytes);
        assert.equal(await mounts.probeFileSystem(device.path), null);

        const formatMs = performance.now();
        await mounts.format(device.path, fs, join(stand.dir, 'scratch'));
        t.diagnostic(`format 64 GiB: ${(performance.now() - formatMs).toFixed(0)} ms`);
        t.diagnostic(`data file after: ${(statSync(parent.pair.data).blocks / 2).toFixed(0)} KiB`);
        assert.equal(await mounts.probeFileSystem(device.path), fs.type);

        const mount = { type: fs.type, source: device.path, options: ['rw', ...fs.mountOptions] };
        await mounts.mount(mount, parent.mountPoint);
        await mounts.mount(mount, parent.mountPoint);
        assert.equal(statSync(parent.mountPoint).mode & 0o777, 0o755);
        assert.deepEqual(execFileSync('ls', ['-A', parent.mountPoint]).toString(), '');
        const content = execFileSync('head', ['-c', '3000000', '/dev/urandom'], { maxBuffer: 1 << 23 });
        writeFileSync(join(parent.mountPoint, 'file'), content);
        assert.equal(await mounts.isHeldElsewhere(device, parent.mountPoint), false);
        await assert.rejects(devices.detach('1'), failsAs(ErrorKind.FailedPrecondition, 'device 1'));
        await mounts.unmount(parent.mountPoint);
        await devices.detach('1');
        await devices.detach('1');
        assert.equal(await devices.find('1'), null);

        await layers.seal(parent.pair.data, parent.pair.index, join(parent.dir, 'fs/overlaybd.sealed'));
        const lowers = [{ dir: join(parent.dir, 'fs') }];
        const child = await snapshot(stand, '2', lowers, { type, virtualSizeBytes: 0n });
        const view = await snapshot(stand, '2-ro', lowers, null);
        for (const { request, mountPoint } of [child, view]) {
          const attached = await devices.attach(request, never);
          assert.equal(attached.readOnly, request.readOnly);
          assert.equal(attached.sizeBytes, kFresh.virtualSizeBytes);
          const norecovery = fs.type === 'xfs' ? ['nouuid', 'norecovery'] : ['noload'];
          const options = request.readOnly ? ['ro', ...norecovery] : ['rw', ...fs.mountOptions];
          await mounts.mount({ type: fs.type, source: attached.path, options }, mountPoint);
          assert.ok(readFileSync(join(mountPoint, 'file')).equals(content));
          if (request.readOnly) assert.throws(() => writeFileSync(join(mountPoint, 'x'), ''), /EROFS/);
          else writeFileSync(join(mountPoint, 'file'), 'changed in the child');
          await mounts.unmount(mountPoint);
        }
        assert.deepEqual((await devices.list()).map((entry) => entry.id).sort(), ['2', '2-ro']);
      });
    }
  }

  it('whose disk is full reports it and the file system above stays readable', async (t) => {
    const stand = makeStand(t, (context) => makeTmpfs(context, 24 << 20));
    const { engine } = stand;
    const made = await snapshot(stand, '1', [], { type: 'append', virtualSizeBytes: 1n << 30n });
    const device = await engine.devices.attach(made.request, never);
    await engine.mounts.format(device.path, kExt4, join(stand.dir, 'scratch'));
    await engine.mounts.mount({ type: 'ext4', source: device.path, options: ['rw'] }, made.mountPoint);
    writeFileSync(join(made.mountPoint, 'kept'), 'kept', { flush: true });
    const noSpace = () =>
      execFileSync('dd', ['if=/dev/urandom', `of=${join(made.mountPoint, 'big')}`, 'bs=1M', 'count=64', 'conv=fsync'], {
        stdio: 'ignore',
      });
    assert.throws(noSpace);
    execFileSync('sh', ['-c', 'echo 1 > /proc/sys/vm/drop_caches']);
    assert.equal(readFileSync(join(made.mountPoint, 'kept'), 'utf8'), 'kept');
    await engine.mounts.unmount(made.mountPoint);
  });
});

describe('attaching', () => {
  it('the same at the same time, many times, gives one device', async (t) => {
    const stand = makeStand(t);
    const made = await snapshot(stand, '1', [], { type: 'append', virtualSizeBytes: 1n << 30n });
    const all = await Promise.all(Array.from({ length: 20 }, () => stand.engine.devices.attach(made.request, never)));
    assert.equal(new Set(all.map((device) => device.path)).size, 1);
    assert.equal((await stand.engine.devices.list()).length, 1);
  });

  it('stops waiting when the caller does', async (t) => {
    const stand = makeStand(t);
    const made = await snapshot(stand, '1', [], { type: 'append', virtualSizeBytes: 1n << 30n });
    const caller = new AbortController();
    const attach = stand.engine.devices.attach(made.request, caller.signal);
    caller.abort();
    await assert.rejects(attach, failsAs(ErrorKind.Cancelled, 'device 1'));
    await assert.rejects(stand.engine.devices.attach(made.request, caller.signal), failsAs(ErrorKind.Cancelled));
    await stand.engine.devices.detach('1'); // comes after the attach that nobody waits for
    assert.equal(await stand.engine.devices.find('1'), null);
  });

  it('a missing layer is NotFound, a corrupt one DataLoss, with the reason', async (t) => {
    const stand = makeStand(t);
    const fs = join(stand.dir, 'layers');
    mkdirSync(fs);
    copyFileSync(join(kFixtures, 'neg-lsmt-magic/layer'), join(fs, 'overlaybd.commit'));
    const broken = await snapshot(stand, '1', [{ dir: fs }], null);
    await assert.rejects(
      stand.engine.devices.attach(broken.request, never),
      failsAs(ErrorKind.DataLoss, 'attach device 1', 'layer'),
    );
    const missing = await snapshot(stand, '2', [{ file: join(fs, 'nonesuch') }], null);
    await assert.rejects(
      stand.engine.devices.attach(missing.request, never),
      failsAs(ErrorKind.NotFound, 'attach device 2', 'nonesuch'),
    );
    const [result] = [readFileSync(join(missing.dir, 'block/init-debug.log'), 'utf8')];
    assert.match(result, /^failed:.*nonesuch/s);
    const absent = { ...missing.request, configPath: join(stand.dir, 'nonesuch.json') };
    await assert.rejects(stand.engine.devices.attach(absent, never), failsAs(ErrorKind.NotFound, 'nonesuch.json'));
    // The same call works once the cause is gone.
    truncateSync(join(fs, 'overlaybd.commit'), 0);
    copyFileSync(join(kFixtures, 'commit-raw/layer'), join(fs, 'overlaybd.commit'));
    await stand.engine.devices.attach(broken.request, never);
  });

  it('keeps stores apart', async (t) => {
    const stand = makeStand(t);
    const other = stand.another('other');
    const made = await snapshot(stand, '1', [], { type: 'append', virtualSizeBytes: 1n << 30n });
    const elsewhere = await snapshot(stand, 'x', [], { type: 'append', virtualSizeBytes: 1n << 30n });
    const mine = await stand.engine.devices.attach(made.request, never);
    const theirs = await other.devices.attach({ ...elsewhere.request, id: '1' }, never);
    assert.notEqual(mine.path, theirs.path);
    await other.devices.detach('1');
    assert.equal(await other.devices.find('1'), null);
    assert.deepEqual(await stand.engine.devices.find('1'), mine);
  });
});

describe('blockd', () => {
  it('that was killed is started again by the next attach, and its death is told once', async (t) => {
    const stand = makeStand(t);
    const { engine } = stand;
    const made = await snapshot(stand, '1', [], { type: 'append', virtualSizeBytes: 1n << 30n });
    await engine.devices.attach(made.request, never);
    const first = await stand.killBlockd();
    // At once: the engine may not have noticed yet.
    const again = await engine.devices.attach(made.request, never);
    assert.equal(again.sizeBytes, 1n << 30n);
    const second = await engine.blockd.status();
    assert.notEqual(second?.pid, first);
    assert.deepEqual(stand.deaths, [first]);
  });

  it('that was killed has no devices, and its death is noticed without a call', async (t) => {
    const stand = makeStand(t);
    const { engine } = stand;
    const made = await snapshot(stand, '1', [], { type: 'append', virtualSizeBytes: 1n << 30n });
    await engine.devices.attach(made.request, never);
    const first = await stand.killBlockd();
    for (let i = 0; stand.deaths.length === 0 && i < 500; i++) await delay(10);
    assert.deepEqual(stand.deaths, [first]);
    assert.deepEqual(await engine.devices.list(), []);
    assert.equal(await engine.devices.find('1'), null);
    await engine.devices.detach('1');
  });

  it('goes on when the engine that started it lets go', async (t) => {
    const stand = makeStand(t);
    const made = await snapshot(stand, '1', [], { type: 'append', virtualSizeBytes: 1n << 30n });
    const device = await stand.engine.devices.attach(made.request, never);
    stand.engine.close();
    assert.deepEqual(await stand.another('test').devices.find('1'), device);
  });

  it('is started once, however many need it first', async (t) => {
    const stand = makeStand(t);
    const engines = [stand.engine, stand.another('a'), stand.another('b')];
    const running = await Promise.all(engines.map((engine) => engine.blockd.ensureRunning()));
    assert.equal(new Set(running.map((status) => status.pid)).size, 1);
  });

  const alone = (t: TestContext, spawn: { program: string; args: string[] } | null): RealEngine => {
    const dir = makeScratch(t);
    const native = loadNative(nativePath());
    const command = spawn === null ? null : { ...spawn, logFile: join(dir, 'log') };
    const socketPath = join(dir, 'sock');
    const engine = createEngine({ native, owner: 'o', blockd: { socketPath, spawn: command, version: '' } });
    t.after(() => engine.close());
    return engine;
  };
  const request: AttachRequest = { id: '1', configPath: '/c', readOnly: true, sectorSizeBytes: 4096 };

  it('that is somebody else’s to start and is not there is Unavailable, and has no devices', async (t) => {
    const engine = alone(t, null);
    await assert.rejects(engine.devices.attach(request, never), failsAs(ErrorKind.Unavailable, 'sock'));
    assert.deepEqual(await engine.devices.list(), []);
    await engine.devices.detach('1');
  });

  it('that ends at once is Unavailable with the last words of its log', async (t) => {
    const engine = alone(t, { program: 'sh', args: ['-c', 'echo no fuse here >&2; exit 3'] });
    await assert.rejects(
      engine.devices.attach(request, never),
      failsAs(ErrorKind.Unavailable, 'exit code 3', 'no fuse here'),
    );
  });

  it('that is not installed is Unavailable', async (t) => {
    const engine = alone(t, { program: '/nonesuch/overlaybd-blockd', args: [] });
    await assert.rejects(engine.devices.attach(request, never), failsAs(ErrorKind.Unavailable, 'nonesuch'));
  });
});
