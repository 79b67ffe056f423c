/** Devices of one store: up when asked for, once however many ask, and never a path that is not checked against the
 * block daemon and this boot. One line per device: a shared one is attached once for all who wait. */
import { ErrorKind, SnapshotterError, withContext } from '../base/errors.ts';
import type { AttachedDevice, Engine, FsDescriptor } from '../engine/engine.ts';
import type { DeviceEvent } from '../states/device-machine.ts';
import { type DeviceEffects, DeviceReality, type Journal, type LifeRecord } from '../states/effects.ts';
import { DeviceLifecycle } from '../states/lifecycle.ts';
import type { Layout } from '../store/layout.ts';
import type { DeviceRow, Store } from '../store/store.ts';
import type { WorkerConfig } from './config.ts';
import { KeyedQueue } from './keyed-queue.ts';
import { type DeviceFacts, isSharedDevice, ownerOfDevice, ownMount } from './mount-recipe.ts';

export interface DevicesNeed {
  readonly store: Store;
  readonly engine: Engine;
  readonly layout: Layout;
  readonly config: WorkerConfig;
}

/** `/proc`'s name of this boot. */
const bootIdPath = '/proc/sys/kernel/random/boot_id';

export class DevicePool {
  readonly #need: DevicesNeed;
  readonly #lines = new KeyedQueue();
  readonly #life: DeviceLifecycle;
  #bootId: string | null = null;

  constructor(need: DevicesNeed) {
    this.#need = need;
    this.#life = new DeviceLifecycle(this.#journal(), this.#effects());
  }

  async bootId(): Promise<string> {
    this.#bootId ??= ((await this.#need.engine.files.readFile(bootIdPath)) ?? 'unknown').trim();
    return this.#bootId;
  }

  /** The device is there when this returns. `signal` stops only the attach of a snapshot's own device: others may be
   * waiting for a shared one. */
  attached(id: string, signal: AbortSignal): Promise<DeviceFacts> {
    return this.#lines.run(id, () => this.#bringUp(id, false, signal));
  }

  /** … and mounted at its snapshot's mount point. */
  mounted(id: string, signal: AbortSignal): Promise<DeviceFacts> {
    return this.#lines.run(id, () => this.#bringUp(id, true, signal));
  }

