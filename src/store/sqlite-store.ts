/** The durable store: one SQLite file, WAL, synchronous=FULL. One connection, used from one thread. */
import { DatabaseSync, type SQLInputValue, type SQLOutputValue, type StatementSync } from 'node:sqlite';
import { ErrorKind, SnapshotterError } from '../base/errors.ts';
import { migrate } from './schema.ts';
import type { DeviceRow, NewSnapshotRow, RowKind, RowStorage, SnapshotChange, SnapshotRow, Store } from './store.ts';

type Record_ = Readonly<Record<string, SQLOutputValue>>;

const columns: Readonly<Record<keyof NewSnapshotRow, string>> = {
  name: 'name',
  kind: 'kind',
  parentId: 'parent_id',
  labels: 'labels',
  createdAt: 'created_at',
  updatedAt: 'updated_at',
  state: 'state',
  intent: 'intent',
  failure: 'failure',
  storage: 'storage',
  mode: 'mode',
  recipe: 'recipe',
  plan: 'plan',
  fileSystem: 'file_system',
  usageBytes: 'usage_bytes',
  usageInodes: 'usage_inodes',
  deviceId: 'device_id',
  activePath: 'active_path',
};
const fields = Object.keys(columns) as (keyof NewSnapshotRow)[];
const selection = 'SELECT s.*, p.name AS parent_name FROM snapshots s LEFT JOIN snapshots p ON p.id = s.parent_id';

const text = (value: SQLOutputValue | undefined): string => {
  if (typeof value !== 'string') throw new SnapshotterError(ErrorKind.DataLoss, 'snapshots.sqlite: text expected');
  return value;
};
const integer = (value: SQLOutputValue | undefined): bigint => {
  if (typeof value !== 'bigint') throw new SnapshotterError(ErrorKind.DataLoss, 'snapshots.sqlite: integer expected');
  return value;
};
const orNull = <T>(value: SQLOutputValue | undefined, read: (value: SQLOutputValue | undefined) => T): T | null =>
  value === null || value === undefined ? null : read(value);

function toRow(record: Record_): SnapshotRow {
  return {
    id: String(integer(record['id'])),
    name: orNull(record['name'], text),
    kind: text(record['kind']) as RowKind,
    parentId: orNull(record['parent_id'], (value) => String(integer(value))),
    parentName: orNull(record['parent_name'], text) ?? '',
    labels: JSON.parse(text(record['labels'])) as Record<string, string>,
    createdAt: integer(record['created_at']),
    updatedAt: integer(record['updated_at']),
    state: text(record['state']),
    intent: orNull(record['intent'], text),
    failure: orNull(record['failure'], text),
    storage: text(record['storage']) as RowStorage,
    mode: text(record['mode']),
    recipe: text(record['recipe']),
    plan: text(record['plan']),
    fileSystem: orNull(record['file_system'], text),
    usageBytes: orNull(record['usage_bytes'], integer),
    usageInodes: orNull(record['usage_inodes'], integer),
    deviceId: orNull(record['device_id'], text),
    activePath: orNull(record['active_path'], text),
  };
}

function toDevice(record: Record_): DeviceRow {
  return {
    id: text(record['id']),
    snapshotId: String(integer(record['snapshot_id'])),
    state: text(record['state']),
    intent: orNull(record['intent'], text),
    failure: orNull(record['failure'], text),
    readOnly: integer(record['read_only']) !== 0n,
    bootId: text(record['boot_id']),
    path: text(record['path']),
    major: Number(integer(record['major'])),
    minor: Number(integer(record['minor'])),
    fileSystem: orNull(record['file_system'], text),
  };
}

function bind(field: keyof NewSnapshotRow, value: NewSnapshotRow[keyof NewSnapshotRow]): SQLInputValue {
  if (field === 'labels') return JSON.stringify(value);
  if (field === 'parentId') return value === null ? null : BigInt(value as string);
  return value as SQLInputValue;
}

