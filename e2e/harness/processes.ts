/** Programs and daemons of a run: started with a log file, awaited by a condition with a deadline, ended by pid. */
import { type ChildProcess, spawn } from 'node:child_process';
import { closeSync, openSync, readFileSync } from 'node:fs';
import { setTimeout as delay } from 'node:timers/promises';
import type { Workdir } from './workdir.ts';

export interface RunOptions {
  readonly cwd?: string;
  /** Added to this process's environment. */
  readonly env?: Readonly<Record<string, string>>;
  readonly input?: string | Uint8Array;
  /** After it the program is killed and the call fails. Default 120 s. */
  readonly timeoutMs?: number;
}

export interface RunResult {
  readonly code: number;
  readonly stdout: string;
  readonly stderr: string;
}

/** A program that ended with a code other than 0. */
export class CommandError extends Error {
  readonly result: RunResult;

  constructor(command: readonly string[], result: RunResult) {
    // Progress goes to stdout and says nothing about the reason.
    const said = lastLines(result.stderr.trim() === '' ? result.stdout : result.stderr, 20);
    super(`${command.join(' ')}: exit ${result.code}${said === '' ? '' : `: ${said}`}`);
    this.name = 'CommandError';
    this.result = result;
  }
}

export function lastLines(text: string, count: number): string {
  return text.trimEnd().split('\n').slice(-count).join('\n');
}

/** Runs to the end, whatever the exit code. Errors: the program can't be started, or the time is up. */
export function runAny(program: string, args: readonly string[], options: RunOptions = {}): Promise<RunResult> {
  const timeoutMs = options.timeoutMs ?? 120_000;
  const { promise, resolve, reject } = Promise.withResolvers<RunResult>();
  const child = spawn(program, args, {
    cwd: options.cwd,
    env: { ...process.env, ...options.env },
    stdio: ['pipe', 'pipe', 'pipe'],
  });
  const out: Buffer[] = [];
  const err: Buffer[] = [];
  let late = false;
  const timer = setTimeout(() => {
    late = true;
    child.kill('SIGKILL');
    // A grandchild may keep the pipes open for ever.
    child.stdout.destroy();
    child.stderr.destroy();
  }, timeoutMs);
  child.stdout.on('data', (chunk: Buffer) => out.push(chunk));
  child.stderr.on('data', (chunk: Buffer) => err.push(chunk));
  // A program may end without reading its input.
  child.stdin.on('error', () => undefined);
  child.stdin.end(options.input);
  child.on('error', (error) => {
    clearTimeout(timer);
    reject(new Error(`${program}: ${error.message}`, { cause: error }));
  });
  child.on('close', (code, signal) => {
    clearTimeout(timer);
    const result = { code: code ?? 128, stdout: Buffer.concat(out).toString(), stderr: Buffer.concat(err).toString() };
    if (late) {
      const said = lastLines(result.stderr + result.stdout, 20);
      reject(new Error(`${program} ${args.join(' ')}: not done after ${timeoutMs} ms: ${said}`));
    } else if (signal !== null) {
      resolve({ ...result, stderr: `${result.stderr}killed by ${signal}\n` });
    } else {
      resolve(result);
    }
  });
  return promise;
}

/** Runs to the end and returns what it printed. Errors: CommandError for any exit code but 0. */
export async function run(program: string, args: readonly string[], options: RunOptions = {}): Promise<string> {
  const result = await runAny(program, args, options);
  if (result.code !== 0) throw new CommandError([program, ...args], result);
  return result.stdout;
}

export interface UntilOptions {
  /** Default 30 s. */
  readonly deadlineMs?: number;
  /** Default 20 ms. */
  readonly intervalMs?: number;
}

/** Polls until the probe gives something other than undefined or false. Its last error goes into the failure. */
export async function until<T>(
  what: string,
  probe: () => Promise<T | undefined | false> | T | undefined | false,
  options: UntilOptions = {},
): Promise<T> {
  const deadlineMs = options.deadlineMs ?? 30_000;
  const end = performance.now() + deadlineMs;
  let reason: unknown;
  for (;;) {
    try {
      const found = await probe();
      if (found !== undefined && found !== false) return found;
      reason = undefined;
    } catch (error) {
      if (error instanceof GivenUp) throw error;
      reason = error;
    }
    if (performance.now() >= end) {
      const detail = reason instanceof Error ? `: ${reason.message}` : '';
      throw new Error(`${what}: not so after ${deadlineMs} ms${detail}`, { cause: reason });
    }
    await delay(options.intervalMs ?? 20);
  }
}

