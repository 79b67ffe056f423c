/** Directories and small files of the snapshots root. Modes are those of the contract (§4.1) whatever the umask is. */
import { chmod, chown, lstat, mkdir, open, readdir, rm, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { ErrorKind, SnapshotterError } from '../base/errors.ts';
import { replaceFile } from './durable-file.ts';
import type { Files } from './engine.ts';
import { errnoName, fromIo } from './io-errors.ts';
import type { Native } from './native.ts';
import { fromNative } from './native-errors.ts';

/** image_ref, backstore_mark, an engine's result: none is long. */
const kTextMaxBytes = 1024 * 1024;

export function createFiles(native: Native): Files {
  return {
    makeSnapshotDir,
    removeTree: async (dir) => {
      try {
        await native.removeTree(dir);
      } catch (error) {
        const failure = fromNative(`remove ${dir}`, error);
        if (failure.kind !== ErrorKind.NotFound) throw failure;
      }
    },
    diskUsage: async (dir, skip) => {
      try {
        return await native.diskUsage(dir, skip);
      } catch (error) {
        throw fromNative(`measure ${dir}`, error);
      }
    },
    listDirs: async (dir) => {
      try {
        const entries = await readdir(dir, { withFileTypes: true });
        return entries.filter((entry) => entry.isDirectory()).map((entry) => entry.name);
      } catch (error) {
        if (errnoName(error) === 'ENOENT') return [];
        throw fromIo(`list ${dir}`, error);
      }
    },
    makeDir: (dir, mode) =>
      describe(`make directory ${dir}`, async () => {
        const first = await mkdir(dir, { recursive: true, mode });
        if (first === undefined) return;
        for (let at = dir; at.length >= first.length; at = join(at, '..')) await chmod(at, mode);
      }),
    removeFile: (path) => describe(`remove ${path}`, () => rm(path, { force: true })),
    exists: async (path) => {
      try {
        await lstat(path);
        return true;
      } catch (error) {
        const name = errnoName(error);
        if (name === 'ENOENT' || name === 'ENOTDIR') return false;
        throw fromIo(`stat ${path}`, error);
      }
    },
    owner: (path) =>
      describe(`owner of ${path}`, async () => {
        const { uid, gid } = await stat(path);
        return { uid, gid };
      }),
    writeFile: (path, text, mode) => replaceFile(path, text, mode),
    readFile: async (path) => {
      try {
        const file = await open(path, 'r');
        try {
          const { size } = await file.stat();
          if (size > kTextMaxBytes) throw new SnapshotterError(ErrorKind.DataLoss, `${size} bytes is too long`);
          return await file.readFile('utf8');
        } finally {
          await file.close();
        }
      } catch (error) {
        if (errnoName(error) === 'ENOENT') return null;
        throw fromIo(`read ${path}`, error);
      }
    },
  };
}

/** Made again over what a crash left. The top directory appears first and closed (0700), so nobody sees a part of it. */
const makeSnapshotDir: Files['makeSnapshotDir'] = (dir, { work, owner }) =>
  describe(`make snapshot directory ${dir}`, async () => {
    const layout: readonly (readonly [string, number])[] = [
      [dir, 0o700],
      [join(dir, 'fs'), 0o755],
      ...(work ? [[join(dir, 'work'), 0o711] as const] : []),
      [join(dir, 'block'), 0o711],
      [join(dir, 'block', 'mountpoint'), 0o711],
    ];
    for (const [path, mode] of layout) {
      if (await makeOne(path, mode)) await chmod(path, mode);
    }
    if (owner !== null) await chown(join(dir, 'fs'), owner.uid, owner.gid);
  });

/** True when it has to be given its mode: it is new, or a crash may have come between its making and that. */
async function makeOne(path: string, mode: number): Promise<boolean> {
  try {
    await mkdir(path, { mode });
    return true;
  } catch (error) {
    if (errnoName(error) !== 'EEXIST') throw error;
    const there = await lstat(path);
    if (!there.isDirectory()) throw new SnapshotterError(ErrorKind.FailedPrecondition, `${path} is not a directory`);
    return (there.mode & 0o7777) !== mode;
  }
}

async function describe<T>(context: string, work: () => Promise<T>): Promise<T> {
  try {
    return await work();
  } catch (error) {
    throw fromIo(context, error);
  }
}
