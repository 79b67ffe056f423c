/** Commit: looks quickly whether it may, settles on paper, and leaves sealing, measuring and detaching to the
 * background. Runs inside containerd's own transaction: milliseconds only. */
import { ErrorKind, SnapshotterError, withContext } from '../base/errors.ts';
import { refuseUnless } from '../states/lifecycle.ts';
import type { SnapshotRow } from '../store/store.ts';
import { limits } from './config.ts';
import { type CommittedPlan, LayerSource, planOf } from './effects.ts';
import { acceptLabels, Label, withLabel, without } from './labels.ts';
import { fileSystemOf } from './plan.ts';
import { checkName } from './prepare.ts';
import {
  failedPrecondition,
  inBackground,
  inTransaction,
  isHeld,
  isHeldByContainer,
  notFound,
  type Scope,
} from './scope.ts';
import { chainOf, Purpose } from './storage-kind.ts';
import type { CommitRequest } from './worker.ts';

export async function commit(scope: Scope, request: CommitRequest): Promise<void> {
  const { name, key } = request;
  const context = `commit ${key} as ${name}`;
  checkName(context, name);
  const labels = without(acceptLabels(context, request.labels), Label.Writable);
  const row = committable(scope, request);
  const layer = await layerOf(scope, row);
  if (row.storage === 'block') await refuseWhileHeld(scope, context, row);
  const id = inTransaction(scope, context, () => settle(scope, request, labels, layer));
  inBackground(scope, id);
}

/** The order of the checks is the reference store's. */
function committable(scope: Scope, { name, key }: CommitRequest): SnapshotRow {
  const context = `commit ${key} as ${name}`;
  if (scope.store.named(name) !== null) {
    throw new SnapshotterError(ErrorKind.AlreadyExists, `${context}: the name is in use`);
  }
  const row = scope.store.named(key);
  if (row === null) throw notFound('commit', key);
  if (row.kind !== 'active') throw failedPrecondition(`${context}: the snapshot is not active`);
  refuseUnless(row.state, { type: 'COMMIT' }, context);
  return row;
}

/** What the snapshot turned out to hold. */
async function layerOf(scope: Scope, row: SnapshotRow): Promise<LayerSource> {
  const { purpose, writable } = planOf(row);
  if (purpose === Purpose.Acceleration) return LayerSource.Below;
  const otherwise = writable === null ? LayerSource.None : LayerSource.Writable;
  if (purpose === Purpose.Rootfs) return otherwise;
  const { fs, mountPoint } = scope.layout.of(row.id);
  const found = await isLayerDirectory(scope, `commit ${row.name ?? row.id}`, writable === null ? fs : mountPoint);
  if (!found) return otherwise;
  return writable === null ? LayerSource.File : LayerSource.Unpacked;
}

/** Whether what was unpacked is one overlaybd layer and not the files of one. */
async function isLayerDirectory({ engine }: Scope, context: string, dir: string): Promise<boolean> {
  const file = `${dir}/overlaybd.commit`;
  try {
    if (!(await engine.files.exists(file)) || (await engine.files.listDirs(dir)).length > 0) return false;
    return (await engine.layers.inspect(file)).kind === 'lsmt-sealed';
  } catch (error) {
    throw withContext(`${context}: look at ${file}`, error);
  }
}

/** Clients unmount lazily right before Commit: waits for the last of them. One that stays loses the device to the seal;
 * only a container that still runs on it makes Commit refuse, with nothing changed. */
async function refuseWhileHeld(scope: Scope, context: string, row: SnapshotRow): Promise<void> {
  for (let waitedMs = 0; await isHeld(scope, context, row.id); waitedMs += limits.busyStepMs) {
    if (waitedMs >= limits.busyWaitMs) {
      if (!(await isHeldByContainer(scope, context, row.id))) return;
      throw failedPrecondition(`${context}: the device of snapshot ${row.id} is in use by a container; stop it first`);
    }
    await scope.pause(limits.busyStepMs);
  }
}

/** REQUIRES: inside a transaction. Everything is looked at again: the quick checks have waited. */
function settle(
  scope: Scope,
  request: CommitRequest,
  labels: Readonly<Record<string, string>>,
  layer: LayerSource,
): string {
  const { store, layout, clock, config } = scope;
  const context = `commit ${request.key} as ${request.name}`;
  const row = committable(scope, request);
  const parentId = parentOf(scope, request, row);
  const rebased = parentId !== row.parentId;
  const parent = parentId === null ? null : store.snapshot(parentId);
  const chain = chainOf(parent === null ? [] : [parent, ...store.ancestors(parent.id)]);
  if (layer === LayerSource.File && chain.directories.length > 0) {
    throw new SnapshotterError(
      ErrorKind.InvalidArgument,
      `${context}: an overlaybd layer can't stand on the plain directories of ${parent?.name ?? ''}`,
    );
  }
  const isBlock = layer !== LayerSource.None;
  const plan: CommittedPlan = {
    ...planOf(row),
    blockId: rebased || isBlock ? (chain.block?.id ?? null) : planOf(row).blockId,
    layer,
  };
  const below = chain.block?.fileSystem ?? null;
  const fileSystem =
    row.fileSystem ??
    (isBlock ? JSON.stringify(fileSystemOf(context, labels, below === null ? null : JSON.parse(below), config)) : null);
  const now = clock.now();
  store.changeSnapshot(row.id, {
    name: request.name,
    kind: 'committed',
    parentId,
    labels:
      layer === LayerSource.Writable ? withLabel(labels, Label.LocalCommitPath, layout.of(row.id).sealed) : labels,
    createdAt: now,
    updatedAt: now,
    intent: 'commit',
    storage: isBlock ? 'block' : 'directory',
    fileSystem,
    plan: JSON.stringify(plan),
    deviceId: null,
    usageBytes: null,
    usageInodes: null,
  });
  return row.id;
}

/** The parent of Prepare, or the one given now (rebase): only for a snapshot that was prepared on nothing. */
function parentOf(scope: Scope, { key, name, parent }: CommitRequest, row: SnapshotRow): string | null {
  if (parent === '' || parent === row.parentName) return row.parentId;
  const context = `commit ${key} as ${name} on ${parent}`;
  const invalid = (why: string): SnapshotterError =>
    new SnapshotterError(ErrorKind.InvalidArgument, `${context}: ${why}`);
  if (row.parentId !== null) throw invalid(`the snapshot has the parent ${row.parentName} already`);
  const found = scope.store.named(parent);
  if (found === null || found.state === 'absent') {
    throw new SnapshotterError(ErrorKind.NotFound, `${context}: the parent does not exist`);
  }
  if (found.kind !== 'committed') throw invalid('the parent is not committed');
  if (row.storage === 'block')
    throw failedPrecondition(`${context}: a writable device can't get another image below it`);
  return found.id;
}
