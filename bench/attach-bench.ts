/** How long attaching and detaching take: a config with many local layers to a device that can be opened, over blockd's
 * socket, and back. */
import { closeSync, mkdirSync, openSync, readSync } from 'node:fs';
import path from 'node:path';
import type { Workdir } from '../e2e/harness/workdir.ts';
import type { LowerEntry } from '../src/engine/engine.ts';
import type { RealEngine } from '../src/engine/real-engine.ts';
import type { Settings } from './settings.ts';
import { print, quantile, table } from './table.ts';

const kRepeats = 40;
const never = new AbortController().signal;

export async function benchAttach(work: Workdir, engine: RealEngine, settings: Settings) {
  const rows: string[][] = [];
  const all: Record<string, { attach: number[]; firstByte: number[]; detach: number[] }> = {};
  for (const depth of settings.depths) {
    const dir = path.join(work.path, `attach-${depth}`);
    const lowers: LowerEntry[] = [];
    const pairIn = (home: string) => ({ data: path.join(home, 'data'), index: path.join(home, 'index') });
    for (let layer = 0; layer < depth; layer++) {
      const home = path.join(dir, `${layer}`);
      mkdirSync(home, { recursive: true });
      const pair = pairIn(home);
      await engine.layers.createWritable({ ...pair, virtualSizeBytes: 1n << 30n, type: 'append' });
      const file = path.join(home, 'overlaybd.sealed');
      await engine.layers.seal(pair.data, pair.index, file);
      lowers.push({ file });
    }
    const upper = pairIn(dir);
    await engine.layers.createWritable({ ...upper, virtualSizeBytes: 1n << 30n, type: 'append' });
    const configPath = path.join(dir, 'config.v1.json');
    await engine.layers.writeImageConfig(configPath, {
      repoBlobUrl: '',
      lowers,
      upper,
      resultFile: path.join(dir, 'result'),
    });
    const id = `attach-${depth}`;
    work.defer(`detach ${id}`, () => engine.devices.detach(id));
    const times = { attach: [] as number[], firstByte: [] as number[], detach: [] as number[] };
    for (let i = 0; i < kRepeats; i++) {
      const begin = performance.now();
      const device = await engine.devices.attach({ id, configPath, readOnly: false, sectorSizeBytes: 4096 }, never);
      const attached = performance.now();
      readFirstByte(device.path);
      const read = performance.now();
      await engine.devices.detach(id);
      times.attach.push(attached - begin);
      times.firstByte.push(read - begin);
      times.detach.push(performance.now() - read);
    }
    all[String(depth)] = times;
    const ms = (values: readonly number[], q: number): string => quantile(values, q).toFixed(1);
    const cells = [times.attach, times.firstByte, times.detach].flatMap((values) => [
      ms(values, 0.5),
      ms(values, 0.95),
    ]);
    rows.push([`${depth} layers and an upper`, ...cells]);
  }
  print('\n### Attach, config to first byte, detach: ms\n');
  print(table(['image', 'attach p50', 'p95', 'first byte p50', 'p95', 'detach p50', 'p95'], rows));
  return all;
}

/** The benchmark is no daemon: it may wait for a device. */
function readFirstByte(device: string): void {
  const fd = openSync(device, 'r');
  try {
    readSync(fd, Buffer.alloc(4096), 0, 4096, 0);
  } finally {
    closeSync(fd);
  }
}
