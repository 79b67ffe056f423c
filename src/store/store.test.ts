/** Invariants: ids are decimal and never given out twice; names are unique until removed on paper; a transaction is all
 * or nothing; pages are in byte order; what was written is there after closing and opening again. */
import assert from 'node:assert/strict';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { DatabaseSync } from 'node:sqlite';
import { after, describe, it } from 'node:test';
import { ErrorKind, SnapshotterError } from '../base/errors.ts';
import { MemoryStore } from './memory-store.ts';
import { schemaVersion } from './schema.ts';
import { SqliteStore } from './sqlite-store.ts';
import type { DeviceRow, NewSnapshotRow, Store } from './store.ts';

const scratch = mkdtempSync(join(tmpdir(), 'store-test-'));
after(() => rmSync(scratch, { recursive: true, force: true }));
let files = 0;
const freshPath = (): string => {
  files += 1;
  return join(scratch, `${files}.sqlite`);
};

const row = (name: string | null, change: Partial<NewSnapshotRow> = {}): NewSnapshotRow => ({
  name,
  kind: 'active',
  parentId: null,
  labels: {},
  createdAt: 1n,
  updatedAt: 1n,
  state: 'absent',
  intent: null,
  failure: null,
  storage: 'directory',
  mode: 'overlayfs',
  recipe: '{}',
  plan: '{}',
  fileSystem: null,
  usageBytes: null,
  usageInodes: null,
  deviceId: null,
  activePath: null,
  ...change,
});

const device: DeviceRow = {
  id: '3-ro',
  snapshotId: '3',
  state: 'attached',
  intent: null,
  failure: null,
  readOnly: true,
  bootId: 'b',
  path: '/dev/loop7',
  major: 7,
  minor: 7,
  fileSystem: null,
};

const isKind = (kind: ErrorKind) => (error: unknown) => error instanceof SnapshotterError && error.kind === kind;

const stores: Readonly<Record<string, () => Store>> = {
  'the memory store': () => new MemoryStore(),
  'the SQLite store': () => new SqliteStore(freshPath()),
};