export class SqliteStore implements Store {
  readonly #database: DatabaseSync;
  readonly #statements = new Map<string, StatementSync>();

  /** Opens or creates the file. Internal when it can't be opened; DataLoss when it is no database. */
  constructor(path: string) {
    try {
      this.#database = new DatabaseSync(path);
      this.#database.exec('PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;');
      migrate(this.#database);
    } catch (error) {
      throw storeError(`open ${path}`, error);
    }
  }

  transaction<T>(body: () => T): T {
    this.#exec('BEGIN IMMEDIATE');
    try {
      const result = body();
      this.#exec('COMMIT');
      return result;
    } catch (error) {
      // A full disk makes SQLite roll back by itself; then there is nothing left to roll back.
      if (this.#database.isTransaction) this.#exec('ROLLBACK');
      throw error;
    }
  }

  addSnapshot(row: NewSnapshotRow): SnapshotRow {
    const sql = `INSERT INTO snapshots (${fields.map((field) => columns[field]).join(', ')})
      VALUES (${fields.map(() => '?').join(', ')})`;
    const { lastInsertRowid } = this.#run(
      sql,
      fields.map((field) => bind(field, row[field])),
    );
    return this.#present(String(lastInsertRowid));
  }

  changeSnapshot(id: string, change: SnapshotChange): SnapshotRow {
    const changed = fields.filter((field) => field in change);
    if (changed.length > 0) {
      const values = changed.map((field) => bind(field, change[field] ?? null));
      const sql = `UPDATE snapshots SET ${changed.map((field) => `${columns[field]} = ?`).join(', ')} WHERE id = ?`;
      this.#run(sql, [...values, BigInt(id)]);
    }
    return this.#present(id);
  }

  dropSnapshot(id: string): void {
    this.#run('DELETE FROM snapshots WHERE id = ?', [BigInt(id)]);
  }

  snapshot(id: string): SnapshotRow | null {
    return this.#one(`${selection} WHERE s.id = ?`, [BigInt(id)]);
  }

  named(name: string): SnapshotRow | null {
    return this.#one(`${selection} WHERE s.name = ?`, [name]);
  }

  ancestors(id: string): readonly SnapshotRow[] {
    return this.#all(
      `WITH RECURSIVE chain (id, depth) AS (
         SELECT parent_id, 1 FROM snapshots WHERE id = ? AND parent_id IS NOT NULL
         UNION ALL
         SELECT s.parent_id, depth + 1 FROM chain JOIN snapshots s ON s.id = chain.id WHERE s.parent_id IS NOT NULL
       )
       SELECT s.*, p.name AS parent_name FROM chain JOIN snapshots s ON s.id = chain.id
       LEFT JOIN snapshots p ON p.id = s.parent_id ORDER BY chain.depth`,
      [BigInt(id)],
    );
  }

  children(id: string): readonly SnapshotRow[] {
    return this.#all(`${selection} WHERE s.parent_id = ? ORDER BY s.id`, [BigInt(id)]);
  }

  page(after: string, limit: number): readonly SnapshotRow[] {
    return this.#all(`${selection} WHERE s.name > ? ORDER BY s.name LIMIT ?`, [after, limit]);
  }

  unsettled(): readonly SnapshotRow[] {
    return this.#all(`${selection} WHERE s.intent IS NOT NULL OR s.name IS NULL ORDER BY s.id`, []);
  }

  usersOf(deviceId: string): readonly SnapshotRow[] {
    return this.#all(`${selection} WHERE s.device_id = ? AND s.name IS NOT NULL ORDER BY s.id`, [deviceId]);
  }

  activePathUser(path: string): SnapshotRow | null {
    return this.#one(`${selection} WHERE s.active_path = ?`, [path]);
  }

