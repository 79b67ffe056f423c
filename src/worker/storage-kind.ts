/** What a Prepare is for and what a layer holds. Pure. Lazy reading of remote layers plugs in here: a `remote` purpose
 * will be answered by committing at once (AlreadyExists protocol) instead of by an extraction. */
import type { SnapshotRow } from '../store/store.ts';
import { Label, labelOf } from './labels.ts';
import type { Labels } from './worker.ts';

export const Purpose = {
  /** The root file system of a container or of a build step. */
  Rootfs: 'rootfs',
  /** An image layer to be unpacked. Never a device of its own unless every layer becomes a block layer. */
  Extraction: 'extraction',
  /** An image layer that could be read lazily: a probe that must touch no device. */
  Remote: 'remote',
  /** A remote layer whose blob the client downloads into `fs`. */
  Download: 'download',
  /** A layer that carries a trace only. */
  Acceleration: 'acceleration',
} as const;
export type Purpose = (typeof Purpose)[keyof typeof Purpose];

/** The client's key behind containerd's `<namespace>/<sequence>/`, which direct users do not send. */
export function clientKey(key: string): { readonly namespace: string; readonly rest: string } {
  const found = /^([^/]+)\/\d+\/(.*)$/s.exec(key);
  return found === null ? { namespace: '', rest: key } : { namespace: found[1] ?? '', rest: found[2] ?? '' };
}

/** BuildKit has its own copy of containerd's metadata layer, under this namespace. */
export const isBuildKit = (key: string): boolean => key.startsWith('buildkit/');

export function purposeOf(key: string, labels: Labels): Purpose {
  const { rest } = clientKey(key);
  const hasRef = labelOf(labels, Label.Ref) !== undefined;
  if (hasRef && labelOf(labels, Label.AccelerationLayer) === 'yes') return Purpose.Acceleration;
  if (hasRef && isRemoteLayer(labels)) {
    return labelOf(labels, Label.Download) === 'download' ? Purpose.Download : Purpose.Remote;
  }
  // BuildKit's probe for a remote snapshot, abandoned when it is not one.
  if (hasRef && isBuildKit(key) && rest.startsWith('tmp-')) return Purpose.Remote;
  if (hasRef || labelOf(labels, Label.Type) === 'image' || rest.startsWith('extract-')) return Purpose.Extraction;
  return Purpose.Rootfs;
}

/** Labels that are enough to read the layer from a registry. */
export function isRemoteLayer(labels: Labels): boolean {
  const has = (label: string): boolean => labelOf(labels, label) !== undefined;
  return has(Label.BlobDigest) && has(Label.BlobSize) && (has(Label.ImageRef) || has(Label.CriImageRef));
}

/** The chain below a snapshot, as its mounts see it. */
export interface Chain {
  /** Nearest first: the directory layers above the block image, or all of them when there is none. */
  readonly directories: readonly SnapshotRow[];
  /** The top of the block image they stand on. */
  readonly block: SnapshotRow | null;
}

export function chainOf(ancestors: readonly SnapshotRow[]): Chain {
  const top = ancestors.findIndex(({ storage }) => storage === 'block');
  return top < 0
    ? { directories: ancestors, block: null }
    : { directories: ancestors.slice(0, top), block: ancestors[top] ?? null };
}
