/** Making a file system on a fresh device: the program of the type, then an empty root directory. */
import { chmod, mkdir, rmdir } from 'node:fs/promises';
import { join } from 'node:path';
import { ErrorKind, SnapshotterError, withContext } from '../base/errors.ts';
import type { Mount } from '../worker/worker.ts';
import type { FsDescriptor } from './engine.ts';
import { errnoName, fromIo, withDeadline } from './io-errors.ts';
import { runProgram } from './programs.ts';

interface Mounting {
  mount(mount: Mount, target: string): Promise<void>;
  unmount(target: string): Promise<void>;
}

const kMkfsTimeoutMs = 120_000;
/** Touching the root directory of the new file system: blockd answers, or the deadline does. */
const kRootTimeoutMs = 30_000;

/** Options of the one mount that empties the root. `noinit_itable`: the kernel must not start zeroing inode tables of a
 * device that reads as zeros. `nouuid`: a clone of this file system may be mounted already. */
const kScratchOptions: Readonly<Record<string, readonly string[]>> = {
  ext4: ['rw', 'noinit_itable', 'nodiscard'],
  xfs: ['rw', 'nouuid'],
};

/** Errors: Unavailable (no mkfs for the type), ResourceExhausted, DeadlineExceeded, Internal with the program's words. */
export async function formatDevice(
  mounting: Mounting,
  devicePath: string,
  fs: FsDescriptor,
  scratchDir: string,
): Promise<void> {
  const context = `format ${devicePath} as ${fs.type}`;
  // The type comes from a label and becomes the name of a program.
  if (!/^[a-z0-9]{1,16}$/.test(fs.type)) {
    throw new SnapshotterError(ErrorKind.InvalidArgument, `${context}: not a file system type`);
  }
  try {
    await runProgram(`mkfs.${fs.type}`, [...mkfsArguments(fs), devicePath], { timeoutMs: kMkfsTimeoutMs });
    if (fs.type === 'ntfs') return; // its root has no lost+found, and no modes
    await withDeadline(context, kRootTimeoutMs, mkdir(scratchDir, { recursive: true, mode: 0o700 }));
    await mounting.mount(
      { type: fs.type, source: devicePath, options: kScratchOptions[fs.type] ?? ['rw'] },
      scratchDir,
    );
  } catch (error) {
    throw error instanceof SnapshotterError ? withContext(context, error) : fromIo(context, error);
  }
  let failure: unknown = null;
  try {
    await withDeadline(context, kRootTimeoutMs, emptyRoot(scratchDir));
  } catch (error) {
    failure = error;
  }
  try {
    await mounting.unmount(scratchDir);
  } catch (error) {
    failure ??= error;
  }
  if (failure !== null) throw fromIo(context, failure);
}

async function emptyRoot(root: string): Promise<void> {
  try {
    await rmdir(join(root, 'lost+found'));
  } catch (error) {
    if (errnoName(error) !== 'ENOENT') throw error; // only the ext family has one
  }
  await chmod(root, 0o755);
}

/** The descriptor's own arguments, adapted to the fresh device and to the tools of today. */
export function mkfsArguments(fs: FsDescriptor): readonly string[] {
  switch (fs.type) {
    case 'ext4':
      return prezeroed(fs.mkfsOptions);
    case 'xfs':
      return fs.mkfsOptions.join(' ') === kXfsLegacyDefault ? ['-f'] : fs.mkfsOptions;
    default:
      return fs.mkfsOptions;
  }
}

/** Adds the promise that the device reads as zeros: a layer without parent is empty, so inode tables need not be written
 * now, nor by the kernel later (64 GiB would carry 1 GiB of zeros). */
function prezeroed(options: readonly string[]): readonly string[] {
  const at = options.lastIndexOf('-E'); // mke2fs takes the last one only
  const given = at < 0 ? undefined : options[at + 1];
  if (given === undefined) return ['-E', kPrezeroed, ...options];
  if (/(^|,)(lazy_itable_init|assume_storage_prezeroed)(=|,|$)/.test(given)) return options;
  return options.map((option, i) => (i === at + 1 ? `${given},${kPrezeroed}` : option));
}

const kPrezeroed = 'assume_storage_prezeroed=1';

/** The contract's default for xfs, which xfsprogs 6 refuses (a log of 4 MiB) and a kernel without V4 support cannot mount
 * (crc=0). Given like this it means "the default", so today's default is made. */
const kXfsLegacyDefault = '-f -l size=4m -m crc=0';
