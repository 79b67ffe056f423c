// Invariants: the table tells the truth about any path a mount can have; a device counts as held while any namespace, or
// an overlay, keeps it; repeating a mount or an unmount is success, and what is somebody else's is not taken for ours.
import assert from 'node:assert/strict';
import { type ChildProcess, execFileSync, spawn } from 'node:child_process';
import { mkdirSync } from 'node:fs';
import { join } from 'node:path';
import { describe, it, type TestContext } from 'node:test';
import { setTimeout as delay } from 'node:timers/promises';
import { ErrorKind } from '../base/errors.ts';
import type { MountEntry, Mounts } from './engine.ts';
import { createMounts } from './mounts.ts';
import { loadNative, nativePath } from './native.ts';
import { failsAs, isGone, makeScratch, mountPoints } from './scratch.test.ts';

const tmpfs = (source: string) => ({ type: 'tmpfs', source, options: ['nosuid', 'nodev', 'size=1m'] });

function make(t: TestContext): { dir: string; mounts: Mounts; entry: (target: string) => Promise<MountEntry> } {
  const mounts = createMounts(loadNative(nativePath()));
  return {
    dir: makeScratch(t),
    mounts,
    entry: async (target) => {
      const found = (await mounts.table()).findLast((candidate) => candidate.mountPoint === target);
      assert.ok(found !== undefined, `${target} is not in the table`);
      return found;
    },
  };
}

function makeDir(dir: string, name: string): string {
  const path = join(dir, name);
  mkdirSync(path, { recursive: true });
  return path;
}

/** A process in a mount namespace of its own that has a copy of all our mounts; ended with the test. */
async function otherNamespace(
  t: TestContext,
  propagation: 'private' | 'slave' = 'private',
): Promise<ChildProcess & { readonly pid: number }> {
  const child = spawn('unshare', ['--mount', '--propagation', propagation, 'sh', '-c', 'echo there; exec sleep 600'], {
    stdio: ['ignore', 'pipe', 'ignore'],
  });
  t.after(() => end(child));
  await new Promise((resolve) => child.stdout.once('data', resolve));
  assert.ok(child.pid !== undefined);
  return child as ChildProcess & { readonly pid: number };
}

async function end(child: ChildProcess): Promise<void> {
  child.kill('SIGKILL');
  if (child.pid !== undefined) await isGone(child.pid);
}

describe('the mount table', () => {
  for (const [what, name] of [
    ['blanks', 'a b\tc'],
    ['a line feed', 'a\nb'],
    ['a backslash', 'a\\040b'],
    ['a hash', '#a'],
    ['letters beyond ASCII', 'träger-層'],
    ['what looks like the separator', 'a - tmpfs b'],
  ] as const) {
    it(`decodes a mount point with ${what}`, async (t) => {
      const { dir, mounts, entry } = make(t);
      const target = makeDir(dir, name);
      await mounts.mount(tmpfs(`source of ${name}`), target);
      const found = await entry(target);
      assert.equal(found.source, `source of ${name}`);
      assert.equal(found.fsType, 'tmpfs');
      assert.ok(found.options.includes('nosuid'));
      await mounts.unmount(target);
      assert.ok(!(await mounts.table()).some((candidate) => candidate.mountPoint === target));
    });
  }

  it('decodes lines longer than a page, and those after them', async (t) => {
    const { dir, mounts, entry } = make(t);
    // Each of these characters takes four in the table; the path is near the longest the kernel takes.
    const deep = makeDir(dir, Array.from({ length: 15 }, () => ' '.repeat(250)).join('/'));
    const source = '\\'.repeat(4000);
    await mounts.mount(tmpfs(source), deep);
    const after = makeDir(dir, 'after');
    await mounts.mount(tmpfs('after'), after);
    assert.equal((await entry(deep)).source, source);
    assert.equal((await entry(after)).source, 'after');
  });

  it('agrees with one read by other code', async () => {
    const points = (await createMounts(loadNative(nativePath())).table()).map((entry) => entry.mountPoint);
    const others = mountPoints();
    for (const point of points) assert.ok(point.startsWith('/'));
    // Other tests mount at the same time: those that are in both readings are enough.
    assert.ok(points.filter((point) => others.includes(point)).length > 3);
  });
});

