/** overlaybd-snapshotter: containerd's snapshots service. Composition root: the only file that sees every folder.
 * Start: configuration → lock each root → open its store → recover → bind sockets → READY. Nothing is ever detached by
 * stopping: containers outlive this process, and so does blockd. */
import { mkdir, realpath } from 'node:fs/promises';
import { extname, join } from 'node:path';
import { Command, Option } from 'commander';
import {
  type Config,
  ConfigError,
  kDefaultConfigPath,
  type LogLevel,
  loadConfig,
  type StoreConfig,
  storesOf,
} from './base/config.ts';
import { ErrorKind, SnapshotterError } from './base/errors.ts';
import { parseFsDescriptor } from './base/fs-descriptor.ts';
import { Gate } from './base/gate.ts';
import { createLog, type Logger, logLevels } from './base/log.ts';
import { Metrics, type RpcFunction } from './base/metrics.ts';
import { ServiceManager } from './base/systemd.ts';
import { packageVersion } from './base/version.ts';
import type { Engine } from './engine/engine.ts';
import { loadNative, type Native, nativePath } from './engine/native.ts';
import { createEngine, type RealEngine } from './engine/real-engine.ts';
import { Snapshots } from './gen/services/snapshots/v1/snapshots_pb.js';
import { type FinishedCall, RpcServer } from './rpc/server.ts';
import { snapshotsHandlers } from './rpc/snapshots-service.ts';
import { codeName } from './rpc/status.ts';
import { layoutOf } from './store/layout.ts';
import { SqliteStore } from './store/sqlite-store.ts';
import type { Store } from './store/store.ts';
import { createWorker, type SnapshotWorker } from './worker/create-worker.ts';

const kLockName = '.overlaybd-worker.lock';
/** What blockd accepts as the name of an owner. */
const kOwnerMaxChars = 255;

interface Flags {
  readonly config: string | undefined;
  readonly logLevel: LogLevel | undefined;
}

/** A store with all that works on it. */
interface Household {
  readonly name: string;
  readonly address: string;
  readonly log: Logger;
  readonly store: Store;
  readonly engine: RealEngine;
  readonly worker: SnapshotWorker;
}

const program = new Command('overlaybd-snapshotter')
  .description("containerd's snapshotter for overlaybd images: read-only and writable block devices for containers.")
  .argument('[config]', 'configuration file; the same as --config')
  .option('--config <file>', `configuration file (default: ${kDefaultConfigPath})`)
  .addOption(new Option('--log-level <level>', 'goes before the configuration').choices([...logLevels]))
  .version(packageVersion())
  .addHelpText(
    'after',
    `
Signals: SIGTERM and SIGINT drain and end, a second one ends at once; containers and their devices are left as they are.
SIGUSR1 writes calls in flight and open handles to the log.`,
  )
  .action(async (positional: string | undefined, { config: named, logLevel }: Flags) => {
    if (positional !== undefined && named !== undefined) program.error('give the configuration once');
    try {
      await run(named ?? positional ?? kDefaultConfigPath, logLevel);
    } catch (error) {
      const words = error instanceof ConfigError || error instanceof SnapshotterError ? error.message : stackOf(error);
      process.stderr.write(`overlaybd-snapshotter: ${words}\n`);
      process.exit(1);
    }
  });

function stackOf(error: unknown): string {
  return error instanceof Error ? (error.stack ?? error.message) : String(error);
}