  count(): { readonly snapshots: number; readonly unsettled: number } {
    const number = (sql: string): number => Number(integer(this.#prepare(sql).get()?.['n']));
    return {
      snapshots: number('SELECT count(*) AS n FROM snapshots WHERE name IS NOT NULL'),
      unsettled: number('SELECT count(*) AS n FROM snapshots WHERE intent IS NOT NULL OR name IS NULL'),
    };
  }

  raiseIds(floor: bigint): void {
    // sqlite_sequence has no row until the first insert.
    this.#run(
      "INSERT INTO sqlite_sequence (name, seq) SELECT 'snapshots', 0 WHERE NOT EXISTS (SELECT 1 FROM sqlite_sequence WHERE name = 'snapshots')",
      [],
    );
    this.#run("UPDATE sqlite_sequence SET seq = max(seq, ?) WHERE name = 'snapshots'", [floor]);
  }

  device(id: string): DeviceRow | null {
    const record = this.#prepare('SELECT * FROM devices WHERE id = ?').get(id);
    return record === undefined ? null : toDevice(record);
  }

  putDevice(row: DeviceRow): void {
    this.#run('INSERT OR REPLACE INTO devices VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)', [
      row.id,
      BigInt(row.snapshotId),
      row.state,
      row.intent,
      row.failure,
      row.readOnly ? 1 : 0,
      row.bootId,
      row.path,
      row.major,
      row.minor,
      row.fileSystem,
    ]);
  }

  dropDevice(id: string): void {
    this.#run('DELETE FROM devices WHERE id = ?', [id]);
  }

  devices(): readonly DeviceRow[] {
    return this.#prepare('SELECT * FROM devices ORDER BY id').all().map(toDevice);
  }

  close(): void {
    if (this.#database.isOpen) this.#database.close();
  }

  #present(id: string): SnapshotRow {
    const row = this.snapshot(id);
    if (row === null) throw new SnapshotterError(ErrorKind.Internal, `store: snapshot ${id} is gone`);
    return row;
  }

  #one(sql: string, values: readonly SQLInputValue[]): SnapshotRow | null {
    const record = this.#prepare(sql).get(...values);
    return record === undefined ? null : toRow(record);
  }

  #all(sql: string, values: readonly SQLInputValue[]): readonly SnapshotRow[] {
    return this.#prepare(sql)
      .all(...values)
      .map(toRow);
  }

  #run(sql: string, values: readonly SQLInputValue[]): { readonly lastInsertRowid: number | bigint } {
    try {
      return this.#prepare(sql).run(...values);
    } catch (error) {
      throw storeError('store', error);
    }
  }

  #exec(sql: string): void {
    try {
      this.#database.exec(sql);
    } catch (error) {
      throw storeError(`store: ${sql.toLowerCase()}`, error);
    }
  }

  #prepare(sql: string): StatementSync {
    let statement = this.#statements.get(sql);
    if (statement === undefined) {
      statement = this.#database.prepare(sql);
      statement.setReadBigInts(true);
      this.#statements.set(sql, statement);
    }
    return statement;
  }
}

/** SQLite's result codes; see sqlite.org/rescode.html. */
const resultCode = { full: 13, corrupt: 11, notADatabase: 26, constraint: 19 } as const;

function storeError(context: string, error: unknown): SnapshotterError {
  if (error instanceof SnapshotterError) return error;
  const code = error instanceof Error && 'errcode' in error ? Number(error.errcode) & 0xff : 0;
  const kinds: Readonly<Record<number, ErrorKind>> = {
    [resultCode.full]: ErrorKind.ResourceExhausted,
    [resultCode.corrupt]: ErrorKind.DataLoss,
    [resultCode.notADatabase]: ErrorKind.DataLoss,
    [resultCode.constraint]: ErrorKind.AlreadyExists,
  };
  const message = error instanceof Error ? error.message : String(error);
  return new SnapshotterError(kinds[code] ?? ErrorKind.Internal, `${context}: ${message}`, { cause: error });
}
