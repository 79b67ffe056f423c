/** Answers of blockd as SnapshotterError. Connect's codes are gRPC's; ours are the kinds of base/errors.ts. */
import { Code, ConnectError } from '@connectrpc/connect';
import { ErrorKind, SnapshotterError } from '../base/errors.ts';
import { errnoName } from './io-errors.ts';

const kKinds: Readonly<Record<Code, ErrorKind>> = {
  [Code.Canceled]: ErrorKind.Cancelled,
  [Code.Unknown]: ErrorKind.Internal,
  [Code.InvalidArgument]: ErrorKind.InvalidArgument,
  [Code.DeadlineExceeded]: ErrorKind.DeadlineExceeded,
  [Code.NotFound]: ErrorKind.NotFound,
  [Code.AlreadyExists]: ErrorKind.AlreadyExists,
  [Code.PermissionDenied]: ErrorKind.PermissionDenied,
  [Code.ResourceExhausted]: ErrorKind.ResourceExhausted,
  [Code.FailedPrecondition]: ErrorKind.FailedPrecondition,
  [Code.Aborted]: ErrorKind.Unavailable,
  [Code.OutOfRange]: ErrorKind.InvalidArgument,
  [Code.Unimplemented]: ErrorKind.Unimplemented,
  [Code.Internal]: ErrorKind.Internal,
  [Code.Unavailable]: ErrorKind.Unavailable,
  [Code.DataLoss]: ErrorKind.DataLoss,
  [Code.Unauthenticated]: ErrorKind.PermissionDenied,
};

/** `context: reason` with the kind of the code. */
export function fromConnect(context: string, error: unknown): SnapshotterError {
  if (error instanceof SnapshotterError) return new SnapshotterError(error.kind, `${context}: ${error.message}`);
  const answer = ConnectError.from(error);
  return new SnapshotterError(kKinds[answer.code], `${context}: ${answer.rawMessage}`, { cause: error });
}

/** True when nobody answered: the socket is missing or refuses, or the connection broke in the middle of the call. An
 * `unavailable` that blockd itself answers (a kernel facility is missing) is not that. */
export function isConnectionLost(error: unknown): boolean {
  for (let at: unknown = error, depth = 0; at instanceof Error && depth < 8; at = at.cause, depth++) {
    const name = errnoName(at);
    if (name !== null && kConnectionErrnos.has(name)) return true;
    if (at instanceof ConnectError && at.code === Code.Aborted) return true;
  }
  return false;
}

const kConnectionErrnos: ReadonlySet<string> = new Set(['ENOENT', 'ECONNREFUSED', 'ECONNRESET', 'EPIPE', 'ENOTCONN']);
