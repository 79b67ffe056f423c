/** The native border: the whole surface, same names and order as native/addon/. Plain data; every property present;
 * null, never undefined. All functions but the clock return promises settled from a worker thread.
 * A rejection is an Error with `code` (a name of native/base/status.h, e.g. 'data-loss') and `errno` (0 if none). */
import { createRequire } from 'node:module';
import { fileURLToPath } from 'node:url';

export interface NativeLayerInfo {
  readonly kind: 'lsmt-sealed' | 'lsmt-writable' | 'not-a-layer';
  readonly virtualSizeBytes: bigint;
  readonly tar: boolean;
  readonly zfile: boolean;
}

export interface NativeDeviceStats {
  readonly readOps: bigint;
  readonly readBytes: bigint;
  readonly writeOps: bigint;
  readonly writeBytes: bigint;
  readonly discardOps: bigint;
  readonly discardBytes: bigint;
  readonly flushOps: bigint;
  readonly errors: bigint;
}

/** A served device. `stop` is idempotent; any later call names the handle in its error. A handle that is dropped,
 * and an environment that ends (a worker), stop an idle device; one that is held open goes on until the process is gone.
 * process.exit and a crash stop nothing: the nodes stay, fail all I/O, and releaseStaleDevices frees them. */
export interface NativeDevice {
  readonly type: 'device';
  readonly path: string;
  readonly major: number;
  readonly minor: number;
  readonly sizeBytes: bigint;
  readonly readOnly: boolean;
  stats(): NativeDeviceStats;
  flush(): Promise<void>;
  /** failed-precondition when held open and !force; the device then goes on, as after a flush that failed. */
  stop(force: boolean): Promise<void>;
  /** True once service has ended, also when the last stop() reported that not everything became durable. */
  isStopped(): boolean;
}

export interface NativeAttachOptions {
  readonly configPath: string;
  readonly readOnly: boolean;
  readonly directIo: boolean;
  readonly sectorSizeBytes: number;
  readonly threads: number;
  /** Unique on this machine, at most 63 bytes: losetup shows it, and releaseStaleDevices finds it. */
  readonly name: string;
  readonly runDir: string;
}

export interface NativeMountEntry {
  readonly mountPoint: string;
  readonly source: string;
  readonly fsType: string;
  readonly major: number;
  readonly minor: number;
  readonly options: readonly string[];
}

export interface Native {
  /** Names of all codes, in the order of native/base/status.h. */
  readonly codes: readonly string[];
  readonly version: string;
  /** clock_gettime(CLOCK_REALTIME), nanoseconds. */
  clockRealtime(): bigint;
  createUpper(options: {
    readonly data: string;
    readonly index: string;
    readonly virtualSizeBytes: bigint;
    readonly sparse: boolean;
    readonly parentUuid: string | null;
  }): Promise<void>;
  /** Seals in place and fsyncs; does not rename. Sealing a sealed file = success. */
  sealUpper(data: string, index: string): Promise<void>;
  inspectLayer(path: string): Promise<NativeLayerInfo>;
  attachDevice(options: NativeAttachOptions): Promise<NativeDevice>;
  /** Takes nodes whose name begins so, and whose server is dead, out of service; answers their paths. A node that is
   * still open goes when its last holder closes it. REQUIRES: nobody serves them any more. */
  releaseStaleDevices(namePrefix: string): Promise<readonly string[]>;
  mount(type: string, source: string, target: string, options: readonly string[]): Promise<void>;
  /** umount2 with flags 0, or MNT_DETACH. Not mounted = 'invalid-argument'. */
  unmount(target: string, detach: boolean): Promise<void>;
  /** Parsed /proc/<pid>/mountinfo; pid 'self' or a number. */
  mountTable(pid: string): Promise<readonly NativeMountEntry[]>;
  /** Recursive delete below a directory that never leaves its file system (openat2, no cross-device). */
  removeTree(path: string): Promise<void>;
  diskUsage(path: string, skip: readonly string[]): Promise<{ readonly sizeBytes: bigint; readonly inodes: bigint }>;
  /** Exclusive lock on a file for the life of the process; false = somebody else holds it. */
  lockFile(path: string): Promise<boolean>;
  /** uid and pid of the peer of a connected unix socket, by its descriptor. */
  peerCredentials(fd: number): { readonly uid: number; readonly gid: number; readonly pid: number };
  /** fsync of a directory: makes a rename in it durable. */
  syncDirectory(path: string): Promise<void>;
  /** sd_notify(3): sends `state` to $NOTIFY_SOCKET given as `socket`. */
  notify(socket: string, state: string): Promise<void>;
}

/** Loads build/bin/overlaybd.node (installed: lib/overlaybd.node). The path is found from this file's own place. */
export function loadNative(path: string): Native {
  return createRequire(import.meta.url)(path) as Native;
}

/** Where the addon lies: beside the built JavaScript (build/js/engine → build/bin, installed the same), or in the
 * project's build folder when this file runs as TypeScript. Tests of other builds name theirs in OVERLAYBD_ADDON. */
export function nativePath(): string {
  const named = process.env['OVERLAYBD_ADDON'];
  if (named !== undefined && named !== '') return named;
  const built = import.meta.url.endsWith('.js');
  return fileURLToPath(new URL(built ? '../../bin/overlaybd.node' : '../../build/bin/overlaybd.node', import.meta.url));
}
