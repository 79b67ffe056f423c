/** The mounts of the contract's templates, and the recipe that is stored at Prepare and replayed for ever. Pure.
 * Device paths are not part of a recipe: a loop number is somebody else's after a reboot. */
import type { FsDescriptor } from '../engine/engine.ts';
import type { Layout } from '../store/layout.ts';
import type { Chain } from './storage-kind.ts';
import type { Mount } from './worker.ts';

export type Recipe =
  /** Needs no device. */
  | { readonly form: 'plain'; readonly mounts: readonly Mount[] }
  /** Stands on the device's mount point. */
  | { readonly form: 'over'; readonly device: string; readonly mounts: readonly Mount[] }
  /** Is the device itself. */
  | { readonly form: 'device'; readonly device: string; readonly access: 'rw' | 'ro' };

/** What the device turned out to be. */
export interface DeviceFacts {
  readonly path: string;
  readonly fileSystem: FsDescriptor;
}

/** The shared read-only device of a committed snapshot. */
export const sharedDeviceOf = (id: string): string => `${id}-ro`;
export const ownerOfDevice = (device: string): string => device.replace(/-ro$/, '');
export const isSharedDevice = (device: string): boolean => device.endsWith('-ro');

const bind = (source: string, ...options: readonly string[]): Mount => ({ type: 'bind', source, options });

/** N0, N1, N2, N3, and B1, B2 when the chain ends in a block image. */
export function layered(
  layout: Layout,
  id: string,
  access: 'rw' | 'ro',
  chain: Chain,
  overlayOptions: readonly string[],
): Recipe {
  const own = layout.of(id);
  const lowers = chain.directories.map((row) => layout.of(row.id).fs);
  if (chain.block !== null) lowers.push(layout.of(chain.block.id).mountPoint);
  const mounts = [mountOver(own.fs, own.work, access, lowers, overlayOptions)];
  return chain.block === null
    ? { form: 'plain', mounts }
    : { form: 'over', device: sharedDeviceOf(chain.block.id), mounts };
}

function mountOver(
  upper: string,
  work: string,
  access: 'rw' | 'ro',
  lowers: readonly string[],
  overlayOptions: readonly string[],
): Mount {
  const [first] = lowers;
  if (first === undefined) return bind(upper, access, 'rbind');
  if (access === 'ro' && lowers.length === 1) return bind(first, 'ro', 'rbind');
  const writable = access === 'rw' ? [`workdir=${work}`, `upperdir=${upper}`] : [];
  return {
    type: 'overlay',
    source: 'overlay',
    options: [...overlayOptions, ...writable, `lowerdir=${lowers.join(':')}`],
  };
}

/** X1: the plain directory for a layer that the client downloads or unpacks as a file. */
export const bareDirectory = (layout: Layout, id: string): Recipe => ({
  form: 'plain',
  mounts: [bind(layout.of(id).fs, 'rw', 'bind')],
});

/** X2: the plain directory; `device` = the image below is to be up all the same. */
export function recursiveDirectory(layout: Layout, id: string, device: string | null): Recipe {
  const mounts = [bind(layout.of(id).fs, 'rw', 'rbind')];
  return device === null ? { form: 'plain', mounts } : { form: 'over', device, mounts };
}

/** D1: the snapshot's own device, mounted by us. */
export const mountedDevice = (layout: Layout, id: string): Recipe => ({
  form: 'over',
  device: id,
  mounts: [bind(layout.of(id).mountPoint, 'rw', 'rbind')],
});

/** V1: a device for the client to mount. */
export const bareDevice = (device: string, access: 'rw' | 'ro'): Recipe => ({ form: 'device', device, access });

export const deviceOf = (recipe: Recipe): string | null => (recipe.form === 'plain' ? null : recipe.device);

/** REQUIRES: facts for a recipe of the form `device`. */
export function mountsOf(recipe: Recipe, facts: DeviceFacts | null): readonly Mount[] {
  if (recipe.form !== 'device') return recipe.mounts;
  if (facts === null) throw new Error(`device ${recipe.device} has no facts`);
  const { type, mountOptions } = facts.fileSystem;
  return [{ type, source: facts.path, options: [recipe.access, ...mountOptions] }];
}

/** How we mount a device ourselves. A read-only one must not replay a journal: it can't be written. */
export function ownMount(facts: DeviceFacts, readOnly: boolean): Mount {
  const { type, mountOptions } = facts.fileSystem;
  const replay: Readonly<Record<string, readonly string[]>> = { ext4: ['noload'], xfs: ['norecovery'] };
  const options = readOnly
    ? ['ro', ...mountOptions.filter((option) => option !== 'discard'), ...(replay[type] ?? [])]
    : ['rw', ...mountOptions];
  return { type, source: facts.path, options };
}
