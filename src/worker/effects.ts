/** Fills the holes of the snapshot machine: what preparing, sealing and erasing do to the world. Every effect reads what
 * to do from the stored row and plan, so recovery can repeat it, and every step of it is idempotent. */
import { ErrorKind, SnapshotterError } from '../base/errors.ts';
import type { Engine, ImageConfig, LowerEntry } from '../engine/engine.ts';
import { Reality, type SnapshotEffects } from '../states/effects.ts';
import type { Layout } from '../store/layout.ts';
import type { SnapshotRow, Store } from '../store/store.ts';
import { limits, type WorkerConfig } from './config.ts';
import type { DevicePool } from './devices.ts';
import { deviceOf, isSharedDevice, type Recipe, sharedDeviceOf } from './mount-recipe.ts';
import type { Plan } from './plan.ts';

export interface EffectsNeed {
  readonly store: Store;
  readonly engine: Engine;
  readonly layout: Layout;
  readonly config: WorkerConfig;
  readonly devices: DevicePool;
  /** Resolves when the layer of a committed snapshot is finished. */
  readonly layerReady: (id: string, signal: AbortSignal) => Promise<void>;
  readonly pause: (milliseconds: number) => Promise<void>;
}

/** How a committed snapshot's layer is found: written by Commit, read by the seal. */
export const LayerSource = {
  /** A directory layer. */
  None: 'none',
  /** Its own writable pair, to be sealed. */
  Writable: 'writable',
  /** `fs/overlaybd.commit`, as a client unpacked it. */
  File: 'file',
  /** The same, but unpacked into its own writable device: the file is the layer, not the device. */
  Unpacked: 'unpacked',
  /** Nothing of its own: the parent's layers. */
  Below: 'below',
} as const;
export type LayerSource = (typeof LayerSource)[keyof typeof LayerSource];

/** The plan of a committed row says also where its layer comes from. */
export type CommittedPlan = Plan & { readonly layer: LayerSource };

export const planOf = (row: SnapshotRow): Plan => JSON.parse(row.plan) as Plan;
export const committedPlanOf = (row: SnapshotRow): CommittedPlan => JSON.parse(row.plan) as CommittedPlan;
export const recipeOf = (row: SnapshotRow): Recipe => JSON.parse(row.recipe) as Recipe;

const neverAborted = new AbortController().signal;
const GiB = 1n << 30n;

export class WorkerEffects implements SnapshotEffects {
  readonly #need: EffectsNeed;

  constructor(need: EffectsNeed) {
    this.#need = need;
  }

