/** Decides, in the order of the contract's tables, what a Prepare or View will be: write mode, storage, mounts, and what
 * has to be made. Pure: everything it looks at is given, and its answer is stored with the row, so that a later change of
 * the configuration changes no existing snapshot. */
import { ErrorKind, SnapshotterError, withContext } from '../base/errors.ts';
import type { FsDescriptor, WritableLayerType } from '../engine/engine.ts';
import type { Layout } from '../store/layout.ts';
import type { RowStorage } from '../store/store.ts';
import type { WorkerConfig } from './config.ts';
import { activePathOf, Label, labelOf, virtualSizeBytes, without } from './labels.ts';
import {
  bareDevice,
  bareDirectory,
  deviceOf,
  layered,
  mountedDevice,
  type Recipe,
  recursiveDirectory,
  sharedDeviceOf,
} from './mount-recipe.ts';
import { type Chain, isBuildKit, Purpose, purposeOf } from './storage-kind.ts';
import type { Labels } from './worker.ts';

export const Mode = { Overlayfs: 'overlayfs', Dir: 'dir', Dev: 'dev' } as const;
export type Mode = (typeof Mode)[keyof typeof Mode];

/** What has to be made, kept with the row so that it can be repeated or undone. */
export interface Plan {
  readonly purpose: Purpose;
  /** Bring the device of the recipe up before the reply; without it only Mounts does. */
  readonly attach: boolean;
  /** Top of the block image below; its layer must be finished first. */
  readonly blockId: string | null;
  /** Whose root directory ours takes its owner from. */
  readonly ownerFrom: { readonly id: string; readonly mounted: boolean } | null;
  readonly imageRef: string | null;
  /** A writable layer of its own; null = none. */
  readonly writable: {
    readonly type: WritableLayerType;
    /** Decimal bytes; 0 = inherit. */
    readonly virtualSizeBytes: string;
    readonly format: boolean;
  } | null;
}

export interface Decision {
  readonly mode: Mode;
  readonly storage: RowStorage;
  readonly labels: Labels;
  readonly plan: Plan;
  readonly fileSystem: FsDescriptor | null;
  readonly activePath: string | null;
  readonly recipe: (id: string) => Recipe;
  /** For the log: a label that could not be followed and why. */
  readonly remark: 'writable label dropped' | 'writable label unknown' | null;
}

export interface Situation {
  readonly kind: 'active' | 'view';
  readonly key: string;
  readonly labels: Labels;
  readonly chain: Chain;
  /** File system of the block image below, as stored with it. */
  readonly below: FsDescriptor | null;
  readonly config: WorkerConfig;
  readonly layout: Layout;
  /** `index=off` where the kernel knows it. */
  readonly overlayOptions: readonly string[];
}

export function decide(situation: Situation): Decision {
  const { kind, key, labels, chain, config } = situation;
  const purpose = purposeOf(key, labels);
  if (kind === 'view') return decideView(situation);
  if (purpose === Purpose.Acceleration) {
    if (!standsOnBlock(chain)) {
      throw refused(situation, 'an acceleration layer needs an overlaybd image below it');
    }
    return plain(situation, purpose, (id) => bareDirectory(situation.layout, id));
  }
  if (purpose === Purpose.Download) return plain(situation, purpose, (id) => bareDirectory(situation.layout, id));
  if (purpose !== Purpose.Rootfs) return decideExtraction(situation, purpose);
  if (isDocker(config) && isInitKey(key)) {
    const device = chain.block === null ? null : sharedDeviceOf(chain.block.id);
    return plain(situation, purpose, (id) => recursiveDirectory(situation.layout, id, device));
  }
  return decideRootfs(situation);
}

/** Always read-only, through the shared device of the image below; a View never gets a writable layer. */
function decideView(situation: Situation): Decision {
  const { chain } = situation;
  const wanted = wantedMode(situation);
  const block = chain.block;
  if (block === null || chain.directories.length > 0) {
    const dropped = wanted.byLabel && wanted.mode !== Mode.Overlayfs;
    return {
      ...overChain(situation, Purpose.Rootfs, Mode.Overlayfs, true),
      labels: without(situation.labels, Label.Writable),
      remark: dropped ? 'writable label dropped' : wanted.remark,
    };
  }
  const seen = overChain(situation, Purpose.Rootfs, wanted.mode, true);
  if (wanted.mode !== Mode.Dev) return { ...seen, remark: wanted.remark };
  return { ...seen, recipe: () => bareDevice(sharedDeviceOf(block.id), 'ro') };
}

function decideExtraction(situation: Situation, purpose: Purpose): Decision {
  const { config, chain, labels } = situation;
  if (labelOf(labels, Label.Convert2Turbo) !== undefined) {
    return plain(situation, purpose, (id) => recursiveDirectory(situation.layout, id, null));
  }
  const stackable = chain.directories.length === 0;
  if (config.ociLayers === 'block' && purpose === Purpose.Extraction && stackable) {
    return { ...writable(situation, Mode.Dir, purpose), labels: without(labels, Label.Writable) };
  }
  // No device work here (the client unpacks straight into our upper directory); Mounts brings the image up for those
  // who really mount.
  const decision = overChain(situation, purpose, Mode.Overlayfs, false);
  return { ...decision, labels: without(labels, Label.Writable) };
}