describe('mounting', () => {
  it('the same once more is success and does not stack', async (t) => {
    const { dir, mounts } = make(t);
    const target = makeDir(dir, 'at');
    await mounts.mount(tmpfs('one'), target);
    await mounts.mount(tmpfs('one'), target);
    assert.equal((await mounts.table()).filter((entry) => entry.mountPoint === target).length, 1);
  });

  it('over something else is refused and names it', async (t) => {
    const { dir, mounts } = make(t);
    const target = makeDir(dir, 'at');
    await mounts.mount(tmpfs('one'), target);
    await assert.rejects(mounts.mount(tmpfs('two'), target), failsAs(ErrorKind.FailedPrecondition, target, 'one'));
  });

  it('an overlay and a bind twice is success', async (t) => {
    const { dir, mounts } = make(t);
    const base = makeDir(dir, 'base');
    await mounts.mount(tmpfs('base'), base);
    const [lower, upper, work] = ['lower', 'upper', 'work'].map((name) => makeDir(base, name));
    const options = [`lowerdir=${lower}`, `upperdir=${upper}`, `workdir=${work}`];
    const [merged, bound] = [makeDir(dir, 'merged'), makeDir(dir, 'bound')];
    for (let i = 0; i < 2; i++) {
      await mounts.mount({ type: 'overlay', source: 'overlay', options }, merged);
      await mounts.mount({ type: 'bind', source: base, options: ['rbind', 'rw'] }, bound);
    }
    const table = await mounts.table();
    for (const target of [merged, bound]) {
      assert.equal(table.filter((entry) => entry.mountPoint === target).length, 1);
    }
  });

  it('a device that does not come is NotFound after a bounded wait', async (t) => {
    const { dir, mounts } = make(t);
    const mount = mounts.mount({ type: 'ext4', source: '/dev/overlaybd-nonesuch', options: [] }, makeDir(dir, 'at'));
    await assert.rejects(mount, failsAs(ErrorKind.NotFound, '/dev/overlaybd-nonesuch'));
  });

  it('an unknown file system or option is an error that names the mount', async (t) => {
    const { dir, mounts } = make(t);
    const target = makeDir(dir, 'at');
    await assert.rejects(mounts.mount({ type: 'nonesuchfs', source: 'x', options: [] }, target), /nonesuchfs/);
    await assert.rejects(mounts.mount({ ...tmpfs('x'), options: ['nonesuch=1'] }, target), /tmpfs/);
    assert.ok(!(await mounts.table()).some((entry) => entry.mountPoint === target));
  });
});

describe('unmounting', () => {
  it('takes the whole stack, and nothing mounted is success', async (t) => {
    const { dir, mounts } = make(t);
    const target = makeDir(dir, 'at');
    for (const name of ['1', '2', '3']) execFileSync('mount', ['-t', 'tmpfs', name, target]);
    await mounts.unmount(target);
    assert.ok(!(await mounts.table()).some((entry) => entry.mountPoint === target));
    await mounts.unmount(target);
    await mounts.unmount(join(dir, 'never-there'));
  });

  it('what is in use is FailedPrecondition, and works once it is not', async (t) => {
    const { dir, mounts } = make(t);
    const target = makeDir(dir, 'at');
    await mounts.mount(tmpfs('busy'), target);
    const holder = spawn('sh', ['-c', 'echo there; exec sleep 600'], {
      cwd: target,
      stdio: ['ignore', 'pipe', 'ignore'],
    });
    t.after(() => end(holder));
    await new Promise((resolve) => holder.stdout.once('data', resolve));
    await assert.rejects(mounts.unmount(target), failsAs(ErrorKind.FailedPrecondition, target));
    await end(holder);
    await mounts.unmount(target);
  });
});

describe('a frozen file system', () => {
  it('holds writes until it is thawed; freezing or thawing it twice is success', async (t) => {
    const { dir, mounts } = make(t);
    const [image, target] = [join(dir, 'image'), makeDir(dir, 'mountpoint')];
    execFileSync('truncate', ['--size', '16M', image]);
    execFileSync('mkfs.ext4', ['-q', image]);
    execFileSync('mount', ['-o', 'loop', image, target]);
    t.after(async () => {
      await mounts.thaw(target);
      await mounts.unmount(target);
    });
    await mounts.freeze(target);
    await mounts.freeze(target);
    const writer = spawn('sh', ['-c', 'echo x > "$0"', join(target, 'file')], { stdio: 'ignore' });
    const ended = new Promise<number | null>((resolve) => writer.once('exit', resolve));
    assert.equal(await Promise.race([ended, delay(100, 'waits')]), 'waits');
    await mounts.thaw(target);
    assert.equal(await ended, 0);
    await mounts.thaw(target);
    await mounts.unmount(target);
    await mounts.thaw(target);
  });

  it('is refused where nothing can be frozen', async (t) => {
    const { dir, mounts } = make(t);
    const target = makeDir(dir, 'mountpoint');
    await mounts.mount(tmpfs('x'), target);
    await assert.rejects(mounts.freeze(target), failsAs(ErrorKind.Internal, target));
  });
});

