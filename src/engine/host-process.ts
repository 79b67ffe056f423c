/** Keeps blockd there: connects to the one that runs, starts one if asked to, notices when it ends. blockd serves devices
 * that containers live on, so it is started to outlive this process and is never stopped from here. */
import { open } from 'node:fs/promises';
import { Agent } from 'node:http';
import { connect as connectSocket, type Socket } from 'node:net';
import { setTimeout as delay } from 'node:timers/promises';
import { type Client, createClient } from '@connectrpc/connect';
import { createConnectTransport } from '@connectrpc/connect-node';
import { ErrorKind, SnapshotterError } from '../base/errors.ts';
import { BlockDaemon } from '../gen/overlaybd/control/v1/blockd_pb.js';
import { fromConnect, isConnectionLost } from './connect-errors.ts';
import { type Daemon, startDaemon } from './programs.ts';

export interface BlockdCommand {
  readonly program: string;
  readonly args: readonly string[];
  /** Its stdout and stderr are appended here. */
  readonly logFile: string;
}

export interface BlockdOptions {
  readonly socketPath: string;
  /** How to start it when nobody listens; null = somebody else's business (a systemd unit). */
  readonly spawn: BlockdCommand | null;
  /** What we are: a running blockd of another version is used, and told about through `onOtherVersion`. */
  readonly version: string;
  readonly startTimeoutMs?: number;
}

/** News from below. Called at most once per incarnation of blockd. */
export interface BlockdEvents {
  /** The blockd with this pid is gone, and its devices with it; each is attached again when somebody needs it. */
  readonly onDeath?: (pid: number) => void;
  readonly onStart?: (pid: number) => void;
  readonly onOtherVersion?: (theirs: string) => void;
}

export interface HostStatus {
  readonly version: string;
  readonly pid: number;
  readonly transports: readonly string[];
}

export interface HostProcess {
  readonly client: Client<typeof BlockDaemon>;
  /** Returns once blockd answers, having started it if that was needed and allowed. Unavailable otherwise. */
  ensureRunning(): Promise<HostStatus>;
  /** The blockd that answers now; null when none does. Starts nothing. */
  status(): Promise<HostStatus | null>;
  /** After a call met a lost connection: forget what was believed and look again. */
  recheck(): Promise<HostStatus | null>;
  /** Stops watching. blockd goes on. Idempotent. */
  close(): void;
}

const kStartTimeoutMs = 15_000;
const kStatusTimeoutMs = 5_000;
/** Between two looks at a socket that does not answer yet, within startTimeoutMs. */
const kPollFirstMs = 10;
const kPollMaxMs = 200;
/** A blockd that ended at once may have lost the start to another one, which answers within this. */
const kLostRaceMs = 2_000;
const kLogTailBytes = 2_000;

export function createHostProcess(options: BlockdOptions, events: BlockdEvents = {}): HostProcess {
  const transport = createConnectTransport({
    httpVersion: '1.1',
    baseUrl: 'http://blockd',
    // A connection per call: an idle one would break on the first call after blockd was replaced.
    nodeOptions: { socketPath: options.socketPath, agent: new Agent({ keepAlive: false }) },
  });
  return new RealHostProcess(createClient(BlockDaemon, transport), options, events);
}

class RealHostProcess implements HostProcess {
  readonly client: Client<typeof BlockDaemon>;
  readonly #options: BlockdOptions;
  readonly #events: BlockdEvents;
  /** The incarnation we believe in; null = none known. */
  #known: HostStatus | null = null;
  #watch: Socket | null = null;
  #starting: Promise<HostStatus> | null = null;
  #looking: Promise<HostStatus | null> | null = null;
  #closed = false;

  constructor(client: Client<typeof BlockDaemon>, options: BlockdOptions, events: BlockdEvents) {
    this.client = client;
    this.#options = options;
    this.#events = events;
  }

