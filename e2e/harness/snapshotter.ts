/** Our two daemons: overlaybd-blockd, which serves devices, and overlaybd-snapshotter, which decides. */
import { existsSync, writeFileSync } from 'node:fs';
import { createConnection } from 'node:net';
import path from 'node:path';
import { detachDeadLoop, ourLoops } from './leaks.ts';
import { mountTable, unmount } from './mounts.ts';
import { Daemon } from './processes.ts';
import { SnapshotsClient, type SnapshotsClientOptions } from './rpc-client.ts';
import { controlCall, servedDevices } from './settled.ts';
import { repository, type Workdir } from './workdir.ts';

/** Where the built programs lie (build/bin; OBD_BIN names another, e.g. an installed /opt/overlaybd/bin). */
export const binDir = process.env['OBD_BIN'] ?? path.join(repository, 'build/bin');

export interface SnapshotterOptions {
  /** Name of the instance in paths and logs; several may run at once. Default snapshotter. */
  readonly name?: string;
  readonly rwMode?: 'overlayfs' | 'dir' | 'dev';
  readonly writableLayerType?: 'append' | 'sparse';
  readonly ociLayers?: 'overlayfs' | 'block';
  readonly defaultFsType?: string;
  /** Further keys of the configuration, on top. */
  readonly config?: Readonly<Record<string, unknown>>;
  /** Further keys of the object `overlaybdWorker`. */
  readonly workerConfig?: Readonly<Record<string, unknown>>;
  readonly env?: Readonly<Record<string, string>>;
}

/** True when somebody accepts connections on the socket. */
export function accepts(socket: string): Promise<boolean> {
  const { promise, resolve } = Promise.withResolvers<boolean>();
  const connection = createConnection(socket);
  connection.once('connect', () => {
    connection.destroy();
    resolve(true);
  });
  connection.once('error', () => resolve(false));
  return promise;
}

export class Blockd {
  readonly address: string;
  readonly #work: Workdir;
  #daemon: Daemon | null = null;
  #isKilled = false;

  constructor(work: Workdir) {
    this.#work = work;
    this.address = work.socket('blockd.sock');
  }

  static async start(work: Workdir): Promise<Blockd> {
    const blockd = new Blockd(work);
    await blockd.start();
    return blockd;
  }

  get daemon(): Daemon {
    if (this.#daemon === null) throw new Error('blockd was not started');
    return this.#daemon;
  }

  async start(): Promise<void> {
    const daemon = await Daemon.start(this.#work, {
      name: 'blockd',
      program: path.join(binDir, 'overlaybd-blockd'),
      args: ['--socket', this.address, '--run-dir', this.#work.dir('blockd')],
    });
    this.#daemon = daemon;
    const loopsBefore = ourLoops();
    this.#work.defer('blockd serves nothing', async () => {
      // It does not end while devices are held open.
      if (daemon.exit === null) await this.#detachAll();
      else await this.#detachDead(loopsBefore);
    });
    await daemon.ready('accepts connections', () => accepts(this.address));
  }

  /** kill -9, awaited. The kernel keeps the loop devices of a dead server, which fail every read; whoever still uses
   * them is to see that. They go with the run. */
  async kill(): Promise<void> {
    this.#isKilled = true;
    await this.daemon.kill();
  }

  /** What a server that is dead left in the kernel. Only worth a complaint if nobody asked for its death. */
  async #detachDead(before: readonly string[]): Promise<void> {
    const dead: string[] = [];
    for (const node of ourLoops().filter((candidate) => !before.includes(candidate))) {
      if (await detachDeadLoop(node)) dead.push(node);
    }
    if (dead.length > 0 && !this.#isKilled) throw new Error(`it died and left ${dead.join(', ')}`);
  }

  /** Ends what a failed run left; says so, because a good one leaves nothing. */
  async #detachAll(): Promise<void> {
    const devices = await servedDevices(this.address);
    for (const { owner, id, path: node } of devices) {
      const mounts = mountTable().filter(({ source }) => source === node);
      for (const { mountPoint } of mounts.reverse()) await unmount(mountPoint);
      await controlCall(this.address, 'Detach', { owner, id, force: true });
    }
    if (devices.length > 0) throw new Error(`had to detach ${devices.map(({ path: node }) => node).join(', ')}`);
  }
}

export class Snapshotter {
  readonly name: string;
  /** Socket of the snapshots service. */
  readonly address: string;
  /** State directory. */
  readonly root: string;
  readonly configPath: string;
  readonly blockd: Blockd;
  readonly #work: Workdir;
  readonly #env: Readonly<Record<string, string>>;
  #daemon: Daemon | null = null;

  constructor(work: Workdir, blockd: Blockd, options: SnapshotterOptions = {}) {
    this.#work = work;
    this.blockd = blockd;
    this.name = options.name ?? 'snapshotter';
    this.address = work.socket(`${this.name}.sock`);
    this.root = path.join(work.dir(this.name), 'root');
    this.configPath = path.join(work.dir(this.name), 'config.json');
    this.#env = options.env ?? {};
    this.configure(options);
  }

  static async start(work: Workdir, blockd: Blockd, options: SnapshotterOptions = {}): Promise<Snapshotter> {
    const snapshotter = new Snapshotter(work, blockd, options);
    await snapshotter.start();
    return snapshotter;
  }

  /** Writes the configuration; read at the next start. */
  configure(options: SnapshotterOptions): void {
    const config = {
      root: this.root,
      address: this.address,
      rwMode: options.rwMode ?? 'overlayfs',
      writableLayerType: options.writableLayerType ?? 'append',
      defaultFsType: options.defaultFsType ?? 'ext4',
      ...options.config,
      overlaybdWorker: {
        ociLayers: options.ociLayers ?? 'overlayfs',
        blockd: { address: this.blockd.address, spawn: false },
        ...options.workerConfig,
      },
    };
    writeFileSync(this.configPath, `${JSON.stringify(config, null, 2)}\n`);
  }

  get daemon(): Daemon {
    if (this.#daemon === null) throw new Error(`${this.name} was not started`);
    return this.#daemon;
  }

  /** Also after stop() or kill(): the same store and socket. */
  async start(): Promise<void> {
    this.#daemon = await Daemon.start(this.#work, {
      name: this.name,
      program: path.join(binDir, 'overlaybd-snapshotter'),
      args: ['--config', this.configPath],
      env: this.#env,
    });
    await this.#daemon.ready('accepts connections', () => accepts(this.address));
  }

  /** SIGTERM, awaited. */
  async stop(): Promise<void> {
    await this.daemon.stop();
  }

  /** kill -9, awaited. */
  async kill(): Promise<void> {
    await this.daemon.kill();
  }

  async restart(): Promise<void> {
    await this.stop();
    await this.start();
  }

  client(options: SnapshotsClientOptions = {}): SnapshotsClient {
    return new SnapshotsClient(this.address, options);
  }

  /** <root>/snapshots/<id> */
  snapshotDir(id: string): string {
    return path.join(this.root, 'snapshots', id);
  }
}

/** False before the first build. */
export function isBuilt(): boolean {
  return existsSync(path.join(binDir, 'overlaybd-snapshotter')) && existsSync(path.join(binDir, 'overlaybd.node'));
}
