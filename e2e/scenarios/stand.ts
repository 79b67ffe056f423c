/** The daemons of one scenario, and the demand every scenario ends with: remove everything, and nothing is left. */
import assert from 'node:assert/strict';
import { type ServiceError, status } from '@grpc/grpc-js';
import { Containerd } from '../harness/containerd.ts';
import { mount, unmount } from '../harness/mounts.ts';
import { until } from '../harness/processes.ts';
import { type Registry, startRegistry } from '../harness/registry.ts';
import { SnapshotsClient } from '../harness/rpc-client.ts';
import { removeAll, type ServedDevice, servedDevices, untilNothingIsLeft } from '../harness/settled.ts';
import { Blockd, Snapshotter, type SnapshotterOptions } from '../harness/snapshotter.ts';
import { Workdir } from '../harness/workdir.ts';

export interface StandOptions extends SnapshotterOptions {
  /** containerd with our plugin; 'cri' with the Kubernetes interface too. Default none. */
  readonly containerd?: 'plain' | 'cri';
  readonly registry?: boolean;
}

export class Stand implements AsyncDisposable {
  readonly work: Workdir;
  readonly blockd: Blockd;
  readonly snapshotter: Snapshotter;
  readonly client: SnapshotsClient;
  readonly #containerd: Containerd | null;
  readonly #registry: Registry | null;

  private constructor(
    work: Workdir,
    blockd: Blockd,
    snapshotter: Snapshotter,
    containerd: Containerd | null,
    registry: Registry | null,
  ) {
    this.work = work;
    this.blockd = blockd;
    this.snapshotter = snapshotter;
    this.client = snapshotter.client();
    this.#containerd = containerd;
    this.#registry = registry;
  }

  static async start(name: string, options: StandOptions = {}): Promise<Stand> {
    const work = new Workdir(name);
    try {
      const blockd = await Blockd.start(work);
      const snapshotter = await Snapshotter.start(work, blockd, {
        ...options,
        // What the default of 64 GB costs is measured by the benchmarks.
        workerConfig: { defaultVirtualSizeGB: 1, ...options.workerConfig },
      });
      const plugins = [{ name: 'overlaybd', address: snapshotter.address }];
      const containerd =
        options.containerd === undefined
          ? null
          : await Containerd.start(work, {
              plugins,
              ...(options.containerd === 'cri' ? { cri: { snapshotter: 'overlaybd' } } : {}),
            });
      return new Stand(
        work,
        blockd,
        snapshotter,
        containerd,
        options.registry === true ? await startRegistry(work) : null,
      );
    } catch (error) {
      await work.close();
      throw error;
    }
  }

