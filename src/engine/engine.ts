/** THE HANDS: what the worker may ask of the world. Implementations: engine.ts's RealEngine (addon, programs, blockd)
 * and memory-engine.ts (records calls, holds completions, injects faults). Every effect is idempotent: recovery may
 * repeat it. Errors: SnapshotterError. */
import type { Mount } from '../worker/worker.ts';

export const WritableLayerType = { Append: 'append', Sparse: 'sparse' } as const;
export type WritableLayerType = (typeof WritableLayerType)[keyof typeof WritableLayerType];

/** `fs[;mount options[;mkfs options]]` parsed, defaults filled in. */
export interface FsDescriptor {
  readonly type: string;
  readonly mountOptions: readonly string[];
  readonly mkfsOptions: readonly string[];
}

/** One lower of a config.v1.json. Absent = not written. */
export interface LowerEntry {
  readonly file?: string;
  readonly dir?: string;
  readonly digest?: string;
  readonly size?: number;
}

/** config.v1.json, formats.md §14. Unknown keys of a file that is rewritten are kept. */
export interface ImageConfig {
  readonly repoBlobUrl: string;
  readonly lowers: readonly LowerEntry[];
  readonly upper: { readonly data: string; readonly index: string; readonly vsize?: number } | null;
  readonly resultFile: string;
}

export interface CreateWritable {
  readonly data: string;
  readonly index: string;
  /** 0 = inherit from the layers below */
  readonly virtualSizeBytes: bigint;
  readonly type: WritableLayerType;
}

/** What a file turned out to be behind its wrappers (tar, ZFile), by content. */
export type LayerKind = 'lsmt-sealed' | 'lsmt-writable' | 'not-a-layer';

export interface LayerInfo {
  readonly kind: LayerKind;
  readonly virtualSizeBytes: bigint;
  readonly tar: boolean;
  readonly zfile: boolean;
}

export interface AttachedDevice {
  /** e.g. /dev/loop7 */
  readonly path: string;
  readonly major: number;
  readonly minor: number;
  readonly sizeBytes: bigint;
  readonly readOnly: boolean;
}

export interface AttachRequest {
  /** unique per store: the snapshot id, or `<id>-ro` for the shared read-only device of a committed snapshot */
  readonly id: string;
  readonly configPath: string;
  readonly readOnly: boolean;
  readonly sectorSizeBytes: 512 | 4096;
}

export interface DiskUsage {
  readonly sizeBytes: bigint;
  readonly inodes: bigint;
}

export interface Layers {
  /** Creates the pair; if a complete, empty or same-geometry pair is there already, keeps it; repairs a half-made one. */
  createWritable(request: CreateWritable): Promise<void>;
  /** Seals the pair in place, makes it durable and renames the data file to `sealed`. Done already = success. */
  seal(data: string, index: string, sealed: string): Promise<void>;
  /** Moves a finished layer file to `to`, also between file systems; durable when it returns. Done already = success. */
  adopt(from: string, to: string): Promise<void>;
  inspect(path: string): Promise<LayerInfo>;
  /** Durable, atomic (temporary file, fsync, rename, fsync of the directory). */
  writeImageConfig(path: string, config: ImageConfig): Promise<void>;
  /** NotFound when the file is missing, DataLoss when it can't be parsed. */
  readImageConfig(path: string): Promise<ImageConfig>;
}

export interface Devices {
  attach(request: AttachRequest, signal: AbortSignal): Promise<AttachedDevice>;
  /** Unknown device = success. FailedPrecondition when somebody holds it open. */
  detach(id: string): Promise<void>;
  /** Takes the device from those who hold it open: what was written is durable, their further I/O fails, the node stays
   * theirs until they close it. Unknown device = success. */
  sever(id: string): Promise<void>;
  /** null = not attached (never was, or blockd restarted). */
  find(id: string): Promise<AttachedDevice | null>;
  list(): Promise<readonly { readonly id: string; readonly device: AttachedDevice }[]>;
}

export interface MountEntry {
  readonly mountPoint: string;
  readonly source: string;
  readonly fsType: string;
  readonly major: number;
  readonly minor: number;
  /** of the mount, then of its super block (overlay: `upperdir=…`, `lowerdir=…`) */
  readonly options: readonly string[];
}

export interface Mounts {
  /** mount(2). Something of the same device mounted at `target` already = success. */
  mount(mount: Mount, target: string): Promise<void>;
  /** Unmounts everything stacked at `target`. Not mounted = success. FailedPrecondition when busy. */
  unmount(target: string): Promise<void>;
  /** The mount table of this process's namespace (/proc/self/mountinfo, escapes decoded). */
  table(): Promise<readonly MountEntry[]>;
  /** True when a mount namespace other than ours, or a mount point other than `except`, holds the device. */
  isHeldElsewhere(device: { readonly major: number; readonly minor: number }, except: string): Promise<boolean>;
  /** True when a mount namespace other than ours (a container) holds the device. */
  isHeldInOtherNamespace(
    device: { readonly major: number; readonly minor: number },
    mountPoint: string,
  ): Promise<boolean>;
  /** Lets the file system at `target` write everything down, as an unmount would, and holds further writes until `thaw`.
   * Frozen already = success. */
  freeze(target: string): Promise<void>;
  /** Not frozen, not mounted = success: nobody may stay frozen by our failure. */
  thaw(target: string): Promise<void>;
  /** mkfs, then remove lost+found so that the root is empty with mode 0755. */
  format(devicePath: string, fs: FsDescriptor, scratchDir: string): Promise<void>;
  /** File system on the device by its superblock: ext4, xfs, erofs, …; null = none known. */
  probeFileSystem(devicePath: string): Promise<string | null>;
}

export interface Files {
  /** The snapshot directory with its standard layout; exists already = success. */
  makeSnapshotDir(
    dir: string,
    options: { readonly work: boolean; readonly owner: { uid: number; gid: number } | null },
  ): Promise<void>;
  /** Recursive delete that never crosses a mount point: FailedPrecondition if one is found. Absent = success. */
  removeTree(dir: string): Promise<void>;
  /** 512-byte blocks of every inode once; entries named in `skip` (at the top) left out. Never crosses a mount. */
  diskUsage(dir: string, skip: readonly string[]): Promise<DiskUsage>;
  /** Names of the directories directly in `dir`; a missing `dir` is empty. */
  listDirs(dir: string): Promise<readonly string[]>;
  /** The directory and its missing parents, each with `mode`; exists already = success. */
  makeDir(dir: string, mode: number): Promise<void>;
  /** Absent = success. */
  removeFile(path: string): Promise<void>;
  exists(path: string): Promise<boolean>;
  owner(path: string): Promise<{ readonly uid: number; readonly gid: number }>;
  writeFile(path: string, text: string, mode: number): Promise<void>;
  /** null = absent */
  readFile(path: string): Promise<string | null>;
}

export interface Engine {
  readonly layers: Layers;
  readonly devices: Devices;
  readonly mounts: Mounts;
  readonly files: Files;
}
