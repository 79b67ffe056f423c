/** A15 and A17: what odd and hostile clients put on the wire gets the answer of the contract (clients-contract §1), and
 * the daemon serves the next call as if nothing had happened. */
import assert from 'node:assert/strict';
import { after, before, describe, it } from 'node:test';
import { create, toBinary } from '@bufbuild/protobuf';
import { EmptySchema } from '@bufbuild/protobuf/wkt';
import { status } from '@grpc/grpc-js';
import {
  CommitSnapshotRequestSchema,
  PrepareSnapshotRequestSchema,
  PrepareSnapshotResponseSchema,
  StatSnapshotRequestSchema,
  UpdateSnapshotRequestSchema,
  UpdateSnapshotResponseSchema,
} from '../../src/gen/services/snapshots/v1/snapshots_pb.js';
import { GivenUp, until } from '../harness/processes.ts';
import { Kind } from '../harness/rpc-client.ts';
import { leftovers } from '../harness/settled.ts';
import { refused, Stand, seededRandom, writableLabel } from './stand.ts';

const { INVALID_ARGUMENT, NOT_FOUND, ALREADY_EXISTS, FAILED_PRECONDITION, RESOURCE_EXHAUSTED, CANCELLED } = status;
/** Go's zero time as containerd sends it in Update. */
const zeroTime = { seconds: -62135596800n, nanos: 0 };