async function run(configPath: string, logLevel: LogLevel | undefined): Promise<void> {
  const environment = {
    notifySocket: process.env['NOTIFY_SOCKET'] ?? '',
    watchdogUs: Number(process.env['WATCHDOG_USEC'] ?? '0'),
  };
  const { config, warnings } = await loadConfig(configPath);
  const log = createLog({
    name: 'overlaybd-snapshotter',
    level: logLevel ?? config.logLevel,
    reportCaller: config.logReportCaller,
  });
  const version = packageVersion();
  log.info({ version, node: process.version, config: configPath }, 'starts');
  for (const warning of warnings) log.warn({ warning }, 'configuration');
  process.on('SIGPIPE', () => undefined);
  for (const event of ['uncaughtException', 'unhandledRejection'] as const) {
    process.on(event, (error: unknown) => {
      // A bug: state in memory can't be trusted, state on disk can. Recovery at the next start copes.
      log.fatal({ err: error }, event);
      process.exit(70);
    });
  }

  const native = loadNative(nativePath());
  const manager = new ServiceManager({
    socket: environment.notifySocket,
    watchdogUs: environment.watchdogUs,
    send: (socket, state) => native.notify(socket, state),
    log,
  });
  const metrics = new Metrics();
  const households: Household[] = [];
  const rpc = new RpcServer({ onFinished: (call) => tell(call, logOf(households, call, log), metrics) });
  // Without a listener Node would open its debugger.
  process.on('SIGUSR1', () => log.info(stateOf(rpc, households), 'state'));
  for (const store of storesOf(config)) households.push(await openHousehold(store, config, native, version, log));
  metrics.watchStores(households.map(({ name, worker }) => ({ name, read: () => worker.stats() })));

  for (const { name, worker } of households) {
    const startedAt = performance.now();
    await worker.recover();
    log.info({ store: name, ms: rounded(performance.now() - startedAt), ...worker.stats() }, 'recovered');
  }

  const leave = leaver({
    rpc,
    households,
    metrics,
    manager,
    log,
    deadlineMs: config.overlaybdWorker.limits.drainTimeoutMs,
  });
  process.on('SIGTERM', leave);
  process.on('SIGINT', leave);

  try {
    for (const { address, worker } of households) await rpc.listen(address, Snapshots, snapshotsHandlers(worker));
  } catch (error) {
    await rpc.drain(0);
    throw error;
  }
  const exporter = config.exporterConfig;
  if (exporter.enable) {
    const { host } = config.overlaybdWorker.metrics;
    await metrics.serve({ host, port: exporter.port, path: exporter.uriPrefix }, log);
  }
  metrics.alive(true);
  await manager.ready();
  log.info({ addresses: rpc.addresses, mode: config.rwMode, writableLayerType: config.writableLayerType }, 'serves');
}

/** Errors: FailedPrecondition when another process works on the root; those of the store. */
async function openHousehold(
  { name, address, root: given }: StoreConfig,
  config: Config,
  native: Native,
  version: string,
  log: Logger,
): Promise<Household> {
  await mkdir(given, { recursive: true, mode: 0o700 });
  const root = await realpath(given);
  if (!(await native.lockFile(join(root, kLockName)))) {
    throw new SnapshotterError(ErrorKind.FailedPrecondition, `root ${root}: another snapshotter works on it`);
  }
  const ours = config.overlaybdWorker;
  const storeLog = log.child({ store: name });
  const { blockd } = ours;
  const engine = createEngine({
    native,
    owner: root.length <= kOwnerMaxChars ? root : root.slice(-kOwnerMaxChars),
    blockd: {
      socketPath: blockd.address,
      version,
      startTimeoutMs: blockd.startTimeoutMs,
      spawn: blockd.spawn
        ? { program: process.execPath, args: blockdArguments(config), logFile: join(blockd.runDir, 'blockd.log') }
        : null,
    },
    events: {
      onStart: (pid) => storeLog.info({ pid }, 'blockd answers'),
      onDeath: (pid) => storeLog.warn({ pid }, 'blockd is gone; devices are attached again when they are needed'),
      onOtherVersion: (theirs) => storeLog.warn({ theirs, version }, 'blockd has another version'),
    },
    timeouts: { attachMs: blockd.attachTimeoutMs, detachMs: blockd.detachTimeoutMs, listMs: 5_000 },
  });
  if (blockd.spawn) await mkdir(blockd.runDir, { recursive: true, mode: 0o700 });
  const layout = layoutOf(root);
  await mkdir(layout.snapshots, { recursive: true, mode: 0o700 });
  const store = new SqliteStore(layout.database);
  const worker = createWorker({
    engine: bounded(engine, ours.limits),
    store,
    clock: { now: () => native.clockRealtime() },
    config: {
      root,
      rwMode: config.rwMode,
      writableLayerType: config.writableLayerType,
      ociLayers: ours.ociLayers,
      defaultFs: parseFsDescriptor(config.defaultFsType),
      parseFs: parseFsDescriptor,
      autoRemoveDev: config.autoRemoveDev,
      asyncRemove: config.asyncRemove,
      runtimeType: config.runtimeType,
      defaultVirtualSizeGB: ours.defaultVirtualSizeGB,
      sectorSizeBytes: ours.sectorSizeBytes,
      tenant: config.tenant,
      mirrorRegistry: config.mirrorRegistry,
    },
    log: storeLog,
  });
  return { name, address, log: storeLog, store, engine, worker };
}

