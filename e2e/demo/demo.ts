/** `make demo`: a redis container on a writable block device, with real parts, step by step. Everything runs in a
 * private root and ends with the demo, also on Ctrl-C. Exit code 0 = every step did what it says. */
import assert from 'node:assert/strict';
import { existsSync, mkdirSync, readFileSync } from 'node:fs';
import path from 'node:path';
import { Containerd } from '../harness/containerd.ts';
import { leaked, type MachineState, machineState } from '../harness/leaks.ts';
import { mount, mountTable, unmount } from '../harness/mounts.ts';
import { type Daemon, lastLines, run, until } from '../harness/processes.ts';
import { type Registry, startRegistry } from '../harness/registry.ts';
import { SnapshotsClient } from '../harness/rpc-client.ts';
import { servedDevices } from '../harness/settled.ts';
import { Blockd, isBuilt, Snapshotter } from '../harness/snapshotter.ts';
import { repository, Workdir } from '../harness/workdir.ts';
import { chainIds, pushImage, readManifest } from '../images/oci.ts';
import { redisCommand, redisImage } from '../images/redis.ts';
import { describeDevice, describeMount, diskUsage, rootMount } from './evidence.ts';
import { bytes, duration, Narrator } from './narrator.ts';

const plugin = 'overlaybd';
const writableLabel = 'containerd.io/snapshot/overlaybd.writable';
const commitPathLabel = 'containerd.io/snapshot/overlaybd.localcommitpath';
const keyCount = 5000;

interface Mode {
  readonly name: 'dev' | 'dir' | 'overlayfs';
  /** Value of the writable label; overlayfs is what an unlabelled snapshot gets. */
  readonly label: 'dev' | 'dir' | null;
  readonly title: string;
  readonly explanation: string;
}

const modes: readonly Mode[] = [
  {
    name: 'dev',
    label: 'dev',
    title: 'Mode dev: the root file system is a writable block device',
    explanation: 'containerd gets one ext4 mount of a device of its own; all layers of the image are below it.',
  },
  {
    name: 'dir',
    label: 'dir',
    title: 'Mode dir: the same device, mounted by the snapshotter',
    explanation: 'containerd gets a directory (a bind mount), for clients that cannot mount devices.',
  },
  {
    name: 'overlayfs',
    label: null,
    title: 'Mode overlayfs: writes go to a directory over a shared read-only device',
    explanation: 'No label: one read-only device serves every container of the image.',
  },
];

interface Parts {
  readonly work: Workdir;
  readonly registry: Registry;
  readonly blockd: Blockd;
  readonly snapshotter: Snapshotter;
  readonly containerd: Containerd;
}

/** Durations in milliseconds by the text of the step. */
type Timings = ReadonlyMap<string, number>;
type Step = (text: string, action: () => Promise<void>) => Promise<void>;

/** One redis-server, reached through a socket in a directory that is bind-mounted into its container. */
class Redis {
  readonly id: string;
  readonly socketDir: string;
  readonly logPath: string;

  constructor(work: Workdir, id: string) {
    this.id = id;
    this.socketDir = work.socket(id);
    this.logPath = work.logPath(id);
    mkdirSync(this.socketDir);
  }

  get socket(): string {
    return path.join(this.socketDir, 'redis.sock');
  }

  /** For `ctr run`. */
  get runArgs(): readonly string[] {
    const bind = `type=bind,src=${this.socketDir},dst=/run/redis,options=rbind:rw`;
    return ['--detach', '--mount', bind, ...this.logArgs];
  }

  get logArgs(): readonly string[] {
    return ['--log-uri', `file://${this.logPath}`];
  }

  async command(...args: readonly string[]): Promise<string> {
    return (await run('redis-cli', ['-e', '-s', this.socket, ...args])).trim();
  }

  async answers(): Promise<void> {
    await until(`${this.id} answers PING`, async () => (await this.command('PING')) === 'PONG');
  }