for (const [title, open] of Object.entries(stores)) {
  describe(title, () => {
    it('answers nothing when empty', () => {
      const store = open();
      assert.equal(store.snapshot('1'), null);
      assert.equal(store.named('a'), null);
      assert.deepEqual(store.page('', 10), []);
      assert.deepEqual(store.unsettled(), []);
      assert.deepEqual(store.devices(), []);
      assert.deepEqual(store.count(), { snapshots: 0, unsettled: 0 });
      store.close();
    });

    it('returns what was stored, nanoseconds and odd labels included', () => {
      const store = open();
      const labels = { 'containerd.io/gc.root': 'x', 'a "b" \u{1f600}': "'; DROP TABLE snapshots" };
      const added = store.addSnapshot(row('k', { labels, createdAt: 1_790_000_000_123_456_789n, updatedAt: 7n }));
      assert.deepEqual(store.named('k'), added);
      assert.deepEqual(added.labels, labels);
      assert.equal(added.createdAt, 1_790_000_000_123_456_789n);
      assert.equal(added.parentName, '');
      store.close();
    });

    it('never gives out an id twice', () => {
      const store = open();
      const first = store.addSnapshot(row('a'));
      store.dropSnapshot(first.id);
      const second = store.addSnapshot(row('a'));
      assert.ok(BigInt(second.id) > BigInt(first.id));
      store.raiseIds(100n);
      assert.equal(store.addSnapshot(row('b')).id, '101');
      store.raiseIds(5n);
      assert.equal(store.addSnapshot(row('c')).id, '102');
      store.close();
    });

    it('raises ids before the first row, too', () => {
      const store = open();
      store.raiseIds(41n);
      assert.equal(store.addSnapshot(row('a')).id, '42');
      store.close();
    });

    it('refuses a name in use, and frees it when the row is removed on paper', () => {
      const store = open();
      const first = store.addSnapshot(row('a'));
      assert.throws(() => store.addSnapshot(row('a')), isKind(ErrorKind.AlreadyExists));
      store.changeSnapshot(first.id, { name: null });
      const second = store.addSnapshot(row('a'));
      store.changeSnapshot(second.id, { name: null });
      assert.equal(store.named('a'), null);
      assert.deepEqual(
        store.unsettled().map(({ id }) => id),
        [first.id, second.id],
      );
      store.close();
    });

    it('refuses two snapshots in one active path', () => {
      const store = open();
      store.addSnapshot(row('a', { activePath: '/d' }));
      assert.throws(() => store.addSnapshot(row('b', { activePath: '/d' })), isKind(ErrorKind.AlreadyExists));
      assert.equal(store.activePathUser('/d')?.name, 'a');
      store.close();
    });

    it('rolls a failed transaction back', () => {
      const store = open();
      const kept = store.addSnapshot(row('kept', { labels: { a: '1' } }));
      assert.throws(
        () =>
          store.transaction(() => {
            store.addSnapshot(row('lost'));
            store.changeSnapshot(kept.id, { name: 'renamed', labels: {} });
            store.putDevice(device);
            store.dropSnapshot(kept.id);
            throw new Error('stop');
          }),
        /stop/,
      );
      assert.deepEqual(store.named('kept'), kept);
      assert.equal(store.named('lost'), null);
      assert.equal(store.device('3-ro'), null);
      assert.equal(
        store.transaction(() => store.count().snapshots),
        1,
      );
      store.close();
    });

    it('walks ancestors nearest first and children by id', () => {
      const store = open();
      const base = store.addSnapshot(row('base'));
      const middle = store.addSnapshot(row('middle', { parentId: base.id }));
      const top = store.addSnapshot(row('top', { parentId: middle.id }));
      const gone = store.addSnapshot(row(null, { parentId: base.id }));
      assert.equal(top.parentName, 'middle');
      assert.deepEqual(
        store.ancestors(top.id).map(({ name }) => name),
        ['middle', 'base'],
      );
      assert.deepEqual(store.ancestors(base.id), []);
      assert.deepEqual(
        store.children(base.id).map(({ id }) => id),
        [middle.id, gone.id],
      );
      store.close();
    });

    it('pages in byte order of the names', () => {
      const store = open();
      const names = ['b', 'a', 'Z', 'a/b', '\u{ffff}', '\u{1f600}', 'é', 'a b'];
      for (const name of names) store.addSnapshot(row(name));
      const sorted = [...names].sort((left, right) => Buffer.compare(Buffer.from(left), Buffer.from(right)));
      const seen: string[] = [];
      for (let last = ''; ; ) {
        const page = store.page(last, 3);
        for (const { name } of page) seen.push(name ?? '');
        last = seen.at(-1) ?? '';
        if (page.length < 3) break;
      }
      assert.deepEqual(seen, sorted);
      store.close();
    });

    it('counts the users of a device without those removed on paper', () => {
      const store = open();
      store.addSnapshot(row('a', { deviceId: '3-ro' }));
      store.addSnapshot(row(null, { deviceId: '3-ro' }));
      assert.deepEqual(
        store.usersOf('3-ro').map(({ name }) => name),
        ['a'],
      );
      store.close();
    });

    it('keeps devices', () => {
      const store = open();
      store.putDevice(device);
      store.putDevice({ ...device, state: 'mounted', fileSystem: '{"type":"ext4"}' });
      assert.deepEqual(store.devices(), [{ ...device, state: 'mounted', fileSystem: '{"type":"ext4"}' }]);
      store.dropDevice('3-ro');
      assert.equal(store.device('3-ro'), null);
      store.close();
    });
  });
}

describe('the SQLite file', () => {
  it('keeps rows and the last id over a restart', () => {
    const path = freshPath();
    const first = new SqliteStore(path);
    const kept = first.addSnapshot(row('kept', { intent: 'commit' }));
    const gone = first.addSnapshot(row('gone'));
    first.dropSnapshot(gone.id);
    first.close();
    first.close();
    const second = new SqliteStore(path);
    assert.deepEqual(second.named('kept'), kept);
    assert.deepEqual(second.unsettled(), [kept]);
    assert.ok(BigInt(second.addSnapshot(row('next')).id) > BigInt(gone.id));
    second.close();
  });

  it('writes through to the disk at every commit', () => {
    const path = freshPath();
    const store = new SqliteStore(path);
    store.close();
    const raw = new DatabaseSync(path);
    assert.equal(raw.prepare('PRAGMA journal_mode').get()?.['journal_mode'], 'wal');
    assert.equal(raw.prepare('PRAGMA user_version').get()?.['user_version'], schemaVersion);
    raw.close();
  });

  it('refuses a file of a newer version', () => {
    const path = freshPath();
    const raw = new DatabaseSync(path);
    raw.exec(`PRAGMA user_version = ${schemaVersion + 1}`);
    raw.close();
    assert.throws(() => new SqliteStore(path), isKind(ErrorKind.FailedPrecondition));
  });

  it('refuses a file that is no database', () => {
    const path = freshPath();
    writeFileSync(path, 'not a database, but long enough to be looked at as one'.repeat(40));
    assert.throws(() => new SqliteStore(path), isKind(ErrorKind.DataLoss));
  });
});