  /** What the record says, unchecked. REQUIRES: it was brought up by the same verb. */
  known(id: string): DeviceFacts {
    const row = this.#need.store.device(id);
    if (row === null) throw new SnapshotterError(ErrorKind.Unavailable, `device ${id} went away`);
    return factsOf(row, this.#need.config.defaultFs);
  }

  /** Makes the file system of a new image. REQUIRES: attached, not mounted, nothing of value on it. */
  format(id: string): Promise<void> {
    return this.#lines.run(id, () => this.#step(id, 'FORMAT'));
  }

  /** Unmounts and detaches. FailedPrecondition while somebody else holds it: it then goes on as it was. */
  release(id: string): Promise<void> {
    return this.#lines.run(id, () => this.#takeDown(id));
  }

  /** Takes a device from clients that have it mounted beside us: its image is then as after an unmount, and their further
   * I/O fails. FailedPrecondition when a container, or somebody who did not mount it, holds it: those are never cut off. */
  sever(id: string): Promise<void> {
    return this.#lines.run(id, async () => {
      const reality = await this.#look(id);
      if (reality === DeviceReality.Absent) return this.#dropDeadMount(id);
      await this.#refuseStrangers(id, this.#mountPoint(id));
      // Freezing needs a mount of ours: it joins the super block of the clients'.
      if (reality === DeviceReality.Attached) await this.#step(id, 'MOUNT');
      await this.#step(id, 'SEVER');
    });
  }

  async #refuseStrangers(id: string, mountPoint: string): Promise<void> {
    const { engine } = this.#need;
    const device = await engine.devices.find(id);
    if (device === null) return;
    const mounted = await engine.mounts.isHeldElsewhere(device, mountPoint);
    if (mounted && !(await engine.mounts.isHeldInOtherNamespace(device, mountPoint))) return;
    throw new SnapshotterError(ErrorKind.FailedPrecondition, `device ${id} is still in use`);
  }

  /** Takes a shared device down when no snapshot but `except` stands on it. Busy is left alone. */
  releaseIfIdle(id: string, except: string): Promise<void> {
    return this.#lines.run(id, async () => {
      if (this.#need.store.usersOf(id).some((row) => row.id !== except)) return;
      try {
        await this.#takeDown(id);
      } catch (error) {
        if (!(error instanceof SnapshotterError) || error.kind !== ErrorKind.FailedPrecondition) throw error;
      }
    });
  }

  /** Whether somebody but our own mount holds the device of this id. */
  async isHeld(id: string): Promise<boolean> {
    if (this.#need.store.device(id) === null) return false;
    const device = await this.#need.engine.devices.find(id);
    if (device === null) return false;
    return this.#need.engine.mounts.isHeldElsewhere(device, this.#mountPoint(id));
  }

  /** Whether a container holds the device of this id. */
  async isHeldByContainer(id: string): Promise<boolean> {
    if (this.#need.store.device(id) === null) return false;
    const device = await this.#need.engine.devices.find(id);
    if (device === null) return false;
    return this.#need.engine.mounts.isHeldInOtherNamespace(device, this.#mountPoint(id));
  }

  /** Brings the record of a device in line with the world; a device that is gone is forgotten. */
  reconcile(id: string): Promise<void> {
    return this.#lines.run(id, async () => {
      const reality = await this.#look(id);
      if (reality === DeviceReality.Absent) await this.#dropDeadMount(id);
    });
  }

  async #bringUp(id: string, mount: boolean, signal: AbortSignal): Promise<DeviceFacts> {
    let reality = await this.#look(id);
    if (reality === DeviceReality.Absent) {
      await this.#step(id, 'ATTACH', isSharedDevice(id) ? undefined : signal);
      reality = DeviceReality.Attached;
    }
    if (mount && reality === DeviceReality.Attached) await this.#step(id, 'MOUNT');
    return this.known(id);
  }

  async #takeDown(id: string): Promise<void> {
    if (this.#need.store.device(id) === null) return;
    const reality = await this.#look(id);
    if (reality === DeviceReality.Absent) return this.#dropDeadMount(id);
    if (reality === DeviceReality.Mounted) await this.#step(id, 'UNMOUNT');
    await this.#step(id, 'DETACH');
  }

  /** What a dead device left at its mount point. A file system frozen for a device that is gone would hold its users for
   * ever, and itself in the kernel. */
  async #dropDeadMount(id: string): Promise<void> {
    const { mounts } = this.#need.engine;
    await mounts.thaw(this.#mountPoint(id));
    await mounts.unmount(this.#mountPoint(id));
    // Unknown = success: whoever answered "absent" a moment ago may have been a block daemon that was only just starting.
    await this.#need.engine.devices.detach(id);
  }

  /** Looks at the world; writes only when the record was wrong or a change was left open. */
  async #look(id: string): Promise<DeviceReality> {
    const row = this.#need.store.device(id);
    if (row === null) return DeviceReality.Absent;
    if (row.intent === null && row.bootId === (await this.bootId())) {
      const reality = await this.#inspect(id);
      if (reality === row.state) return reality;
    }
    // A predecessor may have died between freezing and thawing.
    if (row.intent === 'sever') await this.#need.engine.mounts.thaw(this.#mountPoint(id));
    await this.#step(id, 'RECOVER');
    const state = this.#need.store.device(id)?.state;
    return state === DeviceReality.Attached || state === DeviceReality.Mounted ? state : DeviceReality.Absent;
  }

  async #step(id: string, type: DeviceEvent['type'], signal?: AbortSignal): Promise<void> {
    const outcome = await this.#life.run(id, { type }, signal);
    if (outcome.error !== null) throw withContext(`${type.toLowerCase()} device ${id}`, outcome.error);
  }

  async #inspect(id: string): Promise<DeviceReality> {
    const { engine, store } = this.#need;
    const device = await engine.devices.find(id);
    if (device === null) return DeviceReality.Absent;
    const row = store.device(id);
    if (row !== null && (row.path !== device.path || row.major !== device.major || row.minor !== device.minor)) {
      store.putDevice({ ...row, path: device.path, major: device.major, minor: device.minor });
    }
    const mountPoint = this.#mountPoint(id);
    const found = (await engine.mounts.table()).some(
      (entry) => entry.mountPoint === mountPoint && entry.major === device.major && entry.minor === device.minor,
    );
    return found ? DeviceReality.Mounted : DeviceReality.Attached;
  }

  #effects(): DeviceEffects {
    const { engine, layout, store, config } = this.#need;
    return {
      attach: async (id, signal) => {
        const paths = layout.of(ownerOfDevice(id));
        const device = await engine.devices.attach(
          { id, configPath: paths.config, readOnly: isSharedDevice(id), sectorSizeBytes: config.sectorSizeBytes },
          signal,
        );
        signal.throwIfAborted();
        const fileSystem = await this.#fileSystemOn(id, device);
        const row = { ...this.#row(id), bootId: await this.bootId() };
        const { path, major, minor } = device;
        store.putDevice({ ...row, path, major, minor, fileSystem: JSON.stringify(fileSystem) });
        await engine.files.writeFile(paths.mark, path, 0o644);
      },
      format: async (id) => {
        const row = this.#row(id);
        const { fileSystem } = factsOf(row, config.defaultFs);
        await engine.mounts.format(row.path, fileSystem, this.#mountPoint(id));
      },
      mount: async (id) => {
        const row = this.#row(id);
        const target = this.#mountPoint(id);
        const stale = (await engine.mounts.table()).filter((entry) => entry.mountPoint === target);
        if (stale.some((entry) => entry.major !== row.major || entry.minor !== row.minor)) {
          await engine.mounts.unmount(target);
        }
        await engine.mounts.mount(ownMount(factsOf(row, config.defaultFs), isSharedDevice(id)), target);
      },
      unmount: (id) => engine.mounts.unmount(this.#mountPoint(id)),
      detach: (id) => engine.devices.detach(id),
      sever: async (id) => {
        const mountPoint = this.#mountPoint(id);
        await engine.mounts.freeze(mountPoint);
        try {
          await engine.devices.sever(id);
        } finally {
          await engine.mounts.thaw(mountPoint);
        }
        await engine.mounts.unmount(mountPoint);
      },
      inspect: (id) => this.#inspect(id),
    };
  }

  /** The descriptor of the image, unless its super block says that it is another file system. */
  async #fileSystemOn(id: string, device: AttachedDevice): Promise<FsDescriptor> {
    const { store, engine, config } = this.#need;
    const text = store.snapshot(ownerOfDevice(id))?.fileSystem ?? null;
    const told = text === null ? config.defaultFs : (JSON.parse(text) as FsDescriptor);
    const found = await engine.mounts.probeFileSystem(device.path);
    return found === null || found === told.type ? told : config.parseFs(found);
  }

  #journal(): Journal {
    const { store } = this.#need;
    return {
      read: (id): LifeRecord => store.device(id) ?? { state: 'absent', intent: null },
      intend: (id, intent) => store.putDevice({ ...this.#row(id), intent }),
      settle: (id, state, failure) => {
        if (state === DeviceReality.Absent) store.dropDevice(id);
        else {
          const row = this.#row(id);
          store.putDevice({ ...row, state, failure, intent: null, bootId: this.#bootId ?? row.bootId });
        }
      },
    };
  }

  #row(id: string): DeviceRow {
    return (
      this.#need.store.device(id) ?? {
        id,
        snapshotId: ownerOfDevice(id),
        state: DeviceReality.Absent,
        intent: null,
        failure: null,
        readOnly: isSharedDevice(id),
        bootId: this.#bootId ?? '',
        path: '',
        major: 0,
        minor: 0,
        fileSystem: null,
      }
    );
  }

  #mountPoint(id: string): string {
    return this.#need.layout.of(ownerOfDevice(id)).mountPoint;
  }
}

function factsOf(row: DeviceRow, fallback: FsDescriptor): DeviceFacts {
  const fileSystem = row.fileSystem === null ? fallback : (JSON.parse(row.fileSystem) as FsDescriptor);
  return { path: row.path, fileSystem };
}