  /** Many commands in one connection. */
  async fill(): Promise<void> {
    const commands = Array.from({ length: keyCount }, (_, index) => `SET key:${index} ${contentOf(index)}\r\n`);
    const said = await run('redis-cli', ['-s', this.socket, '--pipe'], { input: commands.join('') });
    assert.match(said, /errors: 0,/);
  }

  async assertFilled(): Promise<void> {
    const names = Array.from({ length: keyCount }, (_, index) => `key:${index}`);
    const values = (await this.command('MGET', ...names)).split('\n');
    assert.deepEqual(
      values,
      names.map((_, index) => contentOf(index)),
      `${this.id}: values differ from what was written`,
    );
  }
}

function contentOf(index: number): string {
  return `${index}-${'v'.repeat(100)}`;
}

/** False when a step failed; it has been told then. */
async function main(narrator: Narrator): Promise<boolean> {
  const started = performance.now();
  narrator.heading(
    'overlaybd-worker: a container on a writable block device',
    'A registry, containerd and our two daemons in a private root, on loopback and unix sockets.',
  );
  if (!isBuilt()) {
    narrator.failure('build/bin lacks the daemons: run "make build" first');
    return false;
  }
  const before = await machineState();
  const work = new Workdir('demo');
  const daemons: Daemon[] = [];
  const redises: Redis[] = [];
  let succeeded = true;
  try {
    await show(narrator, work, daemons, redises);
  } catch (error) {
    succeeded = false;
    if (!work.isOver) tellFailure(narrator, error, daemons, redises);
  }
  try {
    await cleanUp(narrator, work, before);
  } catch (error) {
    succeeded = false;
    narrator.failure(error instanceof Error ? error.message : String(error));
  }
  if (succeeded) narrator.line(`\nDone in ${duration(performance.now() - started)}.`);
  return succeeded;
}

function tellFailure(narrator: Narrator, error: unknown, daemons: readonly Daemon[], redises: readonly Redis[]): void {
  narrator.failure(`Failed: ${error instanceof Error ? error.message : String(error)}`);
  for (const daemon of daemons) narrator.line(daemon.logTail(15));
  for (const { id, logPath } of redises.slice(-1)) {
    if (existsSync(logPath))
      narrator.line(`--- end of ${id}.log\n${lastLines(readFileSync(logPath, 'utf8'), 10)}\n---`);
  }
}

async function cleanUp(narrator: Narrator, work: Workdir, before: MachineState): Promise<void> {
  narrator.heading('The end');
  const problems = await narrator.step('everything is stopped and removed', () => work.close());
  await narrator.step('nothing is left behind', async () => {
    const left = [...problems, ...leaked(before, await machineState(), [work.tag, work.sockets])];
    if (left.length > 0) throw new Error(`left behind:\n  ${left.join('\n  ')}`);
    narrator.fact('mounts, loop devices, processes, runtime files and cgroups of this run: 0');
  });
}

async function show(narrator: Narrator, work: Workdir, daemons: Daemon[], redises: Redis[]): Promise<void> {
  const parts = await startParts(narrator, work, daemons);
  const reference = await makeImage(narrator, parts);
  const timings: Timings[] = [];
  for (const mode of modes) timings.push(await showMode(narrator, parts, mode, reference, redises));
  narrator.heading('The modes side by side');
  const texts = [...(timings[0]?.keys() ?? [])];
  narrator.table([
    ['', ...modes.map(({ name }) => name)],
    ...texts.map((text) => [text, ...timings.map((column) => duration(column.get(text) ?? 0))]),
  ]);
  await removeImage(narrator, parts, reference);
}