/** blockd is of the same package: its entry lies beside this file, built or as TypeScript. */
function blockdArguments(config: Config): readonly string[] {
  const { blockd } = config.overlaybdWorker;
  return [
    join(import.meta.dirname, 'blockd', `main${extname(import.meta.filename)}`),
    '--socket',
    blockd.address,
    '--run-dir',
    blockd.runDir,
    '--threads',
    String(blockd.threads),
    ...(blockd.directIo ? ['--direct-io'] : []),
    '--log-level',
    config.logLevel,
  ];
}

/** The engine, with lines in front of what many callers at once would choke on. */
function bounded(engine: Engine, limits: Config['overlaybdWorker']['limits']): Engine {
  const attaches = new Gate(limits.concurrentAttaches);
  const removals = new Gate(limits.concurrentRemovals);
  const { devices, files } = engine;
  return {
    layers: engine.layers,
    mounts: engine.mounts,
    devices: {
      attach: (request, signal) => attaches.run(() => devices.attach(request, signal)),
      detach: (id) => devices.detach(id),
      sever: (id) => devices.sever(id),
      find: (id) => devices.find(id),
      list: () => devices.list(),
    },
    files: { ...files, removeTree: (dir) => removals.run(() => files.removeTree(dir)) },
  };
}

const functionOfVerb: Readonly<Record<string, RpcFunction>> = {
  prepare: 'Prepare',
  view: 'View',
  mounts: 'Mounts',
  commit: 'Commit',
  remove: 'Remove',
  stat: 'Stat',
  update: 'Update',
  list: 'Walk',
  usage: 'Usage',
};

/** The store is named where there are several. */
function logOf(households: readonly Household[], call: FinishedCall, log: Logger): Logger {
  const household = households.find(({ address }) => address === call.address);
  return households.length < 2 || household === undefined ? log : household.log;
}

/** One line per call. A failure that is ours brings its stack; the caller's own come as words. */
function tell(
  { verb, names, namespace, milliseconds, code, error, failed }: FinishedCall,
  log: Logger,
  metrics: Metrics,
): void {
  const name = functionOfVerb[verb];
  if (name !== undefined) metrics.observe(name, milliseconds / 1000, failed);
  const fields = {
    verb,
    ...names,
    ...(namespace === null ? {} : { namespace }),
    ms: rounded(milliseconds),
    code: codeName(code),
  };
  if (error === null) log.info(fields, 'rpc');
  else if (error instanceof SnapshotterError && error.kind !== ErrorKind.Internal) {
    log.info({ ...fields, error: error.message }, 'rpc');
  } else log.error({ ...fields, err: error }, 'rpc');
}

const rounded = (milliseconds: number): number => Math.round(milliseconds * 1000) / 1000;

interface Leaving {
  readonly rpc: RpcServer;
  readonly households: readonly Household[];
  readonly metrics: Metrics;
  readonly manager: ServiceManager;
  readonly log: Logger;
  readonly deadlineMs: number;
}

/** Drains, closes, ends the process. What is not done by the deadline is in the store as begun, and recovery does it. */
function leaver(what: Leaving): (signal: NodeJS.Signals) => void {
  const { rpc, households, metrics, manager, log, deadlineMs } = what;
  let signals = 0;
  const leave = async (signal: NodeJS.Signals): Promise<void> => {
    log.info({ signal, calls: rpc.inFlight().length }, 'drains');
    await manager.stopping();
    const deadline = new Promise<void>((resolve) => setTimeout(resolve, deadlineMs).unref());
    await rpc.drain(deadlineMs);
    await Promise.race([Promise.all(households.map(({ worker }) => worker.drain())), deadline]);
    metrics.alive(false);
    await metrics.close();
    for (const { store, engine } of households) {
      engine.close();
      store.close();
    }
    manager.close();
    log.info('ends');
    process.exit(0);
  };
  return (signal) => {
    signals += 1;
    if (signals > 1) process.exit(1);
    leave(signal).catch((error: unknown) => {
      log.error({ err: error }, 'did not end in order');
      process.exit(1);
    });
  };
}

function stateOf(rpc: RpcServer, households: readonly Household[]): object {
  const handles: Record<string, number> = {};
  for (const name of process.getActiveResourcesInfo()) handles[name] = (handles[name] ?? 0) + 1;
  const memory = process.memoryUsage();
  return {
    calls: rpc.inFlight(),
    stores: households.map(({ name, worker }) => ({ name, ...worker.stats() })),
    handles,
    memory: { rssBytes: memory.rss, heapUsedBytes: memory.heapUsed, externalBytes: memory.external },
    uptimeSeconds: Math.round(process.uptime()),
  };
}

await program.parseAsync();
