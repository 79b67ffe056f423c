// A real client on a real socket, with the worker on a store and an engine in memory. Invariants: each verb arrives as it
// was sent and its answer or code comes back; List equals Stat, in batches; a misbehaving client or handler costs one call,
// never the daemon; each call is told about once.
import assert from 'node:assert/strict';
import { once } from 'node:events';
import { mkdtempSync, rmSync } from 'node:fs';
import { connect, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, it } from 'node:test';
import { create, fromBinary, type MessageInitShape, type MessageShape, toBinary } from '@bufbuild/protobuf';
import { EmptySchema } from '@bufbuild/protobuf/wkt';
import { Client, credentials, Metadata, type ServiceError, status } from '@grpc/grpc-js';
import { ErrorKind, SnapshotterError } from '../base/errors.ts';
import {
  CommitSnapshotRequestSchema,
  ListSnapshotsResponseSchema,
  PrepareSnapshotRequestSchema,
  Snapshots,
  Kind as WireKind,
} from '../gen/services/snapshots/v1/snapshots_pb.js';
import { World } from '../worker/test-world.ts';
import type { Worker } from '../worker/worker.ts';
import { type FinishedCall, kMessageMaxBytes, RpcServer } from './server.ts';
import { nanosecondsOf } from './snapshots-codec.ts';
import { snapshotsHandlers } from './snapshots-service.ts';

type Methods = typeof Snapshots.method;
type UnaryName = Exclude<keyof Methods, 'list'>;
type Input<N extends keyof Methods> = MessageInitShape<Methods[N]['input']>;
type Output<N extends keyof Methods> = MessageShape<Methods[N]['output']>;

const refLabel = 'containerd.io/snapshot.ref';

class TestClient {
  readonly #client: Client;

  constructor(address: string) {
    this.#client = new Client(`unix:${address}`, credentials.createInsecure(), {
      'grpc.max_receive_message_length': kMessageMaxBytes,
      'grpc.max_send_message_length': 64 * 1024 * 1024,
    });
  }

  call<N extends UnaryName>(name: N, request: Input<N>, metadata = new Metadata()): Promise<Output<N>> {
    const { input } = Snapshots.method[name];
    return this.raw(name, toBinary(input, create(input, request as never)), metadata);
  }

  /** The bytes as they are, whatever they mean. */
  raw<N extends UnaryName>(name: N, bytes: Uint8Array, metadata = new Metadata()): Promise<Output<N>> {
    const method = Snapshots.method[name];
    return new Promise((resolve, reject) => {
      this.#client.makeUnaryRequest(
        `/${Snapshots.typeName}/${method.name}`,
        (message: Uint8Array) => Buffer.from(message),
        (reply: Buffer) => fromBinary(method.output, reply) as Output<N>,
        bytes,
        metadata,
        (error, value) => (error === null && value !== undefined ? resolve(value) : reject(error)),
      );
    });
  }

  async list(...filters: string[]): Promise<readonly MessageShape<typeof ListSnapshotsResponseSchema>[]> {
    const { input, name } = Snapshots.method.list;
    const stream = this.#client.makeServerStreamRequest(
      `/${Snapshots.typeName}/${name}`,
      (message: Uint8Array) => Buffer.from(message),
      (reply: Buffer) => fromBinary(ListSnapshotsResponseSchema, reply),
      toBinary(input, create(input, { filters })),
    );
    const messages: MessageShape<typeof ListSnapshotsResponseSchema>[] = [];
    for await (const message of stream) messages.push(message as MessageShape<typeof ListSnapshotsResponseSchema>);
    return messages;
  }

  /** A Prepare that the client gives up once `started` says that the server has it. */
  async abandonedPrepare(key: string, started: Promise<void>): Promise<ServiceError> {
    const bytes = toBinary(PrepareSnapshotRequestSchema, create(PrepareSnapshotRequestSchema, { key }));
    let giveUp = (): void => undefined;
    const failed = new Promise<ServiceError>((resolve, reject) => {
      const call = this.#client.makeUnaryRequest(
        `/${Snapshots.typeName}/Prepare`,
        (message: Uint8Array) => Buffer.from(message),
        (reply: Buffer) => reply,
        bytes,
        new Metadata(),
        (error) => (error === null ? reject(new Error('was answered')) : resolve(error)),
      );
      giveUp = () => call.cancel();
    });
    await started;
    giveUp();
    return failed;
  }

  close(): void {
    this.#client.close();
  }
}