  async prepare(id: string, signal: AbortSignal): Promise<void> {
    const { engine, layout, devices } = this.#need;
    const row = this.#row(id);
    const plan = planOf(row);
    const paths = layout.of(id);
    const recipe = recipeOf(row);
    const go = <T>(step: () => Promise<T>): Promise<T> => abortable(signal, step);

    if (plan.blockId !== null) await this.#need.layerReady(plan.blockId, signal);
    const device = deviceOf(recipe);
    if (plan.attach && device !== null && isSharedDevice(device)) {
      await go(() => (recipe.form === 'over' ? devices.mounted(device, signal) : devices.attached(device, signal)));
    }
    const owner = await go(() => this.#ownerOf(plan));
    await go(() => engine.files.makeSnapshotDir(paths.dir, { work: row.kind === 'active', owner }));
    const imageRef = plan.imageRef;
    if (imageRef !== null) await go(() => engine.files.writeFile(paths.imageRef, imageRef, 0o644));
    if (plan.writable !== null) await this.#makeWritable(row, plan, plan.writable, signal);
  }

  async discard(id: string): Promise<void> {
    await this.#clear(this.#row(id));
  }

  async seal(id: string): Promise<void> {
    const { engine, layout, store } = this.#need;
    const row = this.#row(id);
    const plan = committedPlanOf(row);
    const paths = layout.of(id);
    if (plan.layer === LayerSource.Writable) {
      await this.#takeForGood(id);
      const pair = this.#pairOf(row);
      await engine.layers.seal(pair.data, pair.index, paths.sealed);
      await engine.files.removeFile(pair.index);
    }
    if (plan.layer === LayerSource.Unpacked) await this.#adoptUnpacked(row);
    if (plan.layer !== LayerSource.None) await this.#writeSealedConfig(row, plan.layer);
    const content = await engine.files.diskUsage(paths.fs, []);
    const block =
      row.storage === 'block'
        ? await engine.files.diskUsage(paths.block, ['mountpoint'])
        : { sizeBytes: 0n, inodes: 0n };
    store.changeSnapshot(id, {
      usageBytes: content.sizeBytes + block.sizeBytes,
      usageInodes: content.inodes + block.inodes,
      // The pair is no longer in the user's directory: it is free for another snapshot.
      activePath: null,
    });
  }

  async erase(id: string): Promise<void> {
    const { store, config, devices } = this.#need;
    const row = this.#row(id);
    // A child that is not erased yet still has our layer files open.
    if (store.children(id).length > 0) {
      throw new SnapshotterError(ErrorKind.FailedPrecondition, `snapshot ${id}: a removed child is not erased yet`);
    }
    await this.#clear(row);
    if (config.autoRemoveDev && row.deviceId !== null && isSharedDevice(row.deviceId)) {
      await devices.releaseIfIdle(row.deviceId, id);
    }
  }

  async inspect(id: string): Promise<Reality> {
    const row = this.#need.store.snapshot(id);
    if (row === null) return Reality.Absent;
    if (row.name === null) return Reality.Removed;
    if (row.kind === 'committed') return row.usageBytes === null ? Reality.Uncommitted : Reality.Committed;
    if (row.state === 'absent') return Reality.Unanswered;
    return row.kind === 'view' ? Reality.View : Reality.Active;
  }

  async #makeWritable(
    row: SnapshotRow,
    plan: Plan,
    writable: NonNullable<Plan['writable']>,
    signal: AbortSignal,
  ): Promise<void> {
    const { engine, layout, devices } = this.#need;
    const paths = layout.of(row.id);
    const go = <T>(step: () => Promise<T>): Promise<T> => abortable(signal, step);
    const { repoBlobUrl, lowers } = await go(() => this.#below(plan.blockId));
    if (lowers.length > limits.lowersMax) {
      throw new SnapshotterError(
        ErrorKind.FailedPrecondition,
        `${lowers.length} layers below; a writable device takes ${limits.lowersMax}: convert or merge the image`,
      );
    }
    const { activePath } = row;
    if (activePath !== null) await go(() => engine.files.makeDir(activePath, 0o700));
    const pair = this.#pairOf(row);
    const virtualSizeBytes = BigInt(writable.virtualSizeBytes);
    await go(() => engine.layers.createWritable({ ...pair, virtualSizeBytes, type: writable.type }));
    const vsize = Number(virtualSizeBytes / GiB);
    const config: ImageConfig = {
      repoBlobUrl,
      lowers,
      upper: { ...pair, ...(vsize > 0 ? { vsize } : {}) },
      resultFile: paths.result,
    };
    await go(() => engine.layers.writeImageConfig(paths.config, config));
    await go(() => devices.attached(row.id, signal));
    if (writable.format) await go(() => devices.format(row.id));
    if (recipeOf(row).form === 'over') await go(() => devices.mounted(row.id, signal));
  }

  /** Takes the layer file out of the device it was unpacked into; the device itself is then nothing. */
  async #adoptUnpacked(row: SnapshotRow): Promise<void> {
    const { engine, layout, devices } = this.#need;
    const paths = layout.of(row.id);
    const pair = this.#pairOf(row);
    // Without the pair the file is out already: a crash came between here and the end.
    if (await engine.files.exists(pair.data)) {
      if (!(await engine.files.exists(paths.commit))) {
        await devices.mounted(row.id, neverAborted);
        await engine.layers.adopt(`${paths.mountPoint}/overlaybd.commit`, paths.commit);
      }
      await this.#takeForGood(row.id);
      await engine.files.removeFile(pair.index);
      await engine.files.removeFile(pair.data);
    }
  }

