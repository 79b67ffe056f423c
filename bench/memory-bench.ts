/** Resident memory of both daemons with a growing number of devices, made as containers make them: Prepare in dev mode. */
import { readFileSync } from 'node:fs';
import { Blockd, Snapshotter } from '../e2e/harness/snapshotter.ts';
import type { Workdir } from '../e2e/harness/workdir.ts';
import type { Settings } from './settings.ts';
import { print, table } from './table.ts';

export async function benchMemory(work: Workdir, settings: Settings) {
  const blockd = await Blockd.start(work);
  const snapshotter = await Snapshotter.start(work, blockd, { name: 'memory', rwMode: 'dev' });
  using client = snapshotter.client();
  await client.prepare('base-key');
  await client.commit('base', 'base-key', { 'containerd.io/snapshot/overlaybd.writable': 'dev' });
  const rows: string[][] = [];
  const all: Record<string, unknown>[] = [];
  let made = 0;
  for (const devices of settings.devices) {
    while (made < devices) await client.prepare(`device-${++made}`, 'base');
    const figures = { devices, snapshotter: memoryOf(snapshotter.daemon.pid), blockd: memoryOf(blockd.daemon.pid) };
    all.push(figures);
    rows.push([
      String(devices),
      ...[figures.snapshotter, figures.blockd].flatMap((kib) => [
        (kib.rss / 1024).toFixed(1),
        (kib.pss / 1024).toFixed(1),
      ]),
    ]);
  }
  for (let i = 1; i <= made; i++) await client.remove(`device-${i}`);
  await client.remove('base');
  await client.cleanup();
  print('\n### Resident memory: MiB\n');
  print(table(['devices', 'snapshotter RSS', 'PSS', 'blockd RSS', 'PSS'], rows));
  return all;
}

/** KiB. PSS counts pages shared with other processes (the node binary) by their share. */
function memoryOf(pid: number): { readonly rss: number; readonly pss: number } {
  const text = readFileSync(`/proc/${pid}/smaps_rollup`, 'utf8');
  const field = (name: string): number =>
    Number(new RegExp(`^${name}:\\s+(\\d+) kB$`, 'm').exec(text)?.[1] ?? Number.NaN);
  return { rss: field('Rss'), pss: field('Pss') };
}
