/** What a run may leave on a machine: mounts, loop devices, FUSE connections, processes, runtime files, cgroups.
 *
 * As a program: `leaks.ts save FILE` before, `leaks.ts check FILE` after; exit 1 and a list when something is left. */
import { existsSync, readdirSync, readFileSync, readlinkSync, rmdirSync, statSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { mountTable } from './mounts.ts';
import { isErrno, run, runAny } from './processes.ts';

/** Each entry is a line for people; two states are compared as sets. */
export interface MachineState {
  readonly mounts: readonly string[];
  readonly loops: readonly string[];
  readonly fuseConnections: readonly string[];
  readonly processes: readonly string[];
  readonly runtimeFiles: readonly string[];
  readonly cgroups: readonly string[];
}

const kinds = ['mounts', 'loops', 'fuseConnections', 'processes', 'runtimeFiles', 'cgroups'] as const;

/** Programs that runs start; others come and go with the machine. */
const ourPrograms =
  /(^|[/ ])(overlaybd-[a-z]+|containerd(-shim[a-z0-9-]*)?|docker-registry|runc|redis-server|qemu-storage-daemon|fio)( |$)|build\/js\/(main|blockd\/main)\.js/;

/** Files below these count, and so does each directory the runtime makes for a namespace. */
const runtimeDirs = [
  '/run/overlaybd-blockd',
  '/run/overlaybd-snapshotter',
  '/run/containerd/s',
  '/run/containerd/fifo',
  '/run/containerd/runc',
];

interface Loop {
  readonly node: string;
  readonly backingFile: string;
}

interface Process {
  readonly pid: number;
  readonly startTicks: string;
  readonly command: string;
  /** /proc/N/cgroup: names the container a process belongs to even when its command does not. */
  readonly cgroup: string;
}

export async function machineState(): Promise<MachineState> {
  return {
    mounts: mountTable().map((line) => `${line.mountPoint} (${line.fsType} from ${line.source})`),
    loops: loops().map((loop) => `${loop.node} (${loop.backingFile})`),
    fuseConnections: await fuseConnections(),
    processes: processes()
      .filter((entry) => ourPrograms.test(entry.command))
      .map((entry) => `${entry.pid}@${entry.startTicks} ${entry.command}`),
    runtimeFiles: runtimeDirs.flatMap(filesBelow),
    cgroups: cgroups(),
  };
}

/** What is there now and was not before. With `mentioning` only what names one of those texts: for a run that shares
 * the machine with others (FUSE connections name nobody and are then left out: each is held by a mount, a loop
 * device or a process, which do). */
export function leaked(
  before: MachineState,
  after: MachineState,
  mentioning: readonly string[] = [],
): readonly string[] {
  return kinds.flatMap((kind) => {
    const known = new Set(before[kind]);
    return after[kind]
      .filter((entry) => !known.has(entry))
      .filter((entry) => mentioning.length === 0 || mentioning.some((text) => entry.includes(text)))
      .map((entry) => `${kind}: ${entry}`);
  });
}

/** Removes by force what names one of the texts; returns a line for each thing it found. */
export async function sweep(texts: readonly string[]): Promise<readonly string[]> {
  const found: string[] = [];
  const ours = (text: string): boolean => texts.some((part) => text.includes(part));
  // A process that was told to end may still be on its way out; only what stays is a leftover.
  const isOurs = (entry: Process): boolean => ours(entry.command) || ours(entry.cgroup);
  for (let round = 0; round < 50 && processes().some(isOurs); round++) await delay(20);
  for (const entry of processes().filter(isOurs)) {
    found.push(`process ${entry.pid}: ${entry.command}`);
    try {
      process.kill(entry.pid, 'SIGKILL');
    } catch (error) {
      if (!isErrno(error, 'ESRCH')) throw error;
    }
  }
  for (const line of mountTable()
    .filter((entry) => ours(entry.mountPoint))
    .reverse()) {
    found.push(`mount ${line.mountPoint} (${line.fsType} from ${line.source})`);
    const result = await runAny('umount', [line.mountPoint]);
    if (result.code !== 0) await runAny('umount', ['--lazy', line.mountPoint]);
  }
  for (const loop of loops().filter((entry) => ours(entry.backingFile))) {
    found.push(`loop device ${loop.node} (${loop.backingFile})`);
    await runAny('losetup', ['--detach', loop.node]);
  }
  // Deepest first, as rmdir wants it. The runtime leaves the parents of its container groups, so no finding.
  for (const group of cgroups().filter(ours).reverse()) {
    try {
      rmdirSync(group);
    } catch (error) {
      if (!isErrno(error, 'ENOENT')) found.push(`cgroup ${group}: ${String(error)}`);
    }
  }
  return found;
}

/** Loop devices over the hidden file of a blockd, whichever: its name is all that tells. */
export function ourLoops(): readonly string[] {
  return loops()
    .filter(({ backingFile }) => backingFile.startsWith('/overlaybd-'))
    .map(({ node }) => node);
}

/** Detaches a loop device whose server is dead, recognised by a read that fails, and tells whether it was one. */
export async function detachDeadLoop(node: string): Promise<boolean> {
  const { code } = await runAny('dd', [`if=${node}`, 'of=/dev/null', 'bs=4096', 'count=1', 'iflag=direct']);
  if (code === 0) return false;
  await run('losetup', ['--detach', node]);
  return true;
}

function loops(): readonly Loop[] {
  return readdirSync('/sys/block')
    .filter((name) => name.startsWith('loop'))
    .flatMap((name) => {
      const file = `/sys/block/${name}/loop/backing_file`;
      return existsSync(file) ? [{ node: `/dev/${name}`, backingFile: readFileSync(file, 'utf8').trim() }] : [];
    });
}

async function fuseConnections(): Promise<readonly string[]> {
  const dir = '/sys/fs/fuse/connections';
  if (!existsSync(dir)) return [];
  const mountedAlready = mountTable().some((line) => line.mountPoint === dir);
  if (!mountedAlready) await run('mount', ['-t', 'fusectl', 'none', dir]);
  try {
    return readdirSync(dir).map((minor) => `connection ${minor}`);
  } finally {
    if (!mountedAlready) await run('umount', [dir]);
  }
}

function processes(): readonly Process[] {
  return readdirSync('/proc')
    .filter((name) => /^[0-9]+$/.test(name) && Number(name) !== process.pid)
    .flatMap((name) => {
      try {
        const command = readFileSync(`/proc/${name}/cmdline`, 'utf8').replaceAll('\0', ' ').trim();
        const stat = readFileSync(`/proc/${name}/stat`, 'utf8');
        // Fields after the parenthesised name: state is the first, start time the twentieth.
        const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
        const ended = fields[0] === 'Z' || fields[0] === 'X';
        if (command === '' || ended) return [];
        const cgroup = readFileSync(`/proc/${name}/cgroup`, 'utf8');
        return [{ pid: Number(name), startTicks: fields[19] ?? '', command, cgroup }];
      } catch {
        return []; // ended meanwhile
      }
    });
}

function filesBelow(dir: string): readonly string[] {
  if (!existsSync(dir)) return [];
  return readdirSync(dir, { recursive: true, withFileTypes: true })
    .filter((entry) => !entry.isDirectory() || dir.endsWith('/runc'))
    .map((entry) => path.join(entry.parentPath, entry.name));
}

function cgroups(): readonly string[] {
  const root = '/sys/fs/cgroup';
  if (!existsSync(root)) return [];
  const walk = (dir: string): string[] =>
    readdirSync(dir, { withFileTypes: true })
      .filter((entry) => entry.isDirectory())
      .map((entry) => path.join(dir, entry.name))
      .flatMap((child) => [child, ...walk(child)]);
  // On cgroup v1 the same controller may be reachable by several names, as symbolic links.
  return walk(root).filter((dir) => statSync(dir).isDirectory());
}

/** The processes that hold this loop device or anything else of that path open: for a message about "busy". */
export function holders(node: string): readonly string[] {
  return processes().flatMap((entry) => {
    try {
      const files = readdirSync(`/proc/${entry.pid}/fd`);
      return files.some((fd) => readlinkSync(`/proc/${entry.pid}/fd/${fd}`) === node)
        ? [`${entry.pid} ${entry.command}`]
        : [];
    } catch {
      return []; // ended meanwhile
    }
  });
}

async function main(args: readonly string[]): Promise<number> {
  const [verb, file] = args;
  if (file === undefined || (verb !== 'save' && verb !== 'check')) {
    process.stderr.write('usage: leaks.ts save|check FILE\n');
    return 2;
  }
  if (verb === 'save') {
    writeFileSync(file, JSON.stringify(await machineState(), null, 1));
    return 0;
  }
  const before = JSON.parse(readFileSync(file, 'utf8')) as MachineState;
  // Kernel objects go away a moment after their last user.
  let left = leaked(before, await machineState());
  for (let round = 0; round < 20 && left.length > 0; round++) {
    await delay(100);
    left = leaked(before, await machineState());
  }
  if (left.length === 0) {
    process.stdout.write(
      'nothing left behind: no mount, loop device, FUSE connection, process, runtime file, cgroup\n',
    );
    return 0;
  }
  process.stdout.write(`left behind:\n  ${left.join('\n  ')}\n`);
  return 1;
}

if (import.meta.main) process.exitCode = await main(process.argv.slice(2));
