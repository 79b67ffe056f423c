/** overlaybd-blockd: serves the block devices of containers, and outlives the snapshotter that asked for them. */
import { mkdir, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { Command, InvalidArgumentError, Option } from 'commander';
import { pino } from 'pino';
import { loadNative, nativePath } from '../engine/native.ts';
import { serveControl } from './control-service.ts';
import { DeviceRegistry } from './devices.ts';

interface Flags {
  readonly socket: string;
  readonly runDir: string;
  readonly threads: number;
  readonly directIo: boolean;
  readonly logLevel: string;
}

const kThreadsMax = 64;
const kTransports = ['loop-fuse'] as const;

function threads(text: string): number {
  const value = Number(text);
  if (!Number.isInteger(value) || value < 1 || value > kThreadsMax) {
    throw new InvalidArgumentError(`a whole number from 1 to ${kThreadsMax}`);
  }
  return value;
}

async function serve(flags: Flags): Promise<void> {
  const log = pino({ name: 'overlaybd-blockd', level: flags.logLevel });
  const native = loadNative(nativePath());
  const notifySocket = process.env['NOTIFY_SOCKET'] ?? '';
  const notify = async (state: string): Promise<void> => {
    if (notifySocket === '') return;
    try {
      await native.notify(notifySocket, state);
    } catch (error) {
      log.warn({ error: String(error), state }, 'could not notify the service manager');
    }
  };

  await mkdir(flags.runDir, { recursive: true, mode: 0o700 });
  if (!(await native.lockFile(join(flags.runDir, 'lock')))) {
    throw new Error(`${flags.runDir}: another blockd uses this folder`);
  }
  const registry = new DeviceRegistry(native, {
    threads: flags.threads,
    directIo: flags.directIo,
    runDir: flags.runDir,
  });

  let leaving = false;
  const leave = (): void => {
    if (leaving) return;
    leaving = true;
    server.close();
    server.closeIdleConnections();
    void Promise.all([notify('STOPPING=1'), rm(flags.socket, { force: true })]).finally(() => {
      log.info('ends');
      process.exit(0);
    });
  };
  const shutdown = (force: boolean): void => {
    void registry.drain(force, leave).then((left) => {
      if (left > 0) log.warn({ devices: left }, 'stays: these devices are held open; ends when the last is detached');
    });
  };

  const server = await serveControl(flags.socket, native, {
    registry,
    version: native.version,
    transports: kTransports,
    log,
    shutdown,
  });
  process.on('SIGTERM', () => shutdown(false));
  process.on('SIGINT', () => shutdown(false));
  process.on('SIGHUP', () => undefined); // the terminal that started us may go
  process.on('SIGPIPE', () => undefined);

  log.info({ socket: flags.socket, threads: flags.threads, directIo: flags.directIo }, 'serves');
  await notify('READY=1');
  const watchdogUs = Number(process.env['WATCHDOG_USEC'] ?? '0');
  if (watchdogUs > 0) setInterval(() => void notify('WATCHDOG=1'), watchdogUs / 2000).unref();
}

const program = new Command('overlaybd-blockd')
  .description('Serves overlaybd images as block devices, on request over a unix socket.')
  .option('--socket <path>', 'control socket (mode 0600)', '/run/overlaybd-blockd/control.sock')
  .option('--run-dir <path>', 'folder for transient mount points and the lock', '/run/overlaybd-blockd')
  .option('--threads <n>', 'request threads per device', threads, 4)
  .option('--direct-io', 'bypass the page cache for raw layer data', false)
  .addOption(
    new Option('--log-level <level>', 'least severe messages to write')
      .choices(['trace', 'debug', 'info', 'warn', 'error', 'fatal'])
      .default('info'),
  )
  .addHelpText(
    'after',
    `
Signals: SIGTERM and SIGINT detach the devices nobody holds open and take no new ones; the process ends when no device
is left, because the others carry file systems of running containers. SIGKILL fails their I/O.`,
  )
  .version(loadVersion())
  .action(async (flags: Flags) => {
    try {
      await serve(flags);
    } catch (error) {
      process.stderr.write(`overlaybd-blockd: ${error instanceof Error ? error.message : String(error)}\n`);
      process.exit(1);
    }
  });

function loadVersion(): string {
  return loadNative(nativePath()).version;
}

await program.parseAsync();
