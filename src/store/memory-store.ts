/** The store of the tests: the same behaviour as sqlite-store.ts without a disk.
 * Faults it can inject: `failNext(error)` makes the next write fail, as a full disk would. */
import { ErrorKind, SnapshotterError } from '../base/errors.ts';
import type { DeviceRow, NewSnapshotRow, SnapshotChange, SnapshotRow, Store } from './store.ts';

type Stored = Omit<SnapshotRow, 'parentName'>;

const byteOrder = (left: string, right: string): number => Buffer.compare(Buffer.from(left), Buffer.from(right));
const byId = (left: SnapshotRow, right: SnapshotRow): number => Number(BigInt(left.id) - BigInt(right.id));

export class MemoryStore implements Store {
  readonly #rows = new Map<string, Stored>();
  readonly #names = new Map<string, string>();
  readonly #devices = new Map<string, DeviceRow>();
  #sorted: readonly string[] | null = null;
  #lastId = 0n;
  #undo: (() => void)[] | null = null;
  #fault: Error | null = null;

  failNext(error: Error): void {
    this.#fault = error;
  }

  transaction<T>(body: () => T): T {
    if (this.#undo !== null) throw new Error('store: a transaction is open already');
    const undo: (() => void)[] = [];
    this.#undo = undo;
    try {
      return body();
    } catch (error) {
      for (const step of undo.reverse()) step();
      throw error;
    } finally {
      this.#undo = null;
    }
  }

  addSnapshot(row: NewSnapshotRow): SnapshotRow {
    this.#write();
    this.#lastId += 1n;
    const stored: Stored = { ...row, id: String(this.#lastId), labels: { ...row.labels } };
    this.#check(stored);
    this.#set(stored.id, stored);
    return this.#joined(stored);
  }

  changeSnapshot(id: string, change: SnapshotChange): SnapshotRow {
    this.#write();
    const before = this.#rows.get(id);
    if (before === undefined) throw new SnapshotterError(ErrorKind.Internal, `store: snapshot ${id} is gone`);
    const after: Stored = { ...before, ...change };
    this.#check(after);
    this.#set(id, after);
    return this.#joined(after);
  }

  dropSnapshot(id: string): void {
    this.#write();
    if (this.children(id).length > 0) throw new SnapshotterError(ErrorKind.AlreadyExists, 'store: still a parent');
    this.#set(id, null);
  }

  snapshot(id: string): SnapshotRow | null {
    const stored = this.#rows.get(id);
    return stored === undefined ? null : this.#joined(stored);
  }

  named(name: string): SnapshotRow | null {
    const id = this.#names.get(name);
    return id === undefined ? null : this.snapshot(id);
  }

  ancestors(id: string): readonly SnapshotRow[] {
    const chain: SnapshotRow[] = [];
    for (let next = this.#rows.get(id)?.parentId ?? null; next !== null; ) {
      const row = this.snapshot(next);
      if (row === null) break;
      chain.push(row);
      next = row.parentId;
    }
    return chain;
  }

  children(id: string): readonly SnapshotRow[] {
    return this.#select((row) => row.parentId === id);
  }

  page(after: string, limit: number): readonly SnapshotRow[] {
    this.#sorted ??= [...this.#names.keys()].sort(byteOrder);
    const sorted = this.#sorted;
    let low = 0;
    for (let high = sorted.length; low < high; ) {
      const middle = (low + high) >>> 1;
      if (byteOrder(sorted[middle] ?? '', after) <= 0) low = middle + 1;
      else high = middle;
    }
    return sorted.slice(low, low + limit).flatMap((name) => this.named(name) ?? []);
  }

  unsettled(): readonly SnapshotRow[] {
    return this.#select((row) => row.intent !== null || row.name === null);
  }

  usersOf(deviceId: string): readonly SnapshotRow[] {
    return this.#select((row) => row.deviceId === deviceId && row.name !== null);
  }

  activePathUser(path: string): SnapshotRow | null {
    return this.#select((row) => row.activePath === path)[0] ?? null;
  }

  count(): { readonly snapshots: number; readonly unsettled: number } {
    return { snapshots: this.#names.size, unsettled: this.unsettled().length };
  }

  raiseIds(floor: bigint): void {
    if (floor > this.#lastId) this.#lastId = floor;
  }

  device(id: string): DeviceRow | null {
    return this.#devices.get(id) ?? null;
  }

  putDevice(row: DeviceRow): void {
    this.#write();
    this.#setDevice(row.id, { ...row });
  }

  dropDevice(id: string): void {
    this.#write();
    this.#setDevice(id, null);
  }

  devices(): readonly DeviceRow[] {
    return [...this.#devices.values()].sort((left, right) => byteOrder(left.id, right.id));
  }

  close(): void {}

  #write(): void {
    const fault = this.#fault;
    this.#fault = null;
    if (fault !== null) throw fault;
  }

  #check(row: Stored): void {
    const holder = row.name === null ? undefined : this.#names.get(row.name);
    if (holder !== undefined && holder !== row.id) {
      throw new SnapshotterError(ErrorKind.AlreadyExists, 'store: the name is in use');
    }
    const sharer = row.activePath === null ? null : this.activePathUser(row.activePath);
    if (sharer !== null && sharer.id !== row.id) {
      throw new SnapshotterError(ErrorKind.AlreadyExists, 'store: the directory is in use');
    }
    if (row.parentId !== null && !this.#rows.has(row.parentId)) {
      throw new SnapshotterError(ErrorKind.AlreadyExists, 'store: no such parent');
    }
  }

  #set(id: string, row: Stored | null): void {
    const before = this.#rows.get(id) ?? null;
    this.#place(id, before, row);
    this.#undo?.push(() => this.#place(id, row, before));
  }

  #place(id: string, before: Stored | null, after: Stored | null): void {
    if (before?.name !== after?.name) this.#sorted = null;
    if (before !== null && before.name !== null) this.#names.delete(before.name);
    if (after === null) this.#rows.delete(id);
    else this.#rows.set(id, after);
    if (after !== null && after.name !== null) this.#names.set(after.name, id);
  }

  #setDevice(id: string, row: DeviceRow | null): void {
    const before = this.#devices.get(id) ?? null;
    const place = (next: DeviceRow | null): void => {
      if (next === null) this.#devices.delete(id);
      else this.#devices.set(id, next);
    };
    place(row);
    this.#undo?.push(() => place(before));
  }

  #joined(row: Stored): SnapshotRow {
    const parent = row.parentId === null ? undefined : this.#rows.get(row.parentId);
    return { ...row, parentName: parent?.name ?? '' };
  }

  #select(accept: (row: Stored) => boolean): readonly SnapshotRow[] {
    return [...this.#rows.values()]
      .filter(accept)
      .map((row) => this.#joined(row))
      .sort(byId);
  }
}
