/** Puts the verbs together. The one place that knows every part of worker/. */
import { setTimeout as pause } from 'node:timers/promises';
import type { Logger } from 'pino';
import type { Clock } from '../base/clock.ts';
import type { Engine } from '../engine/engine.ts';
import { layoutOf } from '../store/layout.ts';
import type { Store } from '../store/store.ts';
import { Background } from './background.ts';
import { cleanup } from './cleanup.ts';
import { commit } from './commit.ts';
import type { WorkerConfig } from './config.ts';
import { DevicePool } from './devices.ts';
import { WorkerEffects } from './effects.ts';
import { mounts } from './mounts.ts';
import { prepare } from './prepare.ts';
import { list, stat, update, usage } from './query.ts';
import { recover } from './recovery.ts';
import { remove } from './remove.ts';
import type { Scope } from './scope.ts';
import type { Worker } from './worker.ts';

export interface WorkerOptions {
  readonly engine: Engine;
  readonly store: Store;
  readonly clock: Clock;
  readonly config: WorkerConfig;
  readonly log: Logger;
  /** How bounded retries wait; tests give one that does not. */
  readonly pause?: (milliseconds: number) => Promise<void>;
}

export interface WorkerStats {
  readonly snapshots: number;
  /** Rows with open or unfinished work. */
  readonly unsettled: number;
  /** Snapshots with work queued or running now. */
  readonly pending: number;
  readonly verbsInFlight: number;
  readonly devices: { readonly attached: number; readonly mounted: number };
}

export interface SnapshotWorker extends Worker {
  /** Once, before the first verb. */
  recover(): Promise<void>;
  /** Resolves when no verb and no background work is left. Takes nothing down. */
  drain(): Promise<void>;
  stats(): WorkerStats;
}

/** The kernel parameter whose presence says that overlayfs knows `index=off`. */
const overlayIndexParameter = '/sys/module/overlay/parameters/index';

export function createWorker({ engine, store, clock, config, log, ...given }: WorkerOptions): SnapshotWorker {
  const layout = layoutOf(config.root);
  const wait = given.pause ?? ((milliseconds: number) => pause(milliseconds));
  const devices = new DevicePool({ store, engine, layout, config });
  const effects = new WorkerEffects({
    store,
    engine,
    layout,
    config,
    devices,
    layerReady: (id, signal) => background.layerReady(id, signal),
    pause: wait,
  });
  const background = new Background(store, layout, log, effects);
  let overlayOptions: Promise<readonly string[]> | null = null;
  const scope: Scope = {
    engine,
    store,
    clock,
    config,
    log,
    layout,
    devices,
    background,
    pause: wait,
    overlayOptions: () => {
      overlayOptions ??= engine.files
        .exists(overlayIndexParameter)
        .then((known) => (known ? ['index=off'] : []))
        .catch((error: unknown) => {
          overlayOptions = null;
          throw error;
        });
      return overlayOptions;
    },
    said: new Set(),
  };

  const inFlight = new Set<Promise<unknown>>();
  const tracked = async <T>(verb: () => Promise<T> | T): Promise<T> => {
    const call = Promise.resolve().then(verb);
    inFlight.add(call);
    try {
      return await call;
    } finally {
      inFlight.delete(call);
    }
  };

  return {
    prepare: (request, signal) => tracked(() => prepare(scope, 'active', request, signal)),
    view: (request, signal) => tracked(() => prepare(scope, 'view', request, signal)),
    mounts: (key, signal) => tracked(() => mounts(scope, key, signal)),
    commit: (request) => tracked(() => commit(scope, request)),
    remove: (key) => tracked(() => remove(scope, key)),
    stat: (key) => tracked(() => stat(scope, key)),
    update: (request) => tracked(() => update(scope, request)),
    list: (filter, batchSize) => list(scope, filter, batchSize),
    usage: (key) => tracked(() => usage(scope, key)),
    cleanup: () => tracked(() => cleanup(scope)),
    recover: () => recover(scope),
    drain: async () => {
      while (inFlight.size > 0 || background.pending > 0) {
        await Promise.allSettled(inFlight);
        await background.idle();
      }
    },
    stats: () => {
      const rows = store.devices();
      return {
        ...store.count(),
        pending: background.pending,
        verbsInFlight: inFlight.size,
        devices: {
          attached: rows.filter(({ state }) => state === 'attached').length,
          mounted: rows.filter(({ state }) => state === 'mounted').length,
        },
      };
    },
  };
}