describe('the wire', () => {
  let stand: Stand;
  before(async () => {
    stand = await Stand.start('wire');
  });
  after(async () => {
    await stand[Symbol.asyncDispose]();
  });
  const listed = async (...filters: string[]): Promise<readonly string[]> =>
    (await stand.client.list(...filters)).map((info) => info.name);

  it('times are nanoseconds of the wall clock, equal at birth, and Go zero times in Update are ignored', async () => {
    const from = BigInt(Date.now() - 1) * 1_000_000n;
    await stand.client.prepare('times');
    const born = await stand.client.stat('times');
    const to = BigInt(Date.now() + 1) * 1_000_000n;
    const nanoseconds = (time: { seconds: bigint; nanos: number } | undefined): bigint =>
      (time?.seconds ?? 0n) * 1_000_000_000n + BigInt(time?.nanos ?? 0);
    assert.deepEqual(born.createdAt, born.updatedAt);
    assert.ok(nanoseconds(born.createdAt) >= from && nanoseconds(born.createdAt) <= to);
    const { info } = await stand.client.unary(
      'Update',
      UpdateSnapshotRequestSchema,
      {
        info: {
          name: 'times',
          parent: 'bogus',
          kind: Kind.COMMITTED,
          createdAt: zeroTime,
          updatedAt: zeroTime,
          labels: { a: 'b' },
        },
        updateMask: { paths: ['labels'] },
      },
      UpdateSnapshotResponseSchema,
    );
    assert.deepEqual(info?.createdAt, born.createdAt);
    assert.ok(nanoseconds(info?.updatedAt) >= nanoseconds(born.updatedAt));
    assert.deepEqual([info?.parent, info?.kind, info?.labels], ['', Kind.ACTIVE, { a: 'b' }]);
    await stand.client.remove('times');
  });

  it('labels with an empty value are never stored, whichever verb brings them', async () => {
    await stand.client.prepare('empty', '', { kept: 'x', dropped: '' });
    assert.deepEqual((await stand.client.stat('empty')).labels, { kept: 'x' });
    await stand.client.update('empty', { kept: '', 'with.dots/and-slash': 'y' }, [
      'labels.kept',
      'labels.with.dots/and-slash',
    ]);
    assert.deepEqual((await stand.client.stat('empty')).labels, { 'with.dots/and-slash': 'y' });
    await stand.client.update('empty', { a: '', b: 'c' });
    assert.deepEqual((await stand.client.stat('empty')).labels, { b: 'c' });
    await stand.client.commit('empty-committed', 'empty', { d: '', e: 'f' });
    assert.deepEqual((await stand.client.stat('empty-committed')).labels, { e: 'f' });
    await stand.client.view('empty-view', 'empty-committed', { g: '' });
    assert.deepEqual((await stand.client.stat('empty-view')).labels, {});
    await stand.client.remove('empty-view');
    await stand.client.remove('empty-committed');
  });

  it('only labels can be updated', async () => {
    await stand.client.prepare('immutable', '', { a: 'b' });
    for (const path of ['parent', 'name', 'kind', 'created', 'created_at', '', 'labelsX', 'labels/x']) {
      await refused(stand.client.update('immutable', { x: 'y' }, [path]), INVALID_ARGUMENT);
      await refused(stand.client.update('immutable', { x: 'y' }, ['labels', path]), INVALID_ARGUMENT);
    }
    assert.deepEqual((await stand.client.stat('immutable')).labels, { a: 'b' });
    await refused(stand.client.update('nobody', { x: 'y' }), NOT_FOUND, /nobody/);
    await stand.client.remove('immutable');
  });

  it('a 4 KiB label goes in and out unchanged, by every way', async () => {
    const key = 'containerd.io/snapshot/long';
    const value = 'v'.repeat(4096 - key.length);
    await stand.client.prepare('long-label', '', { [key]: value });
    assert.equal((await stand.client.stat('long-label')).labels[key], value);
    assert.deepEqual(await listed(`labels."${key}"=="${value}"`), ['long-label']);
    await stand.client.remove('long-label');
  });

  it('keys are text, not paths: spaces, slashes, UTF-8, 1 KiB, dots, quotes', async () => {
    const keys = [
      'k8s.io/1/extract-930618236-QmG- sha256:49a8',
      '../../../../etc/passwd',
      '..',
      '.',
      '/',
      '/absolute/path',
      'ключ 钥匙 🔑',
      'e\u0301 is not \u00e9',
      'quote " and \\ backslash',
      "';drop table snapshots;--",
      'new\nline\ttab',
      'x'.repeat(1024),
      'percent%00%2e%2e',
      ' leading and trailing ',
    ];
    for (const key of keys) {
      const mounts = await stand.client.prepare(key);
      assert.match(mounts[0]?.source ?? '', /\/snapshots\/\d+\/fs$/);
      assert.equal((await stand.client.stat(key)).name, key);
      assert.deepEqual(await listed(`name==${JSON.stringify(key)}`), [key]);
      await refused(stand.client.prepare(key), ALREADY_EXISTS);
    }
    for (const key of keys) {
      await stand.client.commit(`committed ${key}`, key);
      await stand.client.remove(`committed ${key}`);
    }
    assert.deepEqual(await listed(), []);
  });

  it('an empty key is refused by every verb', async () => {
    const { client } = stand;
    await refused(client.prepare(''), INVALID_ARGUMENT);
    await refused(client.view(''), INVALID_ARGUMENT);
    for (const call of [client.mounts(''), client.stat(''), client.usage(''), client.remove('')]) {
      const outcome = await call.then(
        () => null,
        (error: { code: status }) => error.code,
      );
      assert.ok(outcome === NOT_FOUND || outcome === INVALID_ARGUMENT, `code ${outcome}`);
    }
  });

  it('unknown fields are ignored', async () => {
    const unknown = Buffer.from([0xfa, 0x3f, 0x03, 0x61, 0x62, 0x63, 0xf0, 0x3f, 0x2a]); // fields 1023 and 1022
    const request = toBinary(
      PrepareSnapshotRequestSchema,
      create(PrepareSnapshotRequestSchema, { key: 'unknown-fields' }),
    );
    await stand.client.raw('Prepare', Buffer.concat([unknown, request, unknown]));
    assert.equal((await stand.client.stat('unknown-fields')).kind, Kind.ACTIVE);
    await stand.client.remove('unknown-fields');
  });

  it('bytes that are no message end the call, not the daemon', async () => {
    const { next } = seededRandom();
    const methods = ['Prepare', 'View', 'Mounts', 'Commit', 'Remove', 'Stat', 'Update', 'Usage', 'Cleanup', 'List'];
    for (let round = 0; round < 200; round++) {
      const bytes = Buffer.from(Array.from({ length: next(64) }, () => next(256)));
      const method = methods[next(methods.length)] ?? 'Stat';
      await stand.client.raw(method, bytes).catch((error: { code: status }) => {
        assert.notEqual(error.code, status.UNAVAILABLE, `${method} ${bytes.toString('hex')}`);
      });
    }
    await refused(stand.client.raw('Nonsense', Buffer.alloc(0)), status.UNIMPLEMENTED);
    await stand.client.cleanup();
    for (const info of await stand.client.list()) await stand.client.remove(info.name);
  });

  it('Commit with a parent rebases a parentless active, and only that', async () => {
    const { client } = stand;
    await client.prepare('base-active');
    await client.commit('base', 'base-active');
    await client.prepare('loose');
    await client.commit('rebased', 'loose', {}, 'base');
    assert.equal((await client.stat('rebased')).parent, 'base');
    await client.prepare('bound', 'base');
    await client.commit('same', 'bound', {}, 'base');
    assert.equal((await client.stat('same')).parent, 'base');
    await client.prepare('other', 'same');
    await refused(client.commit('moved', 'other', {}, 'base'), INVALID_ARGUMENT, /other/);
    await client.prepare('orphan');
    await refused(client.commit('orphaned', 'orphan', {}, 'nobody'), NOT_FOUND, /nobody/);
    await client.prepare('active-parent');
    await refused(client.commit('x', 'orphan', {}, 'active-parent'), INVALID_ARGUMENT);
    for (const key of ['orphan', 'active-parent', 'other', 'same', 'rebased', 'base']) await client.remove(key);
  });

  it('every refusal of the contract has its code and names the snapshot', async () => {
    const { client } = stand;
    await client.prepare('a');
    await refused(client.prepare('a'), ALREADY_EXISTS, /a/);
    await refused(client.view('a'), ALREADY_EXISTS);
    await refused(client.prepare('b', 'nobody'), NOT_FOUND, /nobody/);
    await refused(client.prepare('b', 'a'), INVALID_ARGUMENT, /a/);
    await refused(client.mounts('nobody'), NOT_FOUND, /nobody/);
    await refused(client.commit('c', 'nobody'), NOT_FOUND, /nobody/);
    await refused(client.commit('a', 'a'), ALREADY_EXISTS);
    await client.commit('c', 'a');
    await refused(client.mounts('c'), FAILED_PRECONDITION, /c/);
    await refused(client.commit('d', 'c'), FAILED_PRECONDITION);
    await client.view('v', 'c');
    await refused(client.commit('d', 'v'), FAILED_PRECONDITION);
    await refused(client.remove('c'), FAILED_PRECONDITION, /remove/);
    await client.prepare('e', 'c');
    await refused(client.commit('c', 'e'), ALREADY_EXISTS);
    for (const key of ['e', 'v', 'c']) await client.remove(key);
    for (const call of [client.remove('c'), client.stat('c'), client.usage('c')]) await refused(call, NOT_FOUND, /c/);
  });

  it('filters follow the grammar of containerd, and a bad one is refused', async () => {
    const { client } = stand;
    const dotted = 'containerd.io/snapshot.ref';
    await client.prepare('f-active', '', { plain: 'one', [dotted]: 'sha256:aa' });
    await client.commit('f-base', 'f-active', { [dotted]: 'sha256:aa' });
    await client.prepare('f-1', 'f-base', { plain: 'one' });
    await client.view('f-2', 'f-base', { plain: 'two', 'a.b': 'c' });
    const cases: readonly [readonly string[], readonly string[]][] = [
      [[], ['f-1', 'f-2', 'f-base']],
      [['kind==active'], ['f-1']],
      [['kind==view'], ['f-2']],
      [['kind==Committed'], []],
      [
        ['name==f-1', 'name==f-2'],
        ['f-1', 'f-2'],
      ],
      [['kind!=committed,labels.plain==two'], ['f-2']],
      [['labels.plain'], ['f-1', 'f-2']],
      [['labels.plain!=one'], ['f-2', 'f-base']],
      [['labels.a.b==c'], ['f-2']],
      [['labels."a.b"==c'], ['f-2']],
      [['parent'], ['f-1', 'f-2', 'f-base']],
      [['parent==""'], ['f-base']],
      [['parent!=""'], ['f-1', 'f-2']],
      [[`labels."${dotted}"==sha256:aa,parent==""`], ['f-base']],
      [['name~=^f-[12]$'], ['f-1', 'f-2']],
      [['name~=/f-b.*/'], ['f-base']],
      [['name~=|^f-1$|'], ['f-1']],
      [
        ['name=="f-1"', 'kind==view'],
        ['f-1', 'f-2'],
      ],
      [['name=="\\u0066-1"'], ['f-1']],
      [['nosuchfield==x'], []],
    ];
    for (const [filters, expected] of cases) {
      assert.deepEqual([...(await listed(...filters))].sort(), expected, JSON.stringify(filters));
    }
    for (const bad of [
      'name=',
      'name==',
      '==x',
      'name=="open',
      'name~=(',
      'labels."open==x',
      'name==a b',
      ',',
      'name==a,,kind==view',
      '"',
    ]) {
      await refused(client.list(bad), INVALID_ARGUMENT);
      await refused(client.list('kind==active', bad), INVALID_ARGUMENT);
    }
    for (const key of ['f-1', 'f-2', 'f-base']) await client.remove(key);
  });

  it('hostile labels are refused by a typed error that names the snapshot, and leave nothing', async () => {
    const { client } = stand;
    const prefix = 'containerd.io/snapshot/';
    const writable = { [writableLabel]: 'dir' };
    const hostile: readonly Readonly<Record<string, string>>[] = [
      { [`${prefix}overlay.active.path`]: '../../../../tmp/escape', ...writable },
      { [`${prefix}overlay.active.path`]: 'relative/path', ...writable },
      { [`${prefix}overlay.active.path`]: '/tmp/with\0nul', ...writable },
      { [`${prefix}overlaybd/vsize`]: String(2n ** 63n), ...writable },
      { [`${prefix}overlaybd/vsize`]: '-1', ...writable },
      { [`${prefix}max-size`]: String(2n ** 63n), ...writable },
      { [`${prefix}overlaybd/blob-fs-type`]: 'ext4;;-E root_owner=0:0;rm -rf /', ...writable },
      { [`${prefix}overlaybd/blob-fs-type`]: '../../bin/sh', ...writable },
      { [`${prefix}overlaybd/blob-fs-type`]: 'ext4\0', ...writable },
      { [`${prefix}disk_quota`]: '9'.repeat(40) },
      { 'nul\0in-key': 'x' },
      { 'nul-in-value': 'x\0y' },
    ];
    for (const [index, labels] of hostile.entries()) {
      const key = `hostile-${index}`;
      const text = JSON.stringify(labels);
      const outcome = await client.prepare(key, '', labels).then(
        () => null,
        (error: { code: status; details: string }) => error,
      );
      if (outcome === null) {
        // Ignored or capped as the contract allows: then the snapshot is an ordinary one inside our root.
        for (const mount of await client.mounts(key)) {
          assert.ok(mount.source.startsWith(stand.snapshotter.root) || mount.source.startsWith('/dev/'), text);
        }
        await client.remove(key);
      } else {
        assert.ok(
          [INVALID_ARGUMENT, RESOURCE_EXHAUSTED].includes(outcome.code),
          `${text}: ${status[outcome.code]} ${outcome.details}`,
        );
        assert.match(outcome.details, new RegExp(key), text);
        await refused(client.stat(key), NOT_FOUND);
        // The cause gone, the same key works.
        await client.prepare(key);
        await client.remove(key);
      }
    }
    await client.cleanup();
    await until('nothing is left', async () => (await leftovers(stand.snapshotter, client)).length === 0);
  });

  it('of two calls for one key exactly one wins', async () => {
    const { client } = stand;
    for (let round = 0; round < 20; round++) {
      const outcomes = await Promise.allSettled(Array.from({ length: 8 }, () => client.prepare(`race-${round}`)));
      assert.equal(outcomes.filter(({ status: outcome }) => outcome === 'fulfilled').length, 1);
      for (const outcome of outcomes) {
        if (outcome.status === 'rejected') assert.equal((outcome.reason as { code: status }).code, ALREADY_EXISTS);
      }
      const ends = await Promise.allSettled([
        client.commit(`raced-${round}`, `race-${round}`),
        client.remove(`race-${round}`),
      ]);
      assert.equal(ends.filter(({ status: outcome }) => outcome === 'fulfilled').length, 1);
      await client.remove(`raced-${round}`).catch(() => undefined);
    }
    assert.deepEqual(await listed(), []);
  });

  it('10,000 snapshots are listed, in messages of at most 100', async (t) => {
    const { client } = stand;
    const count = 10_000;
    const began = performance.now();
    await client.prepare('many-active');
    await client.commit('many', 'many-active');
    const names = Array.from({ length: count - 1 }, (_, index) => `many-${index}`);
    for (let start = 0; start < names.length; start += 64) {
      await Promise.all(names.slice(start, start + 64).map((name) => client.prepare(name, 'many', { n: name })));
    }
    const prepared = performance.now();
    const batches = await client.listBatches();
    const found = performance.now();
    assert.ok(batches.every((batch) => batch.length <= 100));
    assert.equal(new Set(batches.flat().map((info) => info.name)).size, count);
    assert.deepEqual(await listed('labels.n==many-77'), ['many-77']);
    const [stat, ...churn] = await Promise.all([
      client.stat('many-5'),
      client.listBatches(),
      ...names.slice(0, 50).map((name) => client.remove(name)),
    ]);
    assert.equal(stat.name, 'many-5');
    assert.equal(churn.length, 51);
    for (let start = 50; start < names.length; start += 64) {
      await Promise.all(names.slice(start, start + 64).map((name) => client.remove(name)));
    }
    await client.remove('many');
    const removed = performance.now();
    using patient = stand.snapshotter.client({ deadlineMs: 600_000 });
    await patient.cleanup();
    t.diagnostic(
      `${count} prepared in ${Math.round(prepared - began)} ms, listed in ${Math.round(found - prepared)} ms, removed in ${Math.round(removed - found)} ms, cleaned up behind that in ${Math.round(performance.now() - removed)} ms`,
    );
  });

  it('headers decide nothing: none, one, several namespaces, a lease', async () => {
    for (const headers of [
      {},
      { 'containerd-namespace': 'k8s.io' },
      { 'containerd-namespace': 'a, b, c', 'containerd-lease': 'no-such-lease' },
      { 'containerd-namespace': '', 'grpc-metadata-x': 'y', 'x-unknown': 'z'.repeat(4000) },
    ]) {
      using other = stand.snapshotter.client({ headers, snapshotter: 'another-name' });
      await other.prepare('headers');
      assert.equal((await stand.client.stat('headers')).name, 'headers');
      await other.remove('headers');
    }
  });

  it('a cancelled call leaves either nothing or a snapshot that can be used', async () => {
    const { client } = stand;
    const { next } = seededRandom();
    for (let round = 0; round < 12; round++) {
      const key = `cancelled-${round}`;
      const cancel = new AbortController();
      const call = client.unary(
        'Prepare',
        PrepareSnapshotRequestSchema,
        { key, labels: { [writableLabel]: round % 2 === 0 ? 'dir' : 'dev' } },
        PrepareSnapshotResponseSchema,
        cancel.signal,
      );
      const outcome = call.then(
        () => status.OK,
        (error: { code: status }) => error.code,
      );
      setTimeout(() => cancel.abort(), next(150));
      const code = await outcome;
      assert.ok(code === CANCELLED || code === status.OK, status[code]);
      // Whatever became of it: once its undoing is done, the key is either in use and usable, or free again.
      await until(`${key} is settled`, async () => {
        const labels = { [writableLabel]: round % 2 === 0 ? 'dir' : 'dev' };
        const again = await client.prepare(key, '', labels).then(
          () => status.OK,
          (error: { code: status }) => error.code,
        );
        if (again !== status.OK && again !== ALREADY_EXISTS) throw new GivenUp(`${key}: ${status[again]}`);
        return (await client.mounts(key)).length === 1;
      });
      await client.remove(key);
    }
    await client.cleanup();
    await until('nothing is left', async () => (await leftovers(stand.snapshotter, client)).length === 0);
  });

  it('messages up to 16 MiB are taken, larger ones refused without losing the connection', async () => {
    const { client } = stand;
    const filler = (bytes: number): Uint8Array => {
      // One unknown length-delimited field (number 1023).
      const head = Buffer.from([0xfa, 0x3f, 0, 0, 0, 0]);
      for (let rest = bytes - 6, at = 2; at < 6; at++, rest = Math.floor(rest / 128))
        head[at] = (rest % 128) | (at < 5 ? 0x80 : 0);
      return Buffer.concat([head, Buffer.alloc(bytes - 6)]);
    };
    const stat = toBinary(StatSnapshotRequestSchema, create(StatSnapshotRequestSchema, { key: 'big' }));
    await client.prepare('big');
    await client.raw('Stat', Buffer.concat([filler((16 << 20) - stat.length), stat]));
    // Our own client refuses to send more than that; one without a limit meets the daemon's.
    using unlimited = stand.snapshotter.client({ messageMax: 64 << 20 });
    await refused(unlimited.raw('Stat', Buffer.concat([filler(17 << 20), stat])), RESOURCE_EXHAUSTED);
    assert.equal((await unlimited.stat('big')).name, 'big');
    await client.remove('big');
  });

  it('a thousand calls at once on one connection are all answered', async () => {
    const { client } = stand;
    await client.prepare('crowd');
    const stats = await Promise.all(Array.from({ length: 1000 }, () => client.stat('crowd')));
    assert.equal(stats.length, 1000);
    const list = await Promise.all(Array.from({ length: 50 }, () => client.list()));
    assert.ok(list.every((infos) => infos.length === 1));
    await client.remove('crowd');
  });

  it('Commit keeps nothing of the labels of the active, and its parent', async () => {
    const { client } = stand;
    await client.prepare('labels', '', { 'containerd.io/snapshot/a': 'b' });
    await client.unary(
      'Commit',
      CommitSnapshotRequestSchema,
      { name: 'labels-committed', key: 'labels', labels: { c: 'd' } },
      EmptySchema,
    );
    const info = await client.stat('labels-committed');
    assert.deepEqual([info.labels, info.parent, info.kind], [{ c: 'd' }, '', Kind.COMMITTED]);
    await client.remove('labels-committed');
  });

  it('the log of all this holds no protocol error and no internal one', () => {
    const log = stand.snapshotter.daemon.log();
    assert.doesNotMatch(log, /PROTOCOL_ERROR|ERR_HTTP2|unhandled|uncaught/i);
    assert.equal(stand.snapshotter.daemon.exit, null);
  });
});