  /** Derived from the parent's file, not from our own: so that repeating it appends nothing twice. */
  async #writeSealedConfig(row: SnapshotRow, layer: LayerSource): Promise<void> {
    const { engine, layout } = this.#need;
    const paths = layout.of(row.id);
    const { repoBlobUrl, lowers } = await this.#below(committedPlanOf(row).blockId);
    const own: readonly LowerEntry[] = layer === LayerSource.Below ? [] : [{ dir: paths.fs }];
    await engine.layers.writeImageConfig(paths.config, {
      repoBlobUrl,
      lowers: [...lowers, ...own],
      upper: null,
      resultFile: paths.result,
    });
  }

  async #below(blockId: string | null): Promise<{ repoBlobUrl: string; lowers: readonly LowerEntry[] }> {
    if (blockId === null) return { repoBlobUrl: '', lowers: [] };
    await this.#need.layerReady(blockId, neverAborted);
    const { repoBlobUrl, lowers } = await this.#need.engine.layers.readImageConfig(
      this.#need.layout.of(blockId).config,
    );
    return { repoBlobUrl, lowers };
  }

  /** An image's root directory is only there to be asked when it is mounted. */
  async #ownerOf({ ownerFrom, attach }: Plan): Promise<{ uid: number; gid: number } | null> {
    if (ownerFrom === null || (ownerFrom.mounted && !attach)) return null;
    const paths = this.#need.layout.of(ownerFrom.id);
    return this.#need.engine.files.owner(ownerFrom.mounted ? paths.mountPoint : paths.fs);
  }

  /** Devices, directory and the user's two files: nothing is left. Busy = FailedPrecondition, to be tried again. */
  async #clear(row: SnapshotRow): Promise<void> {
    const { engine, layout, devices } = this.#need;
    await devices.release(row.id);
    await devices.release(sharedDeviceOf(row.id));
    if (row.state === 'absent' && row.deviceId !== null && isSharedDevice(row.deviceId)) {
      // A Prepare that failed leaves the image's device as it found it, unless somebody else stands on it by now.
      await devices.releaseIfIdle(row.deviceId, row.id);
    }
    if (row.activePath !== null) {
      const pair = this.#pairOf(row);
      await engine.files.removeFile(pair.data);
      await engine.files.removeFile(pair.index);
    }
    await engine.files.removeTree(layout.of(row.id).dir);
  }

  /** A committed snapshot is nobody's any more: a client that still has it mounted beside us keeps a dead mount. Others
   * are waited for, bounded; then the snapshot is faulty, and tried again when it is needed. */
  async #takeForGood(id: string): Promise<void> {
    const { devices, pause } = this.#need;
    for (let tries = 1; ; tries += 1) {
      if (await ifFree(() => devices.release(id))) return;
      // Commit has waited for clients on their way out.
      if (await ifFree(() => devices.sever(id), tries >= limits.backgroundTries)) return;
      await pause(limits.backgroundStepMs);
    }
  }

  #pairOf(row: SnapshotRow): { readonly data: string; readonly index: string } {
    if (row.activePath !== null) {
      return { data: `${row.activePath}/writable_data`, index: `${row.activePath}/writable_index` };
    }
    const { data, index } = this.#need.layout.of(row.id);
    return { data, index };
  }

  #row(id: string): SnapshotRow {
    const row = this.#need.store.snapshot(id);
    if (row === null) throw new SnapshotterError(ErrorKind.NotFound, `snapshot ${id} has no record`);
    return row;
  }
}

/** false = somebody holds it. */
async function ifFree(take: () => Promise<void>, last = false): Promise<boolean> {
  try {
    await take();
    return true;
  } catch (error) {
    const busy = error instanceof SnapshotterError && error.kind === ErrorKind.FailedPrecondition;
    if (!busy || last) throw error;
    return false;
  }
}

export const cancelled = (): SnapshotterError => new SnapshotterError(ErrorKind.Cancelled, 'cancelled by the client');

/** One step of an effect that may stop between steps. */
export async function abortable<T>(signal: AbortSignal, step: () => Promise<T>): Promise<T> {
  if (signal.aborted) throw cancelled();
  try {
    return await step();
  } catch (error) {
    if (signal.aborted) throw cancelled();
    throw error;
  }
}