const fails = (code: status, details: RegExp | string) => (error: ServiceError) => {
  assert.equal(error.code, code, error.details);
  if (typeof details === 'string') assert.equal(error.details, details);
  else assert.match(error.details, details);
  return true;
};

/** Serves any worker for the length of `body`. */
async function serving<T>(
  worker: Worker,
  body: (client: TestClient, server: RpcServer, finished: FinishedCall[], address: string) => Promise<T>,
): Promise<T> {
  const directory = mkdtempSync(join(tmpdir(), 'rpc-'));
  const address = join(directory, 'overlaybd.sock');
  const finished: FinishedCall[] = [];
  const server = new RpcServer({ onFinished: (call) => finished.push(call) });
  await server.listen(address, Snapshots, snapshotsHandlers(worker));
  const client = new TestClient(address);
  try {
    return await body(client, server, finished, address);
  } finally {
    client.close();
    await server.drain(1000);
    rmSync(directory, { recursive: true });
  }
}

/** All verbs refuse but those given: what a test does not use it must not reach. */
function workerWith(verbs: Partial<Worker>): Worker {
  const refuse = (): never => {
    throw new Error('not expected in this test');
  };
  return {
    prepare: refuse,
    view: refuse,
    mounts: refuse,
    commit: refuse,
    remove: refuse,
    stat: refuse,
    update: refuse,
    list: refuse,
    usage: refuse,
    cleanup: refuse,
    ...verbs,
  };
}

