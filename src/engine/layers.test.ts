// Invariants: a function that was cut anywhere and is called again ends as if it had not been; a file that holds somebody's
// writes is never made anew; a full disk leaves nothing behind.
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { readdirSync, readFileSync, renameSync, rmSync, statSync, truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, it, type TestContext } from 'node:test';
import { ErrorKind } from '../base/errors.ts';
import type { CreateWritable, Layers, WritableLayerType } from './engine.ts';
import { createLayers } from './layers.ts';
import { loadNative, nativePath } from './native.ts';
import { failsAs, makeScratch, makeTmpfs } from './scratch.test.ts';

const kGiB = 1n << 30n;
const kTypes: readonly WritableLayerType[] = ['append', 'sparse'];

function make(
  t: TestContext,
  type: WritableLayerType,
  dir = makeScratch(t),
): { layers: Layers; pair: CreateWritable; sealed: string; dir: string } {
  const [data, index] = [join(dir, 'writable_data'), join(dir, 'writable_index')];
  const pair = { data, index, virtualSizeBytes: kGiB, type };
  return { layers: createLayers(loadNative(nativePath())), pair, sealed: join(dir, 'overlaybd.sealed'), dir };
}

for (const type of kTypes) {
  describe(`a writable ${type} layer`, () => {
    it('is made with the size it was asked for', async (t) => {
      const { layers, pair } = make(t, type);
      await layers.createWritable(pair);
      const info = await layers.inspect(pair.data);
      assert.deepEqual(info, { kind: 'lsmt-writable', virtualSizeBytes: kGiB, tar: false, zfile: false });
    });

    it('that is there already is kept, byte for byte', async (t) => {
      const { layers, pair } = make(t, type);
      await layers.createWritable(pair);
      const before = readFileSync(pair.data).subarray(0, 4096);
      await layers.createWritable(pair);
      assert.deepEqual(readFileSync(pair.data).subarray(0, 4096), before);
    });

    it('of another size or type is refused, and stays', async (t) => {
      const { layers, pair } = make(t, type);
      await layers.createWritable(pair);
      const other = kTypes.find((candidate) => candidate !== type) ?? type;
      for (const change of [{ virtualSizeBytes: 2n * kGiB }, { type: other }]) {
        await assert.rejects(
          layers.createWritable({ ...pair, ...change }),
          failsAs(ErrorKind.FailedPrecondition, pair.data),
        );
      }
      assert.equal((await layers.inspect(pair.data)).virtualSizeBytes, kGiB);
    });

    for (const [what, damage] of [
      ['without its index', (pair: CreateWritable) => rmSync(pair.index)],
      ['without its data file', (pair: CreateWritable) => rmSync(pair.data)],
      ['with a cut data header', (pair: CreateWritable) => truncateSync(pair.data, 100)],
      ['with an empty data file', (pair: CreateWritable) => truncateSync(pair.data, 0)],
      [
        'with a data header that never reached the disk',
        (pair: CreateWritable) => writeFileSync(pair.data, Buffer.alloc(4096)),
      ],
    ] as const) {
      it(`${what} is made anew`, async (t) => {
        const { layers, pair } = make(t, type);
        await layers.createWritable(pair);
        damage(pair);
        await layers.createWritable(pair);
        assert.equal((await layers.inspect(pair.data)).kind, 'lsmt-writable');
        statSync(pair.index);
      });
    }

    it('that holds writes and lost its index is not destroyed', async (t) => {
      const { layers, pair } = make(t, type);
      await layers.createWritable(pair);
      execFileSync('dd', ['if=/dev/urandom', `of=${pair.data}`, 'bs=4096', 'seek=1', 'count=64', 'conv=notrunc'], {
        stdio: 'ignore',
      });
      rmSync(pair.index);
      const before = readFileSync(pair.data).subarray(0, 65 * 4096);
      await assert.rejects(layers.createWritable(pair), failsAs(ErrorKind.DataLoss, pair.data, 'holds writes'));
      assert.deepEqual(readFileSync(pair.data).subarray(0, 65 * 4096), before);
    });

    it('on a full disk is ResourceExhausted, leaves nothing, and works once there is room', async (t) => {
      const dir = makeTmpfs(t, 128 * 1024);
      const { layers, pair } = make(t, type, dir);
      const filler = join(dir, 'filler');
      fill(filler, 0);
      await assert.rejects(layers.createWritable(pair), failsAs(ErrorKind.ResourceExhausted, pair.data));
      assert.deepEqual(readdirSync(dir), ['filler']);
      rmSync(filler);
      await layers.createWritable(pair);
    });

    it('is sealed under its new name, and the index goes', async (t) => {
      const { layers, pair, sealed, dir } = make(t, type);
      await layers.createWritable(pair);
      await layers.seal(pair.data, pair.index, sealed);
      assert.deepEqual(readdirSync(dir), ['overlaybd.sealed']);
      assert.equal((await layers.inspect(sealed)).kind, 'lsmt-sealed');
    });

    it('whose sealing was cut at any step is finished by the next call', async (t) => {
      const { layers, pair, sealed, dir } = make(t, type);
      const native = loadNative(nativePath());
      const steps = [
        () => native.sealUpper(pair.data, pair.index),
        () => Promise.resolve(renameSync(pair.data, sealed)),
        () => Promise.resolve(rmSync(pair.index)),
      ];
      for (let done = 0; done <= steps.length; done++) {
        rmSync(sealed, { force: true });
        await layers.createWritable(pair);
        for (const step of steps.slice(0, done)) await step();
        await layers.seal(pair.data, pair.index, sealed);
        assert.deepEqual(readdirSync(dir), ['overlaybd.sealed'], `cut after step ${done}`);
        assert.equal((await layers.inspect(sealed)).kind, 'lsmt-sealed');
      }
    });

    it('from another file system is sealed too, cut or not, and stays sparse', async (t) => {
      const { layers, pair } = make(t, type, makeTmpfs(t, 1 << 24));
      const dir = makeScratch(t);
      const sealed = join(dir, 'overlaybd.sealed');
      const native = loadNative(nativePath());
      for (const cut of [false, true]) {
        rmSync(sealed, { force: true });
        await layers.createWritable(pair);
        if (cut) {
          await native.sealUpper(pair.data, pair.index);
          execFileSync('cp', ['--sparse=auto', pair.data, sealed]);
        }
        await layers.seal(pair.data, pair.index, sealed);
        assert.deepEqual(readdirSync(dir), ['overlaybd.sealed']);
        assert.equal((await layers.inspect(sealed)).kind, 'lsmt-sealed');
        assert.ok(statSync(sealed).blocks * 512 < 1 << 20);
      }
    });
  });
}

