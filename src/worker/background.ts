/** The slow work behind Commit and Remove: begun by the verb on paper, finished here, one line per snapshot, and found
 * again after a restart because the store remembers what is open. Also runs Prepare's machine for the verbs. */
import type { Logger } from 'pino';
import { ErrorKind, SnapshotterError, withContext } from '../base/errors.ts';
import type { Journal, SnapshotEffects } from '../states/effects.ts';
import { type Outcome, SnapshotLifecycle } from '../states/lifecycle.ts';
import type { SnapshotEvent } from '../states/snapshot-machine.ts';
import type { Layout } from '../store/layout.ts';
import type { SnapshotRow, Store } from '../store/store.ts';
import { limits } from './config.ts';
import { cancelled, committedPlanOf, LayerSource } from './effects.ts';
import { KeyedQueue } from './keyed-queue.ts';
import { Label, withLabel, without } from './labels.ts';

export class Background {
  readonly #store: Store;
  readonly #layout: Layout;
  readonly #log: Logger;
  readonly #life: SnapshotLifecycle;
  readonly #lines = new KeyedQueue();
  readonly #places = new KeyedQueue(limits.backgroundJobsMax);
  #jobs = 0;

  constructor(store: Store, layout: Layout, log: Logger, effects: SnapshotEffects) {
    this.#store = store;
    this.#layout = layout;
    this.#log = log;
    this.#life = new SnapshotLifecycle(this.#journal(), effects);
  }

  /** Lines with work in them. */
  get pending(): number {
    return this.#lines.size;
  }

  /** A change the caller waits for. */
  run(id: string, event: SnapshotEvent, signal?: AbortSignal): Promise<Outcome> {
    return this.#lines.run(id, () => this.#life.run(id, event, signal));
  }

  /** Takes up whatever is open for a snapshot. Resolves when it is done or has failed; failures are logged and kept in
   * the row. */
  finish(id: string): Promise<void> {
    return this.#lines.run(id, async () => {
      const row = this.#store.snapshot(id);
      const event = row === null ? null : openEvent(row);
      if (row === null || event === null) return;
      await this.#blockBelow(row);
      this.#jobs += 1;
      // A place of its own in the pool: the line of the snapshot is held already.
      await this.#places.run(String(this.#jobs), () => this.#finishNow(id, event));
    });
  }

  /** Resolves when nothing is open for the snapshot, or what is open has been tried. */
  quiet(id: string): Promise<void> {
    return this.#lines.quiet(id);
  }

  idle(): Promise<void> {
    return this.#lines.idle();
  }

  /** Resolves when the layer of a committed snapshot can be stacked upon. A failed seal is tried once more.
   * FailedPrecondition with the reason when it can't; Cancelled when the caller gives up. */
  async layerReady(id: string, signal: AbortSignal): Promise<void> {
    if (this.#store.snapshot(id)?.state === 'committed') return;
    await orAborted(this.quiet(id), signal);
    if (this.#store.snapshot(id)?.state === 'committed') return;
    await orAborted(this.finish(id), signal);
    const row = this.#store.snapshot(id);
    if (row?.state === 'committed') return;
    throw new SnapshotterError(
      ErrorKind.FailedPrecondition,
      `snapshot ${row?.name ?? id}: its layer is not finished: ${row?.failure ?? 'it is gone'}`,
    );
  }

  async #finishNow(id: string, event: SnapshotEvent): Promise<void> {
    const row = this.#store.snapshot(id);
    const startedAt = performance.now();
    const log = this.#log.child({ id, key: row?.name ?? null, work: event.type.toLowerCase() });
    try {
      const { state, error } = await this.#life.run(id, event);
      if (error !== null) throw error;
      log.debug({ state, durationMs: performance.now() - startedAt }, 'background work done');
    } catch (error) {
      log.warn({ err: withContext(`finish snapshot ${id}`, error) }, 'background work failed; it will be tried again');
      return;
    }
    const parent = row?.parentId ?? null;
    // A parent removed meanwhile was waiting for this child's directory to go.
    if (parent !== null && this.#store.snapshot(id) === null && this.#store.snapshot(parent)?.name === null) {
      this.finish(parent).catch((error: unknown) => log.error({ err: error }, 'background work could not be taken up'));
    }
  }

  /** Waits outside the pool for the layer below: waiting inside could fill it with waiters. */
  async #blockBelow(row: SnapshotRow): Promise<void> {
    if (row.name === null || row.kind !== 'committed') return;
    const { blockId, layer } = committedPlanOf(row);
    if (blockId === null || layer === LayerSource.None || this.#store.snapshot(blockId)?.state === 'committed') return;
    await this.finish(blockId);
  }

  #journal(): Journal {
    const store = this.#store;
    return {
      read: (id) => store.snapshot(id) ?? { state: 'absent', intent: null },
      intend: (id, intent) => void store.changeSnapshot(id, { intent }),
      settle: (id, state, failure) =>
        store.transaction(() => {
          const row = store.snapshot(id);
          if (row === null) return;
          if (state === 'absent') store.dropSnapshot(id);
          else if (state === 'removed' || row.name === null) {
            // Removed on paper while the work ran: stays removed, whatever the work came to.
            store.changeSnapshot(id, { name: null, state: 'removed', intent: null, failure });
          } else {
            // What a faulty snapshot was about to become stays open: Cleanup, a restart or a child tries again.
            const intent = state === 'faulty' ? row.intent : null;
            store.changeSnapshot(id, { state, intent, failure, labels: this.#labelsAt(row, state) });
          }
        }),
    };
  }

  /** The path of the sealed file is shown while there is, or is about to be, such a file. */
  #labelsAt(row: SnapshotRow, state: string): Readonly<Record<string, string>> {
    if (row.kind !== 'committed' || committedPlanOf(row).layer !== LayerSource.Writable) return row.labels;
    if (state === 'faulty') return without(row.labels, Label.LocalCommitPath);
    // Given at Commit, and possibly dropped by the client since: only what a failure took away is given back.
    if (row.state !== 'faulty') return row.labels;
    return withLabel(row.labels, Label.LocalCommitPath, this.#layout.of(row.id).sealed);
  }
}

/** What a row is waiting for. */
function openEvent(row: SnapshotRow): SnapshotEvent | null {
  if (row.state === 'removed') return { type: 'ERASE' };
  if (row.state === 'faulty') return { type: 'RECOVER' };
  if (row.intent === 'commit') return row.state === 'active' ? { type: 'COMMIT' } : { type: 'RECOVER' };
  return row.intent === null ? null : { type: 'RECOVER' };
}

async function orAborted<T>(work: Promise<T>, signal: AbortSignal): Promise<T> {
  if (signal.aborted) throw cancelled();
  const { promise, reject } = Promise.withResolvers<never>();
  const stop = (): void => reject(cancelled());
  signal.addEventListener('abort', stop, { once: true });
  try {
    return await Promise.race([work, promise]);
  } finally {
    signal.removeEventListener('abort', stop);
  }
}
