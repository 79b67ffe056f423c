/** At start, before anything is served: rows, directories, mounts and devices are made to agree. What was begun is
 * finished or undone. Devices that running containers use are adopted as they are. Trouble with one snapshot is that
 * snapshot's failure: the daemon starts. */

import type { DeviceRow } from '../store/store.ts';
import { releaseOrphan, removeOrphanDirectories } from './cleanup.ts';
import { isSharedDevice, ownerOfDevice, sharedDeviceOf } from './mount-recipe.ts';
import { inBackground, type Scope } from './scope.ts';

export async function recover(scope: Scope): Promise<void> {
  await keepForeignIds(scope);
  await reconcileDevices(scope);
  await unmountStrays(scope);
  await releaseUnknownDevices(scope);
  await takeUpIntents(scope);
  await removeOrphanDirectories(scope);
}

/** Next to the original's database its directories are snapshots to be imported: our ids start above theirs. */
async function keepForeignIds(scope: Scope): Promise<void> {
  const { engine, layout, store } = scope;
  if (!(await engine.files.exists(layout.foreignDatabase))) return;
  const ids = (await engine.files.listDirs(layout.snapshots)).filter((name) => /^[1-9]\d{0,17}$/.test(name));
  // One by one: they may be larger than Math.max can tell apart, and the store keeps the largest.
  for (const id of ids) store.raiseIds(BigInt(id));
  scope.log.info({ directories: ids.length }, "the original's snapshots found; they are left alone");
}

/** One look at the world for all; only devices whose record is wrong or unfinished are taken up one by one. */
async function reconcileDevices(scope: Scope): Promise<void> {
  const rows = scope.store.devices();
  if (rows.length === 0) return;
  const bootId = await scope.devices.bootId();
  const live = new Map((await scope.engine.devices.list()).map(({ id, device }) => [id, device]));
  const table = await scope.engine.mounts.table();
  const mounted = new Set(table.map(({ mountPoint, major, minor }) => `${major}:${minor} ${mountPoint}`));
  const isTrue = ({ id, state, intent, path, major, minor, ...row }: DeviceRow): boolean => {
    const device = live.get(id);
    if (device === undefined || intent !== null || row.bootId !== bootId) return false;
    if (device.path !== path || device.major !== major || device.minor !== minor) return false;
    const { mountPoint } = scope.layout.of(ownerOfDevice(id));
    return state === (mounted.has(`${major}:${minor} ${mountPoint}`) ? 'mounted' : 'attached');
  };
  for (const row of rows) {
    const { id } = row;
    if (isTrue(row)) continue;
    try {
      await scope.devices.reconcile(id);
    } catch (error) {
      scope.log.warn({ err: error, device: id }, 'device could not be reconciled');
    }
  }
}

/** Whether a row could have brought up the device. */
function isWanted(scope: Scope, device: string): boolean {
  const row = scope.store.snapshot(ownerOfDevice(device));
  if (row === null || row.name === null) return false;
  return isSharedDevice(device) ? row.kind === 'committed' : row.storage === 'block';
}

async function releaseUnknownDevices(scope: Scope): Promise<void> {
  for (const { id } of await scope.engine.devices.list()) {
    // Names of another form were given by somebody else.
    if (!/^[1-9]\d{0,17}(-ro)?$/.test(id) || isWanted(scope, id) || scope.store.device(id) !== null) continue;
    try {
      if (scope.store.snapshot(ownerOfDevice(id)) === null) await releaseOrphan(scope, ownerOfDevice(id));
      else await scope.engine.devices.detach(id);
      scope.log.info({ device: id }, 'device without a snapshot detached');
    } catch (error) {
      scope.log.warn({ err: error, device: id }, 'device without a snapshot could not be detached');
    }
  }
}

/** Our own mount points whose snapshot or device is gone. */
async function unmountStrays(scope: Scope): Promise<void> {
  const { engine, layout, store } = scope;
  const prefix = `${layout.snapshots}/`;
  for (const { mountPoint } of await engine.mounts.table()) {
    const id = mountPoint.startsWith(prefix) ? (mountPoint.slice(prefix.length).split('/')[0] ?? '') : '';
    if (!/^[1-9]\d{0,17}$/.test(id) || mountPoint !== layout.of(id).mountPoint) continue;
    if (store.device(id) !== null || store.device(sharedDeviceOf(id)) !== null) continue;
    try {
      await engine.mounts.unmount(mountPoint);
    } catch (error) {
      scope.log.warn({ err: error, mountPoint }, 'stray mount could not be unmounted');
    }
  }
}

/** A Prepare that was never answered is undone before anybody can ask for its key again; sealing and erasing go on
 * behind the first calls. */
async function takeUpIntents(scope: Scope): Promise<void> {
  for (const row of [...scope.store.unsettled()].reverse()) {
    if (row.state === 'absent') {
      await scope.background.finish(row.id);
      // What could not be undone now is removed on paper, and tried again by Cleanup.
      continue;
    }
    inBackground(scope, row.id);
  }
}