describe('snapshots service', () => {
  const directory = mkdtempSync(join(tmpdir(), 'rpc-'));
  const address = join(directory, 'overlaybd.sock');
  const world = new World();
  const finished: FinishedCall[] = [];
  const server = new RpcServer({ onFinished: (call) => finished.push(call) });
  let client: TestClient;

  before(async () => {
    await world.worker.recover();
    await server.listen(address, Snapshots, snapshotsHandlers(world.worker));
    client = new TestClient(address);
  });
  after(async () => {
    client.close();
    await server.drain(1000);
    rmSync(directory, { recursive: true });
  });

  it('carries the life of a layer', async () => {
    const key = 'default/1/extract-930618236-QmG- sha256:aa';
    const { mounts } = await client.call('prepare', { snapshotter: 'overlaybd', key, labels: { empty: '' } });
    assert.deepEqual(
      mounts.map(({ type, target }) => ({ type, target })),
      [{ type: 'bind', target: '' }],
    );
    assert.deepEqual((await client.call('mounts', { key })).mounts, mounts);
    const active = (await client.call('stat', { key })).info;
    assert.deepEqual([active?.kind, active?.parent, active?.labels], [WireKind.ACTIVE, '', {}]);
    assert.deepEqual(active?.createdAt, active?.updatedAt);

    await client.call('commit', { key, name: 'default/2/sha256:aa', labels: { [refLabel]: 'sha256:aa' } });
    await assert.rejects(client.call('stat', { key }), fails(status.NOT_FOUND, /: not found$/));
    await assert.rejects(
      client.call('mounts', { key: 'default/2/sha256:aa' }),
      fails(status.FAILED_PRECONDITION, /: failed precondition$/),
    );

    const view = await client.call('view', { key: 'v', parent: 'default/2/sha256:aa' });
    assert.equal(view.mounts.length, 1);
    assert.ok(view.mounts[0]?.options.includes('ro'));
    await assert.rejects(
      client.call('remove', { key: 'default/2/sha256:aa' }),
      fails(status.FAILED_PRECONDITION, /remove/),
    );
    const { size, inodes } = await client.call('usage', { key: 'default/2/sha256:aa' });
    assert.equal(typeof size, 'bigint');
    assert.equal(typeof inodes, 'bigint');
    await client.call('remove', { key: 'v' });
    await client.call('remove', { key: 'default/2/sha256:aa' });
    await client.call('cleanup', {});
    assert.deepEqual(await client.list(), []);
  });

  it('changes labels by mask, with the zero times that containerd sends', async () => {
    await client.call('prepare', { key: 'u', labels: { a: '1', b: '2' } });
    const before = (await client.call('stat', { key: 'u' })).info;
    const zero = { seconds: -62135596800n, nanos: 0 };
    const { info } = await client.call('update', {
      info: { name: 'u', createdAt: zero, updatedAt: zero, labels: { a: 'new', 'containerd.io/snapshot/x': 'y' } },
      updateMask: { paths: ['labels.a', 'labels.b', 'labels.containerd.io/snapshot/x'] },
    });
    assert.deepEqual(info?.labels, { a: 'new', 'containerd.io/snapshot/x': 'y' });
    assert.deepEqual(info?.createdAt, before?.createdAt);
    assert.ok(info?.updatedAt !== undefined && before?.updatedAt !== undefined);
    assert.ok(nanosecondsOf(info.updatedAt) > nanosecondsOf(before.updatedAt));
    await assert.rejects(
      client.call('update', { info: { name: 'u' }, updateMask: { paths: ['parent'] } }),
      fails(status.INVALID_ARGUMENT, /: invalid argument$/),
    );
    await assert.rejects(
      client.call('update', {}),
      fails(status.INVALID_ARGUMENT, 'info is missing: invalid argument'),
    );
    await client.call('remove', { key: 'u' });
  });

  it('lists what Stat says, filtered, at most 100 to a message', async () => {
    const keys = Array.from({ length: 250 }, (_, i) => `list ${String(i).padStart(3, '0')}`);
    for (const key of keys) await client.call('prepare', { key, labels: { n: key } });
    const messages = await client.list();
    assert.deepEqual(
      messages.map(({ info }) => info.length),
      [100, 100, 50],
    );
    const infos = messages.flatMap(({ info }) => info);
    for (const info of [infos[0], infos[137], infos[249]]) {
      assert.deepEqual((await client.call('stat', { key: info?.name ?? '' })).info, info);
    }
    const some = await client.list('name=="list 007"', 'labels.n~=/^list 24.$/');
    assert.deepEqual(
      some.flatMap(({ info }) => info.map(({ name }) => name)),
      ['list 007', ...keys.slice(240)],
    );
    await assert.rejects(client.list('name=='), fails(status.INVALID_ARGUMENT, /position 6: .*: invalid argument$/));
    for (const key of keys) await client.call('remove', { key });
  });

  it('refuses malformed requests as the caller’s fault', async () => {
    await assert.rejects(client.call('prepare', { key: '' }), fails(status.INVALID_ARGUMENT, /^key is empty/));
    const big = { big: 'v'.repeat(4096) };
    await assert.rejects(client.call('prepare', { key: 'k', labels: big }), fails(status.INVALID_ARGUMENT, /4096/));
    await assert.rejects(
      client.raw('stat', Buffer.from([0x12, 0x02, 0xff, 0xfe])),
      fails(status.INVALID_ARGUMENT, /./),
    );
    await assert.rejects(client.raw('stat', Buffer.from([0x12, 0x7f])), fails(status.INVALID_ARGUMENT, /./));
    await assert.rejects(
      client.call('prepare', { key: 'k', labels: { x: 'v'.repeat(17 * 1024 * 1024) } }),
      fails(status.RESOURCE_EXHAUSTED, /./),
    );
  });

  it('accepts labels of 4 KiB, keys of 1 KiB in any script, and unknown fields', async () => {
    const key = `${'ключ 日本 '.repeat(60)}end`;
    const labels = { l: 'v'.repeat(4095) };
    const known = toBinary(PrepareSnapshotRequestSchema, create(PrepareSnapshotRequestSchema, { key, labels }));
    // Field 1000, a string: what a client of the year after next might send.
    await client.raw('prepare', Buffer.concat([known, Buffer.from([0xc2, 0x3e, 0x03, 0x61, 0x62, 0x63])]));
    const { info } = await client.call('stat', { key });
    assert.deepEqual([info?.name, info?.labels], [key, labels]);
    await client.call('remove', { key });
  });

  it('answers an unknown method with Unimplemented', async () => {
    const bare = new Client(`unix:${address}`, credentials.createInsecure());
    const error = await new Promise<ServiceError | null>((resolve) =>
      bare.makeUnaryRequest(
        `/${Snapshots.typeName}/Rebase`,
        () => Buffer.alloc(0),
        () => null,
        null,
        (e) => resolve(e),
      ),
    );
    assert.equal(error?.code, status.UNIMPLEMENTED);
    bare.close();
  });

  it('tells of each call once: names, duration, code, never labels', async () => {
    finished.length = 0;
    const metadata = new Metadata();
    metadata.add('containerd-namespace', 'newest');
    metadata.add('containerd-namespace', 'older');
    const secret = { 'containerd.io/snapshot/secret': 'hunter2' };
    await client.call('prepare', { key: 'told', labels: secret }, metadata);
    await assert.rejects(client.call('stat', { key: 'unknown' }));
    await client.list();
    await client.call('remove', { key: 'told' });
    assert.deepEqual(
      finished.map(({ verb, names, code, namespace }) => ({ verb, names, code, namespace })),
      [
        { verb: 'prepare', names: { key: 'told' }, code: status.OK, namespace: 'newest' },
        { verb: 'stat', names: { key: 'unknown' }, code: status.NOT_FOUND, namespace: null },
        { verb: 'list', names: {}, code: status.OK, namespace: null },
        { verb: 'remove', names: { key: 'told' }, code: status.OK, namespace: null },
      ],
    );
    assert.ok(finished.every(({ milliseconds }) => milliseconds >= 0 && milliseconds < 60_000));
    assert.ok(!JSON.stringify(finished).includes('hunter2'));
    assert.deepEqual(server.inFlight(), []);
  });
});

