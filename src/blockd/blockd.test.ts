/** blockd as a process, on real devices (root). Invariants: attach and detach are idempotent and single-flight; every
 * failure says why, to the caller and in resultFile; the socket is private, speaks HTTP/1.1 and HTTP/2, and is
 * replaced only when nobody answers; a device in use outlives signals; a killed blockd leaves nothing behind for long. */
import assert from 'node:assert/strict';
import { type ChildProcess, execFile, spawn } from 'node:child_process';
import { createHash } from 'node:crypto';
import { once } from 'node:events';
import { chmodSync, existsSync, mkdirSync, mkdtempSync, readFileSync, statSync, writeFileSync } from 'node:fs';
import { request } from 'node:http';
import { connect } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, afterEach, before, beforeEach, describe, it } from 'node:test';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { type Client, Code, ConnectError, createClient, type Transport } from '@connectrpc/connect';
import { createConnectTransport, createGrpcTransport } from '@connectrpc/connect-node';
import { loadNative, type Native, nativePath } from '../engine/native.ts';
import { BlockDaemon } from '../gen/overlaybd/control/v1/blockd_pb.js';

const run = promisify(execFile);
const kEntry = fileURLToPath(new URL('main.ts', import.meta.url));
const kFixtures = fileURLToPath(new URL('../../native/testdata/fixtures/', import.meta.url));
const kTimeoutMs = 30_000;

class Daemon {
  readonly child: ChildProcess;
  readonly ended: Promise<number | null>;
  log = '';

  constructor(socket: string, runDir: string, env: NodeJS.ProcessEnv = {}) {
    const args = ['--socket', socket, '--run-dir', runDir, '--threads', '2'];
    this.child = spawn(process.execPath, [kEntry, ...args], {
      stdio: ['ignore', 'pipe', 'pipe'],
      env: { ...process.env, ...env },
    });
    this.child.stdout?.on('data', (text: Buffer) => {
      this.log += text.toString();
      this.child.emit('said');
    });
    this.child.stderr?.on('data', (text: Buffer) => {
      this.log += text.toString();
    });
    this.ended = once(this.child, 'exit').then(([code]) => code as number | null);
  }

  /** Resolves once the log holds `text`; fails if the process ends before. */
  async says(text: string): Promise<void> {
    const deadline = AbortSignal.timeout(kTimeoutMs);
    while (!this.log.includes(text)) {
      if (this.child.exitCode !== null) assert.fail(`blockd ended before it said "${text}":\n${this.log}`);
      const left = new AbortController();
      await Promise.race([
        once(this.child, 'said', { signal: AbortSignal.any([deadline, left.signal]) }),
        this.ended,
      ]).finally(() => left.abort());
    }
  }

  async kill(signal: NodeJS.Signals): Promise<void> {
    this.child.kill(signal);
    await this.ended;
  }
}

