/** Stat, Update, List and Usage: the store's answers. */
import { ErrorKind, SnapshotterError, withContext } from '../base/errors.ts';
import type { SnapshotRow } from '../store/store.ts';
import { limits } from './config.ts';
import { committedPlanOf, LayerSource } from './effects.ts';
import { acceptLabels, Label, labelOf, withLabel } from './labels.ts';
import { inTransaction, isVisible, type Scope, visible } from './scope.ts';
import type { Labels, SnapshotFilter, SnapshotInfo, UpdateRequest, Usage } from './worker.ts';

export function infoOf(row: SnapshotRow): SnapshotInfo {
  const { kind, parentName, labels, createdAt, updatedAt } = row;
  return { kind, name: row.name ?? '', parent: parentName, labels, createdAt, updatedAt };
}

/** Clients act on the sealed file as soon as they see its label: waits for the seal of this one snapshot, no other. */
export async function stat(scope: Scope, key: string): Promise<SnapshotInfo> {
  const row = visible(scope, 'stat', key);
  if (row.kind === 'committed' && row.storage === 'block' && row.state !== 'committed') {
    await scope.background.quiet(row.id);
    return infoOf(visible(scope, 'stat', key));
  }
  return infoOf(row);
}

/** In byte order of the names, a page of the store at a time: a walk holds nothing while the client reads. The same
 * answer as Stat, without its waiting: the label of a seal under way is decided already. */
export async function* list(
  scope: Scope,
  filter: SnapshotFilter,
  batchSize: number,
): AsyncGenerator<readonly SnapshotInfo[]> {
  let batch: SnapshotInfo[] = [];
  for (let last = ''; ; ) {
    const page = scope.store.page(last, limits.listPage);
    for (const row of page) {
      if (!isVisible(row)) continue;
      const info = infoOf(row);
      if (filter(info)) batch.push(info);
      if (batch.length < batchSize) continue;
      yield batch;
      batch = [];
    }
    last = page.at(-1)?.name ?? '';
    if (page.length < limits.listPage) break;
  }
  if (batch.length > 0) yield batch;
}

export function update(scope: Scope, { name, labels, paths }: UpdateRequest): SnapshotInfo {
  const context = `update ${name}`;
  const given = acceptLabels(context, labels);
  return inTransaction(scope, context, () => {
    const row = visible(scope, 'update', name);
    // Clients may drop the label that only we give, or ask for it again; its value is never theirs.
    const sealed = labelOf(labels, Label.LocalCommitPath) === undefined ? '' : sealedPath(scope, row);
    const next = masked(context, row.labels, withLabel(given, Label.LocalCommitPath, sealed), paths);
    return infoOf(scope.store.changeSnapshot(row.id, { labels: next, updatedAt: scope.clock.now() }));
  });
}

const keyed = 'labels.';

function masked(context: string, old: Labels, given: Labels, paths: readonly string[]): Labels {
  const invalid = paths.find((path) => path !== 'labels' && !path.startsWith(keyed));
  if (invalid !== undefined) {
    throw new SnapshotterError(
      ErrorKind.InvalidArgument,
      `${context}: cannot update ${JSON.stringify(invalid)}: only labels change`,
    );
  }
  if (paths.length === 0 || paths.includes('labels')) return given;
  let next = old;
  for (const path of paths) {
    const key = path.slice(keyed.length);
    next = withLabel(next, key, labelOf(given, key) ?? '');
  }
  return next;
}

/** What localcommitpath says of a snapshot; '' = it has none. */
function sealedPath(scope: Scope, row: SnapshotRow): string {
  const isOurs =
    row.kind === 'committed' && row.state !== 'faulty' && committedPlanOf(row).layer === LayerSource.Writable;
  return isOurs ? scope.layout.of(row.id).sealed : '';
}

/** Of this snapshot alone. Fixed at Commit: measured once, behind it. */
export async function usage(scope: Scope, key: string): Promise<Usage> {
  let row = visible(scope, 'usage', key);
  if (row.kind === 'view') return { sizeBytes: 0n, inodes: 0n };
  if (row.kind === 'committed') {
    if (row.usageBytes === null) {
      await scope.background.quiet(row.id);
      row = visible(scope, 'usage', key);
    }
    if (row.usageBytes === null) {
      await scope.background.finish(row.id);
      row = visible(scope, 'usage', key);
    }
    if (row.usageBytes === null) {
      throw new SnapshotterError(ErrorKind.Unavailable, `usage ${key}: not measured: ${row.failure ?? 'unknown'}`);
    }
    return { sizeBytes: row.usageBytes ?? 0n, inodes: row.usageInodes ?? 0n };
  }
  const { files } = scope.engine;
  const paths = scope.layout.of(row.id);
  try {
    const parts = [await files.diskUsage(paths.fs, [])];
    if (row.storage === 'block') parts.push(await files.diskUsage(paths.block, ['mountpoint']));
    if (row.activePath !== null) parts.push(await files.diskUsage(row.activePath, []));
    return {
      sizeBytes: parts.reduce((sum, part) => sum + part.sizeBytes, 0n),
      inodes: parts.reduce((sum, part) => sum + part.inodes, 0n),
    };
  } catch (error) {
    throw withContext(`usage ${key}`, error);
  }
}