/** Thrown by a probe of until() when waiting longer is pointless. */
export class GivenUp extends Error {}

export interface Exit {
  readonly code: number | null;
  readonly signal: NodeJS.Signals | null;
}

export interface DaemonOptions {
  readonly name: string;
  readonly program: string;
  readonly args: readonly string[];
  readonly env?: Readonly<Record<string, string>>;
  readonly cwd?: string;
  /** Signal of an orderly end. Default SIGTERM. */
  readonly stopSignal?: NodeJS.Signals;
  /** How long an orderly end may take before SIGKILL. Default 30 s. */
  readonly stopDeadlineMs?: number;
}

/** A long-running child in its own process group (a terminal's Ctrl-C reaches only us). Its output goes to
 * `<work>/log/<name>.log`, appended over restarts. The work directory ends it when the run ends. */
export class Daemon {
  readonly name: string;
  readonly pid: number;
  readonly logPath: string;
  readonly exited: Promise<Exit>;
  #exit: Exit | null = null;
  readonly #stopSignal: NodeJS.Signals;
  readonly #stopDeadlineMs: number;

  private constructor(options: DaemonOptions, child: ChildProcess, pid: number, logPath: string) {
    this.name = options.name;
    this.pid = pid;
    this.logPath = logPath;
    this.#stopSignal = options.stopSignal ?? 'SIGTERM';
    this.#stopDeadlineMs = options.stopDeadlineMs ?? 30_000;
    this.exited = new Promise((resolve) => {
      child.on('exit', (code, signal) => {
        this.#exit = { code, signal };
        resolve(this.#exit);
      });
    });
  }

  static async start(work: Workdir, options: DaemonOptions): Promise<Daemon> {
    const logPath = work.logPath(options.name);
    const log = openSync(logPath, 'a');
    try {
      const child = spawn(options.program, options.args, {
        cwd: options.cwd ?? work.path,
        env: { ...process.env, ...options.env },
        stdio: ['ignore', log, log],
        detached: true,
      });
      const started = Promise.withResolvers<number>();
      child.on('spawn', () => started.resolve(child.pid ?? -1));
      child.on('error', (error) => started.reject(new Error(`${options.name}: ${error.message}`, { cause: error })));
      const pid = await started.promise;
      const daemon = new Daemon(options, child, pid, logPath);
      work.defer(`stop ${options.name}`, () => daemon.stop().then(() => undefined));
      return daemon;
    } finally {
      closeSync(log);
    }
  }

  get exit(): Exit | null {
    return this.#exit;
  }

  /** Waits for the condition; fails at once when the daemon ends. Failures carry the end of the log. */
  async ready(what: string, probe: () => Promise<unknown>, options: UntilOptions = {}): Promise<void> {
    try {
      await until(
        `${this.name}: ${what}`,
        async () => {
          if (this.#exit !== null) {
            throw new GivenUp(`${this.name} ended: ${this.#exit.signal ?? `exit ${this.#exit.code}`}`);
          }
          return (await probe()) !== false;
        },
        options,
      );
    } catch (error) {
      throw new Error(`${error instanceof Error ? error.message : error}\n${this.logTail(30)}`, { cause: error });
    }
  }

  /** An orderly end; SIGKILL to the process group when the deadline passes. Ended already = success. */
  async stop(): Promise<Exit> {
    if (this.#exit !== null) return this.#exit;
    this.signal(this.#stopSignal);
    const deadline = AbortSignal.timeout(this.#stopDeadlineMs);
    const late = new Promise<null>((resolve) =>
      deadline.addEventListener('abort', () => resolve(null), { once: true }),
    );
    const exit = await Promise.race([this.exited, late]);
    return exit ?? this.kill();
  }

  /** kill -9 of the process and its group, awaited. */
  async kill(): Promise<Exit> {
    if (this.#exit !== null) return this.#exit;
    this.signal('SIGKILL', -this.pid);
    return this.exited;
  }

  signal(signal: NodeJS.Signals, target: number = this.pid): void {
    if (this.#exit !== null) return;
    try {
      process.kill(target, signal);
    } catch (error) {
      if (!isErrno(error, 'ESRCH')) throw error;
    }
  }

  log(): string {
    return readFileSync(this.logPath, 'utf8');
  }

  logTail(lines: number): string {
    return `--- end of ${this.name}.log\n${lastLines(this.log(), lines)}\n---`;
  }
}

export function isErrno(error: unknown, code: string): boolean {
  return error instanceof Error && 'code' in error && error.code === code;
}