describe('sealing', () => {
  it('what is not there is NotFound', async (t) => {
    const { layers, pair, sealed } = make(t, 'append');
    await assert.rejects(layers.seal(pair.data, pair.index, sealed), failsAs(ErrorKind.NotFound, pair.data));
  });

  it('never replaces another sealed layer', async (t) => {
    const { layers, pair, sealed } = make(t, 'append');
    await layers.createWritable(pair);
    await layers.seal(pair.data, pair.index, sealed);
    const before = readFileSync(sealed);
    await layers.createWritable(pair);
    await assert.rejects(layers.seal(pair.data, pair.index, sealed), failsAs(ErrorKind.FailedPrecondition, sealed));
    assert.deepEqual(readFileSync(sealed), before);
  });

  it('finds a file that is no layer and says so', async (t) => {
    const { layers, pair, sealed } = make(t, 'append');
    writeFileSync(sealed, 'x'.repeat(10_000));
    await assert.rejects(layers.seal(pair.data, pair.index, sealed), failsAs(ErrorKind.DataLoss, sealed));
  });
});

describe('an image config file', () => {
  const config = { repoBlobUrl: '', lowers: [{ dir: '/a' }], upper: null, resultFile: '/r' };

  it('is private, complete and alone in its directory', async (t) => {
    const dir = makeScratch(t);
    const { layers } = make(t, 'append');
    const path = join(dir, 'config.v1.json');
    await layers.writeImageConfig(path, config);
    await layers.writeImageConfig(path, { ...config, resultFile: '/s' });
    assert.equal((await layers.readImageConfig(path)).resultFile, '/s');
    assert.equal(statSync(path).mode & 0o777, 0o600);
    assert.deepEqual(readdirSync(dir), ['config.v1.json']);
  });

  it('that is missing is NotFound, that is cut is DataLoss', async (t) => {
    const dir = makeScratch(t);
    const { layers } = make(t, 'append');
    const path = join(dir, 'config.v1.json');
    await assert.rejects(layers.readImageConfig(path), failsAs(ErrorKind.NotFound, path));
    writeFileSync(path, '{"lowers":');
    await assert.rejects(layers.readImageConfig(path), failsAs(ErrorKind.DataLoss, path));
  });

  it('on a full disk keeps its old text', async (t) => {
    const dir = makeTmpfs(t, 128 * 1024);
    const { layers } = make(t, 'append');
    const path = join(dir, 'config.v1.json');
    await layers.writeImageConfig(path, config);
    fill(join(dir, 'filler'), 0);
    const long = { ...config, lowers: Array.from({ length: 255 }, (_, i) => ({ dir: `/${i}`.repeat(20) })) };
    await assert.rejects(layers.writeImageConfig(path, long), failsAs(ErrorKind.ResourceExhausted, path));
    assert.deepEqual(await layers.readImageConfig(path), config);
    assert.deepEqual(readdirSync(dir).sort(), ['config.v1.json', 'filler']);
  });
});

/** Takes all room of a small tmpfs but `leaveBytes`. */
function fill(path: string, leaveBytes: number): void {
  writeFileSync(path, '');
  const block = Buffer.alloc(4096, 1);
  try {
    for (;;) writeFileSync(path, block, { flag: 'a' });
  } catch {
    truncateSync(path, Math.max(0, statSync(path).size - leaveBytes));
  }
}
