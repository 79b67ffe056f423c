// Invariants: the layout has the contract's modes whatever the umask; deleting never crosses a mount; a small file is there
// whole or not at all.
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { chmodSync, existsSync, mkdirSync, readdirSync, statSync, symlinkSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, it } from 'node:test';
import { ErrorKind } from '../base/errors.ts';
import { createFiles } from './files.ts';
import { loadNative, nativePath } from './native.ts';
import { failsAs, makeScratch, makeTmpfs } from './scratch.test.ts';

const files = createFiles(loadNative(nativePath()));
const modeOf = (path: string): string => (statSync(path).mode & 0o7777).toString(8);

describe('a snapshot directory', () => {
  for (const umask of [0o022, 0o077, 0o777]) {
    it(`has the modes of the contract under umask ${umask.toString(8)}`, async (t) => {
      const dir = join(makeScratch(t), '1');
      const before = process.umask(umask);
      try {
        await files.makeSnapshotDir(dir, { work: true, owner: { uid: 1000, gid: 1001 } });
      } finally {
        process.umask(before);
      }
      const modes = ['', 'fs', 'work', 'block', 'block/mountpoint'].map((name) => modeOf(join(dir, name)));
      assert.deepEqual(modes, ['700', '755', '711', '711', '711']);
      assert.deepEqual(await files.owner(join(dir, 'fs')), { uid: 1000, gid: 1001 });
      assert.deepEqual(await files.owner(join(dir, 'block')), { uid: 0, gid: 0 });
    });
  }

  it('without work has none', async (t) => {
    const dir = join(makeScratch(t), '1');
    await files.makeSnapshotDir(dir, { work: false, owner: null });
    assert.deepEqual(readdirSync(dir).sort(), ['block', 'fs']);
  });

  it('that a crash left half made is completed', async (t) => {
    const dir = join(makeScratch(t), '1');
    mkdirSync(join(dir, 'fs'), { recursive: true });
    chmodSync(join(dir, 'fs'), 0o700);
    await files.makeSnapshotDir(dir, { work: true, owner: null });
    assert.equal(modeOf(join(dir, 'fs')), '755');
    assert.equal(modeOf(join(dir, 'block/mountpoint')), '711');
  });

  it('in the place of a file is refused', async (t) => {
    const dir = join(makeScratch(t), '1');
    writeFileSync(dir, '');
    await assert.rejects(
      files.makeSnapshotDir(dir, { work: true, owner: null }),
      failsAs(ErrorKind.FailedPrecondition, dir),
    );
  });
});

describe('deleting a tree', () => {
  it('takes everything, follows no link, and nothing there is success', async (t) => {
    const dir = makeScratch(t);
    const tree = join(dir, 'tree');
    mkdirSync(join(tree, 'a/b/c'), { recursive: true });
    writeFileSync(join(dir, 'kept'), 'x');
    symlinkSync(dir, join(tree, 'a/link'));
    chmodSync(join(tree, 'a'), 0);
    await files.removeTree(tree);
    assert.equal(existsSync(tree), false);
    assert.ok(existsSync(join(dir, 'kept')));
    await files.removeTree(tree);
  });

  it('stops at a mount and leaves its content alone', async (t) => {
    const dir = makeScratch(t);
    const point = join(dir, 'tree/point');
    mkdirSync(point, { recursive: true });
    execFileSync('mount', ['-t', 'tmpfs', 'x', point]);
    writeFileSync(join(point, 'precious'), 'x');
    await assert.rejects(files.removeTree(join(dir, 'tree')), failsAs(ErrorKind.FailedPrecondition));
    assert.ok(existsSync(join(point, 'precious')));
  });
});

describe('disk usage', () => {
  it('is what du says, without what is skipped or mounted', async (t) => {
    const dir = makeScratch(t);
    writeFileSync(join(dir, 'a'), Buffer.alloc(100_000, 1));
    execFileSync('ln', [join(dir, 'a'), join(dir, 'same-inode')]);
    mkdirSync(join(dir, 'sub'));
    writeFileSync(join(dir, 'sub/b'), Buffer.alloc(5_000, 1));
    const du = (...args: string[]) =>
      BigInt(
        execFileSync('du', ['-x', '-s', '--block-size=1', ...args, dir])
          .toString()
          .split('\t')[0] ?? '',
      );
    assert.deepEqual(await files.diskUsage(dir, []), { sizeBytes: du(), inodes: 4n });
    mkdirSync(join(dir, 'point'));
    execFileSync('mount', ['-t', 'tmpfs', 'x', join(dir, 'point')]);
    writeFileSync(join(dir, 'point/big'), Buffer.alloc(1 << 20));
    const skipped = await files.diskUsage(dir, ['sub', 'point']);
    assert.deepEqual(skipped, { sizeBytes: du('--exclude=sub', '--exclude=point'), inodes: 2n });
  });
});

describe('small files', () => {
  it('are written whole with their mode, and replaced whole', async (t) => {
    const path = join(makeScratch(t), 'image_ref');
    await files.writeFile(path, 'one', 0o644);
    await files.writeFile(path, 'two', 0o644);
    assert.equal(await files.readFile(path), 'two');
    assert.equal(modeOf(path), '644');
    await files.removeFile(path);
    await files.removeFile(path);
    assert.equal(await files.readFile(path), null);
    assert.equal(await files.exists(path), false);
  });

  it('on a full disk are ResourceExhausted, and nothing is left of them', async (t) => {
    const dir = makeTmpfs(t, 64 * 1024);
    await assert.rejects(
      files.writeFile(join(dir, 'f'), 'x'.repeat(1 << 20), 0o644),
      failsAs(ErrorKind.ResourceExhausted, join(dir, 'f')),
    );
    assert.deepEqual(readdirSync(dir), []);
    await files.writeFile(join(dir, 'f'), 'x', 0o644);
  });

  it('are listed apart from directories; a missing directory is empty', async (t) => {
    const dir = makeScratch(t);
    mkdirSync(join(dir, 'd'));
    writeFileSync(join(dir, 'f'), '');
    assert.deepEqual(await files.listDirs(dir), ['d']);
    assert.deepEqual(await files.listDirs(join(dir, 'nonesuch')), []);
    await files.makeDir(join(dir, 'x/y'), 0o750);
    assert.equal(modeOf(join(dir, 'x/y')), '750');
    await files.makeDir(join(dir, 'x/y'), 0o700);
    assert.equal(modeOf(join(dir, 'x/y')), '750');
  });
});
