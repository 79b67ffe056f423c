/** The engine of the tests: a small world of directories, devices and mounts that behaves as the seam promises.
 * Faults it can inject: `failNext(call, error)` before or, with `after`, behind an effect, and
 * `failAt(n, error)` whichever call is the n-th; `hold(call)` keeps completions
 * back; `cutPowerAfter(n)` lets n effects happen and then fails everything, as for a killed daemon; `holdOpen(id)` is a
 * client that keeps a device busy; `restartBlockd()` and `reboot()` lose what those lose. Every call is recorded. */
import { ErrorKind, SnapshotterError } from '../base/errors.ts';
import type { Mount } from '../worker/worker.ts';
import type {
  AttachedDevice,
  AttachRequest,
  CreateWritable,
  Devices,
  DiskUsage,
  Engine,
  Files,
  FsDescriptor,
  ImageConfig,
  LayerInfo,
  Layers,
  MountEntry,
  Mounts,
} from './engine.ts';

interface WorldDevice extends AttachedDevice {
  readonly configPath: string;
  /** The data file that a writable one writes, else the config: what its file system lives in. */
  readonly content: string;
}

const writable = 'writable layer';
const sealed = 'sealed layer';

export class PowerCut extends Error {}

export class MemoryEngine implements Engine {
  /** `group.call argument`, in the order in which they began. */
  readonly calls: string[] = [];
  readonly #files = new Map<string, string>();
  readonly #dirs = new Map<string, { uid: number; gid: number }>();
  readonly #devices = new Map<string, WorldDevice>();
  /** File systems by what holds them: they outlive devices. */
  readonly #fileSystems = new Map<string, string>();
  /** By a container: in another mount namespace. */
  readonly #heldOpen = new Set<string>();
  readonly #frozen = new Set<string>();
  readonly #faults: { readonly call: string; readonly error: Error; readonly after: boolean }[] = [];
  readonly #holds = new Map<string, Promise<void>>();
  #failure: { readonly at: number; readonly error: Error; readonly after: boolean } | null = null;
  #mounts: MountEntry[] = [];
  #bootId = 1;
  #nextMinor = 0;
  #ticks = 0;
  #effectsLeft = Number.POSITIVE_INFINITY;

  failNext(call: string, error: Error, after = false): void {
    this.#faults.push({ call, error, after });
  }

  /** The n-th call from now (0 = the next one) fails, whichever it is. */
  failAt(n: number, error: Error, after = false): void {
    this.#failure = { at: this.calls.length + n, error, after };
  }

  /** Calls of this name wait until the returned function is called. */
  hold(call: string): () => void {
    const { promise, resolve } = Promise.withResolvers<void>();
    this.#holds.set(call, promise);
    return () => {
      this.#holds.delete(call);
      resolve();
    };
  }

  cutPowerAfter(effects: number): void {
    this.#effectsLeft = effects;
  }

  /** One step towards the power cut. A store under test counts its writes with it. */
  tick(): void {
    if (this.isDead) throw new PowerCut('the power is cut');
    this.#effectsLeft -= 1;
    this.#ticks += 1;
  }

  /** Steps since the beginning: what `cutPowerAfter` counts. */
  get ticks(): number {
    return this.#ticks;
  }

  get isDead(): boolean {
    return this.#effectsLeft <= 0;
  }

  restorePower(): void {
    this.#effectsLeft = Number.POSITIVE_INFINITY;
    this.#faults.length = 0;
    this.#failure = null;
  }

  /** Devices are gone; what was mounted from them stays in the table, dead. */
  restartBlockd(): void {
    this.#devices.clear();
  }

  reboot(): void {
    this.#devices.clear();
    this.#mounts = [];
    this.#heldOpen.clear();
    this.#bootId += 1;
    // Numbers are given out anew: the old path may be another disk now.
    this.#nextMinor += 3;
  }

