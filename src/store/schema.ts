/** The tables of snapshots.sqlite and how an older file becomes a current one. A version is never edited, only followed.
 * STRICT tables: a value of the wrong type is an error, not a surprise. AUTOINCREMENT: an id is never given out twice. */
import type { DatabaseSync } from 'node:sqlite';
import { ErrorKind, SnapshotterError } from '../base/errors.ts';

const migrations: readonly string[] = [
  `CREATE TABLE snapshots (
     id INTEGER PRIMARY KEY AUTOINCREMENT,
     name TEXT UNIQUE,
     kind TEXT NOT NULL CHECK (kind IN ('view', 'active', 'committed')),
     parent_id INTEGER REFERENCES snapshots (id),
     labels TEXT NOT NULL,
     created_at INTEGER NOT NULL,
     updated_at INTEGER NOT NULL,
     state TEXT NOT NULL,
     intent TEXT,
     failure TEXT,
     storage TEXT NOT NULL CHECK (storage IN ('directory', 'block', 'remote')),
     mode TEXT NOT NULL,
     recipe TEXT NOT NULL,
     plan TEXT NOT NULL,
     file_system TEXT,
     usage_bytes INTEGER,
     usage_inodes INTEGER,
     device_id TEXT,
     active_path TEXT UNIQUE
   ) STRICT;
   CREATE INDEX snapshots_by_parent ON snapshots (parent_id);
   CREATE INDEX snapshots_by_device ON snapshots (device_id) WHERE device_id IS NOT NULL;
   CREATE INDEX snapshots_unsettled ON snapshots (id) WHERE intent IS NOT NULL OR name IS NULL;
   CREATE TABLE devices (
     id TEXT PRIMARY KEY,
     snapshot_id INTEGER NOT NULL,
     state TEXT NOT NULL,
     intent TEXT,
     failure TEXT,
     read_only INTEGER NOT NULL,
     boot_id TEXT NOT NULL,
     path TEXT NOT NULL,
     major INTEGER NOT NULL,
     minor INTEGER NOT NULL,
     file_system TEXT
   ) STRICT;`,
];

export const schemaVersion = migrations.length;

/** Brings the file to the current version, each step in its own transaction. FailedPrecondition for a newer file. */
export function migrate(database: DatabaseSync): void {
  const row = database.prepare('PRAGMA user_version').get();
  const found = Number(row?.['user_version'] ?? 0);
  if (found > schemaVersion) {
    throw new SnapshotterError(
      ErrorKind.FailedPrecondition,
      `snapshots.sqlite has schema ${found}; this version knows schemas up to ${schemaVersion}`,
    );
  }
  for (const [step, statements] of migrations.entries()) {
    if (step < found) continue;
    database.exec(`BEGIN IMMEDIATE; ${statements} PRAGMA user_version = ${step + 1}; COMMIT;`);
  }
}
