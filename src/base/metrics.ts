/** Prometheus metrics, with the original's names. Its two faults are not kept: `is_alive` is 1 while the daemon lives, and
 * the AlreadyExists that tells of a layer already there is no error. */
import { createServer, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import { Counter, collectDefaultMetrics, exponentialBuckets, Gauge, Histogram, Registry } from 'prom-client';
import type { Logger } from './log.ts';

export const rpcFunctions = [
  'Stat',
  'Update',
  'Usage',
  'Prepare',
  'View',
  'Mounts',
  'Commit',
  'Remove',
  'Walk',
] as const;
export type RpcFunction = (typeof rpcFunctions)[number];

/** What one store reports when it is asked. */
export interface StoreGauges {
  readonly name: string;
  readonly read: () => {
    readonly snapshots: number;
    readonly unsettled: number;
    readonly pending: number;
    readonly devices: { readonly attached: number; readonly mounted: number };
  };
}

export interface ExporterOptions {
  readonly host: string;
  readonly port: number;
  readonly path: string;
}

export class Metrics {
  readonly #registry = new Registry();
  readonly #alive = new Gauge({
    name: 'is_alive',
    help: '1 while the daemon serves.',
    registers: [this.#registry],
  });
  readonly #errors = new Counter({
    name: 'grpc_error_count',
    help: 'Calls that failed. A remote layer that is there already is a success.',
    labelNames: ['function'],
    registers: [this.#registry],
  });
  readonly #latency = new Histogram({
    name: 'grpc_latency_seconds',
    help: 'Duration of calls.',
    labelNames: ['function'],
    buckets: exponentialBuckets(0.0001, 2, 20),
    registers: [this.#registry],
  });
  #server: Server | null = null;

  constructor() {
    collectDefaultMetrics({ register: this.#registry });
    // A rate over a counter that is not there yet gives nothing, so all are there from the start.
    for (const name of rpcFunctions) this.#errors.inc({ function: name }, 0);
  }

  alive(isAlive: boolean): void {
    this.#alive.set(isAlive ? 1 : 0);
  }

  observe(name: RpcFunction, seconds: number, failed: boolean): void {
    this.#latency.observe({ function: name }, seconds);
    if (failed) this.#errors.inc({ function: name });
  }

  /** Once, before the first scrape. */
  watchStores(stores: readonly StoreGauges[]): void {
    const gauge = (
      name: string,
      help: string,
      labelNames: readonly string[],
      collect: (gauge: Gauge) => void,
    ): void => {
      new Gauge({
        name: `overlaybd_worker_${name}`,
        help,
        labelNames: [...labelNames],
        registers: [this.#registry],
        collect() {
          collect(this);
        },
      });
    };
    gauge('snapshots', 'Snapshots known.', ['store'], (self) => {
      for (const store of stores) self.set({ store: store.name }, store.read().snapshots);
    });
    gauge('unsettled_snapshots', 'Snapshots with a change that is begun and not finished.', ['store'], (self) => {
      for (const store of stores) self.set({ store: store.name }, store.read().unsettled);
    });
    gauge('pending_work', 'Snapshots with background work queued or running.', ['store'], (self) => {
      for (const store of stores) self.set({ store: store.name }, store.read().pending);
    });
    gauge('devices', 'Devices by state.', ['store', 'state'], (self) => {
      for (const store of stores) {
        const { attached, mounted } = store.read().devices;
        self.set({ store: store.name, state: 'attached' }, attached);
        self.set({ store: store.name, state: 'mounted' }, mounted);
      }
    });
  }

  text(): Promise<string> {
    return this.#registry.metrics();
  }

  /** Serves the text over HTTP. A port that is taken is logged and costs nothing but the metrics. */
  async serve(options: ExporterOptions, log: Logger): Promise<void> {
    const server = createServer({ requestTimeout: 10_000, headersTimeout: 5_000 }, (request, response) => {
      const path = (request.url ?? '').split('?', 1)[0];
      if (path !== options.path || (request.method !== 'GET' && request.method !== 'HEAD')) {
        response.writeHead(path === options.path ? 405 : 404).end();
        return;
      }
      this.text().then(
        (text) => response.writeHead(200, { 'content-type': this.#registry.contentType }).end(text),
        (error: unknown) => {
          log.error({ err: error }, 'metrics could not be collected');
          response.writeHead(500).end();
        },
      );
    });
    server.maxConnections = 64;
    await new Promise<void>((resolve) => {
      server.once('error', (error) => {
        log.error({ err: error, host: options.host, port: options.port }, 'metrics are not served');
        resolve();
      });
      server.listen(options.port, options.host, () => {
        this.#server = server;
        log.info(
          { host: options.host, port: (server.address() as AddressInfo).port, path: options.path },
          'metrics are served',
        );
        resolve();
      });
    });
    server.on('error', (error) => log.error({ err: error }, 'metrics server'));
  }

  /** null = not served. */
  get port(): number | null {
    const address = this.#server?.address();
    return typeof address === 'object' && address !== null ? address.port : null;
  }

  async close(): Promise<void> {
    const server = this.#server;
    this.#server = null;
    if (server === null) return;
    server.closeAllConnections();
    await new Promise((resolve) => server.close(resolve));
  }
}
