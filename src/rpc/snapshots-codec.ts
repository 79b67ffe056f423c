/** Wire ⇄ domain for the snapshots service. Everything that enters is checked for shape here, once; meaning is checked in
 * the worker. Errors: InvalidArgument naming the field. Whatever the wire carries beyond these fields is ignored. */
import { create } from '@bufbuild/protobuf';
import { type Timestamp, TimestampSchema } from '@bufbuild/protobuf/wkt';
import { assertNever, ErrorKind, SnapshotterError } from '../base/errors.ts';
import {
  type CommitSnapshotRequest,
  type Info,
  InfoSchema,
  type PrepareSnapshotRequest,
  type UpdateSnapshotRequest,
  type ViewSnapshotRequest,
  Kind as WireKind,
} from '../gen/services/snapshots/v1/snapshots_pb.js';
import { MountSchema, type Mount as WireMount } from '../gen/types/mount_pb.js';
import {
  type CommitRequest,
  Kind,
  type Labels,
  type Mount,
  type PrepareRequest,
  type SnapshotInfo,
  type UpdateRequest,
} from '../worker/worker.ts';

/** What containerd's own store could hold as a key. */
export const kKeyMaxBytes = 32768;
/** containerd's limit for a label, key and value together. */
export const kLabelMaxBytes = 4096;

function refuse(field: string, reason: string): never {
  throw new SnapshotterError(ErrorKind.InvalidArgument, `${field} ${reason}`);
}

/** A name that may be empty. UTF-8 was checked when the message was read. */
export function optionalName(field: string, value: string): string {
  if (value.includes('\0')) refuse(field, 'contains a NUL');
  const bytes = Buffer.byteLength(value);
  if (bytes > kKeyMaxBytes) refuse(field, `is ${bytes} bytes long, at most ${kKeyMaxBytes} are allowed`);
  return value;
}

export function requiredName(field: string, value: string): string {
  if (value === '') refuse(field, 'is empty');
  return optionalName(field, value);
}

/** Empty values are no labels: clients send them to say "none". Refusals name the snapshot. */
export function labelsOf(snapshot: string, labels: Readonly<Record<string, string>>): Labels {
  const kept: [string, string][] = [];
  for (const [key, value] of Object.entries(labels)) {
    const shown = JSON.stringify(key.length > 128 ? `${key.slice(0, 128)}…` : key);
    if (key === '') refuse(`${snapshot}: labels`, 'have an empty key');
    if (key.includes('\0')) refuse(`${snapshot}: label ${shown}`, 'has a NUL in its key');
    const bytes = Buffer.byteLength(key) + Buffer.byteLength(value);
    if (bytes > kLabelMaxBytes) {
      refuse(
        `${snapshot}: label ${shown}`,
        `is ${bytes} bytes long with its value, at most ${kLabelMaxBytes} are allowed`,
      );
    }
    if (value.includes('\0')) refuse(`${snapshot}: label ${shown}`, 'contains a NUL');
    if (value !== '') kept.push([key, value]);
  }
  return Object.fromEntries(kept);
}

export function prepareRequestOf(message: PrepareSnapshotRequest | ViewSnapshotRequest): PrepareRequest {
  return {
    key: requiredName('key', message.key),
    parent: optionalName('parent', message.parent),
    labels: labelsOf(message.key, message.labels),
  };
}

export function commitRequestOf(message: CommitSnapshotRequest): CommitRequest {
  return {
    name: requiredName('name', message.name),
    key: requiredName('key', message.key),
    labels: labelsOf(message.key, message.labels),
    parent: optionalName('parent', message.parent),
  };
}

/** Kind, parent and times of `info` are ignored: only labels can change, and containerd fills the rest with zero values. */
export function updateRequestOf(message: UpdateSnapshotRequest): UpdateRequest {
  if (message.info === undefined) refuse('info', 'is missing');
  return {
    name: requiredName('info.name', message.info.name),
    labels: labelsOf(message.info.name, message.info.labels),
    paths: (message.updateMask?.paths ?? []).map((path) => optionalName('update_mask.paths', path)),
  };
}

const kNanosPerSecond = 1_000_000_000n;

/** Seconds are floored, so that nanos stay positive also before the epoch. */
export function timestampOf(nanoseconds: bigint): Timestamp {
  const nanos = ((nanoseconds % kNanosPerSecond) + kNanosPerSecond) % kNanosPerSecond;
  return create(TimestampSchema, { seconds: (nanoseconds - nanos) / kNanosPerSecond, nanos: Number(nanos) });
}

export function nanosecondsOf(timestamp: Timestamp): bigint {
  return timestamp.seconds * kNanosPerSecond + BigInt(timestamp.nanos);
}

function wireKindOf(kind: Kind): WireKind {
  switch (kind) {
    case Kind.View:
      return WireKind.VIEW;
    case Kind.Active:
      return WireKind.ACTIVE;
    case Kind.Committed:
      return WireKind.COMMITTED;
    default:
      return assertNever(kind);
  }
}

export function wireInfoOf(info: SnapshotInfo): Info {
  return create(InfoSchema, {
    name: info.name,
    parent: info.parent,
    kind: wireKindOf(info.kind),
    createdAt: timestampOf(info.createdAt),
    updatedAt: timestampOf(info.updatedAt),
    labels: info.labels,
  });
}

export function wireMountsOf(mounts: readonly Mount[]): WireMount[] {
  return mounts.map(({ type, source, options }) => create(MountSchema, { type, source, options: [...options] }));
}

/** Upper bound of an info's encoded size: List keeps its messages far below the limit without encoding twice. */
export function wireSizeMax(info: SnapshotInfo): number {
  const fixed = 64;
  const entry = 16;
  const bytesPerUnit = 3;
  let units = info.name.length + info.parent.length;
  let entries = 0;
  for (const [key, value] of Object.entries(info.labels)) {
    units += key.length + value.length;
    entries += 1;
  }
  return fixed + entries * entry + units * bytesPerUnit;
}