function decideRootfs(situation: Situation): Decision {
  const { key, chain, labels } = situation;
  const wanted = wantedMode(situation);
  const plainParent = chain.directories.length > 0;
  if (wanted.mode !== Mode.Overlayfs && !plainParent) return writable(situation, wanted.mode, Purpose.Rootfs);
  const decision = overChain(situation, Purpose.Rootfs, Mode.Overlayfs, true);
  if (!plainParent) return { ...decision, remark: wanted.remark };
  if (wanted.mode === Mode.Overlayfs || !wanted.byLabel) {
    return { ...decision, labels: without(labels, Label.Writable), remark: wanted.remark };
  }
  if (!isBuildKit(key)) {
    throw refused(
      situation,
      `a writable device (${wanted.mode}) can't stand on plain directories: convert the image to overlaybd, or unpack it ` +
        'with ociLayers: "block"',
    );
  }
  // BuildKit sends the label on every mutable Prepare, also for images that are not overlaybd.
  return { ...decision, labels: without(labels, Label.Writable), remark: 'writable label dropped' };
}

interface Wanted {
  readonly mode: Mode;
  readonly byLabel: boolean;
  readonly remark: Decision['remark'];
}

function wantedMode({ labels, config }: Situation): Wanted {
  const label = labelOf(labels, Label.Writable);
  const known = (text: string): Mode | null =>
    text === Mode.Dir || text === Mode.Dev || text === Mode.Overlayfs ? text : null;
  if (label === undefined) return { mode: known(config.rwMode) ?? Mode.Overlayfs, byLabel: false, remark: null };
  const mode = known(label);
  return { mode: mode ?? Mode.Overlayfs, byLabel: true, remark: mode === null ? 'writable label unknown' : null };
}

const standsOnBlock = (chain: Chain): boolean => chain.block !== null && chain.directories.length === 0;

function overChain(situation: Situation, purpose: Purpose, mode: Mode, attach: boolean): Decision {
  const { kind, chain, layout, overlayOptions } = situation;
  const access = kind === 'view' ? 'ro' : 'rw';
  const [nearest] = chain.directories;
  const owner = nearest ?? chain.block;
  return {
    mode,
    storage: 'directory',
    labels: situation.labels,
    plan: {
      purpose,
      attach: attach && chain.block !== null,
      blockId: chain.block?.id ?? null,
      ownerFrom: owner === null || kind === 'view' ? null : { id: owner.id, mounted: owner.storage === 'block' },
      imageRef: imageRefOf(situation.labels),
      writable: null,
    },
    fileSystem: null,
    activePath: null,
    recipe: (id) => layered(layout, id, access, chain, overlayOptions),
    remark: null,
  };
}

function plain(situation: Situation, purpose: Purpose, recipe: (id: string) => Recipe): Decision {
  const decision = overChain(situation, purpose, Mode.Overlayfs, false);
  const attach = deviceOf(recipe('0')) !== null;
  return {
    ...decision,
    labels: without(situation.labels, Label.Writable),
    plan: { ...decision.plan, attach },
    recipe,
  };
}

/** A writable layer stacked on the image below, or a new image. */
function writable(situation: Situation, mode: Mode, purpose: Purpose): Decision {
  const { key, labels, chain, config, layout, below } = situation;
  const context = `prepare ${key}`;
  const isNew = chain.block === null;
  const size = isNew ? virtualSizeBytes(context, labels, config.defaultVirtualSizeGB) : 0n;
  return {
    mode,
    storage: 'block',
    labels,
    plan: {
      purpose,
      attach: true,
      blockId: chain.block?.id ?? null,
      ownerFrom: null,
      imageRef: imageRefOf(labels),
      writable: { type: config.writableLayerType, virtualSizeBytes: String(size), format: isNew },
    },
    fileSystem: fileSystemOf(context, labels, below, config),
    activePath: activePathOf(context, labels, config.root),
    recipe: (id) => (mode === Mode.Dev ? bareDevice(id, 'rw') : mountedDevice(layout, id)),
    remark: null,
  };
}

/** The row's own label, else the chain's, else the daemon's. */
export function fileSystemOf(
  context: string,
  labels: Labels,
  below: FsDescriptor | null,
  config: WorkerConfig,
): FsDescriptor {
  const label = labelOf(labels, Label.BlobFsType);
  if (label === undefined) return below ?? config.defaultFs;
  let found: FsDescriptor;
  try {
    found = config.parseFs(label);
  } catch (error) {
    throw withContext(`${context}: label ${Label.BlobFsType}`, error);
  }
  // The type names a program and a kernel module.
  if (!/^[a-z0-9_]{1,16}$/.test(found.type)) {
    throw new SnapshotterError(
      ErrorKind.InvalidArgument,
      `${context}: label ${Label.BlobFsType}: ${JSON.stringify(found.type)} is no file system type`,
    );
  }
  return { ...found, mountOptions: found.mountOptions.filter((option) => !steering.test(option)) };
}

/** Options that would turn a mount into another one. */
const steering = /^(|ro|rw|r?bind|remount|move|loop(=.*)?|r?(shared|private|slave)|x-.*|offset=.*)$/i;

const imageRefOf = (labels: Labels): string | null =>
  labelOf(labels, Label.CriImageRef) ?? labelOf(labels, Label.ImageRef) ?? null;

const isDocker = ({ runtimeType, rwMode }: WorkerConfig): boolean =>
  runtimeType === 'docker' && rwMode !== Mode.Dir && rwMode !== Mode.Dev;

/** Docker's stub layer between image and container. */
export const isInitKey = (key: string): boolean => key.endsWith('-init') || key.includes('-init-');

function refused({ key, chain }: Situation, why: string): SnapshotterError {
  const parent = chain.directories[0]?.name ?? chain.block?.name ?? '';
  return new SnapshotterError(
    ErrorKind.FailedPrecondition,
    `prepare ${key}${parent === '' ? '' : ` on ${parent}`}: ${why}`,
  );
}
