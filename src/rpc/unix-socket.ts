/** Puts a listening socket at a path without a moment in which the path is missing, world-accessible or dead: it is bound in
 * a private directory beside its place and renamed into it. */
import { chmod, lstat, mkdir, mkdtemp, rename, rm, rmdir, unlink } from 'node:fs/promises';
import { connect } from 'node:net';
import { basename, dirname, join } from 'node:path';
import { ErrorKind, SnapshotterError } from '../base/errors.ts';

/** sizeof(sockaddr_un.sun_path) less the final NUL. */
const kPathMaxBytes = 107;
/** A peer that neither accepts nor refuses within this is taken for alive. */
const kProbeTimeoutMs = 1_000;

export interface SocketPlace {
  /** Listen here, then publish(). */
  readonly bindPath: string;
  /** Mode 0600, then visible under its address; an old socket there is replaced. */
  publish(): Promise<void>;
  /** Takes the address away if it is still ours. Idempotent; also correct when publish() was never reached. */
  withdraw(): Promise<void>;
}

/** Creates the parent directory (0700) when it is missing. Errors: InvalidArgument (path too long), FailedPrecondition
 * (the path is something else than a socket, or somebody answers on it). */
export async function claimSocketPlace(address: string): Promise<SocketPlace> {
  const parent = dirname(address);
  await mkdir(parent, { recursive: true, mode: 0o700 });
  await refuseIfTaken(address);
  const directory = await mkdtemp(join(parent, '.'));
  const bindPath = join(directory, 's');
  const longest = Math.max(Buffer.byteLength(address), Buffer.byteLength(bindPath));
  if (longest > kPathMaxBytes) {
    await rmdir(directory);
    throw new SnapshotterError(
      ErrorKind.InvalidArgument,
      `socket ${address}: path is ${longest - kPathMaxBytes} bytes too long for a unix socket`,
    );
  }
  let published: { readonly ino: bigint; readonly dev: bigint } | null = null;
  return {
    bindPath,
    publish: async () => {
      await chmod(bindPath, 0o600);
      const { ino, dev } = await lstat(bindPath, { bigint: true });
      await refuseIfTaken(address);
      await rename(bindPath, address);
      published = { ino, dev };
      await rmdir(directory);
    },
    withdraw: async () => {
      await rm(directory, { recursive: true, force: true });
      if (published === null) return;
      const there = await lstatOrNull(address);
      if (there !== null && there.ino === published.ino && there.dev === published.dev) await unlink(address);
      published = null;
    },
  };
}

async function refuseIfTaken(address: string): Promise<void> {
  const there = await lstatOrNull(address);
  if (there === null) return;
  if (!there.isSocket()) {
    throw new SnapshotterError(
      ErrorKind.FailedPrecondition,
      `socket ${address}: ${basename(address)} exists and is no socket; it is left alone`,
    );
  }
  if (await answers(address)) {
    throw new SnapshotterError(ErrorKind.FailedPrecondition, `socket ${address}: another process answers on it`);
  }
}

async function lstatOrNull(path: string) {
  try {
    return await lstat(path, { bigint: true });
  } catch (error) {
    if (error instanceof Error && 'code' in error && error.code === 'ENOENT') return null;
    throw error;
  }
}

function answers(address: string): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = connect(address);
    const settle = (alive: boolean): void => {
      socket.destroy();
      resolve(alive);
    };
    socket.setTimeout(kProbeTimeoutMs, () => settle(true));
    socket.once('connect', () => settle(true));
    socket.once('error', (error: NodeJS.ErrnoException) => {
      settle(error.code !== 'ECONNREFUSED' && error.code !== 'ENOENT');
    });
  });
}
