/** Places for tests on the real world: a directory on the disk of the checkout, a small tmpfs, a blockd of one's own.
 * Whatever a test leaves is taken away at its end, also when it fails. */
import { execFileSync, spawnSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { join, resolve } from 'node:path';
import type { TestContext } from 'node:test';
import { setTimeout as delay } from 'node:timers/promises';
import { type ErrorKind, SnapshotterError } from '../base/errors.ts';
import type { BlockdEvents } from './host-process.ts';
import { loadNative, nativePath } from './native.ts';
import { createEngine, type RealEngine } from './real-engine.ts';

const kProject = resolve(import.meta.dirname, '../..');

/** A directory on disk (ext4 on our machines), gone at the end of the test; `before` runs ahead of that. */
export function makeScratch(t: TestContext, before: () => Promise<void> = () => Promise.resolve()): string {
  mkdirSync(join(kProject, 'build/scratch'), { recursive: true });
  const dir = mkdtempSync(join(kProject, 'build/scratch/engine-'));
  t.after(async () => {
    unmountBelow(dir);
    await before();
    unmountBelow(dir);
    rmSync(dir, { recursive: true, force: true });
  });
  return dir;
}

/** A tmpfs of `sizeBytes`: the disk that gets full. */
export function makeTmpfs(t: TestContext, sizeBytes: number): string {
  const dir = makeScratch(t);
  execFileSync('mount', ['-t', 'tmpfs', '-o', `size=${sizeBytes},mode=0755`, 'overlaybd-test', dir]);
  return dir;
}

/** Written apart from the addon's reader, so that each checks the other. */
export function mountPoints(): readonly string[] {
  const decode = (text: string): string =>
    text.replace(/\\([0-7]{3})/g, (_, octal: string) => String.fromCharCode(Number.parseInt(octal, 8)));
  return readFileSync('/proc/self/mountinfo', 'utf8')
    .split('\n')
    .filter((line) => line !== '')
    .map((line) => decode(line.split(' ')[4] ?? ''));
}

export function unmountBelow(dir: string): void {
  const below = mountPoints().filter((point) => point === dir || point.startsWith(`${dir}/`));
  // Later mounts cover earlier ones.
  for (const point of below.reverse()) execFileSync('umount', ['-l', '--', point]);
}

export interface Stand {
  readonly dir: string;
  readonly engine: RealEngine;
  /** pids of every blockd that died while the engine watched */
  readonly deaths: number[];
  /** Another engine on the same blockd. */
  another(owner: string): RealEngine;
  /** kill -9 of the blockd that answers; its pid. */
  killBlockd(): Promise<number>;
}

/** An engine whose blockd is started on first use and ended, devices and all, with the test. */
export function makeStand(t: TestContext, place: (t: TestContext) => string = makeScratch): Stand {
  const deaths: number[] = [];
  const engines: RealEngine[] = [];
  /** Loop devices whose server was killed stay bound to a file that fails. */
  const dead: string[] = [];
  const run = makeScratch(t, async () => {
    for (const engine of engines) await endBlockd(engine);
    // One that lost the race for the start may still be on its way up.
    for (const pid of processesThatName(socketPath)) await endProcess(pid);
    for (const node of dead) freeDeadLoop(node);
  });
  const dir = place === makeScratch ? run : place(t);
  const socketPath = join(run, 'blockd.sock');
  const make = (owner: string, events: BlockdEvents): RealEngine => {
    const native = loadNative(nativePath());
    const main = resolve(import.meta.dirname, '../blockd/main.ts');
    // Daemons see nothing of our environment; this one is to load the addon that we test.
    const args = [`OVERLAYBD_ADDON=${nativePath()}`, process.execPath, main, '--socket', socketPath];
    const spawn = { program: 'env', args: [...args, '--run-dir', join(run, 'run')], logFile: join(run, 'blockd.log') };
    const engine = createEngine({ native, owner, blockd: { socketPath, spawn, version: native.version }, events });
    engines.push(engine);
    return engine;
  };
  const engine = make('test', { onDeath: (pid) => deaths.push(pid) });
  const killBlockd = async (): Promise<number> => {
    const running = await engine.blockd.ensureRunning();
    dead.push(...(await engine.devices.list()).map(({ device }) => device.path));
    process.kill(running.pid, 'SIGKILL');
    await isGone(running.pid);
    return running.pid;
  };
  return { dir, engine, deaths, another: (owner) => make(owner, {}), killBlockd };
}

async function endBlockd(engine: RealEngine): Promise<void> {
  const running = await engine.blockd.recheck().catch(() => null);
  engine.close();
  if (running === null) return;
  await engine.blockd.client.shutdown({ force: true }, { timeoutMs: 10_000 }).catch(() => {
    // Killed below.
  });
  if (!(await isGone(running.pid))) await endProcess(running.pid);
}

/** The next blockd may have released it already, and the number may be somebody's again: only one that fails is freed. */
function freeDeadLoop(node: string): void {
  try {
    execFileSync('dd', [`if=${node}`, 'of=/dev/null', 'bs=4096', 'count=1', 'iflag=direct'], { stdio: 'ignore' });
  } catch {
    spawnSync('losetup', ['-d', node]);
  }
}

function processesThatName(text: string): readonly number[] {
  const named = (pid: string): boolean => {
    try {
      return readFileSync(`/proc/${pid}/cmdline`, 'utf8').includes(text);
    } catch {
      return false;
    }
  };
  return readdirSync('/proc')
    .filter((name) => /^[0-9]+$/.test(name) && name !== String(process.pid) && named(name))
    .map(Number);
}

async function endProcess(pid: number): Promise<void> {
  try {
    process.kill(pid, 'SIGKILL');
  } catch {
    return;
  }
  await isGone(pid);
}

/** True once the process has ended (a zombie has: its parent is just slow to notice). */
export async function isGone(pid: number, timeoutMs = 5_000): Promise<boolean> {
  const deadline = performance.now() + timeoutMs;
  for (;;) {
    try {
      if (/^State:\t[ZX]/m.test(readFileSync(`/proc/${pid}/status`, 'utf8'))) return true;
    } catch {
      return true;
    }
    if (performance.now() > deadline) return false;
    await delay(10);
  }
}

/** For assert.rejects: an error of ours of this kind, whose text has all of `words`. */
export function failsAs(kind: ErrorKind, ...words: readonly string[]): (error: unknown) => boolean {
  return (error) => {
    if (!(error instanceof SnapshotterError) || error.kind !== kind) return false;
    return words.every((word) => error.message.includes(word));
  };
}
