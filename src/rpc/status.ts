/** The only table from error kinds to gRPC codes. containerd's clients strip one trailing class text from a message, and
 * older ones recognise the class by it, so every message ends in exactly one. docs/errors.md is checked against this. */
import { status } from '@grpc/grpc-js';
import { ErrorKind, SnapshotterError } from '../base/errors.ts';

export interface StatusRow {
  readonly code: status;
  /** containerd's words for the class. */
  readonly text: string;
}

export const statusTable: Readonly<Record<ErrorKind, StatusRow>> = {
  [ErrorKind.NotFound]: { code: status.NOT_FOUND, text: 'not found' },
  [ErrorKind.AlreadyExists]: { code: status.ALREADY_EXISTS, text: 'already exists' },
  [ErrorKind.InvalidArgument]: { code: status.INVALID_ARGUMENT, text: 'invalid argument' },
  [ErrorKind.FailedPrecondition]: { code: status.FAILED_PRECONDITION, text: 'failed precondition' },
  [ErrorKind.Unavailable]: { code: status.UNAVAILABLE, text: 'unavailable' },
  [ErrorKind.Unimplemented]: { code: status.UNIMPLEMENTED, text: 'not implemented' },
  [ErrorKind.ResourceExhausted]: { code: status.RESOURCE_EXHAUSTED, text: 'resource exhausted' },
  [ErrorKind.PermissionDenied]: { code: status.PERMISSION_DENIED, text: 'permission denied' },
  [ErrorKind.DataLoss]: { code: status.DATA_LOSS, text: 'data loss' },
  [ErrorKind.Cancelled]: { code: status.CANCELLED, text: 'context canceled' },
  [ErrorKind.DeadlineExceeded]: { code: status.DEADLINE_EXCEEDED, text: 'context deadline exceeded' },
  [ErrorKind.Internal]: { code: status.INTERNAL, text: 'internal' },
};

export interface WireStatus {
  readonly code: status;
  readonly details: string;
}

/** A message travels percent-encoded in one HTTP/2 trailer, and a hostile key may be in it. */
const kDetailsMaxChars = 4096;

/** Errors that are not ours are bugs: Internal, with what they say; their stack belongs in the log. */
export function toStatus(error: unknown): WireStatus {
  const kind = error instanceof SnapshotterError ? error.kind : ErrorKind.Internal;
  const { code, text } = statusTable[kind];
  const suffix = `: ${text}`;
  let message = error instanceof Error ? error.message : String(error);
  while (message.endsWith(suffix)) message = message.slice(0, -suffix.length);
  if (message === text || message === '') return { code, details: text };
  if (message.length > kDetailsMaxChars) message = `${message.slice(0, kDetailsMaxChars)}…`;
  // A cut in the middle of a surrogate pair would make the encoder throw.
  return { code, details: `${message.toWellFormed()}${suffix}` };
}

/** `NotFound`, `AlreadyExists`, …: what log lines call a code. */
export function codeName(code: status): string {
  return (status[code] ?? `code ${code}`)
    .toLowerCase()
    .replace(/(^|_)([a-z])/g, (_match, _gap, letter: string) => letter.toUpperCase())
    .replace(/^Ok$/, 'OK');
}
