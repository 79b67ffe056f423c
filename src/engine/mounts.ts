/** The mount table and what changes it. Mounting goes through mount(2) of the addon; only what has no kernel driver of
 * its own (ntfs) goes through mount(8). Nothing here opens a file below a device we serve. */
import { readlinkSync } from 'node:fs';
import { lstat, readdir } from 'node:fs/promises';
import { setTimeout as delay, setImmediate as nextTurn } from 'node:timers/promises';
import { ErrorKind, SnapshotterError } from '../base/errors.ts';
import type { Mount } from '../worker/worker.ts';
import type { FsDescriptor, MountEntry, Mounts } from './engine.ts';
import { errnoName, fromIo } from './io-errors.ts';
import { formatDevice } from './mkfs.ts';
import type { Native } from './native.ts';
import { errnoOf, fromNative } from './native-errors.ts';
import { probeFileSystem } from './probe.ts';
import { runProgram } from './programs.ts';
import { echoesIn } from './propagation.ts';

const kENOENT = 2;
const kENXIO = 6;
const kEBUSY = 16;
const kEINVAL = 22;

/** How long a device node may take to settle after an attach (devtmpfs, probing by others), and the pace of looking. */
const kSettleMs = 500;
const kSettlePaceMs = 10;
const kMountProgramTimeoutMs = 30_000;
/** Freezing writes down all that is dirty. */
const kFreezeTimeoutMs = 60_000;
/** More stacked mounts than this at one place are not ours to take apart. */
const kStackMax = 256;
/** Processes looked at before other work gets its turn. */
const kProcessBatch = 64;

export function createMounts(native: Native): Mounts {
  const table = async (pid: string): Promise<readonly MountEntry[]> => {
    try {
      return await native.mountTable(pid);
    } catch (error) {
      throw fromNative(`read the mount table of process ${pid}`, error);
    }
  };
  const self = (): Promise<readonly MountEntry[]> => table('self');
  const mount = (what: Mount, target: string): Promise<void> => mountOnce(native, self, what, target);
  const unmount = (target: string): Promise<void> => unmountStack(native, self, target);
  return {
    mount,
    unmount,
    table: self,
    isHeldElsewhere: (device, except) => isHeldElsewhere(table, device, except),
    isHeldInOtherNamespace: (device, mountPoint) => isHeldInOtherNamespace(table, device, mountPoint),
    freeze,
    thaw: (target) => thaw(self, target),
    format: (devicePath: string, fs: FsDescriptor, scratchDir: string) =>
      formatDevice({ mount, unmount }, devicePath, fs, scratchDir),
    probeFileSystem,
  };
}

type Table = () => Promise<readonly MountEntry[]>;

async function mountOnce(native: Native, table: Table, what: Mount, target: string): Promise<void> {
  const context = `mount ${what.type} ${what.source} at ${target}`;
  if (!target.startsWith('/'))
    throw new SnapshotterError(ErrorKind.InvalidArgument, `${context}: not an absolute path`);
  const entries = await table();
  const there = entries.findLast((entry) => entry.mountPoint === target);
  if (there !== undefined) {
    if (await isSame(what, there, entries)) return;
    throw new SnapshotterError(
      ErrorKind.FailedPrecondition,
      `${context}: ${there.fsType} ${there.source} (${there.major}:${there.minor}) is mounted there`,
    );
  }
  if (what.type === 'ntfs') {
    const options = what.options.length === 0 ? [] : ['-o', what.options.join(',')];
    await runProgram('mount', ['-t', 'ntfs', ...options, '--', what.source, target], {
      timeoutMs: kMountProgramTimeoutMs,
    });
    return;
  }
  const deadline = performance.now() + kSettleMs;
  for (;;) {
    try {
      return await native.mount(what.type, what.source, target, what.options);
    } catch (error) {
      const settles = isDeviceNode(what.source) && [kENOENT, kENXIO, kEBUSY].includes(errnoOf(error));
      if (!settles || performance.now() >= deadline) throw fromNative(context, error);
    }
    await delay(kSettlePaceMs);
  }
}

function isDeviceNode(source: string): boolean {
  return source.startsWith('/dev/');
}

/** Whether what is mounted is what was asked for: the device for a device, the device of the covering mount for a bind,
 * the upper (or lowers) for an overlay. Decided from the table: the source itself may be a device that hangs. */
async function isSame(what: Mount, there: MountEntry, entries: readonly MountEntry[]): Promise<boolean> {
  if (what.options.includes('bind') || what.options.includes('rbind')) {
    const below = entries.filter((entry) => entry !== there);
    const covering = coveringMount(what.source, below);
    return covering !== null && covering.major === there.major && covering.minor === there.minor;
  }
  if (what.type === 'overlay') {
    if (there.fsType !== 'overlay') return false;
    const wanted = what.options.find((option) => option.startsWith('upperdir=')) ?? lowerOf(what.options);
    return wanted !== undefined && there.options.includes(wanted);
  }
  if (!isDeviceNode(what.source)) return there.fsType === what.type && there.source === what.source;
  try {
    const { rdev } = await lstat(what.source);
    return deviceNumber(rdev, 'major') === there.major && deviceNumber(rdev, 'minor') === there.minor;
  } catch (error) {
    if (errnoName(error) === 'ENOENT') return false;
    throw fromIo(`stat ${what.source}`, error);
  }
}

const lowerOf = (options: readonly string[]): string | undefined =>
  options.find((option) => option.startsWith('lowerdir='));

/** glibc's makedev(3) layout. */
function deviceNumber(rdev: number, part: 'major' | 'minor'): number {
  const value = BigInt(rdev);
  return part === 'major'
    ? Number(((value >> 8n) & 0xfffn) | ((value >> 32n) & 0xfffff000n))
    : Number((value & 0xffn) | ((value >> 12n) & 0xffffff00n));
}

