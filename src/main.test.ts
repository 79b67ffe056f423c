// The daemon as a process, with its real store, addon and sockets in a private directory. Invariants: a bad configuration
// ends it with words; one process works on a root; a killed one leaves nothing that stops the next; SIGTERM drains, a
// second signal ends at once; a blockd that it started outlives it.
import assert from 'node:assert/strict';
import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, lstatSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { connect, createServer, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { afterEach, beforeEach, describe, it } from 'node:test';
import { create, fromBinary, type MessageInitShape, type MessageShape, toBinary } from '@bufbuild/protobuf';
import { Client, credentials } from '@grpc/grpc-js';
import { createHostProcess } from './engine/host-process.ts';
import { Snapshots } from './gen/services/snapshots/v1/snapshots_pb.js';

const main = join(import.meta.dirname, 'main.ts');
type Unary = Exclude<keyof typeof Snapshots.method, 'list'>;

interface LogLine {
  readonly msg: string;
  readonly [field: string]: unknown;
}

/** One daemon, its output and its end. */
class DaemonUnderTest {
  readonly process: ChildProcess;
  readonly lines: LogLine[] = [];
  readonly ended: Promise<readonly [code: number | null, signal: NodeJS.Signals | null]>;
  #wake: () => void = () => undefined;

  constructor(args: readonly string[], environment: NodeJS.ProcessEnv = {}) {
    this.process = spawn(process.execPath, [main, ...args], {
      stdio: ['ignore', 'pipe', 'inherit'],
      env: { ...process.env, ...environment },
    });
    this.ended = once(this.process, 'exit') as Promise<[number | null, NodeJS.Signals | null]>;
    const { stdout } = this.process;
    assert.ok(stdout !== null);
    createInterface(stdout).on('line', (line) => {
      this.lines.push(JSON.parse(line) as LogLine);
      this.#wake();
    });
  }

  /** The first line with this message, also one that came already. */
  async said(message: string): Promise<LogLine> {
    for (;;) {
      const line = this.lines.find(({ msg }) => msg === message);
      if (line !== undefined) return line;
      const next = new Promise<'line'>((resolve) => (this.#wake = () => resolve('line')));
      const what = await Promise.race([next, this.ended]);
      if (what !== 'line') throw new Error(`ended before it said "${message}": ${JSON.stringify(this.lines)}`);
    }
  }
}

async function call<N extends Unary>(
  address: string,
  name: N,
  request: MessageInitShape<(typeof Snapshots.method)[N]['input']>,
): Promise<MessageShape<(typeof Snapshots.method)[N]['output']>> {
  const { input, output, name: wireName } = Snapshots.method[name];
  const client = new Client(`unix:${address}`, credentials.createInsecure());
  try {
    return await new Promise((resolve, reject) => {
      client.makeUnaryRequest(
        `/${Snapshots.typeName}/${wireName}`,
        (bytes: Uint8Array) => Buffer.from(bytes),
        (bytes: Buffer) => fromBinary(output, bytes) as MessageShape<(typeof Snapshots.method)[N]['output']>,
        toBinary(input, create(input, request as never)),
        (error, value) => (error === null && value !== undefined ? resolve(value) : reject(error)),
      );
    });
  } finally {
    client.close();
  }
}

describe('overlaybd-snapshotter', () => {
  let directory: string;
  let configPath: string;
  let address: string;
  const daemons: DaemonUnderTest[] = [];

  beforeEach(() => {
    directory = mkdtempSync(join(tmpdir(), 'obd-main-'));
    configPath = join(directory, 'config.json');
    address = join(directory, 'overlaybd.sock');
    configure({});
  });
  afterEach(async () => {
    for (const daemon of daemons.splice(0)) {
      daemon.process.kill('SIGKILL');
      await daemon.ended;
    }
    rmSync(directory, { recursive: true });
  });

  function configure(more: object, ours: object = {}): void {
    const blockd = { address: join(directory, 'blockd.sock'), runDir: join(directory, 'blockd') };
    const config = { root: join(directory, 'root'), address, ...more, overlaybdWorker: { blockd, ...ours } };
    writeFileSync(configPath, `// private\n${JSON.stringify(config)}\n`);
  }

  async function start(environment: NodeJS.ProcessEnv = {}, ...flags: readonly string[]): Promise<DaemonUnderTest> {
    const daemon = new DaemonUnderTest(['--config', configPath, ...flags], environment);
    daemons.push(daemon);
    await daemon.said('serves');
    return daemon;
  }

  const runToEnd = (...args: readonly string[]) =>
    spawnSync(process.execPath, [main, ...args], { encoding: 'utf8', timeout: 60_000 });

  it('tells its version and its flags', () => {
    assert.match(runToEnd('--version').stdout, /^\d+\.\d+\.\d+\n$/);
    const { stdout, status } = runToEnd('--help');
    assert.equal(status, 0);
    for (const flag of ['--config', '--log-level', '--version', '--help', 'SIGUSR1']) assert.ok(stdout.includes(flag));
  });

  it('ends with status 1 and all problems when the configuration is bad or missing', () => {
    writeFileSync(configPath, '{ "root": 7, "tenant": "x" }');
    const bad = runToEnd(configPath);
    assert.equal(bad.status, 1);
    for (const key of ['root', 'address', 'tenant']) assert.match(bad.stderr, new RegExp(`^  ${key}: `, 'm'));
    const missing = runToEnd('--config', join(directory, 'none.json'));
    assert.equal(missing.status, 1);
    assert.match(missing.stderr, /none\.json: a problem\n {2}cannot be read/);
    assert.equal(runToEnd(configPath, '--config', configPath).status, 1);
  });

  it('serves, answers, drains on SIGTERM and takes its socket away', async () => {
    const daemon = await start({}, '--log-level', 'debug');
    assert.equal(lstatSync(address).mode & 0o777, 0o600);
    assert.equal(lstatSync(join(directory, 'root')).mode & 0o777, 0o700);
    const { mounts } = await call(address, 'prepare', {
      key: 'k',
      labels: { 'containerd.io/snapshot/secret': 'hunter2' },
    });
    assert.equal(mounts[0]?.source, join(directory, 'root', 'snapshots', '1', 'fs'));
    const line = await daemon.said('rpc');
    assert.deepEqual([line['verb'], line['key'], line['code'], line['level']], ['prepare', 'k', 'OK', 'info']);
    assert.ok(!JSON.stringify(daemon.lines).includes('hunter2'));
    daemon.process.kill('SIGUSR1');
    assert.equal(Array.isArray((await daemon.said('state'))['calls']), true);
    daemon.process.kill('SIGTERM');
    assert.deepEqual(await daemon.ended, [0, null]);
    assert.ok(!existsSync(address));

    await start();
    assert.deepEqual((await call(address, 'mounts', { key: 'k' })).mounts, mounts);
  });

  it('starts on what a killed one left, and keeps a second one off its root', async () => {
    const killed = await start();
    await call(address, 'prepare', { key: 'k' });
    killed.process.kill('SIGKILL');
    await killed.ended;
    assert.ok(existsSync(address));
    await start();
    assert.equal((await call(address, 'stat', { key: 'k' })).info?.name, 'k');

    configure({ address: join(directory, 'second.sock') });
    const second = runToEnd(configPath);
    assert.equal(second.status, 1);
    assert.match(second.stderr, /root .*: another snapshotter works on it/);
  });

  it('does not take a socket that somebody answers', async () => {
    await start();
    configure({ root: join(directory, 'other') });
    const second = runToEnd(configPath);
    assert.equal(second.status, 1);
    assert.match(second.stderr, /another process answers on it/);
    await call(address, 'cleanup', {});
  });

  it('serves one store per owner', async () => {
    const theirs = join(directory, 'buildkit.sock');
    configure({}, { stores: [{ name: 'buildkit', address: theirs, root: join(directory, 'buildkit') }] });
    const daemon = await start();
    await call(address, 'prepare', { key: 'k' });
    assert.equal((await daemon.said('rpc'))['store'], 'default');
    await assert.rejects(call(theirs, 'stat', { key: 'k' }), /not found/);
    await call(theirs, 'prepare', { key: 'k' });
  });

  it('serves metrics where they are asked for', async () => {
    configure({ exporterConfig: { enable: true, port: 0 } });
    const daemon = await start();
    const { port } = await daemon.said('metrics are served');
    const ref = { 'containerd.io/snapshot.ref': 'x' };
    await call(address, 'prepare', { key: 'k', labels: ref });
    await assert.rejects(call(address, 'stat', { key: 'none' }));
    const text = await (await fetch(`http://127.0.0.1:${port}/metrics`)).text();
    assert.match(text, /^is_alive 1$/m);
    assert.match(text, /^grpc_error_count\{function="Stat"\} 1$/m);
    assert.match(text, /^grpc_error_count\{function="Prepare"\} 0$/m);
    assert.match(text, /^overlaybd_worker_snapshots\{store="default"\} 1$/m);
  });

  it('ends at once on a second signal', async () => {
    const blockd = { address: join(directory, 'mute.sock'), spawn: false };
    configure({}, { blockd, limits: { drainTimeoutMs: 600_000 } });
    const daemon = await start();
    // A blockd that takes connections and says nothing: a call that needs it hangs.
    const peers: Socket[] = [];
    const mute = createServer((peer) => peers.push(peer));
    const connected = once(mute, 'connection');
    mute.listen(blockd.address);
    try {
      await once(mute, 'listening');
      const labels = {
        'containerd.io/snapshot/overlaybd.writable': 'dev',
        'containerd.io/snapshot/overlaybd/vsize': '1',
      };
      const hanging = call(address, 'prepare', { key: 'k', labels }).catch((error: Error) => error);
      await connected;
      daemon.process.kill('SIGTERM');
      await daemon.said('drains');
      daemon.process.kill('SIGINT');
      assert.deepEqual(await daemon.ended, [1, null]);
      assert.ok((await hanging) instanceof Error);
    } finally {
      for (const peer of peers) peer.destroy();
      mute.close();
    }
  });

  it('is not held up by a client that merely stays connected', async () => {
    configure({}, { limits: { drainTimeoutMs: 600_000 } });
    const daemon = await start();
    const client = connect(address);
    await once(client, 'connect');
    daemon.process.kill('SIGTERM');
    assert.deepEqual(await daemon.ended, [0, null]);
    client.destroy();
  });

  it('starts a blockd when a device is wanted, and leaves it running', async () => {
    const daemon = await start();
    const writable = {
      'containerd.io/snapshot/overlaybd.writable': 'dev',
      'containerd.io/snapshot/overlaybd/vsize': '1',
    };
    const { mounts } = await call(address, 'prepare', { key: 'k', labels: writable });
    assert.equal(mounts[0]?.type, 'ext4');
    assert.match(mounts[0]?.source ?? '', /^\/dev\/loop\d+$/);
    daemon.process.kill('SIGTERM');
    assert.deepEqual(await daemon.ended, [0, null]);

    const blockd = createHostProcess({ socketPath: join(directory, 'blockd.sock'), spawn: null, version: 'test' });
    try {
      const { devices } = await blockd.client.listDevices({ owner: '' });
      assert.deepEqual(
        devices.map(({ path }) => path),
        [mounts[0]?.source],
      );
      await start();
      assert.deepEqual((await call(address, 'mounts', { key: 'k' })).mounts, mounts);
      await call(address, 'remove', { key: 'k' });
      await call(address, 'cleanup', {});
      assert.deepEqual((await blockd.client.listDevices({ owner: '' })).devices, []);
    } finally {
      // It is not our child: its end is seen on a connection. Should it not end by itself, it is ended.
      const { pid } = await blockd.client.status({});
      const watch = connect(join(directory, 'blockd.sock'));
      await once(watch, 'connect');
      await blockd.client.shutdown({ force: true });
      blockd.close();
      watch.resume();
      await once(watch, 'close', { signal: AbortSignal.timeout(20_000) }).catch((error: unknown) => {
        process.kill(pid, 'SIGKILL');
        throw error;
      });
    }
    assert.match(readFileSync(join(directory, 'blockd', 'blockd.log'), 'utf8'), /serves/);
  });
});