  get containerd(): Containerd {
    if (this.#containerd === null) throw new Error('this stand has no containerd');
    return this.#containerd;
  }

  get registry(): Registry {
    if (this.#registry === null) throw new Error('this stand has no registry');
    return this.#registry;
  }

  ctr(...args: readonly string[]): Promise<string> {
    return this.containerd.ctr(args);
  }

  /** Starts the snapshotter again; returns when our client, which backs off after failures, has found it. */
  async startAgain(): Promise<void> {
    await this.snapshotter.start();
    await until('the client is connected again', async () => (await this.client.list('name==nobody')).length === 0);
  }

  devices(): Promise<readonly ServedDevice[]> {
    return servedDevices(this.blockd.address);
  }

  /** A garbage collection of containerd that has ended when this returns. It looks at a snapshotter only if one of its
   * snapshots was removed since the last one, so one is. */
  async collectGarbage(): Promise<void> {
    const id = `gc-${performance.now()}`;
    await this.ctr('leases', 'create', '--id', id);
    await this.ctr('snapshots', '--snapshotter', 'overlaybd', 'prepare', id, '');
    await this.ctr('snapshots', '--snapshotter', 'overlaybd', 'rm', id);
    await this.ctr('leases', 'delete', '--sync', id);
  }

  /** Mounts the only image there is read-only, as `ctr images mount` would: in 1.6 that one ignores its --snapshotter. */
  async mountImage(target: string): Promise<AsyncDisposable> {
    const client = new SnapshotsClient(this.containerd.address, {
      headers: { 'containerd-namespace': this.containerd.namespace },
    });
    const committed = await client.list('kind==committed');
    const parents = new Set(committed.map((info) => info.parent));
    const tops = committed.filter((info) => !parents.has(info.name));
    assert.equal(tops.length, 1, 'one image');
    const key = `image at ${target}`;
    await mount(await client.view(key, tops[0]?.name ?? '', { 'containerd.io/gc.root': 'mounted' }), target);
    return {
      [Symbol.asyncDispose]: async () => {
        await unmount(target);
        await client.remove(key);
        client[Symbol.dispose]();
      },
    };
  }

  /** Containers, images and snapshots of containerd go, then its garbage; our store must be empty after it. */
  async empty(): Promise<void> {
    if (this.#containerd !== null) {
      await this.#containerd.deleteContainers();
      for (const image of lines(await this.ctr('images', 'ls', '-q'))) await this.ctr('images', 'rm', '--sync', image);
      for (;;) {
        const rows = lines(await this.ctr('snapshots', '--snapshotter', 'overlaybd', 'ls')).slice(1);
        if (rows.length === 0) break;
        for (const row of rows) {
          const [key = ''] = row.split(/\s+/);
          // Parents refuse until their children are gone; the next round takes them.
          await this.#containerd.ctrAny(['snapshots', '--snapshotter', 'overlaybd', 'rm', key]);
        }
      }
      await this.collectGarbage();
    } else {
      await removeAll(this.client);
    }
    await untilNothingIsLeft(this.snapshotter, this.client);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    try {
      if (this.snapshotter.daemon.exit !== null) await this.startAgain();
      await this.empty();
    } finally {
      this.client[Symbol.dispose]();
      await this.work[Symbol.asyncDispose]();
    }
  }
}

export function lines(text: string): readonly string[] {
  return text.split('\n').filter((line) => line.trim() !== '');
}

/** Asserts that a call is refused with this gRPC code; returns its message. */
export async function refused(call: Promise<unknown>, code: status, said: RegExp = /./): Promise<string> {
  const outcome = await call.then(
    () => null,
    (error: unknown) => error as Partial<ServiceError>,
  );
  assert.ok(outcome !== null, `expected ${status[code]}, but the call succeeded`);
  const details = outcome.details ?? String(outcome);
  assert.equal(status[outcome.code ?? -1], status[code], details);
  assert.match(details, said);
  return details;
}

export const writableLabel = 'containerd.io/snapshot/overlaybd.writable';
export const localCommitPathLabel = 'containerd.io/snapshot/overlaybd.localcommitpath';

/** The seed of this file's random choices: printed, and taken from OBD_SEED when given. */
export function seededRandom(): { readonly seed: number; readonly next: (below: number) => number } {
  const seed = Number(process.env['OBD_SEED'] ?? Math.floor(Math.random() * 0xffff_ffff));
  process.stdout.write(`OBD_SEED=${seed}\n`);
  // mulberry32
  let state = seed >>> 0;
  const next = (below: number): number => {
    state = (state + 0x6d2b79f5) >>> 0;
    let value = Math.imul(state ^ (state >>> 15), state | 1);
    value ^= value + Math.imul(value ^ (value >>> 7), value | 61);
    return ((value ^ (value >>> 14)) >>> 0) % below;
  };
  return { seed, next };
}

/** A test body whose failure is told whole: when the clean-up fails too, the runner would show that alone. */
export function told<Args extends readonly unknown[]>(body: (...args: Args) => Promise<void>) {
  return async (...args: Args): Promise<void> => {
    try {
      await body(...args);
    } catch (error) {
      if (!(error instanceof SuppressedError)) throw error;
      const text = (part: unknown): string => (part instanceof Error ? (part.stack ?? part.message) : String(part));
      throw new Error(`${text(error.suppressed)}\nand then, cleaning up: ${text(error.error)}`, {
        cause: error.suppressed,
      });
    }
  };
}