/** The mount that `path` lies on; the last of a stack covers the earlier ones. */
function coveringMount(path: string, entries: readonly MountEntry[]): MountEntry | null {
  let best: MountEntry | null = null;
  for (const entry of entries) {
    if (!isAtOrBelow(path, entry.mountPoint)) continue;
    if (best === null || entry.mountPoint.length >= best.mountPoint.length) best = entry;
  }
  return best;
}

function isAtOrBelow(path: string, dir: string): boolean {
  return path === dir || dir === '/' || path.startsWith(`${dir}/`);
}

/** By a program with a deadline: the ioctl opens the file system, which may hang with its device. */
async function freeze(target: string): Promise<void> {
  const options = { timeoutMs: kFreezeTimeoutMs };
  try {
    await runProgram('fsfreeze', ['--freeze', target], options);
  } catch (error) {
    // Frozen by a predecessor that died: only then can it be thawed.
    await runProgram('fsfreeze', ['--unfreeze', target], options).catch(() => {
      throw error;
    });
    await runProgram('fsfreeze', ['--freeze', target], options);
  }
}

async function thaw(table: Table, target: string): Promise<void> {
  if (!(await table()).some((entry) => entry.mountPoint === target)) return;
  try {
    await runProgram('fsfreeze', ['--unfreeze', target], { timeoutMs: kFreezeTimeoutMs });
  } catch (error) {
    // EINVAL for one that is not frozen, EIO for one whose device is gone: thawed either way.
    if (!(error instanceof SnapshotterError) || error.kind !== ErrorKind.Internal) throw error;
  }
}

async function unmountStack(native: Native, table: Table, target: string): Promise<void> {
  const context = `unmount ${target}`;
  for (let depth = 0; depth < kStackMax; depth++) {
    try {
      await native.unmount(target, false);
    } catch (error) {
      const errno = errnoOf(error);
      if (errno === kENOENT) return;
      if (errno !== kEINVAL) throw fromNative(context, error);
      // "Not a mount point". The table has the last word: EINVAL has other causes (a locked mount).
      if (!(await table()).some((entry) => entry.mountPoint === target)) return;
      throw fromNative(context, error);
    }
  }
  throw new SnapshotterError(ErrorKind.FailedPrecondition, `${context}: still mounted after ${kStackMax} unmounts`);
}

/** A device is held by every mount of its file system, and by every overlay that has a directory of that file system
 * below it (an overlay keeps a private clone of the mount, so unmounting `except` would not free the device). */
async function isHeldElsewhere(
  table: (pid: string) => Promise<readonly MountEntry[]>,
  device: { readonly major: number; readonly minor: number },
  except: string,
): Promise<boolean> {
  const own = await table('self');
  if (own.some((entry) => holds(entry, device, except) && entry.mountPoint !== except)) return true;
  return isHeldInOtherNamespace(table, device, except);
}

async function isHeldInOtherNamespace(
  table: (pid: string) => Promise<readonly MountEntry[]>,
  device: { readonly major: number; readonly minor: number },
  mountPoint: string,
): Promise<boolean> {
  for (const pid of await otherNamespaces()) {
    let entries: readonly MountEntry[];
    try {
      entries = await table(pid);
    } catch {
      continue; // the process ended; a namespace it alone kept ended with it
    }
    const holding = entries.filter((entry) => holds(entry, device, mountPoint));
    if (holding.length === 0) continue;
    const isEcho = await echoesIn(pid);
    if (!holding.every(isEcho)) return true;
  }
  return false;
}

function holds(
  entry: MountEntry,
  device: { readonly major: number; readonly minor: number },
  mountPoint: string,
): boolean {
  if (entry.major === device.major && entry.minor === device.minor) return true;
  return entry.fsType === 'overlay' && entry.options.some((option) => overlayUses(option, mountPoint));
}

/** Whether an overlay option names `dir` or something below. The kernel escapes ':' and ',' in them with a backslash,
 * which only adds characters: a path that is ours has none of these. */
function overlayUses(option: string, dir: string): boolean {
  const match = /^(?:lowerdir|upperdir|workdir|lowerdir\+|datadir\+)=(.*)$/s.exec(option);
  return (match?.[1] ?? '').split(':').some((path) => path !== '' && isAtOrBelow(path, dir));
}

/** One process for each (mount namespace, root directory) other than our own namespace. The root counts because a table
 * shows only what can be reached from it. Processes come and go while we look; those that vanish hold nothing.
 * These links are made up by the kernel on the spot, a few microseconds each and never any I/O: fetching them through
 * the thread pool would cost ten times as much. */
async function otherNamespaces(): Promise<readonly string[]> {
  const link = (path: string): string | null => {
    try {
      return readlinkSync(path);
    } catch {
      return null;
    }
  };
  let pids: string[];
  try {
    pids = (await readdir('/proc')).filter((name) => /^[0-9]+$/.test(name));
  } catch (error) {
    throw fromIo('list processes', error);
  }
  const own = link('/proc/self/ns/mnt');
  const found = new Map<string, string>();
  for (const [i, pid] of pids.entries()) {
    if (i % kProcessBatch === kProcessBatch - 1) await nextTurn();
    const namespace = link(`/proc/${pid}/ns/mnt`);
    // In our own namespace another root shows a part of our table only.
    if (namespace === null || namespace === own) continue;
    const view = `${namespace} ${link(`/proc/${pid}/root`) ?? ''}`;
    if (!found.has(view)) found.set(view, pid);
  }
  return [...found.values()];
}
