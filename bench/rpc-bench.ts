/** Prepare, Commit and Remove over gRPC: our snapshotter without devices, and containerd's own overlayfs snapshotter behind
 * containerd's socket, with a growing number of snapshots in store. */
import { Containerd } from '../e2e/harness/containerd.ts';
import { SnapshotsClient } from '../e2e/harness/rpc-client.ts';
import { Blockd, Snapshotter } from '../e2e/harness/snapshotter.ts';
import type { Workdir } from '../e2e/harness/workdir.ts';
import type { Settings } from './settings.ts';
import { print, quantile, table } from './table.ts';

const kRepeats = 100;
/** Calls under way while the store is filled. */
const kFillers = 8;
const kBase = 'bench-base';

type Verb = 'prepare' | 'mounts' | 'commit' | 'remove';
const kVerbs: readonly Verb[] = ['prepare', 'mounts', 'commit', 'remove'];
type Times = Record<Verb, number[]>;

interface Peer {
  readonly name: string;
  readonly client: SnapshotsClient;
  count: number;
}

export async function benchRpc(work: Workdir, settings: Settings) {
  const snapshotter = await Snapshotter.start(work, await Blockd.start(work), { rwMode: 'overlayfs' });
  const containerd = await Containerd.start(work, { plugins: [] });
  using ourClient = snapshotter.client();
  using theirClient = new SnapshotsClient(containerd.address, {
    snapshotter: 'overlayfs',
    headers: { 'containerd-namespace': containerd.namespace },
  });
  const peers: Peer[] = [
    { name: 'overlaybd-snapshotter', client: ourClient, count: 0 },
    { name: 'containerd overlayfs', client: theirClient, count: 0 },
  ];
  for (const { client } of peers) {
    await client.prepare('bench-base-key');
    await client.commit(kBase, 'bench-base-key', kKeep);
  }
  const rows: string[][] = [];
  const all: Record<string, Record<string, Times>> = {};
  for (const snapshots of settings.snapshots) {
    for (const peer of peers) await fill(peer, snapshots);
    const times = new Map<Peer, Times>(
      peers.map((peer) => [peer, { prepare: [], mounts: [], commit: [], remove: [] }]),
    );
    for (let i = 0; i < kRepeats; i++) {
      for (const peer of i % 2 === 0 ? peers : peers.toReversed())
        await once(peer, times.get(peer), `${snapshots}-${i}`);
    }
    for (const [peer, measured] of times) {
      const cells = kVerbs.flatMap((verb) => [0.5, 0.95].map((q) => quantile(measured[verb], q).toFixed(2)));
      rows.push([`${peer.name}, ${snapshots} snapshots`, ...cells]);
      all[peer.name] = { ...all[peer.name], [snapshots]: measured };
    }
  }
  print('\n### Calls without a device: ms\n');
  print(table(['service', ...kVerbs.flatMap((verb) => [`${verb} p50`, 'p95'])], rows));
  return all;
}

/** Keeps containerd's collector away from what nothing refers to. */
const kKeep = { 'containerd.io/gc.root': 'bench' };

async function fill(peer: Peer, snapshots: number): Promise<void> {
  process.stderr.write(`  rpc: fills ${peer.name} to ${snapshots}\n`);
  const filler = async (): Promise<void> => {
    while (peer.count < snapshots) {
      peer.count++;
      await peer.client.prepare(`bench-fill-${peer.count}`, kBase, kKeep);
    }
  };
  await Promise.all(Array.from({ length: kFillers }, filler));
}

async function once(peer: Peer, times: Times | undefined, name: string): Promise<void> {
  if (times === undefined) return;
  const timed = async (verb: Verb, call: () => Promise<unknown>): Promise<void> => {
    const begin = performance.now();
    await call();
    times[verb].push(performance.now() - begin);
  };
  const key = `bench-key-${name}`;
  await timed('prepare', () => peer.client.prepare(key, kBase, kKeep));
  await timed('mounts', () => peer.client.mounts(key));
  await timed('commit', () => peer.client.commit(`bench-name-${name}`, key, kKeep));
  await timed('remove', () => peer.client.remove(`bench-name-${name}`));
}