describe('a device', () => {
  it('is held by nobody when it is mounted where it belongs', async (t) => {
    const { dir, mounts, entry } = make(t);
    const target = makeDir(dir, 'mountpoint');
    await mounts.mount(tmpfs('x'), target);
    assert.equal(await mounts.isHeldElsewhere(await entry(target), target), false);
  });

  it('is held by a bind mount elsewhere', async (t) => {
    const { dir, mounts, entry } = make(t);
    const [target, bound] = [makeDir(dir, 'mountpoint'), makeDir(dir, 'bound')];
    await mounts.mount(tmpfs('x'), target);
    await mounts.mount({ type: 'bind', source: target, options: ['bind'] }, bound);
    assert.equal(await mounts.isHeldElsewhere(await entry(target), target), true);
    assert.equal(await mounts.isHeldInOtherNamespace(await entry(target), target), false);
    await mounts.unmount(bound);
    assert.equal(await mounts.isHeldElsewhere(await entry(target), target), false);
  });

  it('is held by an overlay on top of it, not by one beside it', async (t) => {
    const { dir, mounts, entry } = make(t);
    const [target, beside, merged] = ['mountpoint', 'mountpoint-2', 'merged'].map((name) => makeDir(dir, name));
    assert.ok(target !== undefined && beside !== undefined && merged !== undefined);
    await mounts.mount(tmpfs('x'), target);
    await mounts.mount(tmpfs('y'), beside);
    const overlay = (base: string) => ({
      type: 'overlay',
      source: 'overlay',
      options: [`lowerdir=${makeDir(base, 'a')}:${makeDir(base, 'b')}`],
    });
    await mounts.mount(overlay(beside), merged);
    assert.equal(await mounts.isHeldElsewhere(await entry(target), target), false);
    await mounts.unmount(merged);
    await mounts.mount(overlay(target), merged);
    assert.equal(await mounts.isHeldElsewhere(await entry(target), target), true);
  });

  it('is held by a mount namespace that kept a copy', async (t) => {
    const { dir, mounts, entry } = make(t);
    const target = makeDir(dir, 'mountpoint');
    await mounts.mount(tmpfs('x'), target);
    const device = await entry(target);
    const child = await otherNamespace(t);
    assert.equal(await mounts.isHeldElsewhere(device, target), true);
    assert.equal(await mounts.isHeldInOtherNamespace(device, target), true);
    await mounts.unmount(target);
    assert.equal(await mounts.isHeldElsewhere(device, target), true);
    await end(child);
    for (let i = 0; i < 100 && (await mounts.isHeldElsewhere(device, target)); i++) await delay(10);
    assert.equal(await mounts.isHeldElsewhere(device, target), false);
  });

  it('is not held by a namespace that only receives our mounts and our unmounts', async (t) => {
    const { dir, mounts, entry } = make(t);
    const base = makeDir(dir, 'shared');
    await mounts.mount(tmpfs('base'), base);
    execFileSync('mount', ['--make-shared', base]);
    const target = makeDir(base, 'mount point');
    await mounts.mount(tmpfs('before'), target);
    const child = await otherNamespace(t, 'slave');
    const late = makeDir(base, 'late');
    await mounts.mount(tmpfs('late'), late);
    for (const place of [target, late]) {
      const device = await entry(place);
      assert.equal(await mounts.isHeldElsewhere(device, place), false);
      await mounts.unmount(place);
      const table = await loadNative(nativePath()).mountTable(String(child.pid));
      assert.ok(!table.some(({ mountPoint }) => mountPoint === place));
    }
    await end(child);
    await mounts.unmount(base);
  });

  it('is looked for in milliseconds', async (t) => {
    const { dir, mounts, entry } = make(t);
    const target = makeDir(dir, 'mountpoint');
    await mounts.mount(tmpfs('x'), target);
    const device = await entry(target);
    const startedMs = performance.now();
    for (let i = 0; i < 10; i++) await mounts.isHeldElsewhere(device, target);
    t.diagnostic(`isHeldElsewhere: ${((performance.now() - startedMs) / 10).toFixed(2)} ms`);
  });
});
