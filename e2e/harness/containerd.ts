/** Debian's containerd with everything private: root, state, socket, namespace. It never meets the system's own. */
import { existsSync, readdirSync, rmdirSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { Daemon, type RunOptions, type RunResult, run, runAny } from './processes.ts';
import type { Workdir } from './workdir.ts';

export interface ProxyPlugin {
  /** Name of the snapshotter; clients know "overlaybd". */
  readonly name: string;
  /** Path of the plugin's socket. It need not exist yet. */
  readonly address: string;
}

export interface ContainerdOptions {
  readonly plugins: readonly ProxyPlugin[];
  /** The Kubernetes interface, off by default. `snapshotter` names its snapshotter; image references are handed down
   * as labels (snapshot annotations). */
  readonly cri?: { readonly snapshotter: string };
  /** Default: unique to the run, so that runtime files and cgroups outside the work directory are ours alone. */
  readonly namespace?: string;
}

export class Containerd {
  readonly address: string;
  readonly namespace: string;
  readonly root: string;
  readonly #work: Workdir;
  readonly #configPath: string;
  #daemon: Daemon | null = null;

  constructor(work: Workdir, options: ContainerdOptions) {
    this.#work = work;
    this.address = work.socket('containerd.sock');
    this.namespace = options.namespace ?? `obd-${work.tag}`;
    this.root = work.dir('containerd', 'root');
    this.#configPath = path.join(work.dir('containerd'), 'config.toml');
    writeFileSync(this.#configPath, this.#config(options));
  }

  static async start(work: Workdir, options: ContainerdOptions): Promise<Containerd> {
    const containerd = new Containerd(work, options);
    await containerd.start();
    return containerd;
  }

  get #tasksDir(): string {
    return this.#work.dir('containerd', 'state', 'io.containerd.runtime.v2.task');
  }

  get daemon(): Daemon {
    if (this.#daemon === null) throw new Error('containerd was not started');
    return this.#daemon;
  }

  /** Also after stop() or kill of the daemon: same root, same state, running containers are found again. */
  async start(): Promise<void> {
    this.#daemon = await Daemon.start(this.#work, {
      name: 'containerd',
      program: 'containerd',
      args: ['--config', this.#configPath],
    });
    // Shims outlive containerd on purpose; containers go first at the end of a run.
    this.#work.defer('delete containers', async () => {
      await this.deleteContainers();
      this.#removeRuncDirs();
    });
    await this.#daemon.ready('answers', async () => (await runAny('ctr', this.#args(['version']))).code === 0, {
      intervalMs: 50,
    });
  }

  async stop(): Promise<void> {
    await this.daemon.stop();
  }

  /** ctr against this containerd; returns what it printed. Errors: CommandError. */
  ctr(args: readonly string[], options: RunOptions & { readonly namespace?: string } = {}): Promise<string> {
    return run('ctr', this.#args(args, options.namespace), options);
  }

  /** The same, whatever the exit code. */
  ctrAny(args: readonly string[], options: RunOptions & { readonly namespace?: string } = {}): Promise<RunResult> {
    return runAny('ctr', this.#args(args, options.namespace), options);
  }

  /** Tasks by container id. */
  async tasks(): Promise<ReadonlyMap<string, { readonly pid: number; readonly status: string }>> {
    const lines = (await this.ctr(['tasks', 'ls'])).trim().split('\n').slice(1);
    return new Map(
      lines.map((line) => {
        const [id = '', pid = '0', status = ''] = line.trim().split(/\s+/);
        return [id, { pid: Number(pid), status }];
      }),
    );
  }

  /** Kills and deletes every task and container of every namespace; a containerd that ended is started for it if
   * tasks are left. */
  async deleteContainers(): Promise<void> {
    if (this.daemon.exit !== null) {
      if (this.bundles().length === 0) return;
      await this.start();
    }
    const namespaces = (await this.ctr(['namespaces', 'ls', '-q'])).split('\n').filter((line) => line !== '');
    for (const namespace of namespaces) {
      const list = async (what: string): Promise<readonly string[]> =>
        (await this.ctr([what, 'ls', '-q'], { namespace })).split('\n').filter((line) => line !== '');
      for (const id of await list('tasks')) await this.ctr(['tasks', 'rm', '--force', id], { namespace });
      for (const id of await list('containers')) await this.ctr(['containers', 'rm', id], { namespace });
    }
  }

  /** `<namespace>/<container>` of every task that was not deleted. */
  bundles(): readonly string[] {
    return readdirSync(this.#tasksDir).flatMap((namespace) =>
      readdirSync(path.join(this.#tasksDir, namespace)).map((id) => `${namespace}/${id}`),
    );
  }

  /** The runtime keeps a directory per namespace outside of containerd's own, and never removes it. */
  #removeRuncDirs(): void {
    for (const namespace of readdirSync(this.#tasksDir)) {
      const dir = path.join('/run/containerd/runc', namespace);
      // Not empty = a container is left: rmdir fails, and says so.
      if (existsSync(dir)) rmdirSync(dir);
    }
  }

  #args(args: readonly string[], namespace = this.namespace): readonly string[] {
    return ['--address', this.address, '--namespace', namespace, ...args];
  }

  #config(options: ContainerdOptions): string {
    const toml = JSON.stringify; // strings are written alike
    const unused = ['aufs', 'btrfs', 'devmapper', 'zfs'].map((name) => `io.containerd.snapshotter.v1.${name}`);
    const disabled = options.cri === undefined ? ['io.containerd.grpc.v1.cri', ...unused] : unused;
    const cri =
      options.cri === undefined
        ? ''
        : `[plugins."io.containerd.grpc.v1.cri"]
  disable_tcp_service = true
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = ${toml(options.cri.snapshotter)}
  disable_snapshot_annotations = false
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = ${toml(this.#work.dir('containerd', 'cni', 'bin'))}
  conf_dir = ${toml(this.#work.dir('containerd', 'cni', 'conf'))}
`;
    return `version = 2
root = ${toml(this.root)}
state = ${toml(this.#work.dir('containerd', 'state'))}
disabled_plugins = ${toml(disabled)}
[grpc]
  address = ${toml(this.address)}
[plugins."io.containerd.internal.v1.opt"]
  path = ${toml(this.#work.dir('containerd', 'opt'))}
${cri}${options.plugins
  .map(
    ({ name, address }) => `[proxy_plugins.${toml(name)}]
  type = "snapshot"
  address = ${toml(address)}
`,
  )
  .join('')}`;
  }
}
