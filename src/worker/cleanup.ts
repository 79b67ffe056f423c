/** Cleanup: finishes what is open and deletes directories without rows. Never crosses a mount (the engine refuses), never
 * touches a directory of a row. Safe at any time: a row is written before its directory is made and outlives it. */
import { sharedDeviceOf } from './mount-recipe.ts';
import type { Scope } from './scope.ts';

export async function cleanup(scope: Scope): Promise<void> {
  // Children first, so that their parents find them gone.
  for (const row of [...scope.store.unsettled()].reverse()) {
    if (row.state !== 'absent') await scope.background.finish(row.id);
  }
  await removeOrphanDirectories(scope);
}

export async function removeOrphanDirectories(scope: Scope): Promise<void> {
  const { engine, layout, store, log } = scope;
  if (await engine.files.exists(layout.foreignDatabase)) {
    // The original's snapshots, to be imported: not ours to delete.
    return;
  }
  for (const name of await engine.files.listDirs(layout.snapshots)) {
    const isId = /^[1-9]\d{0,17}$/.test(name);
    if (isId && store.snapshot(name) !== null) continue;
    try {
      if (isId) await releaseOrphan(scope, name);
      await engine.files.removeTree(layout.orphan(name));
      log.info({ directory: name }, 'directory without a snapshot removed');
    } catch (error) {
      log.warn({ err: error, directory: name }, 'directory without a snapshot could not be removed');
    }
  }
}

/** Devices and our own mount of an id that no row knows. */
export async function releaseOrphan(scope: Scope, id: string): Promise<void> {
  const { engine, layout, store } = scope;
  await engine.mounts.unmount(layout.of(id).mountPoint);
  for (const device of [id, sharedDeviceOf(id)]) {
    if ((await engine.devices.find(device)) !== null) await engine.devices.detach(device);
    store.dropDevice(device);
  }
}
