/** Errors of node:fs and of our own waiting, as SnapshotterError. The native side has its own table, native-errors.ts. */
import { ErrorKind, SnapshotterError } from '../base/errors.ts';

const kKinds: Readonly<Record<string, ErrorKind>> = {
  ENOENT: ErrorKind.NotFound,
  EEXIST: ErrorKind.AlreadyExists,
  EINVAL: ErrorKind.InvalidArgument,
  ENAMETOOLONG: ErrorKind.InvalidArgument,
  ENOTDIR: ErrorKind.FailedPrecondition,
  EISDIR: ErrorKind.FailedPrecondition,
  ENOTEMPTY: ErrorKind.FailedPrecondition,
  EBUSY: ErrorKind.FailedPrecondition,
  ENOSPC: ErrorKind.ResourceExhausted,
  EDQUOT: ErrorKind.ResourceExhausted,
  EMFILE: ErrorKind.ResourceExhausted,
  ENFILE: ErrorKind.ResourceExhausted,
  ENOMEM: ErrorKind.ResourceExhausted,
  EFBIG: ErrorKind.ResourceExhausted,
  EACCES: ErrorKind.PermissionDenied,
  EPERM: ErrorKind.PermissionDenied,
  EROFS: ErrorKind.PermissionDenied,
  EIO: ErrorKind.Internal,
  EUCLEAN: ErrorKind.DataLoss,
};

/** The errno name of an error of node:fs or node:net; null for any other value. */
export function errnoName(error: unknown): string | null {
  const code = error instanceof Error ? (error as NodeJS.ErrnoException).code : undefined;
  return typeof code === 'string' && /^E[A-Z0-9]+$/.test(code) ? code : null;
}

/** `context: …` with the kind its errno has; an error that is ours already keeps its kind. */
export function fromIo(context: string, error: unknown): SnapshotterError {
  const message = error instanceof Error ? error.message : String(error);
  const name = errnoName(error);
  const kind =
    error instanceof SnapshotterError
      ? error.kind
      : name === null
        ? ErrorKind.Internal
        : (kKinds[name] ?? ErrorKind.Internal);
  return new SnapshotterError(kind, `${context}: ${message}`, { cause: error });
}

/** The value of `work`, or DeadlineExceeded. The work itself goes on: a read of a dead device cannot be called back. */
export async function withDeadline<T>(context: string, timeoutMs: number, work: Promise<T>): Promise<T> {
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(
      () => reject(new SnapshotterError(ErrorKind.DeadlineExceeded, `${context}: not done after ${timeoutMs} ms`)),
      timeoutMs,
    );
  });
  try {
    return await Promise.race([work, late]);
  } finally {
    clearTimeout(timer);
    work.catch(() => {
      // Its late failure has nobody left to tell; the deadline was reported.
    });
  }
}

/** The value of `work`, or Cancelled as soon as `signal` aborts. Cancelling stops the waiting, not the work. */
export async function untilAborted<T>(context: string, signal: AbortSignal, work: Promise<T>): Promise<T> {
  const cancelled = (): SnapshotterError => new SnapshotterError(ErrorKind.Cancelled, `${context}: cancelled`);
  if (signal.aborted) {
    work.catch(() => {
      // Whoever shares the work hears of its failure; this caller has left.
    });
    throw cancelled();
  }
  const { promise: aborted, reject } = Promise.withResolvers<never>();
  const onAbort = (): void => reject(cancelled());
  signal.addEventListener('abort', onAbort, { once: true });
  try {
    return await Promise.race([work, aborted]);
  } finally {
    signal.removeEventListener('abort', onAbort);
    work.catch(() => {
      // As above.
    });
  }
}
