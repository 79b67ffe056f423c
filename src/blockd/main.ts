/** overlaybd-blockd: serves the block devices of containers, and outlives the snapshotter that asked for them. */
import { createHash } from 'node:crypto';
import { mkdir, realpath, rm } from 'node:fs/promises';
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

  // Nothing we make is for others.
  process.umask(0o077);
  await mkdir(flags.runDir, { recursive: true, mode: 0o700 });
  if (!(await native.lockFile(join(flags.runDir, 'lock')))) {
    throw new Error(`${flags.runDir}: another blockd uses this folder`);
  }
  // The lock says that whoever served devices from this folder before is dead; what the kernel kept of them is dead too.
  const namePrefix = await deviceNamePrefix(flags.runDir);
  const stale = await native.releaseStaleDevices(namePrefix);
  if (stale.length > 0) log.warn({ devices: stale }, 'released devices of a blockd that died');
  const registry = new DeviceRegistry(native, {
    namePrefix,
    threads: flags.threads,
    directIo: flags.directIo,
    runDir: flags.runDir,
  });

  let leaving = false;
  const leave = (): void => {
    if (leaving) return;
    leaving = true;
    void Promise.all([notify('STOPPING=1'), rm(flags.socket, { force: true }), server.close()]).finally(() => {
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
  .option('--run-dir <path>', 'folder of the lock; one blockd per folder', '/run/overlaybd-blockd')
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
Signals:
  SIGTERM, SIGINT  take no new devices, detach those that nobody holds open, end when none is left. Devices that are
                   held open carry file systems of running containers: they are served on, and detaching them stays
                   possible. Sending the signal again tries again; it never forces.
  SIGHUP           ignored
  SIGKILL          fails the I/O of every device that is in use
To end at once and fail the I/O of whoever still uses a device, call Shutdown with force over the control socket.

Control: overlaybd.control.v1.BlockDaemon by gRPC, gRPC-Web or Connect, e.g.
  curl --unix-socket /run/overlaybd-blockd/control.sock -H 'content-type: application/json' -d '{}' \\
    http://blockd/overlaybd.control.v1.BlockDaemon/ListDevices`,
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

/** The same for every blockd of one folder, and different between folders. */
async function deviceNamePrefix(runDir: string): Promise<string> {
  const digest = createHash('sha256')
    .update(await realpath(runDir))
    .digest('hex');
  return `overlaybd-${digest.slice(0, 12)}-`;
}

function loadVersion(): string {
  return loadNative(nativePath()).version;
}

await program.parseAsync();