  /** Mount points that somebody forgot to thaw. */
  get frozen(): readonly string[] {
    return [...this.#frozen].sort();
  }

  /** A client holds the device; the returned function lets go. */
  holdOpen(device: string): () => void {
    this.#heldOpen.add(device);
    return () => this.#heldOpen.delete(device);
  }

  /** A client mounts something somewhere. */
  addMount(entry: MountEntry): () => void {
    this.#mounts.push(entry);
    return () => {
      this.#mounts = this.#mounts.filter((other) => other !== entry);
    };
  }

  /** A client unmounts. */
  dropMount(mountPoint: string): void {
    this.#mounts = this.#mounts.filter((entry) => entry.mountPoint !== mountPoint);
    this.#frozen.delete(mountPoint);
  }

  /** A device that nobody recorded, as a crash between two steps leaves it. */
  addDevice(id: string): void {
    this.#attach({ id, configPath: '', readOnly: true, sectorSizeBytes: 4096 }, id);
  }

  addFile(path: string, text: string): void {
    this.#files.set(path, text);
  }

  /** A file that `inspect` takes for a sealed layer. */
  addLayer(path: string): void {
    this.#files.set(path, sealed);
  }

  addDir(path: string, owner = { uid: 0, gid: 0 }): void {
    this.#dirs.set(path, owner);
  }

  /** Everything that could have been leaked, sorted. */
  state(): {
    readonly paths: readonly string[];
    readonly devices: readonly string[];
    readonly mounts: readonly string[];
  } {
    return {
      paths: [...this.#files.keys(), ...this.#dirs.keys()].sort(),
      devices: [...this.#devices.keys()].sort(),
      mounts: this.#mounts.map(({ mountPoint }) => mountPoint).sort(),
    };
  }

  text(path: string): string | undefined {
    return this.#files.get(path);
  }

  readonly layers: Layers = {
    createWritable: (request: CreateWritable) =>
      this.#effect('layers.createWritable', request.data, () => {
        for (const path of [request.data, request.index]) {
          this.#needParent(path);
          if (!this.#files.has(path)) this.#files.set(path, writable);
        }
      }),
    seal: (data, index, target) =>
      this.#effect('layers.seal', data, () => {
        if (this.#files.get(target) === sealed) return;
        if (!this.#files.has(data) || !this.#files.has(index)) throw missing(data);
        for (const device of this.#devices.values()) {
          if (device.content === data) throw new Error(`sealed under a live device: ${data}`);
        }
        this.#files.set(target, sealed);
        this.#files.delete(data);
        const fileSystem = this.#fileSystems.get(data);
        if (fileSystem !== undefined) this.#fileSystems.set(target, fileSystem);
        this.#fileSystems.delete(data);
      }),
    adopt: (from, to) =>
      this.#effect('layers.adopt', from, () => {
        const text = this.#files.get(from) ?? this.#files.get(to);
        if (text === undefined) throw missing(from);
        const mounted = (path: string): boolean =>
          this.#mounts.some((entry) => path.startsWith(`${entry.mountPoint}/`));
        if (from.includes('/mountpoint/') && !mounted(from) && !this.#files.has(to)) throw missing(from);
        this.#files.set(to, text);
        this.#files.delete(from);
      }),
    inspect: (path): Promise<LayerInfo> =>
      this.#effect('layers.inspect', path, () => {
        const text = this.#files.get(path);
        if (text === undefined) throw missing(path);
        const kind = text === sealed ? 'lsmt-sealed' : text === writable ? 'lsmt-writable' : 'not-a-layer';
        return { kind, virtualSizeBytes: 1n << 30n, tar: false, zfile: false };
      }),
    writeImageConfig: (path, config) =>
      this.#effect('layers.writeImageConfig', path, () => {
        this.#needParent(path);
        this.#files.set(path, JSON.stringify(config));
      }),
    readImageConfig: (path) =>
      this.#effect('layers.readImageConfig', path, () => {
        const text = this.#files.get(path);
        if (text === undefined) throw missing(path);
        return JSON.parse(text) as ImageConfig;
      }),
  };

  readonly devices: Devices = {
    attach: async (request: AttachRequest, signal: AbortSignal) => {
      const attached = await this.#effect('devices.attach', request.id, () => {
        if (signal.aborted) throw new SnapshotterError(ErrorKind.Cancelled, 'attach: cancelled');
        const text = this.#files.get(request.configPath);
        if (text === undefined) throw missing(request.configPath);
        const { upper, lowers } = JSON.parse(text) as ImageConfig;
        if (!request.readOnly && upper === null) throw new Error(`writable attach of a read-only image ${request.id}`);
        const top = lowers.at(-1)?.dir;
        const below = top === undefined ? undefined : this.#fileSystems.get(`${top}/overlaybd.sealed`);
        const content = upper?.data ?? `${top}/overlaybd.sealed`;
        if (below !== undefined && !this.#fileSystems.has(content)) this.#fileSystems.set(content, below);
        return this.#attach(request, content);
      });
      return attached;
    },
    detach: (id) =>
      this.#effect('devices.detach', id, () => {
        const device = this.#devices.get(id);
        if (device === undefined) return;
        const mounted = this.#mounts.some(({ major, minor }) => major === device.major && minor === device.minor);
        if (this.#heldOpen.has(id) || mounted) {
          throw new SnapshotterError(ErrorKind.FailedPrecondition, `detach ${id}: it is in use`);
        }
        this.#devices.delete(id);
      }),
    sever: (id) =>
      this.#effect('devices.sever', id, () => {
        this.#devices.delete(id);
        this.#heldOpen.delete(id);
      }),
    find: (id) => this.#effect('devices.find', id, () => this.#devices.get(id) ?? null),
    list: () => this.#effect('devices.list', '', () => [...this.#devices].map(([id, device]) => ({ id, device }))),
  };

  readonly mounts: Mounts = {
    mount: (mount: Mount, target) =>
      this.#effect('mounts.mount', target, () => {
        const device = [...this.#devices.values()].find(({ path }) => path === mount.source);
        if (device === undefined) throw missing(mount.source);
        if (!this.#dirs.has(target)) throw missing(target);
        const found = this.#fileSystems.get(device.content);
        if (found !== mount.type) {
          throw new SnapshotterError(ErrorKind.InvalidArgument, `mount ${mount.source}: ${found} is no ${mount.type}`);
        }
        if (device.readOnly && !mount.options.includes('ro')) throw new Error(`rw mount of read-only ${mount.source}`);
        if (this.#mounts.some((entry) => entry.mountPoint === target && entry.minor === device.minor)) return;
        const { major, minor } = device;
        const { type: fsType, source, options } = mount;
        this.#mounts.push({ mountPoint: target, source, fsType, major, minor, options });
      }),
    unmount: (target) =>
      this.#effect('mounts.unmount', target, () => {
        this.#mounts = this.#mounts.filter(({ mountPoint }) => mountPoint !== target);
      }),
    table: () => this.#effect('mounts.table', '', () => [...this.#mounts]),
    isHeldElsewhere: (device, except) =>
      this.#effect('mounts.isHeldElsewhere', except, () => {
        const [id] = [...this.#devices].find(([, { minor }]) => minor === device.minor) ?? [''];
        const elsewhere = this.#mounts.some(
          (entry) => entry.major === device.major && entry.minor === device.minor && entry.mountPoint !== except,
        );
        return this.#heldOpen.has(id) || elsewhere;
      }),
    isHeldInOtherNamespace: (device) =>
      this.#effect('mounts.isHeldInOtherNamespace', '', () => {
        const [id] = [...this.#devices].find(([, { minor }]) => minor === device.minor) ?? [''];
        return this.#heldOpen.has(id);
      }),
    freeze: (target) =>
      this.#effect('mounts.freeze', target, () => {
        if (!this.#mounts.some(({ mountPoint }) => mountPoint === target)) throw missing(target);
        this.#frozen.add(target);
      }),
    thaw: (target) => this.#effect('mounts.thaw', target, () => void this.#frozen.delete(target)),
    format: (path, fs: FsDescriptor) =>
      this.#effect('mounts.format', fs.type, () => {
        const device = [...this.#devices.values()].find((each) => each.path === path);
        if (device === undefined) throw missing(path);
        if (device.readOnly) throw new Error(`mkfs of read-only ${path}`);
        if (this.#fileSystems.has(device.content)) throw new Error(`mkfs over a file system: ${path}`);
        this.#fileSystems.set(device.content, fs.type);
      }),
    probeFileSystem: (path) =>
      this.#effect('mounts.probeFileSystem', path, () => {
        const device = [...this.#devices.values()].find((each) => each.path === path);
        return device === undefined ? null : (this.#fileSystems.get(device.content) ?? null);
      }),
  };

  readonly files: Files = {
    makeSnapshotDir: (dir, { work, owner }) =>
      this.#effect('files.makeSnapshotDir', dir, () => {
        const names = ['', '/fs', '/block', '/block/mountpoint', ...(work ? ['/work'] : [])];
        for (const name of names) if (!this.#dirs.has(dir + name)) this.#dirs.set(dir + name, { uid: 0, gid: 0 });
        if (owner !== null) this.#dirs.set(`${dir}/fs`, owner);
        this.#files.set(`${dir}/block/init-debug.log`, '');
      }),
    removeTree: (dir) =>
      this.#effect('files.removeTree', dir, () => {
        const inside = (path: string): boolean => path === dir || path.startsWith(`${dir}/`);
        if (this.#mounts.some(({ mountPoint }) => inside(mountPoint))) {
          throw new SnapshotterError(ErrorKind.FailedPrecondition, `remove ${dir}: something is mounted in it`);
        }
        for (const path of [...this.#files.keys()].filter(inside)) {
          this.#files.delete(path);
          this.#fileSystems.delete(path);
        }
        for (const path of [...this.#dirs.keys()].filter(inside)) this.#dirs.delete(path);
      }),
    diskUsage: (dir, skip): Promise<DiskUsage> =>
      this.#effect('files.diskUsage', dir, () => {
        const skipped = (path: string): boolean => skip.some((name) => path.startsWith(`${dir}/${name}`));
        const inside = (path: string): boolean => (path === dir || path.startsWith(`${dir}/`)) && !skipped(path);
        const files = [...this.#files].filter(([path]) => inside(path));
        const dirs = [...this.#dirs.keys()].filter(inside);
        const bytes = files.reduce((sum, [, text]) => sum + Math.ceil(text.length / 512) * 512, 0);
        return { sizeBytes: BigInt(bytes + dirs.length * 4096), inodes: BigInt(files.length + dirs.length) };
      }),
    listDirs: (dir) =>
      this.#effect('files.listDirs', dir, () => {
        const names = [...this.#dirs.keys()]
          .filter((path) => path.startsWith(`${dir}/`))
          .map((path) => path.slice(dir.length + 1).split('/')[0] ?? '');
        return [...new Set(names)].sort();
      }),
    makeDir: (dir) =>
      this.#effect('files.makeDir', dir, () => {
        if (!this.#dirs.has(dir)) this.#dirs.set(dir, { uid: 0, gid: 0 });
      }),
    removeFile: (path) =>
      this.#effect('files.removeFile', path, () => {
        this.#files.delete(path);
        this.#fileSystems.delete(path);
      }),
    exists: (path) => this.#effect('files.exists', path, () => this.#files.has(path) || this.#dirs.has(path)),
    owner: (path) =>
      this.#effect('files.owner', path, () => {
        const owner = this.#dirs.get(path);
        if (owner === undefined) throw missing(path);
        return owner;
      }),
    writeFile: (path, text) =>
      this.#effect('files.writeFile', path, () => {
        this.#needParent(path);
        this.#files.set(path, text);
      }),
    readFile: (path) =>
      this.#effect('files.readFile', path, () =>
        path === '/proc/sys/kernel/random/boot_id' ? `boot-${this.#bootId}\n` : (this.#files.get(path) ?? null),
      ),
  };

  #attach(request: AttachRequest, content: string): AttachedDevice {
    const before = this.#devices.get(request.id);
    if (before !== undefined) return before;
    const minor = this.#nextMinor;
    this.#nextMinor += 1;
    const device: WorldDevice = {
      path: `/dev/loop${minor}`,
      major: 7,
      minor,
      sizeBytes: 1n << 30n,
      readOnly: request.readOnly,
      configPath: request.configPath,
      content,
    };
    this.#devices.set(request.id, device);
    return device;
  }

  #needParent(path: string): void {
    const parent = path.slice(0, path.lastIndexOf('/'));
    if (!this.#dirs.has(parent)) throw missing(parent);
  }

  async #effect<T>(call: string, argument: string, act: () => T): Promise<T> {
    this.tick();
    const isNth = this.#failure?.at === this.calls.length;
    this.calls.push(argument === '' ? call : `${call} ${argument}`);
    // Always asynchronous, as the real one is.
    await Promise.resolve();
    await this.#holds.get(call);
    const fault = this.#faults.findIndex((each) => each.call === call);
    const found = isNth ? (this.#failure ?? undefined) : fault < 0 ? undefined : this.#faults.splice(fault, 1)[0];
    if (isNth) this.#failure = null;
    if (found !== undefined && !found.after) throw found.error;
    const result = act();
    if (found !== undefined) throw found.error;
    // Not heard by a daemon that died meanwhile.
    if (this.isDead) throw new PowerCut('the power is cut');
    return result;
  }
}

const missing = (path: string): SnapshotterError =>
  new SnapshotterError(ErrorKind.NotFound, `${path}: no such file or directory`);
