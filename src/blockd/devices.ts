/** The devices this process serves. Holds no decisions: opens and closes when told, says what there is. */
import { ErrorKind, SnapshotterError } from '../base/errors.ts';
import type { Native, NativeDevice } from '../engine/native.ts';
import { fromNative } from '../engine/native-errors.ts';

export interface DeviceRequest {
  readonly owner: string;
  readonly id: string;
  readonly configPath: string;
  readonly sectorSizeBytes: number;
  readonly readOnly: boolean;
}

export interface ServedDevice {
  readonly request: DeviceRequest;
  readonly native: NativeDevice;
}

export interface DeviceSettings {
  /** What the names of all devices of this run directory begin with; a counter follows. */
  readonly namePrefix: string;
  readonly threads: number;
  readonly directIo: boolean;
  readonly runDir: string;
}

type Slot =
  | { readonly state: 'opening'; readonly request: DeviceRequest; readonly opened: Promise<ServedDevice> }
  | { readonly state: 'serving'; readonly device: ServedDevice }
  | { readonly state: 'closing'; readonly closed: Promise<void> };

/** Confined to the event loop. */
export class DeviceRegistry {
  readonly #native: Native;
  readonly #settings: DeviceSettings;
  readonly #slots = new Map<string, Slot>();
  #opened = 0;
  #draining = false;
  #onEmpty: (() => void) | null = null;

  constructor(native: Native, settings: DeviceSettings) {
    this.#native = native;
    this.#settings = settings;
  }

  get size(): number {
    return this.#slots.size;
  }

  /** Idempotent for an equal request, which joins one under way. FailedPrecondition: the id serves something else. */
  async attach(request: DeviceRequest): Promise<ServedDevice> {
    const key = slotKey(request);
    for (;;) {
      const slot = this.#slots.get(key);
      if (slot === undefined) return this.#open(key, request);
      if (slot.state === 'closing') {
        await settled(slot.closed);
        continue;
      }
      const there = slot.state === 'opening' ? slot.request : slot.device.request;
      if (!sameRequest(there, request)) {
        throw new SnapshotterError(
          ErrorKind.FailedPrecondition,
          `device ${request.id}: already attached with ${there.configPath}${there.readOnly ? ' read-only' : ''}`,
        );
      }
      return slot.state === 'opening' ? slot.opened : slot.device;
    }
  }

  /** Unknown = success. FailedPrecondition when held open and !force; the device then goes on. */
  detach(owner: string, id: string, force: boolean): Promise<void> {
    return this.#detach(slotKey({ owner, id }), force);
  }

  async #detach(key: string, force: boolean): Promise<void> {
    for (;;) {
      const slot = this.#slots.get(key);
      if (slot === undefined) return;
      if (slot.state === 'serving') return this.#close(key, slot.device, force);
      await settled(slot.state === 'opening' ? slot.opened : slot.closed);
    }
  }

  find(owner: string, id: string): ServedDevice | null {
    const slot = this.#slots.get(slotKey({ owner, id }));
    return slot?.state === 'serving' ? slot.device : null;
  }

  /** '' = of every owner. */
  list(owner: string): readonly ServedDevice[] {
    const found: ServedDevice[] = [];
    for (const slot of this.#slots.values()) {
      if (slot.state === 'serving' && (owner === '' || slot.device.request.owner === owner)) found.push(slot.device);
    }
    return found;
  }

  /** No new devices from now on. Closes those nobody holds, all of them when `force`. Resolves with how many are left;
   * `onEmpty` is called when the last one goes. */
  async drain(force: boolean, onEmpty: () => void): Promise<number> {
    this.#draining = true;
    this.#onEmpty = onEmpty;
    const keys = [...this.#slots.keys()];
    await Promise.allSettled(keys.map((key) => this.#detach(key, force)));
    this.#tellIfEmpty();
    return this.#slots.size;
  }

  async #open(key: string, request: DeviceRequest): Promise<ServedDevice> {
    if (this.#draining) {
      throw new SnapshotterError(ErrorKind.Unavailable, `device ${request.id}: blockd is shutting down`);
    }
    const opened = this.#native
      .attachDevice({
        configPath: request.configPath,
        readOnly: request.readOnly,
        directIo: this.#settings.directIo,
        sectorSizeBytes: request.sectorSizeBytes,
        threads: this.#settings.threads,
        name: `${this.#settings.namePrefix}${this.#opened++}`,
        runDir: this.#settings.runDir,
      })
      .then(
        (native): ServedDevice => ({ request, native }),
        (error: unknown) => {
          throw fromNative(`attach ${request.id}`, error);
        },
      );
    this.#slots.set(key, { state: 'opening', request, opened });
    try {
      const device = await opened;
      this.#slots.set(key, { state: 'serving', device });
      return device;
    } catch (error) {
      this.#slots.delete(key);
      this.#tellIfEmpty();
      throw error;
    }
  }

  async #close(key: string, device: ServedDevice, force: boolean): Promise<void> {
    const closed = device.native.stop(force);
    this.#slots.set(key, { state: 'closing', closed });
    // Whatever happens the slot leaves `closing`: those who wait for it look again as soon as `closed` settles.
    let ended = true;
    try {
      await closed;
    } catch (error) {
      // A device that still serves must stay visible; one that ended with data lost must not come back.
      ended = device.native.isStopped();
      throw fromNative(`detach ${device.request.id}`, error);
    } finally {
      if (ended) {
        this.#slots.delete(key);
        this.#tellIfEmpty();
      } else {
        this.#slots.set(key, { state: 'serving', device });
      }
    }
  }

  #tellIfEmpty(): void {
    if (this.#draining && this.#slots.size === 0) this.#onEmpty?.();
  }
}

function slotKey(device: { readonly owner: string; readonly id: string }): string {
  return JSON.stringify([device.owner, device.id]);
}

function sameRequest(a: DeviceRequest, b: DeviceRequest): boolean {
  return a.configPath === b.configPath && a.readOnly === b.readOnly && a.sectorSizeBytes === b.sectorSizeBytes;
}

async function settled(promise: Promise<unknown>): Promise<void> {
  await promise.then(
    () => undefined,
    () => undefined,
  );
}
