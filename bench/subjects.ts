/** What is compared: a disk of the same size and content, served in different ways. Reads find their data spread over all
 * layers in pieces of 1 MiB; writes go to a fresh top that `reset` brings back. */
import { mkdirSync, rmSync, statSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { Daemon, run } from '../e2e/harness/processes.ts';
import type { Workdir } from '../e2e/harness/workdir.ts';
import type { LowerEntry, WritableLayerType } from '../src/engine/engine.ts';
import type { RealEngine } from '../src/engine/real-engine.ts';

export interface Subject {
  readonly name: string;
  /** Layers below the writable one; 0 = none exist. */
  readonly depth: number;
  /** The process that serves; null = the kernel alone. */
  serverPid(): number | null;
  /** The device with a fresh writable top. */
  reset(): Promise<string>;
  /** Ends the service; the work directory's end does it too. */
  close(): Promise<void>;
}

const kPieceMiB = 1;
const never = new AbortController().signal;

/** A loop device with direct I/O straight on a file: what the kernel alone can do. */
export async function rawLoop(work: Workdir, dir: string, sizeMiB: number): Promise<Subject> {
  const file = path.join(dir, 'raw');
  await run('dd', ['if=/dev/urandom', `of=${file}`, 'bs=1M', `count=${sizeMiB}`, 'conv=fsync']);
  const loop = await loopOn(work, file);
  const reset = (): Promise<string> => Promise.resolve(loop.path);
  return { name: 'raw loop', depth: 0, serverPid: () => null, reset, close: loop.close };
}

/** Our loop-fuse device over `depth` sealed layers. */
export async function ours(
  engine: RealEngine,
  work: Workdir,
  dir: string,
  options: { readonly type: WritableLayerType; readonly depth: number; readonly sizeMiB: number },
): Promise<Subject> {
  const { type, depth, sizeMiB } = options;
  const name = `overlaybd ${type} ${depth}`;
  const id = `${path.basename(dir)}-${type}-${depth}`;
  const home = path.join(dir, id);
  mkdirSync(home, { recursive: true });
  const virtualSizeBytes = BigInt(sizeMiB) << 20n;
  const config = path.join(home, 'config.v1.json');
  const pair = (top: string) => ({ data: path.join(top, 'writable_data'), index: path.join(top, 'writable_index') });
  const attach = async (top: string, lowers: readonly LowerEntry[]): Promise<string> => {
    mkdirSync(top, { recursive: true });
    await engine.layers.createWritable({ ...pair(top), virtualSizeBytes, type });
    await engine.layers.writeImageConfig(config, {
      repoBlobUrl: '',
      lowers,
      upper: pair(top),
      resultFile: path.join(home, 'result'),
    });
    const request = { id, configPath: config, readOnly: false, sectorSizeBytes: 4096 } as const;
    return (await engine.devices.attach(request, never)).path;
  };
  const lowers: LowerEntry[] = [];
  for (let layer = 0; layer < depth; layer++) {
    const top = path.join(home, `layer-${layer}`);
    await fillLayer(await attach(top, lowers), layer, depth, sizeMiB);
    await engine.devices.detach(id);
    const { data, index } = pair(top);
    const file = path.join(top, 'overlaybd.sealed');
    await engine.layers.seal(data, index, file);
    lowers.push({ file });
  }
  work.defer(`detach ${id}`, () => engine.devices.detach(id));
  const top = path.join(home, 'top');
  const { pid } = await engine.blockd.ensureRunning();
  return {
    name,
    depth,
    serverPid: () => pid,
    reset: async () => {
      await engine.devices.detach(id);
      rmSync(top, { recursive: true, force: true });
      return attach(top, lowers);
    },
    close: () => engine.devices.detach(id),
  };
}

/** Every `depth`-th piece of the disk, beginning with number `layer`. */
async function fillLayer(device: string, layer: number, depth: number, sizeMiB: number): Promise<void> {
  const pieces = Math.ceil((sizeMiB / kPieceMiB - layer) / depth);
  const skip = kPieceMiB * (depth - 1);
  await run('fio', [
    '--name=fill',
    `--filename=${device}`,
    '--ioengine=psync',
    '--direct=1',
    depth === 1 ? '--rw=write' : `--rw=write:${skip}m`,
    `--bs=${kPieceMiB}m`,
    `--offset=${layer * kPieceMiB}m`,
    `--size=${sizeMiB - layer * kPieceMiB}m`,
    `--io_size=${pieces * kPieceMiB}m`,
    '--end_fsync=1',
    '--allow_file_create=0',
  ]);
}

/** qemu-storage-daemon: qcow2 with backing files, exported over FUSE, with a loop device on it. */
export async function qsd(work: Workdir, dir: string, depth: number, sizeMiB: number): Promise<Subject> {
  const name = `qsd qcow2 ${depth}`;
  const home = path.join(dir, `qsd-${depth}`);
  mkdirSync(home, { recursive: true });
  const file = (layer: number): string => path.join(home, `${layer}.qcow2`);
  const createOver = async (layer: number): Promise<void> => {
    const backing = layer === 0 ? [] : ['-b', file(layer - 1), '-F', 'qcow2'];
    await run('qemu-img', ['create', '-q', '-f', 'qcow2', ...backing, file(layer), `${sizeMiB}M`]);
  };
  for (let layer = 0; layer < depth; layer++) {
    await createOver(layer);
    const commands: string[] = [];
    for (let at = layer; at < sizeMiB; at += depth) commands.push(`write -q -P ${(at % 255) + 1} ${at}M 1M`);
    await run('qemu-io', ['-f', 'qcow2', file(layer)], { input: `${commands.join('\n')}\n`, timeoutMs: 300_000 });
  }
  let round = 0;
  let serving: Serving | null = null;
  const close = async (): Promise<void> => {
    await serving?.close();
    serving = null;
  };
  work.defer(`end ${name}`, close);
  return {
    name,
    depth,
    serverPid: () => serving?.pid ?? null,
    close,
    reset: async () => {
      await close();
      rmSync(file(depth), { force: true });
      await createOver(depth);
      serving = await serveQsd(work, `qsd-${path.basename(dir)}-${depth}-${round++}`, home, file(depth), sizeMiB);
      return serving.path;
    },
  };
}

interface Serving {
  readonly path: string;
  readonly pid: number;
  readonly close: () => Promise<void>;
}

async function serveQsd(work: Workdir, name: string, home: string, image: string, sizeMiB: number): Promise<Serving> {
  const point = path.join(home, 'export');
  writeFileSync(point, '');
  const daemon = await Daemon.start(work, {
    name,
    program: 'qemu-storage-daemon',
    args: [
      ...['--blockdev', `driver=file,node-name=f,filename=${image},cache.direct=on,aio=io_uring`],
      ...['--blockdev', 'driver=qcow2,node-name=q,file=f,cache.direct=on,discard=unmap'],
      ...['--export', `type=fuse,id=e,node-name=q,mountpoint=${point},writable=on,allow-other=off`],
    ],
  });
  await daemon.ready('exports', async () => statSync(point).size === sizeMiB * 1024 * 1024);
  const loop = await loopOn(work, point);
  return {
    path: loop.path,
    pid: daemon.pid,
    close: async () => {
      await loop.close();
      await daemon.stop();
    },
  };
}

async function loopOn(work: Workdir, file: string): Promise<{ path: string; close: () => Promise<void> }> {
  const args = ['--show', '-f', '--direct-io=on', '--sector-size', '4096', file];
  const node = (await run('losetup', args)).trim();
  let open = true;
  const close = async (): Promise<void> => {
    if (!open) return;
    open = false;
    await run('losetup', ['--detach', node]);
  };
  work.defer(`free ${node}`, close);
  return { path: node, close };
}