describe('blockd', { timeout: 300_000 }, () => {
  const native: Native = loadNative(nativePath());
  let dir = '';
  let socket = '';
  let runDir = '';
  let daemon: Daemon;
  let client: Client<typeof BlockDaemon>;
  const mounts: string[] = [];

  const start = async (env: NodeJS.ProcessEnv = {}): Promise<Daemon> => {
    const started = new Daemon(socket, runDir, env);
    await started.says('"msg":"serves"');
    return started;
  };
  const over = (transport: Transport): Client<typeof BlockDaemon> => createClient(BlockDaemon, transport);

  const makeConfig = async (name: string, options: { lower?: string; sizeBytes?: bigint } = {}): Promise<string> => {
    const home = join(dir, name);
    mkdirSync(home, { recursive: true });
    const upper = { data: join(home, 'data'), index: join(home, 'index') };
    await native.createUpper({
      ...upper,
      virtualSizeBytes: options.sizeBytes ?? 64n << 20n,
      sparse: false,
      parentUuid: null,
    });
    return writeConfig(home, { lowers: options.lower === undefined ? [] : [{ file: options.lower }], upper });
  };
  const writeConfig = (home: string, config: object): string => {
    mkdirSync(home, { recursive: true });
    const path = join(home, 'config.v1.json');
    writeFileSync(path, JSON.stringify({ repoBlobUrl: '', resultFile: join(home, 'result'), ...config }));
    return path;
  };
  const mountAt = async (device: string, name: string): Promise<string> => {
    const at = join(dir, name);
    mkdirSync(at, { recursive: true });
    await native.mount('ext4', device, at, []);
    mounts.push(at);
    return at;
  };
  const unmountAll = async (): Promise<void> => {
    for (const at of mounts.splice(0)) await native.unmount(at, false).catch(() => native.unmount(at, true));
  };
  const attach = async (id: string, configPath: string) => {
    const { device } = await client.attach({ owner: 'test', id, configPath });
    assert.ok(device);
    return device;
  };
  const refusal = async (call: Promise<unknown>): Promise<ConnectError> => {
    const error = await call.then(
      () => assert.fail('was not refused'),
      (reason: unknown) => reason,
    );
    assert.ok(error instanceof ConnectError);
    return error;
  };

  before(() => {
    assert.equal(process.getuid?.(), 0, 'these tests need root');
  });
  beforeEach(async () => {
    dir = mkdtempSync(join(tmpdir(), 'obd-blockd-'));
    runDir = join(dir, 'run');
    socket = join(runDir, 'control.sock');
    client = over(
      createConnectTransport({ httpVersion: '1.1', baseUrl: 'http://blockd', nodeOptions: { socketPath: socket } }),
    );
    daemon = await start();
  });
  afterEach(async () => {
    await unmountAll();
    if (daemon.child.exitCode === null && daemon.child.signalCode === null) {
      await client.shutdown({ force: true }).catch(() => daemon.child.kill('SIGKILL'));
      await daemon.ended;
    }
    const prefix = createHash('sha256').update(runDir).digest('hex').slice(0, 12);
    const left = await native.releaseStaleDevices(`overlaybd-${prefix}-`);
    await native.removeTree(dir);
    assert.deepEqual(left, [], 'a device is left behind');
  });
  after(() => unmountAll());

  it('serves a device that keeps a file system over detach and attach', async () => {
    const config = await makeConfig('one');
    const device = await attach('1', config);
    assert.equal(device.sizeBytes, 64n << 20n);
    assert.equal(device.transport, 'loop-fuse');
    assert.equal(readFileSync(join(dir, 'one', 'result'), 'utf8'), 'success');
    const node = statSync(device.path);
    assert.equal(node.rdev, device.major * 256 + device.minor);
    await run('mkfs.ext4', ['-q', device.path]);
    const at = await mountAt(device.path, 'mnt');
    await run('sh', ['-c', 'head -c 3000000 /dev/urandom > "$0/file" && sha256sum < "$0/file" > "$0/sum"', at]);

    const busy = await refusal(client.detach({ owner: 'test', id: '1' }));
    assert.equal(busy.code, Code.FailedPrecondition);
    assert.match(busy.message, /detach 1: .*in use: mounted at .*mnt/);
    assert.equal((await client.listDevices({})).devices.length, 1);

    await unmountAll();
    await client.flush({ owner: 'test', id: '1' });
    await client.detach({ owner: 'test', id: '1' });
    await client.detach({ owner: 'test', id: '1' });
    assert.equal((await client.listDevices({})).devices.length, 0);

    const again = await attach('1', config);
    const back = await mountAt(again.path, 'mnt');
    await run('sh', ['-c', 'cd "$0" && test "$(sha256sum < file)" = "$(cat sum)"', back]);
    const [listed] = (await client.listDevices({ owner: 'test' })).devices;
    assert.ok((listed?.stats?.readBytes ?? 0n) > 3_000_000n);
  });

  it('answers equal attaches, also at once, with one device and refuses others for its id', async () => {
    const config = await makeConfig('one');
    const other = await makeConfig('two');
    const answers = await Promise.all(Array.from({ length: 8 }, () => attach('1', config)));
    assert.equal(new Set(answers.map((device) => device.path)).size, 1);
    const refused = await refusal(attach('1', other));
    assert.equal(refused.code, Code.FailedPrecondition);
    assert.match(refused.message, /already attached with .*one/);
    const elsewhere = await client.attach({ owner: 'else', id: '1', configPath: other });
    assert.notEqual(elsewhere.device?.path, answers[0]?.path);
    assert.equal((await client.listDevices({ owner: 'else' })).devices.length, 1);
    assert.equal((await client.status({})).devices, 2);
  });

  it('survives attach and detach of one id in any order at once', async () => {
    const config = await makeConfig('one');
    await Promise.all(
      Array.from({ length: 20 }, (_, i) =>
        i % 3 === 2
          ? client.detach({ owner: 'test', id: '1' })
          : client.attach({ owner: 'test', id: '1', configPath: config }),
      ),
    );
    await client.detach({ owner: 'test', id: '1' });
    assert.equal((await client.status({})).devices, 0);
  });

  const absent = (home: string): string => join(home, 'absent');
  const damaged = (home: string): string => join(home, 'damaged');
  for (const [what, code, reason, prepare] of [
    ['a config that is missing', Code.NotFound, /No such file/, (home: string) => join(home, 'config.v1.json')],
    [
      'a config that is not JSON',
      Code.InvalidArgument,
      /config/,
      (home: string) => {
        mkdirSync(home);
        writeFileSync(join(home, 'config.v1.json'), '{"lowers": [');
        return join(home, 'config.v1.json');
      },
    ],
    [
      'a layer that is missing',
      Code.NotFound,
      /absent/,
      (home: string) => writeConfig(home, { lowers: [{ file: absent(home) }] }),
    ],
    [
      'a layer that is damaged',
      Code.DataLoss,
      /damaged/,
      (home: string) => {
        mkdirSync(home);
        const layer = readFileSync(join(kFixtures, 'commit-raw', 'layer'));
        writeFileSync(damaged(home), layer.subarray(0, layer.length - 512));
        return writeConfig(home, { lowers: [{ file: damaged(home) }] });
      },
    ],
  ] as const) {
    it(`says why it cannot attach ${what}`, async () => {
      const home = join(dir, 'bad');
      const refused = await refusal(attach('1', prepare(home)));
      assert.equal(refused.code, code, refused.message);
      assert.match(refused.message, /attach 1: /);
      assert.match(refused.message, reason);
      if (existsSync(join(home, 'config.v1.json')) && code !== Code.InvalidArgument) {
        assert.match(readFileSync(join(home, 'result'), 'utf8'), /^failed:/);
      }
      assert.equal((await client.status({})).devices, 0);
    });
  }

  it('refuses malformed requests and an image that does not fit the sector size', async () => {
    const config = await makeConfig('odd', { sizeBytes: (8n << 20n) + 512n });
    for (const request of [
      { owner: '', id: '1', configPath: config },
      { owner: 'test', id: '../1', configPath: config },
      { owner: 'test', id: '1', configPath: 'relative' },
      { owner: 'test', id: '1', configPath: config, sectorSizeBytes: 1024 },
      { owner: 'test', id: '1', configPath: config, sectorSizeBytes: 4096 },
    ]) {
      assert.equal((await refusal(client.attach(request))).code, Code.InvalidArgument, JSON.stringify(request));
    }
    assert.match(readFileSync(join(dir, 'odd', 'result'), 'utf8'), /^failed:.*sector size/);
    const { device } = await client.attach({ owner: 'test', id: '1', configPath: config, sectorSizeBytes: 512 });
    assert.equal(device?.sectorSizeBytes, 512);
  });

  it('speaks JSON over HTTP/1.1 and gRPC over HTTP/2 on one private socket', async () => {
    assert.equal(statSync(socket).mode & 0o777, 0o600);
    assert.equal(statSync(runDir).mode & 0o777, 0o700);
    const grpc = over(
      createGrpcTransport({ baseUrl: 'http://blockd', nodeOptions: { createConnection: () => connect(socket) } }),
    );
    const connectHttp2 = over(
      createConnectTransport({
        httpVersion: '2',
        baseUrl: 'http://blockd',
        nodeOptions: { createConnection: () => connect(socket) },
      }),
    );
    assert.equal((await grpc.status({})).pid, daemon.child.pid);
    assert.equal((await connectHttp2.status({})).pid, daemon.child.pid);
    const text = await new Promise<string>((resolve, reject) => {
      const call = request(
        {
          socketPath: socket,
          path: '/overlaybd.control.v1.BlockDaemon/Status',
          method: 'POST',
          headers: { 'content-type': 'application/json' },
        },
        (answer) => {
          let body = '';
          answer.setEncoding('utf8').on('data', (part: string) => {
            body += part;
          });
          answer.on('end', () => resolve(body));
        },
      );
      call.on('error', reject);
      call.end('{}');
    });
    assert.equal((JSON.parse(text) as { pid: number }).pid, daemon.child.pid);
  });

  it('cuts off peers of another user even where the file modes let them in', async () => {
    for (const path of [dir, runDir, socket]) chmodSync(path, 0o777);
    // A system program: another user may not be able to reach ours.
    const peer = spawn('curl', ['-sS', '--unix-socket', socket, 'http://blockd/'], {
      uid: 65534,
      gid: 65534,
      stdio: 'ignore',
      cwd: '/',
    });
    const [code] = (await once(peer, 'exit')) as [number | null];
    // 52: the server said nothing; 55, 56: it hung up while we spoke or listened.
    assert.ok(code === 52 || code === 55 || code === 56, `curl ended with ${code}`);
    await daemon.says('refused a peer of another user');
  });

  it('does not start beside a living one, and replaces one that was killed with everything it held', async () => {
    const second = new Daemon(socket, runDir);
    assert.equal(await second.ended, 1);
    assert.match(second.log, /another blockd/);
    const third = new Daemon(socket, join(dir, 'run2'));
    assert.equal(await third.ended, 1);
    assert.match(third.log, /another blockd listens/);
    assert.equal((await client.status({})).pid, daemon.child.pid);

    const config = await makeConfig('one');
    const device = await attach('1', config);
    await run('mkfs.ext4', ['-q', device.path]);
    await daemon.kill('SIGKILL');
    daemon = await start();
    assert.match(daemon.log, /released devices of a blockd that died/);
    const again = await attach('1', config);
    assert.equal(again.path, device.path);
    await run('e2fsck', ['-fn', again.path]);
  });

  it('keeps serving a device in use over SIGTERM and ends when it is let go', async () => {
    const used = await attach('used', await makeConfig('used'));
    await attach('idle', await makeConfig('idle'));
    await run('mkfs.ext4', ['-q', used.path]);
    const at = await mountAt(used.path, 'mnt');
    daemon.child.kill('SIGTERM');
    await daemon.says('stays: these devices are held open');
    assert.deepEqual(
      (await client.listDevices({})).devices.map((device) => device.id),
      ['used'],
    );
    await run('sh', ['-c', 'echo alive > "$0/file" && sync "$0/file"', at]);
    assert.equal((await refusal(attach('new', join(dir, 'idle', 'config.v1.json')))).code, Code.Unavailable);
    await unmountAll();
    await client.detach({ owner: 'test', id: 'used' });
    assert.equal(await daemon.ended, 0);
    assert.equal(existsSync(socket), false);
  });

  it('ends at SIGTERM when nothing is held; a service manager that is gone does not matter', async () => {
    await daemon.kill('SIGTERM');
    daemon = await start({ NOTIFY_SOCKET: join(dir, 'nobody') });
    await daemon.says('could not notify the service manager');
    await attach('1', await makeConfig('one'));
    daemon.child.kill('SIGTERM');
    assert.equal(await daemon.ended, 0);
  });

  it('detaches and ends when told to by force, failing who still holds a device', async () => {
    const device = await attach('1', await makeConfig('one'));
    const holder = spawn('sh', ['-c', `exec 3<${device.path}; echo ready; cat`], { stdio: ['pipe', 'pipe', 'ignore'] });
    await once(holder.stdout, 'data');
    await client.shutdown({ force: true });
    assert.equal(await daemon.ended, 0);
    holder.stdin.end();
    await once(holder, 'exit');
  });
});
