/** What every verb works with. One object, made once by create-worker.ts. */
import type { Logger } from 'pino';
import type { Clock } from '../base/clock.ts';
import { ErrorKind, SnapshotterError, withContext } from '../base/errors.ts';
import type { Engine } from '../engine/engine.ts';
import type { Layout } from '../store/layout.ts';
import type { SnapshotRow, Store } from '../store/store.ts';
import type { Background } from './background.ts';
import type { WorkerConfig } from './config.ts';
import type { DevicePool } from './devices.ts';
import { planOf, recipeOf } from './effects.ts';
import { deviceOf, mountsOf } from './mount-recipe.ts';
import type { Mount } from './worker.ts';

export interface Scope {
  readonly engine: Engine;
  readonly store: Store;
  readonly clock: Clock;
  readonly config: WorkerConfig;
  readonly log: Logger;
  readonly layout: Layout;
  readonly devices: DevicePool;
  readonly background: Background;
  readonly pause: (milliseconds: number) => Promise<void>;
  /** `index=off` where the kernel knows it; asked once. */
  readonly overlayOptions: () => Promise<readonly string[]>;
  /** Log lines that are worth one line per life of the process. */
  readonly said: Set<string>;
}

export const notFound = (verb: string, key: string): SnapshotterError =>
  new SnapshotterError(ErrorKind.NotFound, `${verb} ${key}: snapshot does not exist`);

export const failedPrecondition = (message: string): SnapshotterError =>
  new SnapshotterError(ErrorKind.FailedPrecondition, message);

/** A row that clients may see: a Prepare that is not answered yet does not exist for them. */
export const isVisible = (row: SnapshotRow): boolean => row.state !== 'absent';

export function visible(scope: Scope, verb: string, key: string): SnapshotRow {
  const row = scope.store.named(key);
  if (row === null || !isVisible(row)) throw notFound(verb, key);
  return row;
}

/** Replays the stored recipe; the device it stands on is up when this returns, whatever happened to it. */
export async function replay(scope: Scope, row: SnapshotRow, signal: AbortSignal): Promise<readonly Mount[]> {
  const recipe = recipeOf(row);
  const device = deviceOf(recipe);
  if (device === null) return mountsOf(recipe, null);
  const { blockId } = planOf(row);
  if (blockId !== null) await scope.background.layerReady(blockId, signal);
  const facts = await (recipe.form === 'over'
    ? scope.devices.mounted(device, signal)
    : scope.devices.attached(device, signal));
  return mountsOf(recipe, facts);
}

/** A verb's transaction. What a verb refuses names the snapshot already; what the store refuses (a full disk) does not. */
export function inTransaction<T>(scope: Scope, context: string, body: () => T): T {
  try {
    return scope.store.transaction(body);
  } catch (error) {
    const told = error instanceof SnapshotterError && refusals.has(error.kind);
    throw told ? error : withContext(context, error);
  }
}

const refusals: ReadonlySet<ErrorKind> = new Set([
  ErrorKind.NotFound,
  ErrorKind.AlreadyExists,
  ErrorKind.InvalidArgument,
  ErrorKind.FailedPrecondition,
]);

/** Whether somebody but our own mount holds a device, asked for a verb. */
export async function isHeld(scope: Scope, context: string, device: string): Promise<boolean> {
  try {
    return await scope.devices.isHeld(device);
  } catch (error) {
    throw withContext(`${context}: look at device ${device}`, error);
  }
}

export async function isHeldByContainer(scope: Scope, context: string, device: string): Promise<boolean> {
  try {
    return await scope.devices.isHeldByContainer(device);
  } catch (error) {
    throw withContext(`${context}: look at device ${device}`, error);
  }
}

/** Starts background work that nobody waits for here. Its own failures are logged by it. */
export function inBackground(scope: Scope, id: string): void {
  scope.background
    .finish(id)
    .catch((error: unknown) => scope.log.error({ err: error, id }, 'background work could not be taken up'));
}