async function startParts(narrator: Narrator, work: Workdir, daemons: Daemon[]): Promise<Parts> {
  narrator.heading('The parts', `private root: ${path.relative(repository, work.path)}`);
  const registry = await narrator.step('docker-registry', async () => {
    const started = await startRegistry(work);
    narrator.fact(`http://${started.host}, pid ${started.daemon.pid}`);
    return started;
  });
  const blockd = await narrator.step('overlaybd-blockd, which serves block devices', async () => {
    const started = await Blockd.start(work);
    daemons.push(started.daemon);
    narrator.fact(`${started.address}, pid ${started.daemon.pid}`);
    return started;
  });
  const snapshotter = await narrator.step('overlaybd-snapshotter, which containerd talks to', async () => {
    const started = await Snapshotter.start(work, blockd, { rwMode: 'overlayfs', ociLayers: 'block' });
    daemons.push(started.daemon);
    narrator.fact(`${started.address}, pid ${started.daemon.pid}; plain OCI layers become block layers`);
    return started;
  });
  const containerd = await narrator.step('containerd, with the snapshotter as proxy plugin', async () => {
    const started = await Containerd.start(work, { plugins: [{ name: plugin, address: snapshotter.address }] });
    daemons.push(started.daemon);
    const version = /Version:\s+(\S+)/.exec(await started.ctr(['version']))?.[1] ?? '?';
    narrator.fact(`containerd ${version}, ${started.address}, namespace ${started.namespace}`);
    return started;
  });
  return { work, registry, blockd, snapshotter, containerd };
}

async function makeImage(narrator: Narrator, parts: Parts): Promise<string> {
  const { containerd, registry } = parts;
  narrator.heading('The image');
  const image = await narrator.step('redis out of Debian packages, as an OCI image', async () => {
    const made = await redisImage();
    const sizes = readManifest(made).layers.map((layer) => bytes(layer.size));
    const origin = made.isNew ? 'downloaded and packed' : 'kept from an earlier run';
    narrator.fact(`${sizes.length} layers: ${sizes.join(', ')}; ${origin}, ${path.relative(repository, made.layout)}`);
    return made;
  });
  const reference = await narrator.step('push', async () => {
    const pushed = await pushImage(image, registry.host, 'demo/redis');
    narrator.fact(pushed);
    return pushed;
  });
  await narrator.step('pull and unpack into block layers', async () => {
    await ctr(narrator, parts, ['images', 'pull', '--plain-http', '--snapshotter', plugin, reference]);
    const listed = await containerd.ctr(['snapshots', '--snapshotter', plugin, 'ls']);
    const unpacked = chainIds(image);
    for (const name of unpacked) assert.ok(listed.includes(name), `snapshot ${name} is missing`);
    const size = diskUsage(path.join(parts.snapshotter.root, 'snapshots'));
    narrator.fact(`${unpacked.length} committed snapshots, ${bytes(size)} on disk`);
  });
  return reference;
}

async function showMode(
  narrator: Narrator,
  parts: Parts,
  mode: Mode,
  reference: string,
  redises: Redis[],
): Promise<Timings> {
  const { containerd, work } = parts;
  const timings = new Map<string, number>();
  const step: Step = async (text, action) => {
    await narrator.step(text, action);
    timings.set(text, narrator.lastMs);
  };
  const labelArgs = mode.label === null ? [] : ['--snapshotter-label', `${writableLabel}=${mode.label}`];
  const redis = new Redis(work, `redis-${mode.name}`);
  redises.push(redis);
  narrator.heading(mode.title, mode.explanation);

  await step('run the container', async () => {
    const args = ['run', `--snapshotter=${plugin}`, ...labelArgs, ...redis.runArgs, reference, redis.id];
    await ctr(narrator, parts, args);
    await redis.answers();
    await tellRoot(narrator, parts, redis.id, mode);
  });
  await step(`write: SET greeting and ${keyCount} keys more, with appendfsync always`, async () => {
    await redis.command('SET', 'greeting', `hello from ${mode.name}`);
    await redis.fill();
    narrator.fact(`redis> SET greeting "hello from ${mode.name}"; DBSIZE → ${await redis.command('DBSIZE')}`);
  });
  await step('kill -9 the task and delete it', async () => {
    await ctr(narrator, parts, ['tasks', 'kill', '--signal', 'SIGKILL', redis.id]);
    await deleteTask(containerd, redis.id);
  });
  await step('start the task again on the same snapshot: the data is there', async () => {
    await ctr(narrator, parts, ['tasks', 'start', '--detach', ...redis.logArgs, redis.id]);
    await redis.answers();
    await tellData(narrator, redis, `hello from ${mode.name}`);
  });
  const committed = `redis-with-data-${mode.name}`;
  await step('stop, commit the snapshot', async () => {
    await ctr(narrator, parts, ['tasks', 'kill', '--signal', 'SIGTERM', redis.id]);
    await deleteTask(containerd, redis.id);
    await ctr(narrator, parts, ['snapshots', '--snapshotter', plugin, 'commit', committed, redis.id]);
    await containerd.ctr(['containers', 'rm', '--keep-snapshot', redis.id]);
    await tellCommitted(narrator, parts, committed, mode);
  });
  await showSecond(narrator, parts, mode, committed, redises, step);
  return timings;
}

