/** make bench: runs the parts that were asked for, prints tables, leaves nothing. */
import { writeFileSync } from 'node:fs';
import { cpus, release } from 'node:os';
import path from 'node:path';
import { Daemon } from '../e2e/harness/processes.ts';
import { accepts, binDir, isBuilt } from '../e2e/harness/snapshotter.ts';
import { Workdir } from '../e2e/harness/workdir.ts';
import { loadNative, nativePath } from '../src/engine/native.ts';
import { createEngine, type RealEngine } from '../src/engine/real-engine.ts';
import { benchAttach } from './attach-bench.ts';
import { benchDevices } from './device-bench.ts';
import { benchMemory } from './memory-bench.ts';
import { benchRpc } from './rpc-bench.ts';
import { type Settings, settingsOf } from './settings.ts';
import { print } from './table.ts';

async function startEngine(work: Workdir, { directIo, threads }: Settings): Promise<RealEngine> {
  const socketPath = work.socket('bench-blockd.sock');
  const tuning = [...(directIo ? ['--direct-io'] : []), ...(threads > 0 ? ['--threads', String(threads)] : [])];
  const daemon = await Daemon.start(work, {
    name: 'bench-blockd',
    program: path.join(binDir, 'overlaybd-blockd'),
    args: ['--socket', socketPath, '--run-dir', work.dir('bench-blockd'), '--log-level', 'warn', ...tuning],
  });
  await daemon.ready('accepts connections', () => accepts(socketPath));
  const native = loadNative(nativePath());
  const engine = createEngine({ native, owner: 'bench', blockd: { socketPath, spawn: null, version: native.version } });
  work.defer('let go of blockd', () => engine.close());
  return engine;
}

async function bench(settings: Settings): Promise<void> {
  print(`# overlaybd-worker benchmark\n\n${cpus().length} CPUs (${cpus()[0]?.model.trim()}), Linux ${release()}`);
  print(`${settings.rounds} rounds of ${settings.seconds} s, a disk of ${settings.sizeMiB} MiB`);
  const results: Record<string, unknown> = {};
  await using work = new Workdir('bench');
  const wants = (part: Settings['parts'][number]): boolean => settings.parts.includes(part);
  if (wants('devices') || wants('attach')) {
    const engine = await startEngine(work, settings);
    if (wants('attach')) results['attach'] = await benchAttach(work, engine, settings);
    for (const medium of wants('devices') ? settings.media : []) {
      results[`devices ${medium}`] = await benchDevices(work, engine, settings, medium);
    }
  }
  if (wants('memory')) {
    await using own = new Workdir('bench-memory');
    results['memory'] = await benchMemory(own, settings);
  }
  if (wants('rpc')) {
    await using own = new Workdir('bench-rpc');
    results['rpc'] = await benchRpc(own, settings);
  }
  if (settings.out !== null) writeFileSync(settings.out, `${JSON.stringify(results, null, 2)}\n`);
}

if (!isBuilt()) {
  process.stderr.write('bench: build first (make build)\n');
  process.exit(1);
}
await bench(settingsOf(process.env));
