/** The vocabulary of the snapshots service in domain terms, and the ten verbs. rpc/ translates the wire to this. */

export const Kind = { View: 'view', Active: 'active', Committed: 'committed' } as const;
export type Kind = (typeof Kind)[keyof typeof Kind];

export type Labels = Readonly<Record<string, string>>;

/** One mount as containerd executes it. Target is always empty on the wire. */
export interface Mount {
  readonly type: string;
  readonly source: string;
  readonly options: readonly string[];
}

export interface SnapshotInfo {
  readonly kind: Kind;
  /** key of an active or view, name of a committed snapshot */
  readonly name: string;
  /** '' = none */
  readonly parent: string;
  readonly labels: Labels;
  /** nanoseconds since the epoch */
  readonly createdAt: bigint;
  readonly updatedAt: bigint;
}

export interface Usage {
  readonly sizeBytes: bigint;
  readonly inodes: bigint;
}

export interface PrepareRequest {
  readonly key: string;
  readonly parent: string;
  readonly labels: Labels;
}

export interface CommitRequest {
  readonly name: string;
  readonly key: string;
  readonly labels: Labels;
  /** '' = keep the parent of Prepare; else only allowed where the active has none (rebase). */
  readonly parent: string;
}

export interface UpdateRequest {
  readonly name: string;
  readonly labels: Labels;
  /** Field mask. Empty = replace all labels. */
  readonly paths: readonly string[];
}

/** Decides whether one snapshot is listed; built by rpc/filter-grammar.ts from containerd filter strings. */
export type SnapshotFilter = (info: SnapshotInfo) => boolean;

/** Errors of every verb: SnapshotterError with the kind the contract's table names. */
export interface Worker {
  prepare(request: PrepareRequest, signal: AbortSignal): Promise<readonly Mount[]>;
  view(request: PrepareRequest, signal: AbortSignal): Promise<readonly Mount[]>;
  mounts(key: string, signal: AbortSignal): Promise<readonly Mount[]>;
  commit(request: CommitRequest): Promise<void>;
  remove(key: string): Promise<void>;
  stat(key: string): Promise<SnapshotInfo>;
  update(request: UpdateRequest): Promise<SnapshotInfo>;
  /** In byte order of the names, in batches of at most `batchSize`. */
  list(filter: SnapshotFilter, batchSize: number): AsyncIterable<readonly SnapshotInfo[]>;
  usage(key: string): Promise<Usage>;
  cleanup(): Promise<void>;
}
