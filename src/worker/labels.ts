/** The labels of the contract, and what their texts mean. Pure. Labels are hostile: what is used is checked here. */
import { normalize } from 'node:path';
import { ErrorKind, SnapshotterError } from '../base/errors.ts';
import type { Labels } from './worker.ts';

export const Label = {
  Ref: 'containerd.io/snapshot.ref',
  ImageRef: 'containerd.io/snapshot/image-ref',
  CriImageRef: 'containerd.io/snapshot/cri.image-ref',
  Type: 'containerd.io/snapshot/type',
  BlobDigest: 'containerd.io/snapshot/overlaybd/blob-digest',
  BlobSize: 'containerd.io/snapshot/overlaybd/blob-size',
  BlobFsType: 'containerd.io/snapshot/overlaybd/blob-fs-type',
  AccelerationLayer: 'containerd.io/snapshot/overlaybd/acceleration-layer',
  Download: 'containerd.io/snapshot/overlaybd/download-remote-blob',
  Convert2Turbo: 'containerd.io/snapshot/overlaybd/convert2turbo-oci',
  Writable: 'containerd.io/snapshot/overlaybd.writable',
  LocalCommitPath: 'containerd.io/snapshot/overlaybd.localcommitpath',
  ActivePath: 'containerd.io/snapshot/overlay.active.path',
  VirtualSize: 'containerd.io/snapshot/overlaybd/vsize',
  MaxSize: 'containerd.io/snapshot/max-size',
} as const;

const GiB = 1n << 30n;
/** The largest virtual size we make: beyond it mkfs and its metadata stop being reasonable. */
export const virtualSizeMaxBytes = 65536n * GiB;
const virtualSizeMinBytes = 1n << 20n;
const sizeUnitBytes = 4096n;
const labelBytesMax = 4096;

const bad = (context: string, label: string, why: string): SnapshotterError =>
  new SnapshotterError(ErrorKind.InvalidArgument, `${context}: label ${label}: ${why}`);

/** What is stored of the labels a client sent: empty values never are, and the ones only we may give are not taken.
 * InvalidArgument above containerd's limit for a pair. */
export function acceptLabels(context: string, labels: Labels): Record<string, string> {
  const accepted: Record<string, string> = {};
  for (const [key, value] of Object.entries(labels)) {
    if (Buffer.byteLength(key) + Buffer.byteLength(value) > labelBytesMax) {
      throw bad(context, key.slice(0, 64), `key and value are longer than ${labelBytesMax} bytes`);
    }
    if (key.includes('\0') || value.includes('\0')) throw bad(context, JSON.stringify(key), 'contains NUL');
    if (value !== '' && key !== '' && key !== Label.LocalCommitPath) put(accepted, key, value);
  }
  return accepted;
}

/** Assigns also `__proto__`, which a plain assignment would swallow. */
function put(labels: Record<string, string>, key: string, value: string): void {
  Object.defineProperty(labels, key, { value, enumerable: true, configurable: true, writable: true });
}

export function without(labels: Labels, ...keys: readonly string[]): Record<string, string> {
  const rest: Record<string, string> = {};
  for (const [key, value] of Object.entries(labels)) if (!keys.includes(key)) put(rest, key, value);
  return rest;
}

export function withLabel(labels: Labels, key: string, value: string): Record<string, string> {
  const next = without(labels, key);
  if (value !== '') put(next, key, value);
  return next;
}

/** Own property only: a label may be called `constructor`. */
export const labelOf = (labels: Labels, key: string): string | undefined =>
  Object.hasOwn(labels, key) ? labels[key] : undefined;

/** Virtual size of a new image in bytes. InvalidArgument for negative or absurd sizes; unparsable = the default. */
export function virtualSizeBytes(context: string, labels: Labels, defaultGB: number): bigint {
  const gigabytes = (labelOf(labels, Label.VirtualSize) ?? '').trim();
  if (/^-\d/.test(gigabytes)) throw bad(context, Label.VirtualSize, `${gigabytes} is negative`);
  const asked = /^\+?\d+$/.test(gigabytes) ? BigInt(gigabytes.replace('+', '')) : 0n;
  let size = (asked === 0n ? BigInt(defaultGB) : asked) * GiB;
  if (size > virtualSizeMaxBytes) {
    throw bad(context, Label.VirtualSize, `${gigabytes} GB is more than ${virtualSizeMaxBytes / GiB} GB`);
  }
  const maxText = labelOf(labels, Label.MaxSize);
  if (maxText !== undefined) {
    const max = /^\d+$/.test(maxText) ? BigInt(maxText) : -1n;
    if (max < virtualSizeMinBytes || max > virtualSizeMaxBytes) {
      throw bad(
        context,
        Label.MaxSize,
        `${maxText} is not a size between ${virtualSizeMinBytes} and ${virtualSizeMaxBytes} bytes`,
      );
    }
    // A limit: never rounded up beyond it.
    const limit = (max / sizeUnitBytes) * sizeUnitBytes;
    if (asked === 0n || limit < size) size = limit;
  }
  return size;
}

/** The user's directory for the writable pair, normalised; null = none asked. InvalidArgument unless it is an absolute
 * path without `..` outside our own root. */
export function activePathOf(context: string, labels: Labels, root: string): string | null {
  const path = labelOf(labels, Label.ActivePath);
  if (path === undefined) return null;
  if (!path.startsWith('/')) throw bad(context, Label.ActivePath, 'is not an absolute path');
  if (path.split('/').includes('..')) throw bad(context, Label.ActivePath, 'contains ".."');
  const clean = normalize(path).replace(/\/+$/, '');
  if (clean === '') throw bad(context, Label.ActivePath, 'is the root directory');
  if (clean === root || clean.startsWith(`${root}/`)) throw bad(context, Label.ActivePath, 'is inside our own root');
  return clean;
}
