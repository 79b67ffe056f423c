/** The one place that starts child processes. A program that is run to its end has a deadline and a bounded capture of
 * its output, and dies with its whole process group when the deadline passes. A daemon is started to outlive us. All
 * get a fixed environment. */
import { spawn } from 'node:child_process';
import { closeSync, openSync } from 'node:fs';
import { ErrorKind, SnapshotterError } from '../base/errors.ts';
import { fromIo } from './io-errors.ts';

export interface RunOptions {
  readonly timeoutMs: number;
  /** What is kept of stdout and of stderr; more is read and dropped, so that a chatty child cannot fill memory. */
  readonly outputMaxBytes?: number;
  /** Cancelling kills the child. */
  readonly signal?: AbortSignal;
  readonly cwd?: string;
}

export interface ProgramOutput {
  readonly stdout: string;
  readonly stderr: string;
}

const kOutputMaxBytes = 64 * 1024;
const kErrorTextMaxChars = 2000;

/** Tools live in sbin directories that a service's PATH may lack; their messages are parsed by nobody but must be stable. */
const kEnvironment = {
  PATH: '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin',
  LC_ALL: 'C',
};

class Capture {
  readonly #chunks: Buffer[] = [];
  readonly #maxBytes: number;
  #bytes = 0;
  #truncated = false;

  constructor(maxBytes: number) {
    this.#maxBytes = maxBytes;
  }

  add(chunk: Buffer): void {
    const room = this.#maxBytes - this.#bytes;
    if (chunk.length > room) this.#truncated = true;
    if (room <= 0) return;
    this.#chunks.push(chunk.subarray(0, room));
    this.#bytes += Math.min(chunk.length, room);
  }

  text(): string {
    return Buffer.concat(this.#chunks).toString('utf8') + (this.#truncated ? '… (cut)' : '');
  }
}

/** Runs `program` to its end and returns what it wrote.
 * Errors: Unavailable (not installed or cannot be started), DeadlineExceeded, Cancelled, Internal (exit code other than
 * 0; the message carries what the program said). */
export function runProgram(program: string, args: readonly string[], options: RunOptions): Promise<ProgramOutput> {
  return new Promise((resolve, reject) => {
    if (options.signal?.aborted === true) {
      reject(new SnapshotterError(ErrorKind.Cancelled, `${program}: cancelled before it was started`));
      return;
    }
    const maxBytes = options.outputMaxBytes ?? kOutputMaxBytes;
    const stdout = new Capture(maxBytes);
    const stderr = new Capture(maxBytes);
    // Its own process group, so that the deadline also ends what the program started (mkfs and mount run helpers).
    const child = spawn(program, args, {
      stdio: ['ignore', 'pipe', 'pipe'],
      env: kEnvironment,
      detached: true,
      ...(options.cwd === undefined ? {} : { cwd: options.cwd }),
    });
    let stopped: ErrorKind | null = null;
    const stop = (kind: ErrorKind): void => {
      stopped ??= kind;
      if (child.pid === undefined) return;
      try {
        process.kill(-child.pid, 'SIGKILL');
      } catch {
        // The group is gone already; 'close' follows.
      }
    };
    const deadline = setTimeout(() => stop(ErrorKind.DeadlineExceeded), options.timeoutMs);
    const onAbort = (): void => stop(ErrorKind.Cancelled);
    options.signal?.addEventListener('abort', onAbort, { once: true });
    const finish = (): void => {
      clearTimeout(deadline);
      options.signal?.removeEventListener('abort', onAbort);
    };

    child.stdout.on('data', (chunk: Buffer) => stdout.add(chunk));
    child.stderr.on('data', (chunk: Buffer) => stderr.add(chunk));
    child.on('error', (error) => {
      finish();
      reject(new SnapshotterError(ErrorKind.Unavailable, `${program}: ${error.message}`, { cause: error }));
    });
    child.on('close', (exitCode, signal) => {
      finish();
      const said = [stderr.text().trim(), stdout.text().trim()].filter((text) => text !== '').join('; ');
      const tail = said === '' ? '' : `: ${said.slice(-kErrorTextMaxChars)}`;
      if (stopped === ErrorKind.DeadlineExceeded) {
        reject(new SnapshotterError(stopped, `${program}: not done after ${options.timeoutMs} ms${tail}`));
      } else if (stopped !== null) {
        reject(new SnapshotterError(stopped, `${program}: cancelled${tail}`));
      } else if (exitCode === 0) {
        resolve({ stdout: stdout.text(), stderr: stderr.text() });
      } else {
        const how = exitCode === null ? `killed by ${signal}` : `exit code ${exitCode}`;
        reject(new SnapshotterError(ErrorKind.Internal, `${program}: ${how}${tail}`));
      }
    });
  });
}

export interface Daemon {
  readonly pid: number;
  /** null while it runs, then how it ended. */
  ended(): string | null;
}

/** Starts `program` in a session of its own with its output appended to `logFile`: signals to our process group and our
 * own end do not reach it. Errors: Unavailable, or what opening the log gave. */
export async function startDaemon(program: string, args: readonly string[], logFile: string): Promise<Daemon> {
  let log: number;
  try {
    log = openSync(logFile, 'a', 0o600);
  } catch (error) {
    throw fromIo(`open log ${logFile}`, error);
  }
  try {
    const child = spawn(program, args, { stdio: ['ignore', log, log], env: kEnvironment, detached: true, cwd: '/' });
    let ended: string | null = null;
    child.on('exit', (exitCode, signal) => {
      ended = exitCode === null ? `killed by ${signal}` : `exit code ${exitCode}`;
    });
    await new Promise<void>((resolve, reject) => {
      child.once('spawn', resolve);
      child.once('error', (error) =>
        reject(new SnapshotterError(ErrorKind.Unavailable, `${program}: ${error.message}`, { cause: error })),
      );
    });
    if (child.pid === undefined) throw new SnapshotterError(ErrorKind.Unavailable, `${program}: not started`);
    child.unref(); // it must not keep our event loop alive either
    return { pid: child.pid, ended: () => ended };
  } finally {
    closeSync(log);
  }
}
