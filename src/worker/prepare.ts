/** Prepare and View: decide and write the intent in one transaction, make it, settle, reply. What fails is undone. */
import { ErrorKind, SnapshotterError, withContext } from '../base/errors.ts';
import type { FsDescriptor } from '../engine/engine.ts';
import type { SnapshotRow } from '../store/store.ts';
import { cancelled } from './effects.ts';
import { acceptLabels } from './labels.ts';
import { deviceOf, mountsOf } from './mount-recipe.ts';
import { type Decision, decide } from './plan.ts';
import { failedPrecondition, inBackground, inTransaction, type Scope } from './scope.ts';
import { chainOf } from './storage-kind.ts';
import type { Labels, Mount, PrepareRequest } from './worker.ts';

export async function prepare(
  scope: Scope,
  kind: 'active' | 'view',
  request: PrepareRequest,
  signal: AbortSignal,
): Promise<readonly Mount[]> {
  const verb = kind === 'view' ? 'view' : 'prepare';
  const context = `${verb} ${request.key}`;
  checkName(context, request.key);
  const labels = acceptLabels(context, request.labels);
  const overlayOptions = await scope.overlayOptions().catch((error: unknown) => {
    throw withContext(context, error);
  });
  if (signal.aborted) throw withContext(context, cancelled());

  const { row, decision } = inTransaction(scope, context, () => begin(scope, kind, request, labels, overlayOptions));
  remark(scope, row, decision);
  const outcome = await scope.background.run(row.id, { type: kind === 'view' ? 'VIEW' : 'PREPARE' }, signal);
  if (outcome.error !== null || (outcome.state !== 'active' && outcome.state !== 'view')) {
    // What could not be undone is removed on paper: the key is free, the rest follows.
    if (outcome.state === 'removed') inBackground(scope, row.id);
    throw withContext(`${context} (snapshot ${row.id})`, outcome.error ?? new Error(`it is ${outcome.state}`));
  }
  const recipe = decision.recipe(row.id);
  // The device came up a moment ago; Mounts looks again before it hands the path out another time.
  return mountsOf(recipe, recipe.form === 'device' ? scope.devices.known(recipe.device) : null);
}

/** REQUIRES: inside a transaction. The order of the checks is the reference store's. */
function begin(
  scope: Scope,
  kind: 'active' | 'view',
  { key, parent }: PrepareRequest,
  labels: Labels,
  overlayOptions: readonly string[],
): { readonly row: SnapshotRow; readonly decision: Decision } {
  const { store, layout, config } = scope;
  const context = `${kind === 'view' ? 'view' : 'prepare'} ${key}`;
  const parentRow = parent === '' ? null : store.named(parent);
  if (parent !== '' && (parentRow === null || parentRow.state === 'absent')) {
    throw new SnapshotterError(ErrorKind.NotFound, `${context}: parent ${parent} does not exist`);
  }
  if (parentRow !== null && parentRow.kind !== 'committed') {
    throw new SnapshotterError(ErrorKind.InvalidArgument, `${context}: parent ${parent} is not committed`);
  }
  if (store.named(key) !== null) throw new SnapshotterError(ErrorKind.AlreadyExists, `${context}: the key is in use`);

  const chain = chainOf(parentRow === null ? [] : [parentRow, ...store.ancestors(parentRow.id)]);
  const text = chain.block?.fileSystem ?? null;
  const below = text === null ? null : (JSON.parse(text) as FsDescriptor);
  const decision = decide({ kind, key, labels, chain, below, config, layout, overlayOptions });
  const sharer = decision.activePath === null ? null : store.activePathUser(decision.activePath);
  if (sharer !== null) {
    throw failedPrecondition(
      `${context}: ${decision.activePath} holds the layer of ${sharer.name ?? `snapshot ${sharer.id}`}`,
    );
  }

  const now = scope.clock.now();
  const { id } = store.addSnapshot({
    name: key,
    kind,
    parentId: parentRow?.id ?? null,
    labels: decision.labels,
    createdAt: now,
    updatedAt: now,
    state: 'absent',
    intent: kind === 'view' ? 'view' : 'prepare',
    failure: null,
    storage: decision.storage,
    mode: decision.mode,
    recipe: '',
    plan: JSON.stringify(decision.plan),
    fileSystem: decision.fileSystem === null ? null : JSON.stringify(decision.fileSystem),
    usageBytes: null,
    usageInodes: null,
    deviceId: null,
    activePath: decision.activePath,
  });
  const recipe = decision.recipe(id);
  const row = store.changeSnapshot(id, { recipe: JSON.stringify(recipe), deviceId: deviceOf(recipe) });
  return { row, decision };
}

function remark(scope: Scope, row: SnapshotRow, { remark: text }: Decision): void {
  if (text === null || scope.said.has(text)) return;
  scope.said.add(text);
  scope.log.warn({ key: row.name, id: row.id }, `${text}; further ones are not logged`);
}

/** Keys are never used as paths; they only must be something, and text. */
export function checkName(context: string, name: string): void {
  if (name === '') throw new SnapshotterError(ErrorKind.InvalidArgument, `${context}: the name is empty`);
  if (name.includes('\0')) {
    throw new SnapshotterError(ErrorKind.InvalidArgument, `${context.replaceAll('\0', '\\0')}: the name contains NUL`);
  }
}
