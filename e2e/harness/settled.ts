/** The demand every run ends with: once all snapshots are removed, nothing of them is left anywhere. */
import { readdirSync } from 'node:fs';
import { request } from 'node:http';
import path from 'node:path';
import { mountsBelow } from './mounts.ts';
import { until } from './processes.ts';
import type { SnapshotsClient } from './rpc-client.ts';
import type { Snapshotter } from './snapshotter.ts';

export interface ServedDevice {
  readonly owner: string;
  readonly id: string;
  /** e.g. /dev/loop7 */
  readonly path: string;
  readonly configPath: string;
  readonly readOnly: boolean;
}

/** Any call of blockd's control service, as a person would make it with curl: JSON over its socket. */
export function controlCall(socket: string, method: string, body: object = {}): Promise<Record<string, unknown>> {
  const { promise, resolve, reject } = Promise.withResolvers<Record<string, unknown>>();
  const call = request(
    {
      socketPath: socket,
      path: `/overlaybd.control.v1.BlockDaemon/${method}`,
      method: 'POST',
      headers: { 'content-type': 'application/json', 'connect-protocol-version': '1' },
    },
    (response) => {
      const chunks: Buffer[] = [];
      response.on('data', (chunk: Buffer) => chunks.push(chunk));
      response.on('error', reject);
      response.on('end', () => {
        const text = Buffer.concat(chunks).toString();
        if (response.statusCode === 200) resolve(JSON.parse(text) as Record<string, unknown>);
        else reject(new Error(`${method}: HTTP ${response.statusCode}: ${text}`));
      });
    },
  );
  call.on('error', reject);
  call.end(JSON.stringify(body));
  return promise;
}

/** What blockd serves at this moment, of all stores. */
export async function servedDevices(socket: string): Promise<readonly ServedDevice[]> {
  const { devices = [] } = (await controlCall(socket, 'ListDevices')) as { devices?: readonly Partial<ServedDevice>[] };
  return devices.map(({ owner = '', id = '', path: node = '', configPath = '', readOnly = false }) => ({
    owner,
    id,
    path: node,
    configPath,
    readOnly,
  }));
}

/** Removes every snapshot, children first, then asks for Cleanup. */
export async function removeAll(client: SnapshotsClient): Promise<void> {
  for (;;) {
    const infos = await client.list();
    if (infos.length === 0) break;
    const parents = new Set(infos.map((info) => info.parent));
    for (const info of infos) if (!parents.has(info.name)) await client.remove(info.name);
  }
  await client.cleanup();
}

/** What of this store is still there: rows, directories, mounts, devices. */
export async function leftovers(snapshotter: Snapshotter, client: SnapshotsClient): Promise<readonly string[]> {
  const infos = await client.list();
  const devices = await servedDevices(snapshotter.blockd.address);
  return [
    ...infos.map((info) => `snapshot ${info.name}`),
    ...readdirSync(path.join(snapshotter.root, 'snapshots')).map((name) => `directory snapshots/${name}`),
    ...mountsBelow(snapshotter.root).map((line) => `mount ${line.mountPoint}`),
    ...devices
      .filter(({ configPath }) => configPath.startsWith(`${snapshotter.root}/`))
      .map(({ id, path: node }) => `device ${id} ${node}`),
  ];
}

/** Waits for the slow half of removals. Fails with a list of what stayed. */
export async function untilNothingIsLeft(snapshotter: Snapshotter, client: SnapshotsClient): Promise<void> {
  await until(
    `${snapshotter.name} is empty`,
    async () => {
      const left = await leftovers(snapshotter, client);
      if (left.length > 0) throw new Error(`left: ${left.slice(0, 20).join(', ')}`);
      return true;
    },
    { deadlineMs: 60_000 },
  );
}