describe('snapshots service at its edges', () => {
  it('passes the parent of a Commit on, and the empty one', async () => {
    const seen: unknown[] = [];
    const worker = workerWith({ commit: async (request) => void seen.push(request) });
    await serving(worker, async (client) => {
      await client.call('commit', { name: 'n', key: 'k', parent: 'p' });
      const old = create(CommitSnapshotRequestSchema, { name: 'n', key: 'k' });
      await client.raw('commit', toBinary(CommitSnapshotRequestSchema, old));
    });
    assert.deepEqual(seen, [
      { name: 'n', key: 'k', labels: {}, parent: 'p' },
      { name: 'n', key: 'k', labels: {}, parent: '' },
    ]);
  });

  it('counts AlreadyExists as an answer where a layer was asked for, and as a failure elsewhere', async () => {
    const worker = workerWith({
      prepare: async ({ key }) => {
        throw new SnapshotterError(ErrorKind.AlreadyExists, `prepare ${key}: there`);
      },
    });
    await serving(worker, async (client, _server, finished) => {
      const exists = fails(status.ALREADY_EXISTS, 'prepare k: there: already exists');
      await assert.rejects(client.call('prepare', { key: 'k', labels: { [refLabel]: 'sha256:aa' } }), exists);
      await assert.rejects(client.call('prepare', { key: 'k' }), exists);
      assert.deepEqual(
        finished.map(({ failed }) => failed),
        [false, true],
      );
    });
  });

  it('outlives a handler that throws, synchronously and later', async () => {
    const worker = workerWith({
      stat: () => {
        throw new TypeError('x is undefined');
      },
      usage: async () => {
        await Promise.resolve();
        throw 'a string';
      },
      cleanup: async () => undefined,
    });
    await serving(worker, async (client, _server, finished) => {
      await assert.rejects(client.call('stat', { key: 'k' }), fails(status.INTERNAL, 'x is undefined: internal'));
      await assert.rejects(client.call('usage', { key: 'k' }), fails(status.INTERNAL, 'a string: internal'));
      assert.deepEqual(await client.call('cleanup', {}), create(EmptySchema));
      assert.ok(finished[0]?.error instanceof TypeError);
    });
  });

  it('cancels what the client gave up', async () => {
    let begun = (): void => undefined;
    const started = new Promise<void>((resolve) => (begun = resolve));
    let stopped = (): void => undefined;
    const noticed = new Promise<void>((resolve) => (stopped = resolve));
    const worker = workerWith({
      prepare: (_request, signal) =>
        new Promise((_resolve, reject) => {
          signal.addEventListener('abort', () => {
            stopped();
            reject(new SnapshotterError(ErrorKind.Cancelled, 'prepare k: given up'));
          });
          begun();
        }),
    });
    await serving(worker, async (client, server) => {
      const error = await client.abandonedPrepare('k', started);
      assert.equal(error.code, status.CANCELLED);
      await noticed;
      await new Promise((resolve) => setImmediate(resolve));
      assert.deepEqual(server.inFlight(), []);
    });
  });

  it('keeps every List message small, however long the labels', async () => {
    const labels = Object.fromEntries(Array.from({ length: 30 }, (_, i) => [`l${i}`, 'v'.repeat(4000)]));
    const infos = Array.from({ length: 250 }, (_, i) => ({
      kind: 'committed' as const,
      name: `n${i}`,
      parent: '',
      labels,
      createdAt: 1n,
      updatedAt: 2n,
    }));
    const worker = workerWith({
      list: async function* (filter, batchSize) {
        for (let at = 0; at < infos.length; at += batchSize) yield infos.slice(at, at + batchSize).filter(filter);
      },
    });
    await serving(worker, async (client) => {
      const messages = await client.list();
      assert.equal(messages.flatMap(({ info }) => info).length, infos.length);
      for (const message of messages)
        assert.ok(toBinary(ListSnapshotsResponseSchema, message).length < 5 * 1024 * 1024);
    });
  });

  it('ends a List with the error of its middle', async () => {
    const worker = workerWith({
      list: async function* () {
        yield [{ kind: 'view' as const, name: 'n', parent: '', labels: {}, createdAt: 1n, updatedAt: 1n }];
        throw new SnapshotterError(ErrorKind.DataLoss, 'list: the store is damaged');
      },
    });
    await serving(worker, async (client) => {
      await assert.rejects(client.list(), fails(status.DATA_LOSS, 'list: the store is damaged: data loss'));
    });
  });

  it('drains: running calls end, new ones find nobody, a stuck one is cut off', async () => {
    let finish = (): void => undefined;
    let begun = (): void => undefined;
    const started = new Promise<void>((resolve) => (begun = resolve));
    const worker = workerWith({
      cleanup: () =>
        new Promise<void>((resolve) => {
          finish = resolve;
          begun();
        }),
    });
    await serving(worker, async (client, server, _finished, address) => {
      const running = client.call('cleanup', {});
      await started;
      const drained = server.drain(60_000);
      finish();
      await running;
      await drained;
      await assert.rejects(client.call('cleanup', {}), fails(status.UNAVAILABLE, /./));
      await assert.rejects(once(connect(address), 'connect'), { code: 'ENOENT' });
    });
    await serving(workerWith({ cleanup: () => new Promise<void>(() => begun()) }), async (client, server) => {
      const stuck = client.call('cleanup', {}).catch((error: ServiceError) => error.code);
      await started;
      await new Promise((resolve) => setImmediate(resolve));
      await server.drain(20);
      assert.ok([status.CANCELLED, status.UNAVAILABLE].includes((await stuck) as status));
    });
  });

  it('does not mind clients that speak something else or nothing', async () => {
    await serving(workerWith({ cleanup: async () => undefined }), async (client, _server, _finished, address) => {
      const socket: Socket = connect(address);
      await once(socket, 'connect');
      socket.on('error', () => undefined);
      socket.end('GET / HTTP/1.1\r\nHost: x\r\n\r\n\0\0\0');
      const silent = connect(address);
      await once(silent, 'connect');
      await client.call('cleanup', {});
      socket.destroy();
      silent.destroy();
    });
  });
});