  async ensureRunning(): Promise<HostStatus> {
    if (this.#known !== null && this.#watch !== null) return this.#known;
    this.#starting ??= this.#start().finally(() => {
      this.#starting = null;
    });
    return this.#starting;
  }

  async status(): Promise<HostStatus | null> {
    if (this.#known !== null && this.#watch !== null) return this.#known;
    return this.recheck();
  }

  recheck(): Promise<HostStatus | null> {
    this.#looking ??= this.#look().finally(() => {
      this.#looking = null;
    });
    return this.#looking;
  }

  close(): void {
    this.#closed = true;
    this.#watch?.destroy();
    this.#watch = null;
  }

  /** Asks who answers now and draws the conclusions: a death, a new incarnation, a watch to renew. */
  async #look(): Promise<HostStatus | null> {
    let found: HostStatus | null;
    try {
      const { version, pid, transports } = await this.client.status({}, { timeoutMs: kStatusTimeoutMs });
      found = { version, pid, transports };
    } catch (error) {
      if (!isConnectionLost(error)) throw fromConnect(`blockd at ${this.#options.socketPath}`, error);
      found = null;
    }
    const before = this.#known;
    this.#known = found;
    if (before !== null && before.pid !== found?.pid) {
      this.#watch?.destroy();
      this.#watch = null;
      this.#events.onDeath?.(before.pid);
    }
    if (found !== null) {
      if (before?.pid !== found.pid && found.version !== this.#options.version) {
        this.#events.onOtherVersion?.(found.version);
      }
      this.#watchSocket();
    }
    return found;
  }

  /** A connection that carries nothing and breaks when the process ends, however it ends. Its end alone proves nothing
   * (servers drop idle connections), so the socket is asked again. */
  #watchSocket(): void {
    if (this.#closed || this.#watch !== null) return;
    const socket = connectSocket(this.#options.socketPath);
    this.#watch = socket;
    socket.unref();
    socket.resume(); // a server that drops idle connections may say so; unread words would hide its end
    socket.on('error', () => {
      // 'close' follows
    });
    socket.on('close', () => {
      if (this.#watch !== socket) return;
      this.#watch = null;
      if (this.#closed) return;
      this.recheck().catch(() => {
        // It exists but does not answer: the next call finds out and says so to its caller.
      });
    });
  }

  async #start(): Promise<HostStatus> {
    const running = await this.recheck();
    if (running !== null) return running;
    const { spawn, socketPath } = this.#options;
    if (spawn === null) {
      throw new SnapshotterError(ErrorKind.Unavailable, `blockd does not listen at ${socketPath}`);
    }
    const daemon = await startDaemon(spawn.program, spawn.args, spawn.logFile);
    const status = await this.#untilItAnswers(daemon);
    this.#events.onStart?.(status.pid);
    return status;
  }

  async #untilItAnswers(daemon: Daemon): Promise<HostStatus> {
    const { socketPath, spawn } = this.#options;
    const startTimeoutMs = this.#options.startTimeoutMs ?? kStartTimeoutMs;
    let deadline = performance.now() + startTimeoutMs;
    let ended: string | null = null;
    for (let pauseMs = kPollFirstMs; ; pauseMs = Math.min(2 * pauseMs, kPollMaxMs)) {
      const status = await this.recheck();
      if (status !== null) return status;
      if (ended === null && daemon.ended() !== null) {
        ended = daemon.ended();
        deadline = Math.min(deadline, performance.now() + kLostRaceMs);
      }
      if (performance.now() > deadline) {
        const what = ended === null ? `does not answer after ${startTimeoutMs} ms` : `ended (${ended})`;
        const said = spawn === null ? '' : await logTail(spawn.logFile);
        throw new SnapshotterError(ErrorKind.Unavailable, `blockd, started for ${socketPath}, ${what}${said}`);
      }
      await delay(pauseMs);
    }
  }
}

async function logTail(path: string): Promise<string> {
  try {
    const file = await open(path, 'r');
    try {
      const { size } = await file.stat();
      const tail = Buffer.alloc(Math.min(size, kLogTailBytes));
      await file.read(tail, 0, tail.length, size - tail.length);
      const text = tail.toString('utf8').trim();
      return text === '' ? '' : `; its log ends: ${text}`;
    } finally {
      await file.close();
    }
  } catch {
    return ''; // the log is a courtesy to the reader of the error
  }
}
