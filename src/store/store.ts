/** THE MEMORY: what the snapshotter knows, durably. A transaction is synchronous, so it cannot span I/O; what it wrote
 * is on disk when it returns. Implementations: sqlite-store.ts and, for tests, memory-store.ts; one suite runs on both. */

export type RowKind = 'view' | 'active' | 'committed';

/** What the snapshot's own content is: files for overlayfs, or a layer of a block image. `remote` is reserved for
 * layers read lazily. */
export type RowStorage = 'directory' | 'block' | 'remote';

export interface SnapshotRow {
  /** Decimal, never reused; the name of our directory. */
  readonly id: string;
  /** Key or committed name, unique. null = removed on paper: the name is free, the directory is still to be deleted. */
  readonly name: string | null;
  readonly kind: RowKind;
  readonly parentId: string | null;
  /** '' = none. Follows parentId; never written. */
  readonly parentName: string;
  readonly labels: Readonly<Record<string, string>>;
  /** Nanoseconds since the epoch. */
  readonly createdAt: bigint;
  readonly updatedAt: bigint;
  /** Last settled state of the snapshot machine. */
  readonly state: string;
  /** The change that was begun and not yet settled: recovery finishes or undoes it. */
  readonly intent: string | null;
  /** Why the last change failed, as text. */
  readonly failure: string | null;
  readonly storage: RowStorage;
  /** Write mode, resolved once at Prepare. */
  readonly mode: string;
  /** JSON: the mounts to return, and what the intent needs to be repeated or undone. */
  readonly recipe: string;
  readonly plan: string;
  /** JSON of the file system descriptor of a block layer. */
  readonly fileSystem: string | null;
  /** Fixed at Commit; null = not measured yet. */
  readonly usageBytes: bigint | null;
  readonly usageInodes: bigint | null;
  /** The device its mounts stand on: its own id, or `<id>-ro` of a committed snapshot. */
  readonly deviceId: string | null;
  /** Directory of a user that holds writable_data and writable_index. Unique. */
  readonly activePath: string | null;
}

export type NewSnapshotRow = Omit<SnapshotRow, 'id' | 'parentName'>;
export type SnapshotChange = Partial<NewSnapshotRow>;

/** Bookkeeping of one device: what we asked the kernel for, and in which boot. */
export interface DeviceRow {
  readonly id: string;
  readonly snapshotId: string;
  readonly state: string;
  readonly intent: string | null;
  readonly failure: string | null;
  readonly readOnly: boolean;
  readonly bootId: string;
  /** '' until attached. */
  readonly path: string;
  readonly major: number;
  readonly minor: number;
  /** JSON of the file system descriptor found on it. */
  readonly fileSystem: string | null;
}

/** Errors: what `body` threw (after a roll-back); AlreadyExists for a name in use; Internal when the disk refuses. */
export interface Store {
  /** All or nothing. REQUIRES: not inside another transaction. */
  transaction<T>(body: () => T): T;

  addSnapshot(row: NewSnapshotRow): SnapshotRow;
  changeSnapshot(id: string, change: SnapshotChange): SnapshotRow;
  dropSnapshot(id: string): void;
  snapshot(id: string): SnapshotRow | null;
  named(name: string): SnapshotRow | null;
  /** Nearest first, without itself. */
  ancestors(id: string): readonly SnapshotRow[];
  /** Including those removed on paper. */
  children(id: string): readonly SnapshotRow[];
  /** Named rows after `after`, in byte order of the names. */
  page(after: string, limit: number): readonly SnapshotRow[];
  /** Rows with an open intent or removed on paper, by id. */
  unsettled(): readonly SnapshotRow[];
  /** Named rows whose mounts stand on the device. */
  usersOf(deviceId: string): readonly SnapshotRow[];
  activePathUser(path: string): SnapshotRow | null;
  count(): { readonly snapshots: number; readonly unsettled: number };
  /** No id up to `floor` will be given out. */
  raiseIds(floor: bigint): void;

  device(id: string): DeviceRow | null;
  putDevice(row: DeviceRow): void;
  dropDevice(id: string): void;
  devices(): readonly DeviceRow[];

  close(): void;
}