/** ctr runs images, not snapshots: the second container's snapshot is prepared through containerd's API with the same
 * label, mounted as the answer says, and run as a root file system. */
async function showSecond(
  narrator: Narrator,
  parts: Parts,
  mode: Mode,
  committed: string,
  redises: Redis[],
  step: Step,
): Promise<void> {
  const { containerd, work } = parts;
  const redis = new Redis(work, `second-${mode.name}`);
  redises.push(redis);
  using snapshots = new SnapshotsClient(containerd.address, {
    snapshotter: plugin,
    headers: { 'containerd-namespace': containerd.namespace },
  });
  const root = path.join(work.dir('rootfs'), mode.name);
  await step('a second container from the committed snapshot: the data is there too', async () => {
    const labels = { 'containerd.io/gc.root': new Date().toISOString() };
    const mounts = await snapshots.prepare(
      redis.id,
      committed,
      mode.label === null ? labels : { ...labels, [writableLabel]: mode.label },
    );
    for (const { type, source, options } of mounts) {
      narrator.fact(`mount -t ${type} -o ${shorten(options.join(','), work)} ${shorten(source, work)} rootfs`);
    }
    work.defer(`unmount ${root}`, () => unmount(root));
    await mount(mounts, root);
    const bind = ['run', ...redis.runArgs, '--rootfs', root, redis.id, ...redisCommand];
    await ctr(narrator, parts, bind);
    await redis.answers();
    await tellData(narrator, redis, `hello from ${mode.name}`);
    await redis.command('SET', 'greeting', 'changed in the second container');
  });
  await step('remove both', async () => {
    await containerd.ctr(['tasks', 'kill', '--signal', 'SIGTERM', redis.id]);
    await deleteTask(containerd, redis.id);
    await containerd.ctr(['containers', 'rm', redis.id]);
    await unmount(root);
    for (const name of [redis.id, committed]) {
      await containerd.ctr(['snapshots', '--snapshotter', plugin, 'rm', name]);
    }
  });
}

async function removeImage(narrator: Narrator, parts: Parts, reference: string): Promise<void> {
  const { snapshotter, work } = parts;
  narrator.heading('The image goes');
  await narrator.step('remove the image; containerd collects its snapshots', async () => {
    await ctr(narrator, parts, ['images', 'rm', '--sync', reference]);
    using client = snapshotter.client();
    await until('the store is empty', async () => {
      const left = await client.list();
      if (left.length > 0) throw new Error(`left: ${left.map(({ name }) => name).join(', ')}`);
      return true;
    });
    await client.cleanup();
    await until('devices and mounts are gone', async () => {
      const left = [
        ...(await servedDevices(parts.blockd.address)).map((device) => `${device.path} for ${device.id}`),
        ...mountTable()
          .map(({ mountPoint }) => mountPoint)
          .filter((mountPoint) => mountPoint.startsWith(work.path)),
      ];
      if (left.length > 0) throw new Error(`left: ${left.join(', ')}`);
      return true;
    });
    const size = diskUsage(path.join(snapshotter.root, 'snapshots'));
    assert.equal(size, 0, `${size} bytes are left in the store`);
    narrator.fact('0 snapshots, 0 devices, 0 mounts, 0 bytes of layers');
  });
}

