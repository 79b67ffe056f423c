/** The only table from codes of native/base/status.h to kinds. The addon exports its codes; a test demands that both
 * sets are the same. */
import { ErrorKind, SnapshotterError } from '../base/errors.ts';

export const kKindOfCode = {
  'invalid-argument': ErrorKind.InvalidArgument,
  'not-found': ErrorKind.NotFound,
  'already-exists': ErrorKind.AlreadyExists,
  'failed-precondition': ErrorKind.FailedPrecondition,
  'data-loss': ErrorKind.DataLoss,
  'no-space': ErrorKind.ResourceExhausted,
  'resource-exhausted': ErrorKind.ResourceExhausted,
  'permission-denied': ErrorKind.PermissionDenied,
  unavailable: ErrorKind.Unavailable,
  cancelled: ErrorKind.Cancelled,
  io: ErrorKind.Internal,
  unimplemented: ErrorKind.Unimplemented,
} as const satisfies Readonly<Record<string, ErrorKind>>;

function property(error: unknown, name: 'code' | 'errno'): unknown {
  return error instanceof Error && name in error ? (error as unknown as Record<string, unknown>)[name] : undefined;
}

/** `context: …` with the kind of the rejection's code; anything that is not a rejection of the addon is Internal. */
export function fromNative(context: string, error: unknown): SnapshotterError {
  if (error instanceof SnapshotterError) return new SnapshotterError(error.kind, `${context}: ${error.message}`);
  const code = property(error, 'code');
  const kind =
    typeof code === 'string' && Object.hasOwn(kKindOfCode, code)
      ? kKindOfCode[code as keyof typeof kKindOfCode]
      : ErrorKind.Internal;
  const message = error instanceof Error ? error.message : String(error);
  return new SnapshotterError(kind, `${context}: ${message}`, { cause: error });
}

/** The errno behind a rejection of the addon, positive; 0 when there is none. */
export function errnoOf(error: unknown): number {
  const errno = property(error, 'errno');
  return typeof errno === 'number' ? errno : 0;
}
