/** Operating errors: one class, closed kinds. rpc/status.ts maps them to gRPC codes; nobody compares messages. */
export const ErrorKind = {
  NotFound: 'not-found',
  AlreadyExists: 'already-exists',
  InvalidArgument: 'invalid-argument',
  FailedPrecondition: 'failed-precondition',
  Unavailable: 'unavailable',
  Unimplemented: 'unimplemented',
  ResourceExhausted: 'resource-exhausted',
  PermissionDenied: 'permission-denied',
  DataLoss: 'data-loss',
  Cancelled: 'cancelled',
  DeadlineExceeded: 'deadline-exceeded',
  Internal: 'internal',
} as const;
export type ErrorKind = (typeof ErrorKind)[keyof typeof ErrorKind];

export class SnapshotterError extends Error {
  readonly kind: ErrorKind;

  constructor(kind: ErrorKind, message: string, options?: { cause?: unknown }) {
    super(message, options);
    this.name = 'SnapshotterError';
    this.kind = kind;
  }
}

/** Adds context on the way up, keeping the kind: `attach snapshot 12: open layer 3: …`. */
export function withContext(context: string, error: unknown): SnapshotterError {
  const kind = error instanceof SnapshotterError ? error.kind : ErrorKind.Internal;
  const message = error instanceof Error ? error.message : String(error);
  return new SnapshotterError(kind, `${context}: ${message}`, { cause: error });
}

export function assertNever(value: never): never {
  throw new Error(`unexpected value: ${JSON.stringify(value)}`);
}