/** Checks that the root file system is what the mode promises, and shows it. */
async function tellRoot(narrator: Narrator, parts: Parts, id: string, mode: Mode): Promise<void> {
  const { containerd, work } = parts;
  const pid = (await containerd.tasks()).get(id)?.pid;
  assert.ok(pid !== undefined, `container ${id} has no task`);
  const line = rootMount(pid);
  narrator.fact(describeMount(line, work.path));
  assert.equal(line.fsType, mode.name === 'overlayfs' ? 'overlay' : 'ext4');
  if (mode.name === 'overlayfs') {
    const lower = mountTable().find(({ mountPoint }) =>
      line.superOptions.some((option) => option === `lowerdir=${mountPoint}`),
    );
    assert.ok(lower !== undefined, `the lower directory is not a mounted device: ${line.superOptions.join(',')}`);
    narrator.fact(`its lower directory is ${lower.fsType} (${lower.options.join(',')})`);
    narrator.fact(describeDevice(lower.major, lower.minor) ?? lower.source);
  } else {
    const device = describeDevice(line.major, line.minor);
    assert.ok(device !== null, `${line.source} is not a block device`);
    narrator.fact(device);
  }
}

async function tellData(narrator: Narrator, redis: Redis, greeting: string): Promise<void> {
  const found = await redis.command('GET', 'greeting');
  assert.equal(found, greeting);
  const size = await redis.command('DBSIZE');
  assert.equal(size, String(keyCount + 1));
  await redis.assertFilled();
  narrator.fact(`redis> GET greeting → "${found}"; DBSIZE → ${size}, all values as written`);
}

async function tellCommitted(narrator: Narrator, parts: Parts, name: string, mode: Mode): Promise<void> {
  const { containerd, work } = parts;
  const text = await containerd.ctr(['snapshots', '--snapshotter', plugin, 'info', name]);
  const info = JSON.parse(text) as { readonly Labels?: Readonly<Record<string, string>> };
  const usage = await containerd.ctr(['snapshots', '--snapshotter', plugin, 'usage', '-b', name]);
  const [, size = '', inodes = ''] = usage.trim().split('\n').at(-1)?.split(/\s+/) ?? [];
  narrator.fact(`usage: ${bytes(Number(size))}, ${inodes} inodes`);
  const sealed = info.Labels?.[commitPathLabel];
  if (mode.label === null) return;
  assert.ok(sealed !== undefined, `the committed snapshot has no label ${commitPathLabel}`);
  assert.ok(existsSync(sealed), `${sealed} does not exist`);
  narrator.fact(`sealed layer: ${shorten(sealed, work)}`);
}

/** A task that was told to end is deleted once it has. */
async function deleteTask(containerd: Containerd, id: string): Promise<void> {
  await until(`task ${id} has stopped`, async () => (await containerd.tasks()).get(id)?.status === 'STOPPED');
  // Its exit code is the code of this command; 128 + signal is what was asked for.
  await containerd.ctrAny(['tasks', 'rm', id]);
  assert.equal((await containerd.tasks()).has(id), false, `task ${id} was not deleted`);
}

async function ctr(narrator: Narrator, { work, containerd }: Parts, args: readonly string[]): Promise<string> {
  narrator.command(['ctr', ...args.map((argument) => shorten(argument, work))]);
  return containerd.ctr(args);
}

/** The path of the private root tells a reader nothing. */
function shorten(text: string, work: Workdir): string {
  return text.replaceAll(work.path, '…');
}

const screen = {
  write: (text: string) => void process.stdout.write(text),
  isTty: process.stdout.isTTY === true,
  columns: process.stdout.columns ?? 100,
};

if (!(await main(new Narrator(screen, process.env)))) process.exitCode = 1;
