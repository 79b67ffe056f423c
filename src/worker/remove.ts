/** Remove: quick checks, then removed on paper: the key is free at once. Devices and the directory go in the background,
 * or with Cleanup when asyncRemove asks for that. */
import { withContext } from '../base/errors.ts';
import { refuseUnless } from '../states/lifecycle.ts';
import type { SnapshotRow } from '../store/store.ts';
import { sharedDeviceOf } from './mount-recipe.ts';
import { failedPrecondition, inBackground, inTransaction, isHeld, notFound, type Scope } from './scope.ts';

export async function remove(scope: Scope, key: string): Promise<void> {
  const { store } = scope;
  const id = removable(scope, key).id;
  await refuseWhileUsed(scope, key, id);
  inTransaction(scope, `remove ${key}`, () => {
    const row = removable(scope, key);
    // Somebody removed it and made another one under the key while we looked: that one was not looked at.
    if (row.id !== id) throw failedPrecondition(`remove ${key}: the snapshot changed meanwhile`);
    store.changeSnapshot(id, { name: null, state: 'removed', intent: null, failure: null });
  });
  if (!scope.config.asyncRemove) inBackground(scope, id);
}

function removable(scope: Scope, key: string): SnapshotRow {
  const row = scope.store.named(key);
  if (row === null) throw notFound('remove', key);
  if (scope.store.children(row.id).some(({ name }) => name !== null)) {
    throw failedPrecondition(`cannot remove snapshot ${key}: it has children`);
  }
  refuseUnless(row.state, { type: 'REMOVE' }, `remove ${key}`);
  return row;
}

/** Busy must be said now and as FailedPrecondition: any other error stops containerd's garbage collection. */
async function refuseWhileUsed(scope: Scope, key: string, id: string): Promise<void> {
  const { layout, engine } = scope;
  for (const device of [id, sharedDeviceOf(id)]) {
    if (await isHeld(scope, `remove ${key}`, device))
      throw failedPrecondition(`remove ${key}: device ${device} is still in use`);
  }
  const paths = layout.of(id);
  const uses = new Set([`upperdir=${paths.fs}`, `workdir=${paths.work}`]);
  const stands = (option: string): boolean =>
    uses.has(option) || (option.startsWith('lowerdir=') && option.slice(9).split(':').includes(paths.mountPoint));
  const table = await engine.mounts.table().catch((error: unknown) => {
    throw withContext(`remove ${key}: read the mount table`, error);
  });
  const user = table.find((entry) => entry.fsType === 'overlay' && entry.options.some(stands));
  if (user !== undefined) throw failedPrecondition(`remove ${key}: it is still mounted at ${user.mountPoint}`);
}
