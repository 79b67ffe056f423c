/** The private place of one run: a directory, a short one for sockets, and everything that must be undone at the end,
 * in reverse order, also after a failure or a signal. */
import { AsyncLocalStorage } from 'node:async_hooks';
import { mkdirSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { sweep } from './leaks.ts';

/** Where the repository lies. */
export const repository = path.resolve(path.dirname(fileURLToPath(import.meta.url)), '../..');

/** sun_path minus its NUL. */
const socketPathMax = 107;

interface Undo {
  readonly what: string;
  readonly undo: () => Promise<void> | void;
}

const open = new Set<Workdir>();

/** Set in what the clean-up itself does, which may still start things (a containerd to end its containers). */
const cleaning = new AsyncLocalStorage<true>();

export class Workdir implements AsyncDisposable {
  readonly name: string;
  /** e2e/.work/<name>-<random>, mode 0700, on the repository's file system. */
  readonly path: string;
  /** A short directory below the system's temporary one; see socket(). */
  readonly sockets: string;
  /** Random part of the name: unique over runs, usable in names of namespaces, cgroups and containers. */
  readonly tag: string;
  readonly #undo: Undo[] = [];
  #closing: Promise<readonly string[]> | null = null;

  constructor(name: string) {
    this.name = name;
    const parent = path.join(repository, 'e2e/.work');
    mkdirSync(parent, { recursive: true });
    this.path = mkdtempSync(path.join(parent, `${name}-`));
    this.tag = this.path.slice(-6);
    this.sockets = mkdtempSync(path.join(tmpdir(), 'obd-'));
    open.add(this);
    listenForSignals();
  }

  /** True from the begin of the clean-up, e.g. after Ctrl-C: what fails now fails because of it. */
  get isOver(): boolean {
    return this.#closing !== null;
  }

  /** A directory of that name inside, made if absent. Nothing new can begin once the clean-up has. */
  dir(...names: readonly string[]): string {
    if (this.isOver && cleaning.getStore() !== true) throw new Error(`${this.name}: the run is over`);
    const dir = path.join(this.path, ...names);
    mkdirSync(dir, { recursive: true });
    return dir;
  }

  logPath(name: string): string {
    return path.join(this.dir('log'), `${name}.log`);
  }

  socket(name: string): string {
    const socket = path.join(this.sockets, name);
    if (Buffer.byteLength(socket) > socketPathMax) throw new Error(`${socket}: too long for a unix socket`);
    return socket;
  }

  /** Registers the undoing of something just done. Runs in reverse order; one that fails does not stop the others. */
  defer(what: string, undo: () => Promise<void> | void): void {
    this.#undo.push({ what, undo });
  }

  /** Undoes everything and removes the directories; returns what went wrong or had to be removed by force: processes,
   * mounts and loop devices that name this directory and that nobody undid. Idempotent. */
  close(options: { readonly keepFiles?: boolean } = {}): Promise<readonly string[]> {
    this.#closing ??= this.#close(options.keepFiles === true || process.env['OBD_KEEP'] === '1');
    return this.#closing;
  }

  async #close(keepFiles: boolean): Promise<readonly string[]> {
    const problems: string[] = [];
    for (;;) {
      const step = this.#undo.pop();
      if (step === undefined) break;
      try {
        await cleaning.run(true, async () => step.undo());
      } catch (error) {
        problems.push(`${step.what}: ${error instanceof Error ? error.message : String(error)}`);
      }
    }
    problems.push(...(await sweep([this.path, this.sockets, this.tag])));
    rmSync(this.sockets, { recursive: true, force: true });
    if (!keepFiles) rmSync(this.path, { recursive: true, force: true });
    open.delete(this);
    return problems;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    const problems = await this.close();
    if (problems.length > 0) throw new Error(`${this.name} left behind:\n  ${problems.join('\n  ')}`);
  }
}

let listening = false;

function listenForSignals(): void {
  if (listening) return;
  listening = true;
  const codes = { SIGINT: 130, SIGTERM: 143, SIGHUP: 129 } as const;
  for (const [signal, code] of Object.entries(codes)) {
    process.once(signal, () => {
      process.stderr.write(`\n${signal}: cleaning up\n`);
      void closeAll().finally(() => process.exit(code));
    });
  }
}

async function closeAll(): Promise<void> {
  for (const work of open) {
    for (const problem of await work.close()) process.stderr.write(`${problem}\n`);
  }
}
