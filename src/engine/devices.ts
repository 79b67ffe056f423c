/** Devices of one store, through blockd. A call that meets a dying blockd looks again once; calls are idempotent there. */
import { readFile, stat } from 'node:fs/promises';
import { ErrorKind, SnapshotterError } from '../base/errors.ts';
import type { Device } from '../gen/overlaybd/control/v1/blockd_pb.js';
import { fromConnect, isConnectionLost } from './connect-errors.ts';
import type { AttachedDevice, AttachRequest, Devices, ImageConfig } from './engine.ts';
import type { HostProcess } from './host-process.ts';
import { untilAborted } from './io-errors.ts';

export interface DeviceTimeouts {
  /** Opening 255 layers on a cold disk, then a loop device. */
  readonly attachMs: number;
  /** Detaching flushes what the kernel still holds. */
  readonly detachMs: number;
  readonly listMs: number;
}

export const kDeviceTimeouts: DeviceTimeouts = { attachMs: 60_000, detachMs: 60_000, listMs: 5_000 };

const kResultTextMaxChars = 4096;
const kTickMs = 10;

interface Flight {
  readonly request: AttachRequest;
  readonly done: Promise<AttachedDevice>;
}

export class BlockdDevices implements Devices {
  readonly #host: HostProcess;
  readonly #owner: string;
  readonly #timeouts: DeviceTimeouts;
  readonly #readConfig: (path: string) => Promise<ImageConfig>;
  /** Attaches under way by id: equal requests share one. */
  readonly #flights = new Map<string, Flight>();
  /** Per id, the end of its last call: attach and detach of one id never overlap. */
  readonly #tails = new Map<string, Promise<unknown>>();

  constructor(
    host: HostProcess,
    owner: string,
    readConfig: (path: string) => Promise<ImageConfig>,
    timeouts: DeviceTimeouts = kDeviceTimeouts,
  ) {
    this.#host = host;
    this.#owner = owner;
    this.#readConfig = readConfig;
    this.#timeouts = timeouts;
  }

  attach(request: AttachRequest, signal: AbortSignal): Promise<AttachedDevice> {
    const context = `attach device ${request.id}`;
    const shared = this.#flights.get(request.id);
    if (shared !== undefined && sameRequest(shared.request, request)) {
      return untilAborted(context, signal, shared.done);
    }
    if (signal.aborted) return Promise.reject(new SnapshotterError(ErrorKind.Cancelled, `${context}: cancelled`));
    const flight: Flight = { request, done: this.#inTurn(request.id, () => this.#attach(context, request)) };
    this.#flights.set(request.id, flight);
    const land = (): void => {
      if (this.#flights.get(request.id) === flight) this.#flights.delete(request.id);
    };
    flight.done.then(land, land);
    return untilAborted(context, signal, flight.done);
  }

  detach(id: string): Promise<void> {
    return this.#detach(id, false);
  }

  sever(id: string): Promise<void> {
    return this.#detach(id, true);
  }

  #detach(id: string, force: boolean): Promise<void> {
    // An attach that is asked for from now on must come after this, not join one that began before.
    this.#flights.delete(id);
    return this.#inTurn(id, async () => {
      const context = `detach device ${id}`;
      try {
        // No blockd, no devices: starting one to hear that would be absurd.
        if ((await this.#host.status()) === null) return;
        await this.#host.client.detach({ owner: this.#owner, id, force }, { timeoutMs: this.#timeouts.detachMs });
      } catch (error) {
        if (isConnectionLost(error) && (await this.#host.recheck()) === null) return;
        throw fromConnect(context, error);
      }
    });
  }

  async find(id: string): Promise<AttachedDevice | null> {
    return (await this.list()).find((entry) => entry.id === id)?.device ?? null;
  }

  async list(): Promise<readonly { readonly id: string; readonly device: AttachedDevice }[]> {
    try {
      if ((await this.#host.status()) === null) return [];
      try {
        return await this.#list();
      } catch (error) {
        if (!isConnectionLost(error)) throw error;
        return (await this.#host.recheck()) === null ? [] : await this.#list();
      }
    } catch (error) {
      throw fromConnect('list devices', error);
    }
  }

  async #list(): Promise<readonly { readonly id: string; readonly device: AttachedDevice }[]> {
    const { devices } = await this.#host.client.listDevices(
      { owner: this.#owner },
      { timeoutMs: this.#timeouts.listMs },
    );
    return devices
      .filter((device) => device.owner === this.#owner)
      .map((device) => ({ id: device.id, device: attachedDevice(device) }));
  }

  async #attach(context: string, request: AttachRequest): Promise<AttachedDevice> {
    const startedMs = Date.now();
    try {
      await this.#host.ensureRunning();
      try {
        return await this.#attachOnce(request);
      } catch (error) {
        if (!isConnectionLost(error)) throw error;
        await this.#host.recheck();
        await this.#host.ensureRunning();
        return await this.#attachOnce(request);
      }
    } catch (error) {
      const failure = fromConnect(context, error);
      const result = await this.#resultText(request.configPath, startedMs);
      if (result === null || failure.message.includes(result)) throw failure;
      throw new SnapshotterError(failure.kind, `${failure.message} (engine: ${result})`, { cause: error });
    }
  }

  async #attachOnce(request: AttachRequest): Promise<AttachedDevice> {
    const { device } = await this.#host.client.attach(
      {
        owner: this.#owner,
        id: request.id,
        configPath: request.configPath,
        sectorSizeBytes: request.sectorSizeBytes,
        readOnly: request.readOnly,
      },
      { timeoutMs: this.#timeouts.attachMs },
    );
    if (device === undefined) throw new SnapshotterError(ErrorKind.Internal, 'blockd answered without a device');
    return attachedDevice(device);
  }

  /** What the engine wrote about this failure to open the image; null = nothing to add. */
  async #resultText(configPath: string, startedMs: number): Promise<string | null> {
    try {
      const { resultFile } = await this.#readConfig(configPath);
      if (resultFile === '') return null;
      // An older text tells of an older failure. File times are as coarse as a kernel tick.
      if ((await stat(resultFile)).mtimeMs < startedMs - kTickMs) return null;
      const text = (await readFile(resultFile, 'utf8')).slice(0, kResultTextMaxChars).trim();
      return text.startsWith('failed:') ? text.slice('failed:'.length).trim() : null;
    } catch {
      return null; // the failure of the attach itself is what matters
    }
  }

  #inTurn<T>(id: string, work: () => Promise<T>): Promise<T> {
    const before = this.#tails.get(id) ?? Promise.resolve();
    const done = before.then(work, work);
    const tail = done.then(
      () => undefined,
      () => undefined,
    );
    this.#tails.set(id, tail);
    void tail.then(() => {
      if (this.#tails.get(id) === tail) this.#tails.delete(id);
    });
    return done;
  }
}

function sameRequest(a: AttachRequest, b: AttachRequest): boolean {
  return a.configPath === b.configPath && a.readOnly === b.readOnly && a.sectorSizeBytes === b.sectorSizeBytes;
}

function attachedDevice(device: Device): AttachedDevice {
  const { path, major, minor, sizeBytes, readOnly } = device;
  return { path, major, minor, sizeBytes, readOnly };
}
