/** A worker on a store and an engine in memory, for tests. The world outlives its workers: `restart` is a new daemon on
 * what the old one left. */
import { pino } from 'pino';
import { ErrorKind, SnapshotterError } from '../base/errors.ts';
import { type FsDescriptor, WritableLayerType } from '../engine/engine.ts';
import { MemoryEngine, PowerCut } from '../engine/memory-engine.ts';
import { layoutOf } from '../store/layout.ts';
import { MemoryStore } from '../store/memory-store.ts';
import type { Store } from '../store/store.ts';
import type { WorkerConfig } from './config.ts';
import { createWorker, type SnapshotWorker } from './create-worker.ts';
import type { Labels, Mount, SnapshotInfo } from './worker.ts';

export const root = '/r';
export const layout = layoutOf(root);
export const writableLabel = 'containerd.io/snapshot/overlaybd.writable';
export const localCommitPath = 'containerd.io/snapshot/overlaybd.localcommitpath';

const mountOptions: Readonly<Record<string, readonly string[]>> = { ext4: ['discard'], xfs: ['nouuid', 'discard'] };

/** The grammar of the contract, as far as the tests need it. */
export function parseFs(text: string): FsDescriptor {
  const [type = '', mounts, mkfs] = text.split(';');
  const list = (part: string, separator: string): readonly string[] =>
    part.split(separator).filter((each) => each !== '');
  return {
    type,
    mountOptions: mounts === undefined ? (mountOptions[type] ?? []) : list(mounts, ','),
    mkfsOptions: mkfs === undefined ? [] : list(mkfs, ' '),
  };
}

export const defaults: WorkerConfig = {
  root,
  rwMode: 'overlayfs',
  writableLayerType: WritableLayerType.Append,
  ociLayers: 'overlayfs',
  defaultFs: parseFs('ext4'),
  parseFs,
  autoRemoveDev: false,
  asyncRemove: false,
  runtimeType: 'containerd',
  defaultVirtualSizeGB: 64,
  sectorSizeBytes: 4096,
  tenant: -1,
  mirrorRegistry: [],
};

const writes = new Set(['addSnapshot', 'changeSnapshot', 'dropSnapshot', 'putDevice', 'dropDevice']);

/** A dead daemon writes nothing. Each write is a step towards the power cut; what a cut transaction wrote is gone. */
function mortal(store: Store, engine: MemoryEngine): Store {
  return new Proxy(store, {
    get(target, name) {
      const member: unknown = Reflect.get(target, name);
      if (typeof member !== 'function' || typeof name !== 'string') return member;
      return (...values: unknown[]): unknown => {
        if (engine.isDead) throw new PowerCut('the power is cut');
        if (writes.has(name)) engine.tick();
        return Reflect.apply(member, target, values);
      };
    },
  });
}

export class World {
  readonly engine = new MemoryEngine();
  readonly store: Store;
  readonly logged: string[] = [];
  now = 1_790_000_000_000_000_000n;
  worker: SnapshotWorker;
  #config: WorkerConfig;

  constructor(change: Partial<WorkerConfig> = {}, store: Store = new MemoryStore()) {
    this.store = store;
    this.#config = { ...defaults, ...change };
    this.engine.addFile('/sys/module/overlay/parameters/index', 'N');
    this.engine.addDir(layout.snapshots);
    this.worker = this.#daemon();
  }

  #daemon(): SnapshotWorker {
    const { engine, logged } = this;
    return createWorker({
      engine,
      store: mortal(this.store, engine),
      clock: { now: () => (this.now += 1n) },
      config: this.#config,
      log: pino({ level: 'debug' }, { write: (line: string) => void logged.push(line) }),
      pause: () => Promise.resolve(),
    });
  }

  /** The old daemon is dead; a new one starts on what it left. */
  async restart(change: Partial<WorkerConfig> = {}): Promise<void> {
    this.#config = { ...this.#config, ...change };
    this.engine.restorePower();
    this.worker = this.#daemon();
    await this.worker.recover();
    await this.worker.drain();
  }

  prepare(key: string, parent = '', labels: Labels = {}, signal = live): Promise<readonly Mount[]> {
    return this.worker.prepare({ key, parent, labels }, signal);
  }

  view(key: string, parent = '', labels: Labels = {}): Promise<readonly Mount[]> {
    return this.worker.view({ key, parent, labels }, live);
  }

  mounts(key: string): Promise<readonly Mount[]> {
    return this.worker.mounts(key, live);
  }

  commit(name: string, key: string, labels: Labels = {}, parent = ''): Promise<void> {
    return this.worker.commit({ name, key, labels, parent });
  }

  /** A committed layer of plain files. */
  async directoryLayer(name: string, parent = ''): Promise<string> {
    await this.prepare(`extract-1 ${name}`, parent);
    await this.commit(name, `extract-1 ${name}`);
    await this.worker.drain();
    return this.idOf(name);
  }

  /** A committed layer made on a writable device. */
  async blockLayer(name: string, parent = '', labels: Labels = {}): Promise<string> {
    await this.prepare(`make ${name}`, parent, { [writableLabel]: 'dir', ...labels });
    await this.commit(name, `make ${name}`);
    await this.worker.drain();
    return this.idOf(name);
  }

  idOf(name: string): string {
    const row = this.store.named(name);
    if (row === null) throw new Error(`no snapshot ${name}`);
    return row.id;
  }

  async list(): Promise<readonly SnapshotInfo[]> {
    const all: SnapshotInfo[] = [];
    for await (const batch of this.worker.list(() => true, 100)) all.push(...batch);
    return all;
  }

  /** Removes every snapshot, children first; whatever is left then was leaked. */
  async removeAll(): Promise<void> {
    for (let left = await this.list(); left.length > 0; left = await this.list()) {
      const parents = new Set(left.map(({ parent }) => parent));
      for (const { name } of left) if (!parents.has(name)) await this.worker.remove(name);
    }
    await this.worker.drain();
    await this.worker.cleanup();
  }
}

const live = new AbortController().signal;

export const isKind =
  (kind: ErrorKind, text = /./) =>
  (error: unknown): boolean =>
    error instanceof SnapshotterError && error.kind === kind && text.test(error.message);

/** What an empty world holds. */
export const emptyState = { paths: ['/r/snapshots', '/sys/module/overlay/parameters/index'], devices: [], mounts: [] };
export { ErrorKind };
